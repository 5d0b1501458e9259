"""Measures of spoilt images against closed forms."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from cwdm import spoilt
from cwdm.spoilt import Brain

SHAPE = (60, 64, 56)
EVERYWHERE = np.ones(SHAPE, dtype=bool)
UNIT = np.ones(3)


def brain(values: NDArray[np.floating], spacing: NDArray[np.float64] = UNIT) -> Brain:
    return Brain.of(values.astype(np.float32), np.ones(values.shape, dtype=bool), spacing)


@pytest.fixture(scope="module")
def white() -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(size=SHAPE)


@pytest.fixture(scope="module")
def edges() -> NDArray[np.floating]:
    """Boxes of tissue, without noise."""
    coarse = np.random.default_rng(1).normal(size=(10, 11, 10))
    return np.kron(coarse, np.ones((6, 6, 6)))[tuple(map(slice, SHAPE))]


def test_98_percent_of_a_brain_are_between_0_and_1(white: NDArray[np.float64]) -> None:
    values = brain(100 + 7 * white).values
    assert (values.min(), values.max()) == (0, 1)
    assert (values == 0).mean() == pytest.approx(0.01, abs=1e-4)
    assert (values == 1).mean() == pytest.approx(0.01, abs=1e-4)


def test_fine_voxels_are_averaged_to_a_millimeter() -> None:
    ramp = np.broadcast_to(np.arange(60.0)[:, None, None], (60, 31, 20))
    averaged = brain(ramp, np.array([0.5, 0.5, 1.0]))
    assert averaged.values.shape == (30, 15, 20)
    inner = averaged.values[2:-2, 0, 0]
    assert np.ptp(np.diff(inner)) < 1e-6


def test_nothing_but_noise_is_noise_of_100_percent(white: NDArray[np.float64]) -> None:
    assert spoilt.noise(brain(white)) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_noise_is_told_from_tissue(
    white: NDArray[np.float64], edges: NDArray[np.floating], share: float
) -> None:
    tissue = edges / edges.std()
    lower, upper = np.quantile(tissue + share * white, [0.25, 0.75])
    expected = share / ((upper - lower) / 1.349)
    assert spoilt.noise(brain(tissue + share * white)) == pytest.approx(expected, rel=0.05)


def test_detail_of_white_noise_is_3(white: NDArray[np.float64]) -> None:
    assert spoilt.detail(brain(white)) == pytest.approx((3, 3, 3), rel=0.02)


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_detail_of_blurred_noise_is_that_of_its_correlation(
    white: NDArray[np.float64], sigma: float
) -> None:
    one, two = (np.exp(-((lag / sigma) ** 2) / 4) for lag in (1, 2))
    expected = (6 - 8 * one + 2 * two) / (2 - 2 * one)
    x, y, z = spoilt.detail(brain(ndimage.gaussian_filter1d(white, sigma, axis=1)))
    assert y == pytest.approx(expected, rel=0.1)
    assert x == pytest.approx(3, rel=0.05)
    assert z == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [15, 21])
def test_an_echo_is_found_where_it_is(white: NDArray[np.float64], axis: int, lag: int) -> None:
    tissue = ndimage.gaussian_filter(white, 1)
    clean = spoilt.echo(brain(tissue), range(3))
    found = spoilt.echo(brain(tissue + 0.4 * np.roll(tissue, lag, axis)), range(3))
    assert found.axis == axis
    assert abs(found.lag - lag) <= 1
    assert found.strength > 5 * clean.strength
    others = [each for each in range(3) if each != axis]
    assert spoilt.echo(brain(tissue + 0.4 * np.roll(tissue, lag, axis)), others).axis != axis


def test_texture_is_the_share_of_roughness_where_the_others_are_smooth(
    white: NDArray[np.float64],
) -> None:
    noises = np.random.default_rng(3).normal(size=(3, *SHAPE))
    depth = np.where(np.arange(SHAPE[0]) < SHAPE[0] // 2, 0.25, 1)[:, None, None]
    images = [brain(depth * each) for each in noises]
    assert spoilt.texture(images) == pytest.approx([0.25] * 3, rel=0.1)
    flat, *others = spoilt.texture([brain(white), *images[1:]])
    assert flat == pytest.approx(1, rel=0.1)
    assert others == pytest.approx([0.25] * 2, rel=0.2)


def test_gaps_are_slices_between_others() -> None:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[10:50, 10:50, 10:50] = True
    assert spoilt.gaps(mask) == 0
    mask[:, 20:23] = False
    mask[30] = False
    assert spoilt.gaps(mask) == 4


@pytest.mark.parametrize(("missing", "found"), [(0, 0), (8, 0), (9, 9), (20, 20)])
def test_what_is_cut_off_is_measured_but_for_a_rim(missing: int, found: int) -> None:
    expected = np.zeros(SHAPE, dtype=bool)
    expected[10:50, 10:50, 10:50] = True
    mask = expected.copy()
    mask[50 - missing :] = False
    assert spoilt.cut_ml(mask, expected, UNIT) == pytest.approx(found * 40 * 40 / 1000)


def test_what_is_cut_off_at_the_border_of_the_grid_counts() -> None:
    mask = EVERYWHERE.copy()
    mask[..., :5] = False
    assert spoilt.cut_ml(mask, EVERYWHERE, UNIT) == pytest.approx(5 * 60 * 64 / 1000)


def test_an_outlier_is_measured_in_ranges() -> None:
    voxels = np.linspace(0, 100, EVERYWHERE.size).reshape(SHAPE).astype(np.float32)
    assert spoilt.outlier(voxels, EVERYWHERE) == pytest.approx(50 / 98, rel=1e-3)
    voxels[0, 0, 0] = -9750
    assert spoilt.outlier(voxels, EVERYWHERE) == pytest.approx(100, rel=1e-3)


def test_saturation_is_a_share() -> None:
    voxels = np.linspace(0, 100, EVERYWHERE.size).reshape(SHAPE).astype(np.float32)
    assert spoilt.saturation(voxels.clip(max=80), EVERYWHERE) == pytest.approx(0.2, rel=1e-3)


def test_shading_follows_a_field_and_not_tissue(white: NDArray[np.float64]) -> None:
    tissue = 100 + 10 * white
    values = []
    for strength in (0, 0.5, 1.0):
        field = np.exp(strength * np.linspace(-1, 1, SHAPE[1]))[:, None]
        shaded = (tissue * field).astype(np.float32)
        values.append(spoilt.shading(shaded, EVERYWHERE, UNIT))
    assert values[0] == pytest.approx(1, abs=0.02)
    assert all(a < b for a, b in pairwise(values))
    assert values[2] < np.exp(2)
    assert spoilt.shading((white).astype(np.float32), EVERYWHERE, UNIT) == 1
