"""Trivial syntheses a model must beat, and truths spoilt on purpose (a copy needs no code).

`zeros` and `constant_brain` hold nothing at all, `erased` and `blurred` are the truth without its
tumor and without its detail: no method can reach these, they show what a figure does not see.

A regression maps the available modalities around one voxel to the missing one, by the same function
everywhere. Its features are, per modality, the image and its Gaussian averages over 1, 2 and 4 mm,
normalized in the brain of that image as (voxel - median) / (interquartile range / 1.349): for a
normal distribution (voxel - mean) / standard deviation, whatever the scanner's units.
It needs scikit-learn, extra `cwdm[evaluate]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.errors import InputError
from cwdm.masks import extent
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.volume import Volume, brain_mask

__all__ = ["CaseFeatures", "Kind", "VoxelRegression", "VoxelSample", "blurred", "constant_brain"]
__all__ += ["erased", "zeros"]

Kind = Literal["ridge", "boosting"]
Voxels = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIGMAS_MM = (0.0, 1.0, 2.0, 4.0)
IQR_OF_A_NORMAL = 1.349  # in standard deviations
RIDGE_PENALTY = 1.0
BOOSTING_ROUNDS = 300
BLUR_MM = 2.0  # of `blurred`: wider than a gyrus' cortex is thick
FILL_MM = 8.0  # of `erased`: how far the fill looks around
BLOCK = 200_000  # voxels predicted at a time: scikit-learn copies them to float64


def zeros(volume: Volume) -> Voxels:
    """(X, Y, Z): an empty image on the grid of another."""
    return np.zeros(volume.voxels.shape, dtype=np.float32)


def constant_brain(volumes: Mapping[Modality, Volume], target: Modality) -> Voxels:
    """(X, Y, Z): 1 where one of the other modalities has brain, else 0."""
    brains = [brain_mask(volumes[modality]) for modality in others(target)]
    union: Mask = np.logical_or.reduce(brains)
    return union.astype(np.float32)


def blurred(truth: Volume) -> Voxels:
    """(X, Y, Z): the truth, averaged in its brain with a Gaussian of 2 mm."""
    smooth = ndimage.gaussian_filter(truth.voxels, BLUR_MM / _spacing_mm(truth.affine))
    return np.where(brain_mask(truth), smooth, truth.voxels).astype(np.float32)


def erased(truth: Volume, tumor: Mask) -> Voxels:
    """(X, Y, Z): the truth with its tumor painted over by Gaussian averages of the healthy brain.

    The averages look about 8 mm far; deeper in the tumor they go over to the mean of the brain.
    """
    healthy = brain_mask(truth) & ~tumor
    mean = float(truth.voxels[healthy].mean()) if healthy.any() else 0.0
    sigma = FILL_MM / _spacing_mm(truth.affine)
    near = ndimage.gaussian_filter(healthy.astype(np.float32), sigma)
    total = ndimage.gaussian_filter(np.where(healthy, truth.voxels, 0), sigma)
    weight_of_mean = 1e-3  # small beside that of healthy voxels within about 20 mm
    fill = (total + weight_of_mean * mean) / (near + weight_of_mean)
    return np.where(tumor & brain_mask(truth), fill, truth.voxels).astype(np.float32)


def _spacing_mm(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) voxel size."""
    spacing: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return spacing


@dataclass(frozen=True)
class CaseFeatures:
    """The features of every voxel of a case, in the bounding box of its brain."""

    values: Mapping[Modality, Voxels]
    """Per modality (4, x, y, z): the normalized image averaged over each of SIGMAS_MM."""
    brains: Mapping[Modality, Mask]
    """Per modality (x, y, z): where its image has brain."""
    box: tuple[slice, slice, slice]
    """Where the two lie in the volumes."""
    shape: tuple[int, ...]
    """(X, Y, Z) of the volumes."""

    @classmethod
    def of(cls, volumes: Mapping[Modality, Volume]) -> Self:
        """From volumes on one grid. A 240 x 240 x 155 case takes seconds and about 200 MB."""
        brains = {modality: brain_mask(volume) for modality, volume in volumes.items()}
        union = np.logical_or.reduce(list(brains.values()))
        box = extent(union)
        cropped = {modality: brain[box] for modality, brain in brains.items()}
        values = {
            modality: _averages(volume.voxels[box], cropped[modality], volume.affine)
            for modality, volume in volumes.items()
        }
        return cls(values, cropped, box, union.shape)


