"""How far several samples of one image lie apart, and what that says about their error.

The samples' standard deviation s tells where a model is unsure, not by how much it is wrong: what
it has not learnt it gets wrong alike in every sample. Split conformal prediction (Angelopoulos and
Bates 2021, arXiv 2107.07511, section 2.3) measures the rest on cases with a known truth: with the
score |truth - mean| / (s + floor) of every brain voxel and q the quantile of the scores, the
interval mean +- q (s + floor) holds the truth in the share of voxels that was asked for.

Arrays are (X, Y, Z), in scanner units of the scale that the prediction assumes. The truth has a
scale of its own: it is brought into these units by the inverse of the line that
`metrics.affine_fit` draws from the prediction to the truth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.errors import InputError
from cwdm.metrics import affine_fit

__all__ = [
    "FLOOR",
    "MAPS",
    "Calibration",
    "HeldOut",
    "Moments",
    "Scores",
    "Uncertainty",
    "agreement",
    "conformal_quantile",
    "coverage",
    "in_units_of",
    "largest",
    "leave_one_out",
    "normal_quantile",
]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]

MAPS = ("std", "low", "high")
"""What is written of several samples beside their mean: the ends of the files' names."""
FLOOR = 0.1
"""Added to s, in shares of the mean image's standard deviation in the brain: keeps scores finite
where all samples agree."""
_ALIKE = 0.01
"""Samples whose median s is less, in the same shares, are practically one."""


@dataclass(frozen=True)
class Calibration:
    """What turns the spread of a model's samples into an interval, and on what it was measured."""

    coverage: float
    """Share of the brain's voxels that the interval is to hold."""
    q: float
    """The interval is mean +- q (s + floor)."""
    floor: float
    """In shares of the mean image's standard deviation in the brain."""
    samples: int
    sampler: str
    steps: int | tuple[int, ...]
    cases: int
    date: str
    """When it was measured, year-month-day."""
    held_out: tuple[float, ...]
    """Coverage in the brain of each case by the q of the others."""

    def holds_for(self, samples: int, sampler: str, steps: int | tuple[int, ...]) -> bool:
        """Whether samples were made as those that it was measured on."""
        return (samples, sampler, steps) == (self.samples, self.sampler, self.steps)


class Moments:
    """Mean and standard deviation of arrays that come one by one (Welford 1962), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: NDArray[np.float64] = np.zeros(())
        self._squares: NDArray[np.float64] = np.zeros(())

    def add(self, voxels: Voxels) -> None:
        """One more array of the same shape."""
        self.count += 1
        step = voxels - self._mean
        self._mean = self._mean + step / self.count
        self._squares = self._squares + step * (voxels - self._mean)

    @property
    def mean(self) -> NDArray[np.float32]:
        """The mean so far."""
        return self._mean.astype(np.float32)

    @property
    def std(self) -> NDArray[np.float32]:
        """The standard deviation so far, that of a sample (n - 1); needs two arrays."""
        return np.sqrt(self._squares / (self.count - 1)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Maps (X, Y, Z) float32 in scanner units beside a mean image; 0 outside the brain."""

    std: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    brain: Mask
    coverage: float
    """Share of the brain's voxels that low to high is to hold."""
    spread: float
    """Standard deviation of the mean image in the brain."""
    wide: Mask
    """Where low to high is no narrower than the central `coverage` of the mean image's own values
    in the brain: nothing is known there but that it is brain."""

    @classmethod
    def of(
        cls, mean: Voxels, std: Voxels, brain: Mask, *, q: float, floor: float, coverage: float
    ) -> Self:
        """The interval mean +- q (std + floor)."""
        spread = float(mean[brain].std())
        half = np.where(brain, q * (std + floor * spread), 0)
        low, high = (np.where(brain, mean + side * half, 0) for side in (-1, 1))
        return cls.within(mean, np.where(brain, std, 0), low, high, brain, coverage=coverage)

    @classmethod
    def within(
        cls,
        mean: Voxels,
        std: Voxels,
        low: Voxels,
        high: Voxels,
        brain: Mask | None = None,
        *,
        coverage: float,
    ) -> Self:
        """The interval low to high; all are 0 outside the brain, which is else where one is not."""
        brain = (mean != 0) | (high > low) if brain is None else brain
        bottom, top = np.quantile(mean[brain], [(1 - coverage) / 2, (1 + coverage) / 2])
        return cls(
            std=std.astype(np.float32),
            low=low.astype(np.float32),
            high=high.astype(np.float32),
            brain=brain,
            coverage=coverage,
            spread=float(mean[brain].std()),
            wide=brain & (high - low >= top - bottom),
        )

    @property
    def maps(self) -> Mapping[str, NDArray[np.float32]]:
        """The maps by the ending of their file's name."""
        return {kind: getattr(self, kind) for kind in MAPS}

    @property
    def alike(self) -> bool:
        """Whether the samples are practically one, so that their spread says nothing."""
        return bool(np.median(self.std[self.brain]) < _ALIKE * self.spread)


