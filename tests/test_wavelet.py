"""One level of the transform against PyWavelets, the published numbers, and its own properties."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from cwdm.wavelet import BANDS, dwt3, filters, idwt3

WAVELETS = {"haar": 2, "db2": 4, "coif1": 6, "sym4": 8}
even = st.integers(4, 7).map(lambda n: 2 * n)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), even, even, even)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(shapes, st.sampled_from(sorted(WAVELETS)))
@settings(deadline=None, max_examples=25)
def test_every_band_equals_that_of_pywavelets(shape, wavelet):
    x = random(shape)
    y = dwt3(x, wavelet).unflatten(1, (shape[1], 8))
    expected = pywt.dwtn(x.numpy(), wavelet, mode="periodization", axes=(2, 3, 4))
    for b, band in enumerate(BANDS):
        name = band.replace("l", "a").replace("h", "d")
        assert_close(y[:, :, b], torch.from_numpy(expected[name]), rtol=0, atol=1e-12)


@given(shapes, st.integers(0, 100), st.sampled_from(sorted(WAVELETS)))
@settings(deadline=None, max_examples=25)
def test_inverse_is_exact_and_energy_is_kept(shape, seed, wavelet):
    x = random(shape, seed)
    y = dwt3(x, wavelet)
    assert_close(idwt3(y, wavelet), x, rtol=0, atol=1e-11)
    assert_close(y.square().sum(), x.square().sum())


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_inverse_is_the_transpose(wavelet):
    x, y = random((2, 1, 8, 10, 8)), random((2, 8, 4, 5, 4), 1)
    forward, backward = (dwt3(x, wavelet) * y).sum(), (x * idwt3(y, wavelet)).sum()
    assert_close(forward, backward, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal_and_halve_the_constant(wavelet):
    bank = filters(wavelet)
    assert bank.shape == (2, WAVELETS[wavelet])
    for shift in range(0, WAVELETS[wavelet], 2):
        overlap = bank[:, shift:] @ bank[:, : WAVELETS[wavelet] - shift].T
        wanted = torch.eye(2).double() if shift == 0 else torch.zeros(2, 2).double()
        assert_close(overlap, wanted, rtol=0, atol=1e-9)
    assert_close(bank.sum(dim=1), torch.tensor([2**0.5, 0]).double(), rtol=0, atol=1e-7)


def test_transform_equals_the_published_one(golden):
    numbers = {k: torch.from_numpy(v) for k, v in golden("dwt").items() if v.dtype == np.float32}
    sizes = [name.removeprefix("x_") for name in numbers if name.startswith("x_")]
    assert sizes == ["16", "16x24x8", "8x16x24", "24x16x8"]
    for size in sizes:
        x = numbers[f"x_{size}"]
        assert_close(dwt3(x), numbers[f"bands_{size}"], rtol=0, atol=2e-6)
        if f"idwt_{size}" in numbers:
            assert_close(idwt3(numbers[f"c_{size}"]), numbers[f"idwt_{size}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 4, 4), (1, 4, 4, 4)])
def test_odd_and_flat_shapes_are_refused(shape, wavelet):
    with pytest.raises(ValueError, match="even"):
        dwt3(torch.zeros(shape), wavelet)
    with pytest.raises(ValueError, match="8"):
        idwt3(torch.zeros(1, 7, 4, 4, 4), wavelet)
    with pytest.raises(ValueError, match="8"):
        idwt3(torch.zeros(8, 4, 4, 4), wavelet)


@pytest.mark.parametrize("wavelet", ["db2", "coif1", "sym4"])
def test_a_volume_smaller_than_the_filter_is_refused(wavelet):
    n = WAVELETS[wavelet]
    assert dwt3(torch.zeros(1, 1, n, n, n), wavelet).shape == (1, 8, n // 2, n // 2, n // 2)
    with pytest.raises(ValueError, match="smaller than the filter"):
        dwt3(torch.zeros(1, 1, n, n - 2, n), wavelet)
    with pytest.raises(ValueError, match="smaller than the filter"):
        idwt3(torch.zeros(1, 8, n // 2, n // 2, n // 2 - 1), wavelet)
