"""Images as channels: against PyWavelets and the published numbers, exact inverse, mistakes."""

import sys

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from cwdm.coefficients import LLL_SCALE, Transform
from cwdm.config import Config
from cwdm.errors import InputError
from cwdm.wavelet import BANDS, dwt3, filters

WAVELETS = ("haar", "db2", "coif1", "sym4")
LENGTHS = {"identity": 2, "haar": 2, "db2": 4, "coif1": 6, "sym4": 8}


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def images(draw):
    """A transform and an image it can take: the last level is no shorter than the filter."""
    wavelet, levels = draw(st.sampled_from(sorted(LENGTHS))), draw(st.integers(1, 3))
    half = LENGTHS[wavelet] // 2
    sides = st.integers(half, half + (3 if levels < 3 else 0)).map(lambda n: n * 2**levels)
    x = random((draw(st.integers(1, 2)), draw(st.integers(1, 2)), *(draw(sides) for _ in "xyz")))
    return wavelet, levels, x


def packet(x, wavelet, levels):
    """PyWavelets, every band split again: (..., X, Y, Z) -> list of 8**levels bands."""
    if levels == 0:
        return [x]
    bands = pywt.dwtn(x, wavelet, mode="periodization", axes=(-3, -2, -1))
    ordered = [bands[name.replace("l", "a").replace("h", "d")] for name in BANDS]
    return [part for band in ordered for part in packet(band, wavelet, levels - 1)]