@dataclass(frozen=True, eq=False)
class Scores:
    """How far the truth of one case lies from the mean of its samples, in units of s + floor."""

    case: str
    brain: NDArray[np.float32]
    """One score per voxel of the brain."""
    tumor: NDArray[np.float32] | None
    """Those of them in the tumor; None without a segmentation or a tumor."""
    agreement: float | None
    """See `agreement`, in the brain."""
    agreement_tumor: float | None

    @classmethod
    def of(
        cls,
        case: str,
        mean: Voxels,
        std: Voxels,
        truth: Voxels,
        brain: Mask,
        tumor: Mask | None = None,
        *,
        floor: float = FLOOR,
    ) -> Self:
        """Scores of (X, Y, Z) arrays in the brain.

        Raises:
            InputError: the mean does not rise with the truth, so that no scale brings them
                together.
        """
        fitted = in_units_of(mean, truth, brain)
        if fitted is None:
            raise InputError(
                f"case {case}: the mean of the samples does not rise with the truth, expected a "
                "trained model"
            )
        s, m = std[brain], mean[brain]
        error = np.abs(fitted[brain] - m)
        scores = (error / (s + floor * m.std())).astype(np.float32)
        if tumor is None or not (inside := tumor[brain]).any():
            return cls(case, scores, None, agreement(s, error), None)
        in_tumor = agreement(s[inside], error[inside])
        return cls(case, scores, scores[inside], agreement(s, error), in_tumor)


@dataclass(frozen=True)
class HeldOut:
    """What the calibration of the other cases is worth on one."""

    case: str
    q: float
    """Of the others."""
    coverage: float
    coverage_tumor: float | None
    agreement: float | None
    agreement_tumor: float | None


def in_units_of(prediction: Voxels, truth: Voxels, brain: Mask) -> NDArray[np.float64] | None:
    """The truth (X, Y, Z) by the inverse of the line from the prediction to it; None if none rises.

    The line is that of `metrics.affine_fit` over the brain.
    """
    slope, offset = affine_fit(prediction, truth, brain)
    if slope <= 0:
        return None
    return (truth.astype(np.float64) - offset) / slope


def conformal_quantile(scores: Voxels, share: float) -> float:
    """The k-th smallest of n scores, k = ceil((n + 1) share).

    The chance that another score of the same kind is no larger is at least `share`.

    Raises:
        InputError: k is above n, there are too few scores.
    """
    k = ceil((scores.size + 1) * share)
    if k > scores.size:
        raise InputError(f"found {scores.size} voxels, too few for a coverage of {share:g}")
    return float(np.partition(scores, k - 1)[k - 1])


def normal_quantile(share: float) -> float:
    """How many standard deviations either side of the mean hold `share` of a normal variable."""
    return NormalDist().inv_cdf((1 + share) / 2)


def coverage(scores: Voxels, q: float) -> float:
    """The share of voxels whose truth is inside mean +- q (s + floor)."""
    return float(np.mean(scores <= q))


def agreement(std: Voxels, error: Voxels) -> float | None:
    """Spearman's rank correlation of s and |error| of some voxels; None if either is constant."""
    if np.ptp(std) == 0 or np.ptp(error) == 0:
        return None
    from scipy.stats import spearmanr  # takes half a second to import

    return float(spearmanr(std, error).statistic)


def leave_one_out(scores: Sequence[Scores], share: float) -> list[HeldOut]:
    """For each case what the q of the others covers there; needs two cases."""
    rows = []
    for left in scores:
        q = conformal_quantile(np.concatenate([s.brain for s in scores if s is not left]), share)
        tumor = None if left.tumor is None else coverage(left.tumor, q)
        rows.append(
            HeldOut(
                left.case,
                q,
                coverage(left.brain, q),
                tumor,
                left.agreement,
                left.agreement_tumor,
            )
        )
    return rows


def largest(mask: Mask, count: int = 3) -> list[tuple[int, tuple[slice, ...]]]:
    """Voxels and box of the largest connected parts (by faces) of a mask (X, Y, Z)."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    boxes = ndimage.find_objects(labels)
    return [(int(sizes[i]), boxes[i]) for i in np.argsort(-sizes, kind="stable")[:count]]
