"""The Haar transform against PyWavelets, the published numbers, and its own properties."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from cwdm.coefficients import LLL_SCALE, clamp_image, decode, encode
from cwdm.wavelet import BANDS, dwt3, idwt3

even = st.integers(1, 5).map(lambda n: 2 * n)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), even, even, even)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(shapes)
@settings(deadline=None, max_examples=25)
def test_every_band_equals_that_of_pywavelets(shape):
    x = random(shape)
    y = dwt3(x).unflatten(1, (shape[1], 8))
    expected = pywt.dwtn(x.numpy(), "haar", axes=(2, 3, 4))
    for b, band in enumerate(BANDS):
        name = band.replace("l", "a").replace("h", "d")
        assert_close(y[:, :, b], torch.from_numpy(expected[name]), rtol=0, atol=1e-12)


@given(shapes, st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_inverse_is_exact_and_energy_is_kept(shape, seed):
    x = random(shape, seed)
    y = dwt3(x)
    assert_close(idwt3(y), x, rtol=0, atol=1e-12)
    assert_close(y.square().sum(), x.square().sum())
    assert_close(decode(encode(x)), x, rtol=0, atol=1e-12)


def test_transform_equals_the_published_one(golden):
    numbers = {k: torch.from_numpy(v) for k, v in golden("dwt").items() if v.dtype == np.float32}
    sizes = [name.removeprefix("x_") for name in numbers if name.startswith("x_")]
    assert sizes == ["16", "16x24x8", "8x16x24", "24x16x8"]
    for size in sizes:
        x = numbers[f"x_{size}"]
        assert_close(dwt3(x), numbers[f"bands_{size}"], rtol=0, atol=2e-6)
        assert_close(encode(x), numbers[f"coef_{size}"], rtol=0, atol=2e-6)
        if f"idwt_{size}" in numbers:
            c = numbers[f"c_{size}"]
            assert_close(idwt3(c), numbers[f"idwt_{size}"], rtol=0, atol=2e-6)
            assert_close(decode(c), numbers[f"idwt3_{size}"], rtol=0, atol=2e-6)


def test_constant_image_is_one_lll_value():
    y = encode(torch.ones(1, 2, 4, 4, 4))
    assert_close(y[:, ::8], torch.full((1, 2, 2, 2, 2), 8**0.5 / LLL_SCALE))
    assert y[:, 1:8].abs().max() < 1e-6


def test_clamping_acts_on_the_image():
    c = encode(random((1, 1, 4, 4, 4)))
    assert_close(decode(clamp_image(c, -0.5, 0.25)), decode(c).clamp(-0.5, 0.25))


@pytest.mark.parametrize("shape", [(1, 1, 3, 4, 4), (1, 4, 4, 4)])
def test_odd_and_flat_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="even"):
        dwt3(torch.zeros(shape))
    with pytest.raises(ValueError, match="8"):
        idwt3(torch.zeros(1, 7, 2, 2, 2))