@given(images(), st.floats(0.1, 10), st.floats(0.1, 10))
@settings(deadline=None, max_examples=25)
def test_decode_undoes_encode(image, lll_scale, scale):
    wavelet, levels, x = image
    transform = Transform(wavelet=wavelet, levels=levels, lll_scale=lll_scale, scale=scale)
    y = transform.encode(x)
    assert y.shape[1] == x.shape[1] * transform.channels
    assert list(y.shape[2:]) == [n // transform.factor for n in x.shape[2:]]
    assert_close(transform.decode(y), x, rtol=0, atol=1e-9)


@given(images())
@settings(deadline=None, max_examples=25)
def test_energy_and_angles_are_kept_where_nothing_is_divided(image):
    wavelet, levels, x = image
    transform = Transform(wavelet=wavelet, levels=levels, lll_scale=1)
    other = random(x.shape, 1)
    y, other_y = transform.encode(x), transform.encode(other)
    assert_close(y.square().sum(), x.square().sum())
    angle = (y * other_y).sum() / (y.norm() * other_y.norm())
    assert_close(angle, (x * other).sum() / (x.norm() * other.norm()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_band_equals_that_of_pywavelets(wavelet, levels):
    n = LENGTHS[wavelet] // 2 * 2**levels
    x = random((1, 2, n, n + 2**levels, n + 2 * 2**levels))
    y = Transform(wavelet=wavelet, levels=levels, lll_scale=1).encode(x).unflatten(1, (2, -1))
    expected = packet(x.numpy(), wavelet, levels)
    assert y.shape[2] == len(expected) == 8**levels
    for index, band in enumerate(expected):
        assert_close(y[:, :, index], torch.from_numpy(band), rtol=0, atol=1e-12)


def test_published_scaling(golden):
    numbers = {k: torch.from_numpy(v) for k, v in golden("dwt").items() if v.dtype == np.float32}
    transform = Transform()
    for size in ("16", "16x24x8", "8x16x24", "24x16x8"):
        coefficients = transform.encode(numbers[f"x_{size}"])
        assert_close(coefficients, numbers[f"coef_{size}"], rtol=0, atol=2e-6)
        if f"idwt_{size}" in numbers:
            volume = transform.decode(numbers[f"c_{size}"])
            assert_close(volume, numbers[f"idwt3_{size}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("levels", [1, 2])
def test_scaling_of_fastwdm3d_keeps_the_range_of_the_image(levels):
    transform = Transform(levels=levels, scale=8**0.5, lll_scale=1)
    x = random((1, 1, 8, 12, 16))
    y = transform.encode(x)
    assert_close(y[:, :1], F.avg_pool3d(x, 2**levels))
    assert_close(y, Transform(levels=levels, lll_scale=1).encode(x) / 8 ** (levels / 2))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_scale_of_the_lowest_band_counts_once_per_level(levels):
    y = Transform(levels=levels).encode(torch.ones(1, 2, 8, 8, 8))
    lowest = y[:, :: 8**levels]
    assert_close(lowest, torch.full_like(lowest, (8**0.5 / LLL_SCALE) ** levels))
    assert y[:, 1 : 8**levels].abs().max() < 1e-6


def test_identity_changes_nothing():
    x = random((2, 3, 3, 5, 7))
    transform = Transform(wavelet="identity", levels=2)
    assert (transform.channels, transform.factor) == (1, 1)
    assert torch.equal(transform.encode(x), x)
    assert torch.equal(transform.decode(x), x)
    assert torch.equal(transform.clamp(x, -0.5, 0.25), x.clamp(-0.5, 0.25))


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_clamping_acts_on_the_image(wavelet):
    transform = Transform(wavelet=wavelet)
    c = transform.encode(random((1, 1, 8, 8, 10)))
    clamped = transform.decode(transform.clamp(c, -0.5, 0.25))
    assert_close(clamped, transform.decode(c).clamp(-0.5, 0.25))
    assert not torch.allclose(clamped, transform.decode(c))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"wavelet": "haaar"}, "'haaar' is not a wavelet"),
        ({"wavelet": "bior2.2"}, "'bior2.2' is not orthogonal"),
        ({"wavelet": "gaus1"}, "'gaus1' is not a wavelet"),  # continuous
        ({"levels": 0}, "levels must lie within 1..3, got 0"),
        ({"levels": 4}, "levels must lie within 1..3, got 4"),
    ],
)
def test_a_transform_that_does_not_exist_is_one_clear_error(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Transform(**settings)
    values = {"name": "x", "target": "t2f", "transform": settings}
    with pytest.raises(InputError, match=rf"^mine\.toml: transform: .*{reason}") as caught:
        Config.parse(values, "mine.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wavelet", "levels", "shape", "reason"),
    [
        ("haar", 1, (3, 4, 4), "even"),
        ("haar", 2, (6, 8, 8), "even"),
        ("db2", 1, (8, 8, 5), "even"),
        ("db2", 1, (8, 8, 2), "smaller than the filter"),
        ("sym4", 1, (8, 6, 8), r"smaller than the filter \(8\)"),
        ("sym4", 2, (16, 16, 8), "smaller than the filter"),
    ],
)
def test_images_that_cannot_be_halved_are_refused(wavelet, levels, shape, reason):
    with pytest.raises(ValueError, match=reason):
        Transform(wavelet=wavelet, levels=levels).encode(torch.zeros(1, 1, *shape))


def test_coefficients_of_a_volume_smaller_than_the_filter_are_refused():
    with pytest.raises(ValueError, match="smaller than the filter"):
        Transform(wavelet="sym4").decode(torch.zeros(1, 8, 4, 4, 3))


def test_only_haar_does_without_pywavelets(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    filters.cache_clear()
    assert dwt3(torch.ones(1, 1, 2, 2, 2)).shape == (1, 8, 1, 1, 1)
    with pytest.raises(InputError, match=r"'db2' needs PyWavelets: pip install 'cwdm\[wavelets\]'"):
        filters("db2")


def test_half_precision_stays_half_precision():
    for wavelet in ("haar", "db2"):
        transform = Transform(wavelet=wavelet)
        y = transform.encode(torch.ones(1, 1, 8, 8, 8, dtype=torch.bfloat16))
        assert y.dtype == transform.decode(y).dtype == torch.bfloat16
