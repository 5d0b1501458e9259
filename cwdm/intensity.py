"""Scanner units to network units and back.

MRI has no unit: the same tissue differs thirtyfold between scans. A normalization measures an
offset and a scale in one image; the image becomes ``(voxels - offset) / scale``, clipped to the
range the normalization declares, and its background outside the brain. The range of a modality
that was never acquired is unknown and is predicted from the case's other modalities
(``ScalePrior``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cwdm.modality import SEQUENCES, Modality

__all__ = ["NORMALIZATIONS", "Normalization", "NormalizationName", "Scale", "ScalePrior"]

NormalizationName = Literal["published", "published-wdm", "hounsfield", "robust"]


@dataclass(frozen=True)
class Scale:
    """Linear map between scanner units and network units."""

    offset: float
    """Scanner units that become 0."""
    scale: float
    """Scanner units per network unit, positive."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")


@dataclass(frozen=True)
class Normalization:
    """How to measure a ``Scale``, and the range of the images that result."""

    measure: Callable[[NDArray[np.floating], NDArray[np.bool_]], Scale]
    """(voxels, brain mask) -> Scale."""
    low: float
    high: float
    background: float = 0.0
    """What stands outside the brain, in network units."""
    masked: bool = True
    """Whether there is an outside: CT is taken with all that is around the body."""

    def normalize(
        self, voxels: NDArray[np.floating], mask: NDArray[np.bool_], scale: Scale
    ) -> NDArray[np.floating]:
        """Network units, clipped to [low, high]; ``background`` outside the mask."""
        image = ((voxels - scale.offset) / scale.scale).clip(self.low, self.high)
        image[~mask] = self.background
        return image

    @staticmethod
    def denormalize(
        image: NDArray[np.floating], mask: NDArray[np.bool_], scale: Scale
    ) -> NDArray[np.floating]:
        """Scanner units; 0 outside the mask. Inverse of ``normalize`` where it did not clip."""
        return np.where(mask, image * scale.scale + scale.offset, image.dtype.type(0))


def _quantiles(voxels: NDArray[np.floating], mask: NDArray[np.bool_]) -> Scale:
    """0.1 % and 99.9 % quantiles of the whole volume, background included, become 0 and 1.

    As published for cWDM (arXiv 2411.17203, section 3). About 90 % of a volume is background, so
    the upper end is about the brightest 1 % of the brain: vessels and enhancing tumour.
    """
    low, high = np.quantile(voxels, [0.001, 0.999])
    return _scale(float(low), float(high - low), voxels)


def _symmetric(voxels: NDArray[np.floating], mask: NDArray[np.bool_]) -> Scale:
    """The same quantiles become -1 and 1, as published for WDM (arXiv 2402.19043, section 4.1)."""
    unit = _quantiles(voxels, mask)
    return Scale(unit.offset + unit.scale / 2, unit.scale / 2)


def _hounsfield(voxels: NDArray[np.floating], mask: NDArray[np.bool_]) -> Scale:
    """-1000 HU (air) becomes -1, the 99.9 % quantile 1, as published for WDM on LIDC-IDRI."""
    high = float(np.quantile(voxels.clip(min=-1000), 0.999))
    return _scale((high - 1000) / 2, (high + 1000) / 2, voxels)


def _quartiles(voxels: NDArray[np.floating], mask: NDArray[np.bool_]) -> Scale:
    """In-brain median becomes 0, in-brain interquartile range 1.349 (that of a unit normal).

    Neither depends on how much of the volume is background, nor on the brightest quarter of it.
    """
    lower, median, upper = np.quantile(voxels[mask], [0.25, 0.5, 0.75])
    return _scale(float(median), float(upper - lower) / 1.349, voxels)


def _scale(offset: float, scale: float, voxels: NDArray[np.floating]) -> Scale:
    """A degenerate scale (most voxels alike) falls back on the standard deviation."""
    return Scale(offset, scale if scale > 0 else float(voxels.std()))


NORMALIZATIONS: dict[NormalizationName, Normalization] = {
    "published": Normalization(_quantiles, low=0.0, high=1.0),
    "published-wdm": Normalization(_symmetric, low=-1.0, high=1.0, background=-1.0),
    "hounsfield": Normalization(_hounsfield, low=-1.0, high=1.0, background=-1.0, masked=False),
    "robust": Normalization(_quartiles, low=-8.0, high=10.0),
}


@dataclass(frozen=True)
class ScalePrior:
    """Predicts the scale of an image that was not acquired; learnt from complete training cases."""

    ratios: Mapping[Modality, float]
    """For each other modality, the mean of log(scale of the target / scale of that modality)."""
    offset: float
    """The median of offset / scale of the target."""
    scale: float = 1.0
    """The median scale of the target, where there is nothing to compare it with."""

    @classmethod
    def learn(cls, target: Modality, cases: Sequence[Mapping[Modality, Scale]]) -> "ScalePrior":
        """From the measured scales of each training case, the target's among them."""
        ratios = {
            other: float(
                np.mean([np.log(c[target].scale / c[other].scale) for c in cases if other in c])
            )
            for other in SEQUENCES
            if other != target and any(other in c for c in cases)
        }
        return cls(
            ratios,
            float(np.median([c[target].offset / c[target].scale for c in cases])),
            float(np.median([c[target].scale for c in cases])),
        )

    def predict(self, scales: Mapping[Modality, Scale]) -> Scale:
        """The target's scale from those of the modalities a case does have, and training cases
        had."""
        known = [other for other in scales if other in self.ratios]
        logs = [np.log(scales[other].scale) + self.ratios[other] for other in known]
        scale = float(np.exp(np.mean(logs))) if logs else self.scale
        return Scale(self.offset * scale, scale)
