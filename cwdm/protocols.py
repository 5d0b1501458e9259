"""What is compared how: how images are scaled, by what range figures are divided, and where.

Every protocol gives the same figures (`FIGURES`) in the same regions, so that they can be held side
by side, and a perceptual distance if it is given one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cwdm.intensity import NORMALIZATIONS
from cwdm.metrics import Aligned, Similarity, mae, mse, ncc, psnr, volume_ssim
from cwdm.segmentation import Labels, Region
from cwdm.segmentation import regions as tumor_regions

__all__ = ["FIGURES", "PERCEPTUAL", "PROTOCOLS", "REGIONS", "Distances", "Protocol"]
__all__ += ["ProtocolName"]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]
Distances = Callable[[Voxels, Voxels, Mapping[str, Mask]], Mapping[str, float]]
"""(prediction, truth, regions), all (X, Y, Z) -> a distance in each region."""
ProtocolName = Literal["aligned", "brasyn", "published"]

FIGURES = {
    "psnr": "peak signal-to-noise ratio in dB for a data range of 1, at most 100",
    "ssim": "structural similarity, 3D Gaussian window of sigma 1.5 and 11 voxels",
    "mae": "mean absolute error in shares of the range",
    "ms_ssim": "multi-scale SSIM, 5 scales, mean over the region of its maps, data range 1",
    "mse": "mean squared error in squared shares of the range",
    "ncc": "normalized cross correlation (Pearson's r)",
}
PSNR_LIMIT = 100.0
"""dB: what equal images get, so that a few voxels do not make a mean infinite."""
PERCEPTUAL = (
    "distance of Med3D features, each image standardized: squared difference of their directions "
    "(LPIPS, as in MONAI, of the box of what is not background)"
)
"""What the figure is that only is there with a network."""
REGIONS = {
    "brain": "where the truth is not background, holes filled",
    "healthy": "the brain without the tumor",
    **{Region.WT.value: "whole tumor: every label", Region.TC.value: "tumor core: labels 1 and 3"},
    Region.ET.value: "enhancing tumor: label 3 (4 in BraTS until 2020)",
    "non-tumor": "all that is not tumor, background included",
    "cuboid": "the whole volume, background included",
}


@dataclass(frozen=True)
class Protocol:
    """A set of rules for comparing a prediction with the truth."""

    name: ProtocolName
    scaling: str
    """How images are scaled and what the data range is, in words."""
    masking: str
    """Where figures are taken, in words."""
    scale: Callable[[Voxels, Voxels, Mask, bool], tuple[Voxels, Voxels]]
    """(prediction, truth, brain), all (X, Y, Z) -> both float32, with a data range of 1. A fit may
    be told not to invert the prediction."""
    masks: Callable[[Mask, Labels | None], Mapping[str, Mask]]
    """(brain, labels) -> the regions, some may be empty."""
    whole_volume_ssim: bool = False
    """SSIM of a region: `volume_ssim` of images that are 0 elsewhere, not the mean of its map."""

    @property
    def text(self) -> str:
        """One paragraph that says what the figures mean."""
        return f"Protocol {self.name}. {self.scaling} {self.masking}"

    def figures(
        self,
        prediction: Voxels,
        truth: Voxels,
        brain: Mask,
        labels: Labels | None,
        distances: Distances | None = None,
        *,
        rising: bool = False,
    ) -> Iterator[tuple[str, int, dict[str, float]]]:
        """(region, voxels in it, its `FIGURES`) for every region that is not empty.

        With `distances` there is one figure more, "perceptual". PSNR is at most `PSNR_LIMIT`.

        Args:
            rising: a fit may not turn the prediction's contrast round, see `metrics.affine_fit`.
        All arrays are (X, Y, Z); ValueError as `Aligned.of`, if the truth is constant, for example.
        """
        p, t = self.scale(prediction, truth, brain, rising)
        similarity = Similarity.of(p, t)
        masks = {region: mask for region, mask in self.masks(brain, labels).items() if mask.any()}
        perceptual = distances(p, t, masks) if distances else {}
        for region, mask in masks.items():
            if self.whole_volume_ssim:
                ssim = volume_ssim(np.where(mask, p, 0), np.where(mask, t, 0))
            else:
                ssim = similarity.ssim(mask)
            figures = {
                "psnr": min(psnr(p, t, mask), PSNR_LIMIT),
                "ssim": ssim,
                "mae": mae(p, t, mask),
                "ms_ssim": similarity.ms_ssim(mask),
                "mse": mse(p, t, mask),
                "ncc": ncc(p, t, mask),
            }
            if perceptual:
                figures["perceptual"] = perceptual[region]
            yield region, int(mask.sum()), figures


def _aligned(prediction: Voxels, truth: Voxels, brain: Mask, rising: bool) -> tuple[Voxels, Voxels]:
    """`Aligned`, put back into the whole volume."""
    return Aligned.of(prediction, truth, brain, rising=rising).whole(truth.shape)


def _percentiles(image: Voxels) -> Voxels:
    """Clipped to the 0.5 % and 99.5 % quantile of the whole volume, not below 0; these are 0 and 1.

    Of a constant image the challenge makes NaN; here it becomes 0.
    """
    low, high = np.percentile(image, [0.5, 99.5])
    low = max(low, 0.0)
    if not low < high:
        return np.zeros(image.shape, dtype=np.float32)
    scaled: Voxels = ((image.clip(low, high) - low) / (high - low)).astype(np.float32)
    return scaled


def _published(image: Voxels) -> Voxels:
    """As networks see it; 0 for a constant image, which has no scale."""
    if np.ptp(image) == 0:
        return np.zeros(image.shape, dtype=np.float32)
    normalization, everywhere = NORMALIZATIONS["published"], np.ones(image.shape, dtype=bool)
    scale = normalization.measure(image, everywhere)
    return normalization.normalize(image, everywhere, scale).astype(np.float32)


def _each(
    scale: Callable[[Voxels], Voxels],
) -> Callable[[Voxels, Voxels, Mask, bool], tuple[Voxels, Voxels]]:
    """Both images by themselves."""
    return lambda prediction, truth, brain, rising: (scale(prediction), scale(truth))


def _in_brain(brain: Mask, labels: Labels | None) -> dict[str, Mask]:
    """The regions, tumor only where there is brain."""
    found = {"brain": brain}
    if labels is not None:
        found["healthy"] = brain & (labels == 0)
        found |= {str(region): brain & mask for region, mask in tumor_regions(labels).items()}
    return {**found, "cuboid": np.ones_like(brain)}


def _as_labeled(brain: Mask, labels: Labels | None) -> dict[str, Mask]:
    """The regions, the tumor as it is labeled, and the challenge's other half."""
    found = _in_brain(brain, labels)
    if labels is not None:
        found |= {str(region): mask for region, mask in tumor_regions(labels).items()}
        found["non-tumor"] = labels == 0
    return found