def _averages(voxels: Voxels, brain: Mask, affine: NDArray[np.float64]) -> Voxels:
    """(x, y, z) -> (4, x, y, z), normalized in the brain.

    Everything outside the brain counts as its darkest thousandth: averages then fall off towards
    the surface in the same way whatever number the file has for background.
    """
    q1, median, q3 = np.quantile(voxels[brain], (0.25, 0.5, 0.75))
    scale = float(q3 - q1) / IQR_OF_A_NORMAL or float(voxels[brain].std()) or 1.0
    image = ((voxels - median) / scale).astype(np.float32)
    outside = float(np.quantile(image[brain], 0.001))
    image = np.where(brain, image, np.float32(outside))
    spacing_mm = _spacing_mm(affine)
    return np.stack(
        [
            ndimage.gaussian_filter(image, sigma / spacing_mm, mode="constant", cval=outside)
            for sigma in SIGMAS_MM
        ]
    )


@dataclass(frozen=True)
class VoxelSample:
    """Voxels drawn from complete cases, to fit regressions for any target on."""

    values: Voxels
    """(voxels, 4, 4): modalities in their order, SIGMAS_MM."""

    @classmethod
    def of(
        cls, cases: Iterable[CaseFeatures], *, voxels_per_case: int = 20_000, seed: int = 0
    ) -> Self:
        """Draw brain voxels of each case without repetition; the cases have all four modalities.

        The voxels of case number n depend on (seed, n) only. Brain is where all four images are.
        """
        drawn = []
        for number, features in enumerate(cases):
            brain = np.logical_and.reduce([features.brains[m] for m in SEQUENCES])
            inside = np.flatnonzero(brain)
            generator = np.random.default_rng((seed, number))
            chosen = generator.choice(inside, min(voxels_per_case, inside.size), replace=False)
            x, y, z = np.unravel_index(np.sort(chosen), brain.shape)
            drawn.append(np.stack([features.values[m][:, x, y, z].T for m in SEQUENCES], axis=1))
        if not drawn:
            raise InputError("regression floors: found no complete case to fit them on")
        return cls(np.concatenate(drawn))


@dataclass(frozen=True)
class VoxelRegression:
    """A fitted regression; called with the features of a case it predicts `target`."""

    target: Modality
    kind: Kind
    model: Any
    """A scikit-learn regressor."""

    @classmethod
    def fit(
        cls, sample: VoxelSample, target: Modality, kind: Kind = "ridge", *, seed: int = 0
    ) -> Self:
        """Fit on all drawn voxels; InputError without scikit-learn."""
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        order = list(SEQUENCES)
        sources = [order.index(modality) for modality in others(target)]
        predictors = sample.values[:, sources].reshape(len(sample.values), -1)
        model = _regressor(kind, seed)
        model.fit(predictors, sample.values[:, order.index(target), 0])
        return cls(target, kind, model)

    def __call__(self, features: CaseFeatures) -> Voxels:
        """(X, Y, Z) in normalized units, 0 where no available image has brain.

        Only the three other modalities are looked at. InputError if one is absent.
        """
        sources = others(self.target)
        absent = [modality for modality in sources if modality not in features.values]
        if absent:
            raise InputError(f"{self.kind} for {self.target}: needs {', '.join(absent)} too")
        brain = np.logical_or.reduce([features.brains[m] for m in sources])
        predictors = np.concatenate([features.values[m][:, brain] for m in sources]).T
        blocks = range(0, len(predictors), BLOCK)
        cropped = np.zeros(brain.shape, dtype=np.float32)
        cropped[brain] = np.concatenate(
            [self.model.predict(predictors[start : start + BLOCK]) for start in blocks]
        )
        predicted = np.zeros(features.shape, dtype=np.float32)
        predicted[features.box] = cropped
        return predicted


def _regressor(kind: Kind, seed: int) -> Any:
    """An unfitted scikit-learn regressor."""
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
        from sklearn.linear_model import Ridge
    except ModuleNotFoundError as error:
        raise InputError(
            "scikit-learn is not installed, regressions need it: pip install 'cwdm[evaluate]'"
        ) from error
    if kind == "ridge":
        return Ridge(alpha=RIDGE_PENALTY)
    return HistGradientBoostingRegressor(
        max_iter=BOOSTING_ROUNDS, early_stopping=False, random_state=seed
    )
