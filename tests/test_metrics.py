"""Figures against MONAI, loops written out by hand, and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from cwdm.metrics import (
    Aligned,
    Similarity,
    affine_fit,
    intensity_range,
    mae,
    mse,
    ncc,
    psnr,
    ssim,
    ssim_map,
    volume_ssim,
)

Voxels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@pytest.fixture
def images() -> tuple[Voxels, Voxels, Mask]:
    """A prediction, a truth and an off-centre ellipsoid of brain, (24, 22, 20)."""
    generator = np.random.default_rng(3)
    x, y, z = np.meshgrid(*(np.arange(n) for n in (24, 22, 20)), indexing="ij")
    brain = ((x - 11) / 9) ** 2 + ((y - 12) / 8) ** 2 + ((z - 9) / 7) ** 2 < 1
    truth = (
        300 + 100 * np.sin(x / 3) + 60 * np.cos(y / 2 + z / 4) + generator.normal(0, 20, x.shape)
    )
    prediction = 0.4 * truth + generator.normal(0, 15, x.shape) - 70
    return prediction.astype(np.float32), truth.astype(np.float32), brain


def test_affine_fit_equals_numpy_least_squares(images: tuple[Voxels, Voxels, Mask]) -> None:
    prediction, truth, brain = images
    columns = np.stack([prediction[brain], np.ones(brain.sum())], axis=1).astype(np.float64)
    expected = np.linalg.lstsq(columns, truth[brain].astype(np.float64))[0]
    np.testing.assert_allclose(affine_fit(prediction, truth, brain), expected, rtol=1e-6)


def test_affine_fit_of_a_constant_is_the_mean_of_the_truth(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    _, truth, brain = images
    slope, offset = affine_fit(np.full_like(truth, 7), truth, brain)
    assert slope == 0
    assert offset == pytest.approx(float(truth[brain].mean()), rel=1e-6)


def test_range_is_the_quantiles_of_the_brain_alone(images: tuple[Voxels, Voxels, Mask]) -> None:
    _, truth, brain = images
    ordered = np.sort(truth[brain].astype(np.float64))
    low, high = intensity_range(np.where(brain, truth, 1e6), brain, (0.0, 1.0))
    assert (low, high) == pytest.approx((ordered[0], ordered[-1]))


def test_a_constant_truth_has_no_range() -> None:
    with pytest.raises(ValueError, match="constant in the mask"):
        intensity_range(np.ones((4, 4, 4)), np.ones((4, 4, 4), dtype=bool))


def test_aligned_images_are_zero_outside_the_brain_and_cropped_to_it(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    prediction, truth, brain = images
    aligned = Aligned.of(prediction, truth, brain)
    assert aligned.brain.sum() == brain.sum()
    assert all(
        face.any()
        for axis in range(3)
        for face in (aligned.brain.take(0, axis), aligned.brain.take(-1, axis))
    )
    assert not aligned.prediction[~aligned.brain].any()
    assert not aligned.truth[~aligned.brain].any()
    np.testing.assert_array_equal(brain[aligned.box], aligned.brain)


def test_figures_ignore_units_of_either_image_and_everything_outside_the_brain(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    prediction, truth, brain = images
    first = Aligned.of(prediction, truth, brain)
    other_prediction = np.where(brain, 5 - 30 * prediction, 1e5).astype(np.float32)
    other_truth = np.where(brain, truth / 30 + 4, -3).astype(np.float32)
    second = Aligned.of(other_prediction, other_truth, brain)

    for figure in (psnr, ssim, mae):
        one = figure(first.prediction, first.truth, first.brain)
        other = figure(second.prediction, second.truth, second.brain)
        assert one == pytest.approx(other, rel=1e-4)


def test_psnr_after_the_fit_follows_from_the_correlation(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    prediction, truth, brain = images
    aligned = Aligned.of(prediction, truth, brain)
    correlation = np.corrcoef(prediction[brain], truth[brain])[0, 1]
    low, high = np.quantile(truth[brain], (0.005, 0.995))
    residual = truth[brain].astype(np.float64).var() * (1 - correlation**2)
    expected = 10 * np.log10((high - low) ** 2 / residual)
    actual = psnr(aligned.prediction, aligned.truth, aligned.brain)
    assert actual == pytest.approx(expected, abs=1e-3)


def test_psnr_and_mae_of_a_constant_error_are_closed_forms() -> None:
    truth = np.zeros((5, 6, 7), dtype=np.float32)
    mask = np.ones(truth.shape, dtype=bool)
    assert psnr(truth + 5, truth, mask, data_range=50) == pytest.approx(20)
    assert mae(truth - 5, truth, mask) == pytest.approx(5)
    assert mse(truth - 5, truth, mask) == pytest.approx(25)


def test_correlation_ignores_units_knows_the_sign_and_is_zero_for_a_constant(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    prediction, truth, brain = images
    expected = np.corrcoef(prediction[brain], truth[brain])[0, 1]
    assert ncc(prediction, truth, brain) == pytest.approx(expected, rel=1e-6)
    assert ncc(7 - 3 * prediction, truth, brain) == pytest.approx(-expected, rel=1e-6)
    assert ncc(np.full_like(truth, 4), truth, brain) == 0


def test_a_perfect_prediction_has_infinite_psnr_and_ssim_one(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    _, truth, brain = images
    assert psnr(truth, truth, brain) == float("inf")
    assert ssim(truth, truth, brain, data_range=500) == pytest.approx(1, abs=1e-6)
    assert mae(truth, truth, brain) == 0


def test_ssim_map_equals_monai_on_the_image_padded_with_background(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    torch = pytest.importorskip("torch")
    from monai.metrics.regression import compute_ssim_and_cs

    prediction, truth, brain = images
    aligned = Aligned.of(prediction, truth, brain)
    padded = [
        torch.from_numpy(np.pad(image, 5))[None, None]
        for image in (aligned.prediction, aligned.truth)
    ]
    expected, _ = compute_ssim_and_cs(
        padded[0],
        padded[1],
        spatial_dims=3,
        kernel_size=(11, 11, 11),
        kernel_sigma=(1.5, 1.5, 1.5),
        data_range=1.0,
    )
    actual = ssim_map(aligned.prediction, aligned.truth)
    np.testing.assert_allclose(actual, expected[0, 0].numpy(), atol=1e-4)  # float32


def test_ssim_at_one_voxel_equals_the_formula_written_out(
    images: tuple[Voxels, Voxels, Mask],
) -> None:
    prediction, truth, _ = images
    centre, data_range = (11, 12, 9), 400.0
    total = mean_p = mean_t = pp = tt = pt = 0.0
    for offset in itertools.product(range(-5, 6), repeat=3):
        weight = float(np.exp(-sum(o * o for o in offset) / (2 * 1.5**2)))
        where = tuple(c + o for c, o in zip(centre, offset, strict=True))
        p, t = float(prediction[where]), float(truth[where])
        total += weight
        mean_p, mean_t = mean_p + weight * p, mean_t + weight * t
        pp, tt, pt = pp + weight * p * p, tt + weight * t * t, pt + weight * p * t
    mean_p, mean_t, pp, tt, pt = (v / total for v in (mean_p, mean_t, pp, tt, pt))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    expected = (
        (2 * mean_p * mean_t + c1)
        * (2 * (pt - mean_p * mean_t) + c2)
        / ((mean_p**2 + mean_t**2 + c1) * (pp - mean_p**2 + tt - mean_t**2 + c2))
    )
    actual = ssim_map(prediction, truth, data_range=data_range)[centre]
    assert float(actual) == pytest.approx(expected, abs=1e-4)


def test_cropping_to_the_brain_changes_no_ssim_inside(images: tuple[Voxels, Voxels, Mask]) -> None:
    prediction, truth, brain = images
    aligned = Aligned.of(prediction, truth, brain)
    whole_p, whole_t = np.zeros_like(truth), np.zeros_like(truth)
    whole_p[aligned.box], whole_t[aligned.box] = aligned.prediction, aligned.truth
    np.testing.assert_allclose(
        ssim_map(whole_p, whole_t)[aligned.box][aligned.brain],
        ssim_map(aligned.prediction, aligned.truth)[aligned.brain],
        atol=1e-6,
    )


def test_two_constants_differ_by_the_luminance_term_only() -> None:
    p, t = np.full((25, 25, 25), 0.5, np.float32), np.full((25, 25, 25), 0.8, np.float32)
    expected = (2 * 0.5 * 0.8 + 1e-4) / (0.5**2 + 0.8**2 + 1e-4)
    assert float(ssim_map(p, t)[12, 12, 12]) == pytest.approx(expected, abs=1e-4)


def test_what_is_empty_in_both_images_is_skipped_and_counts_as_equal() -> None:
    generator = np.random.default_rng(0)
    p, t = generator.uniform(size=(2, 12, 10, 8)).astype(np.float32)
    small = ssim_map(np.pad(p, 5), np.pad(t, 5))
    wide = ssim_map(np.pad(p, 40), np.pad(t, 40))
    np.testing.assert_allclose(wide[35:-35, 35:-35, 35:-35], small, atol=1e-5)
    wide[35:-35, 35:-35, 35:-35] = 1
    np.testing.assert_allclose(wide, 1, atol=1e-6)
    assert (ssim_map(0 * p, 0 * t) == 1).all()


def test_ssim_of_volumes_has_their_own_range_or_none() -> None:
    p, t = np.random.default_rng(0).uniform(size=(2, 14, 12, 13)).astype(np.float32)
    assert volume_ssim(30 * p, 30 * t) == pytest.approx(volume_ssim(p, t), abs=1e-5)
    assert np.isnan(volume_ssim(0 * p, 0 * t))


def test_multi_scale_similarity_of_a_negative_is_zero_and_of_itself_one() -> None:
    image = np.random.default_rng(0).uniform(size=(20, 17, 16)).astype(np.float32)
    mask = image > 0.5
    assert Similarity.of(image, image).ms_ssim(mask) == pytest.approx(1, abs=1e-6)
    assert Similarity.of(1 - image, image).ms_ssim(mask) == 0


def test_arrays_of_different_shape_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\), \(3, 2, 2\)"):
        Aligned.of(np.ones((2, 2, 2)), np.ones((3, 2, 2)), np.ones((2, 2, 2), dtype=bool))


def test_an_empty_brain_is_refused() -> None:
    ones = np.ones((2, 2, 2))
    with pytest.raises(ValueError, match="empty"):
        Aligned.of(ones, ones, np.zeros(ones.shape, dtype=bool))
