"""Voxelwise regressions on images whose relation is known."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from cwdm.errors import InputError
from cwdm.floors import (
    SIGMAS_MM,
    CaseFeatures,
    VoxelRegression,
    VoxelSample,
    blurred,
    constant_brain,
    erased,
    zeros,
)
from cwdm.metrics import affine_fit
from cwdm.modality import SEQUENCES, Modality
from cwdm.volume import Volume, brain_mask

SHAPE = (26, 24, 22)
T1N, T1C, T2W, T2F = SEQUENCES


def volume(voxels: np.ndarray, spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Volume:
    affine = np.diag([*spacing_mm, 1.0])
    return Volume(voxels.astype(np.float32), affine, nib.Nifti1Header(), Path("x.nii.gz"))


def case(seed: int, gain: float = 1.0, outside: float = 0.0) -> dict[Modality, Volume]:
    """T2F is a linear function of T1N and T1C, and the square of T2W; all in one ellipsoid."""
    generator = np.random.default_rng(seed)
    grid = np.indices(SHAPE).reshape(3, -1).T - (np.array(SHAPE) - 1) / 2
    brain = ((grid / np.array([11, 10, 9])) ** 2).sum(axis=1).reshape(SHAPE) < 1
    a, b, c = (ndimage.gaussian_filter(generator.normal(size=SHAPE), 1.2) * 8 for _ in range(3))
    images = {T1N: 20 + a, T1C: 30 + b, T2W: 15 + c, T2F: 50 + 2 * a - 3 * b + 0.5 * c**2}
    return {m: volume(np.where(brain, gain * v, outside)) for m, v in images.items()}


@pytest.fixture(scope="module")
def sample() -> VoxelSample:
    return VoxelSample.of((CaseFeatures.of(case(seed)) for seed in range(3)), voxels_per_case=3000)


def features_without(target: Modality, volumes: Mapping[Modality, Volume]) -> CaseFeatures:
    return CaseFeatures.of({m: v for m, v in volumes.items() if m is not target})


def test_features_are_gaussian_averages_in_millimetres_of_the_normalized_image() -> None:
    voxels = case(1)[T1N].voxels
    anisotropic = volume(voxels, spacing_mm=(1.0, 2.0, 0.5))
    features = CaseFeatures.of({T1N: anisotropic})
    brain = brain_mask(anisotropic)
    q1, median, q3 = np.quantile(voxels[brain], (0.25, 0.5, 0.75))
    image = (voxels - median) / ((q3 - q1) / 1.349)
    image[~brain] = np.quantile(image[brain], 0.001)
    for index, sigma in enumerate(SIGMAS_MM):
        wide = np.pad(image, 40, mode="edge")  # the margin is background on every side
        expected = ndimage.gaussian_filter(wide, (sigma, sigma / 2, sigma / 0.5))[
            40:-40, 40:-40, 40:-40
        ]
        np.testing.assert_allclose(
            features.values[T1N][index], expected[features.box], atol=2e-4, err_msg=f"{sigma} mm"
        )


def test_features_do_not_depend_on_units_or_the_number_outside_the_brain() -> None:
    plain, other = CaseFeatures.of(case(2)), CaseFeatures.of(case(2, gain=30.0, outside=-7.0))
    for modality in SEQUENCES:
        np.testing.assert_allclose(plain.values[modality], other.values[modality], atol=1e-3)


def test_the_sample_is_drawn_from_the_brain_and_depends_on_the_seed_alone() -> None:
    features = [CaseFeatures.of(case(seed)) for seed in range(2)]
    first = VoxelSample.of(features, voxels_per_case=500, seed=4)
    again = VoxelSample.of(iter(features), voxels_per_case=500, seed=4)
    other = VoxelSample.of(features, voxels_per_case=500, seed=5)
    assert first.values.shape == (1000, 4, 4)
    np.testing.assert_array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)
    alone = VoxelSample.of(features[:1], voxels_per_case=500, seed=4)
    np.testing.assert_array_equal(first.values[:500], alone.values)


def test_a_small_brain_gives_every_voxel_once() -> None:
    features = CaseFeatures.of(case(0))
    drawn = VoxelSample.of([features], voxels_per_case=10**6).values
    inside = features.values[T1N][0][features.brains[T1N]]
    np.testing.assert_array_equal(np.sort(drawn[:, 0, 0]), np.sort(inside))


def test_ridge_equals_the_normal_equations(sample: VoxelSample) -> None:
    pytest.importorskip("sklearn")
    regression = VoxelRegression.fit(sample, T2F, "ridge")
    x = sample.values[:, :3].reshape(len(sample.values), 12).astype(np.float64)
    y = sample.values[:, 3, 0].astype(np.float64)
    centered = x - x.mean(axis=0)
    weights = np.linalg.solve(centered.T @ centered + np.eye(12), centered.T @ (y - y.mean()))
    volumes = case(9)
    predicted = regression(features_without(T2F, volumes))
    features = CaseFeatures.of(volumes)
    inside = [features.values[m][:, features.brains[m]] for m in (T1N, T1C, T2W)]
    expected = (np.concatenate(inside).T - x.mean(axis=0)) @ weights + y.mean()
    actual = predicted[features.box][features.brains[T1N]]
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_boosting_finds_what_is_not_linear_and_ridge_does_not(
    sample: VoxelSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("cwdm.floors.BOOSTING_ROUNDS", 60)
    volumes = case(9)
    truth = volumes[T2F].voxels
    brain = brain_mask(volumes[T2F])
    errors = {}
    for kind in ("ridge", "boosting"):
        predicted = VoxelRegression.fit(sample, T2F, kind)(features_without(T2F, volumes))
        slope, offset = affine_fit(predicted, truth, brain)
        errors[kind] = float(np.std(slope * predicted[brain] + offset - truth[brain]))
    assert errors["boosting"] < 0.8 * errors["ridge"] < 0.8 * float(truth[brain].std())


def test_a_prediction_is_zero_outside_the_brain_and_never_sees_the_target(
    sample: VoxelSample,
) -> None:
    pytest.importorskip("sklearn")
    volumes = case(9)
    regression = VoxelRegression.fit(sample, T1C, "ridge")
    blind = regression(features_without(T1C, volumes))
    assert blind.shape == SHAPE
    assert not blind[~brain_mask(volumes[T1N])].any()
    np.testing.assert_array_equal(blind, regression(CaseFeatures.of(volumes)))


def test_a_case_without_a_needed_modality_is_refused_by_name(sample: VoxelSample) -> None:
    pytest.importorskip("sklearn")
    regression = VoxelRegression.fit(sample, T2F, "ridge")
    volumes = {m: v for m, v in case(9).items() if m in (T1N, T2W)}
    with pytest.raises(InputError, match="needs t1c too"):
        regression(CaseFeatures.of(volumes))


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(InputError, match="no complete case"):
        VoxelSample.of([])


def test_an_unknown_kind_is_refused(sample: VoxelSample) -> None:
    with pytest.raises(ValueError, match="forest"):
        VoxelRegression.fit(sample, T2F, "forest")  # type: ignore[arg-type]


def test_without_scikit_learn_the_error_names_the_extra(
    sample: VoxelSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sklearn", "sklearn.ensemble", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"cwdm\[evaluate\]"):
        VoxelRegression.fit(sample, T2F, "ridge")


def test_blank_images_hold_nothing_of_the_target() -> None:
    volumes = case(1)
    target = volumes.pop(T2F)
    brain = brain_mask(target)
    blank = constant_brain(volumes, T2F)
    np.testing.assert_array_equal(blank, brain)
    assert not zeros(target).any()
    assert zeros(target).shape == SHAPE


def test_erasing_a_bump_on_an_even_brain_leaves_the_even_brain() -> None:
    brain = brain_mask(case(1)[T1N])
    even = np.where(brain, 100.0, 0.0)
    tumor = np.zeros(SHAPE, dtype=bool)
    tumor[10:16, 9:15, 8:14] = True
    image = erased(volume(np.where(tumor, 250, even)), tumor)
    np.testing.assert_allclose(image, even, rtol=1e-5)


def test_erasing_changes_nothing_but_the_tumor_and_depends_on_the_healthy_brain_alone() -> None:
    truth = case(1)[T2F]
    tumor = np.zeros(SHAPE, dtype=bool)
    tumor[10:16, 9:15, 8:14] = True
    image = erased(truth, tumor)
    np.testing.assert_array_equal(image[~tumor], truth.voxels[~tumor])
    other = erased(volume(np.where(tumor, 9 * truth.voxels, truth.voxels)), tumor)
    np.testing.assert_array_equal(image, other)
    assert image[tumor].std() < 0.3 * truth.voxels[tumor].std()


def test_deep_in_a_large_tumor_the_fill_is_the_mean_of_the_brain() -> None:
    grid = np.indices((90, 90, 90)) - 44.5
    radius = np.sqrt((grid**2).sum(axis=0))
    image = np.where(radius < 43, 100 + grid[0], 0) + 400 * (radius < 40)
    tumor = radius < 40
    mean = float(image[(radius < 43) & ~tumor].mean())
    fill = erased(volume(image), tumor)[45, 45, 45]
    assert fill == pytest.approx(mean, rel=0.01)


def test_a_blurred_truth_is_the_truth_averaged_in_its_brain() -> None:
    plain = case(1)[T2F]
    truth = volume(plain.voxels, spacing_mm=(1.0, 2.0, 0.5))
    image = blurred(truth)
    brain = brain_mask(truth)
    expected = ndimage.gaussian_filter(truth.voxels, (2, 1, 4))
    np.testing.assert_allclose(image[brain], expected[brain], rtol=1e-5)
    np.testing.assert_array_equal(image[~brain], truth.voxels[~brain])