PROTOCOLS: dict[ProtocolName, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "aligned",
            "In the brain of the truth, the prediction is brought to the truth by one affine "
            "intensity fit (least squares; what is judged is never inverted by it, floors may be); "
            "outside both are 0. Data range: 0.5 % to 99.5 % "
            "quantile of the truth in the brain; nothing is clipped.",
            "Every figure is taken over the voxels of its region, SSIM as the mean of its map; "
            "tumor regions with the fit and range of the brain.",
            _aligned,
            _in_brain,
        ),
        Protocol(
            "brasyn",
            "The rules of the BraSyn challenge: each image is clipped to its own 0.5 % and 99.5 % "
            "percentile of the whole volume (at least 0), which become 0 and 1; no fit.",
            "SSIM: both images are set to 0 outside the region, its data range is the larger of "
            "their ranges then, and the mean is over the whole volume (torchmetrics' defaults); "
            "WT and non-tumor are the challenge's two figures. All other figures are taken over "
            "the voxels of the region, with a data range of 1, as in its inpainting task.",
            _each(_percentiles),
            _as_labeled,
            whole_volume_ssim=True,
        ),
        Protocol(
            "published",
            "The normalization published for cWDM: each image is clipped to its own 0.1 % and "
            "99.9 % quantile of the whole volume, which become 0 and 1; no fit. Data range: 1.",
            "Every figure is taken over the voxels of its region, SSIM as the mean of its map.",
            _each(_published),
            _in_brain,
        ),
    )
}
