"""How near a prediction is to the truth: formulas; arrays of shape (X, Y, Z) throughout.

What is compared, on which scale and where, is decided in `protocols`. How the protocol of cwdm
scales is here, too: the scale of a missing modality cannot be known, so a prediction p is first
brought to the truth t by the least-squares line a*p + b over the brain (`affine_fit`). Both are
then expressed in shares of the truth's in-brain range (`Aligned`): 0 and 1 are its 0.5 % and 99.5 %
quantiles, nothing is clipped, and every voxel outside the brain is 0 in both. So no figure in the
brain depends on the units of either image, and none can be raised by adding background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.masks import extent

__all__ = ["Aligned", "Similarity", "affine_fit", "intensity_range", "mae", "mse", "ncc", "psnr"]
__all__ += ["ssim", "ssim_map", "volume_ssim"]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]

RANGE_QUANTILES = (0.005, 0.995)  # of the truth in the brain; further out are vessels and noise
SSIM_SIGMA = (
    1.5  # voxels, with 11 taps: Wang et al. 2004, and what MONAI and torchmetrics default to
)
SSIM_TAPS = 11
SSIM_K1, SSIM_K2 = 0.01, 0.03  # Wang et al. 2004
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, fine to coarse

Edge = Literal["constant", "mirror"]
"""How images go on beyond the edge of the array: 0, or mirrored at the outermost voxel."""


def affine_fit(
    prediction: Voxels, truth: Voxels, mask: Mask, *, rising: bool = False
) -> tuple[float, float]:
    """(a, b) that minimize the sum over `mask` of (a * prediction + b - truth)^2.

    a = cov(p, t) / var(p) and b = mean(t) - a * mean(p). It may be negative: a copy of T1 then
    serves as an inverted T2, which makes it a harder floor. A constant prediction gives a = 0.

    Args:
        rising: only a >= 0 is allowed: what falls where the truth rises counts as constant.
    """
    p = prediction[mask].astype(np.float64)
    t = truth[mask].astype(np.float64)
    variance = p.var()
    slope = float(np.mean((p - p.mean()) * (t - t.mean())) / variance) if variance > 0 else 0.0
    slope = max(slope, 0.0) if rising else slope
    return slope, float(t.mean() - slope * p.mean())


def intensity_range(
    voxels: Voxels, mask: Mask, quantiles: tuple[float, float] = RANGE_QUANTILES
) -> tuple[float, float]:
    """Low and high quantile of the voxels in `mask`; ValueError where they are equal."""
    low, high = np.quantile(voxels[mask], quantiles)
    if not low < high:
        raise ValueError(f"the image is constant in the mask: its range is {low:g} to {high:g}")
    return float(low), float(high)


@dataclass(frozen=True)
class Aligned:
    """A prediction brought to the truth; both in shares of the truth's range, 0 outside the brain.

    Cropped to the bounding box of the brain: everything outside it is background in both.
    """

    prediction: Voxels
    """(x, y, z) float32: (a * prediction + b - low) / (high - low)."""
    truth: Voxels
    """(x, y, z) float32: (truth - low) / (high - low)."""
    brain: Mask
    """(x, y, z): where the figures are taken."""
    box: tuple[slice, slice, slice]
    """Where the three lie in the arrays given, to crop other masks alike."""

    @classmethod
    def of(cls, prediction: Voxels, truth: Voxels, brain: Mask, *, rising: bool = False) -> Self:
        """Align (X, Y, Z) arrays; ValueError if shapes differ, brain empty or truth constant.

        Args:
            rising: see `affine_fit`.
        """
        if not prediction.shape == truth.shape == brain.shape:
            raise ValueError(
                "prediction, truth and brain must have one shape, got "
                f"{prediction.shape}, {truth.shape} and {brain.shape}"
            )
        if not brain.any():
            raise ValueError("the brain mask is empty")
        box = extent(brain)
        brain, prediction, truth = brain[box], prediction[box], truth[box]
        slope, offset = affine_fit(prediction, truth, brain, rising=rising)
        low, high = intensity_range(truth, brain)
        fitted = (slope * prediction.astype(np.float32) + (offset - low)) / (high - low)
        shares = (truth.astype(np.float32) - low) / (high - low)
        return cls(
            prediction=np.where(brain, fitted, 0).astype(np.float32),
            truth=np.where(brain, shares, 0).astype(np.float32),
            brain=brain,
            box=box,
        )

    def whole(self, shape: tuple[int, ...]) -> tuple[Voxels, Voxels]:
        """Prediction and truth, back in arrays of the shape they were given in."""
        both = np.zeros((2, *shape), dtype=np.float32)
        both[0][self.box], both[1][self.box] = self.prediction, self.truth
        return both[0], both[1]


def mae(prediction: Voxels, truth: Voxels, mask: Mask) -> float:
    """Mean over `mask` of |prediction - truth|, in the units of the two."""
    return float(np.mean(np.abs(prediction[mask] - truth[mask]), dtype=np.float64))


def mse(prediction: Voxels, truth: Voxels, mask: Mask) -> float:
    """Mean over `mask` of (prediction - truth)^2."""
    difference = prediction[mask].astype(np.float64) - truth[mask].astype(np.float64)
    return float(np.mean(difference**2))


def psnr(prediction: Voxels, truth: Voxels, mask: Mask, *, data_range: float = 1.0) -> float:
    """10 log10(data_range^2 / mean over `mask` of (prediction - truth)^2) dB; infinite if equal."""
    mean_square = mse(prediction, truth, mask)
    return float(10 * np.log10(data_range**2 / mean_square)) if mean_square > 0 else float("inf")


def ncc(prediction: Voxels, truth: Voxels, mask: Mask) -> float:
    """Normalized cross correlation, Pearson's r, over `mask`; 0 where either image is constant."""
    p, t = (image[mask].astype(np.float64) for image in (prediction, truth))
    p, t = p - p.mean(), t - t.mean()
    norm = float(np.sqrt((p @ p) * (t @ t)))
    return float(p @ t) / norm if norm > 0 else 0.0


def ssim(prediction: Voxels, truth: Voxels, mask: Mask, *, data_range: float = 1.0) -> float:
    """Mean of `ssim_map` over the voxels of `mask`."""
    return float(
        np.mean(ssim_map(prediction, truth, data_range=data_range)[mask], dtype=np.float64)
    )


def ssim_map(
    prediction: Voxels, truth: Voxels, *, data_range: float = 1.0, edge: Edge = "constant"
) -> Voxels:
    """Structural similarity around every voxel, (X, Y, Z) float32 (Wang et al. 2004, equation 13).

    With means, variances and covariance under a Gaussian window (sigma 1.5, 11 voxels per axis),
    (2 m_p m_t + c1)(2 c_pt + c2) / ((m_p^2 + m_t^2 + c1)(v_p + v_t + c2)), c1 = (0.01 range)^2,
    c2 = (0.03 range)^2. By default both images go on as 0, the background, beyond the edge of the
    array: a box cropped from a larger background gives the same values. The window is applied axis
    by axis, 33 multiplications per voxel instead of 1331, where either image has something.
    """
    return _maps(prediction, truth, data_range, edge)[0]


def volume_ssim(prediction: Voxels, truth: Voxels) -> float:
    """SSIM of whole volumes as by torchmetrics' defaults (`structural_similarity_index_measure`).

    The range is the larger of the two images' own ranges, images are mirrored at the edge, and the
    mean is over all voxels (until 2024 torchmetrics left out the outer 5 along every axis). NaN if
    both images are constant: there is no range.
    """
    data_range = max(float(np.ptp(prediction)), float(np.ptp(truth)))
    if data_range == 0:
        return float("nan")
    similarity = ssim_map(prediction, truth, data_range=data_range, edge="mirror")
    return float(similarity.mean(dtype=np.float64))


@dataclass(frozen=True)
class Similarity:
    """The maps behind SSIM and multi-scale SSIM of two images, for any number of regions."""

    ssim_maps: Sequence[Voxels]
    """(X, Y, Z), and halved four times: `ssim_map` of the images in voxels of 1, 2, ... 16."""
    contrast_maps: Sequence[Voxels]
    """The second factor of each alone: (2 c_pt + c2) / (v_p + v_t + c2)."""

    @classmethod
    def of(cls, prediction: Voxels, truth: Voxels, *, data_range: float = 1.0) -> Self:
        """Compute them; (X, Y, Z) at the end filled up with 0 where a side cannot be halved."""
        pairs = [(np.asarray(prediction, np.float32), np.asarray(truth, np.float32))]
        for _ in MS_SSIM_WEIGHTS[1:]:
            p, t = pairs[-1]
            pairs.append((_halve(p), _halve(t)))
        maps = [_maps(p, t, data_range, "constant") for p, t in pairs]
        return cls([each[0] for each in maps], [each[1] for each in maps])

    def ssim(self, mask: Mask) -> float:
        """As the function `ssim`."""
        return float(self.ssim_maps[0][mask].mean(dtype=np.float64))

    def ms_ssim(self, mask: Mask) -> float:
        """Multi-scale SSIM over `mask` (Wang et al. 2003, equation 7), from 0 to 1.

        The product over five scales of mean^weight, of the contrast map, at the coarsest of the
        SSIM map. A coarse voxel counts by the share of it that lies in the mask. A mean below 0 is
        taken for 0, whose root exists, as in torchmetrics and MONAI.
        """
        share: Voxels = mask.astype(np.float32)
        result = 1.0
        for level, weight in enumerate(MS_SSIM_WEIGHTS):
            share = share if level == 0 else _halve(share)
            last = level == len(MS_SSIM_WEIGHTS) - 1
            values = (self.ssim_maps if last else self.contrast_maps)[level]
            inside = share > 0
            mean = np.average(values[inside].astype(np.float64), weights=share[inside])
            result *= max(float(mean), 0.0) ** weight
        return result


def _maps(
    prediction: Voxels, truth: Voxels, data_range: float, edge: Edge
) -> tuple[Voxels, Voxels]:
    """SSIM and its second factor around every voxel; both are 1 where both images are 0 all around.

    So only the bounding box of what is not 0 is computed, with a margin of two windows' reaches:
    one that the window needs, one that a mirror at the edge of the box shows.
    """
    similarity = np.ones(truth.shape, dtype=np.float32)
    contrast = np.ones(truth.shape, dtype=np.float32)
    there = (prediction != 0) | (truth != 0)
    if not there.any():
        return similarity, contrast
    box = extent(there, SSIM_TAPS - 1)
    p = np.asarray(prediction[box], dtype=np.float32) / np.float32(data_range)
    t = np.asarray(truth[box], dtype=np.float32) / np.float32(data_range)
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    mean_p, mean_t = _smooth(p, edge), _smooth(t, edge)
    variances = _smooth(p * p + t * t, edge) - mean_p**2 - mean_t**2
    covariance = _smooth(p * t, edge) - mean_p * mean_t
    contrast[box] = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_p * mean_t + c1) / (mean_p**2 + mean_t**2 + c1)
    similarity[box] = luminance * contrast[box]
    return similarity, contrast


def _smooth(image: Voxels, edge: Edge) -> Voxels:
    """The SSIM window along every axis."""
    weights = _window(SSIM_TAPS, SSIM_SIGMA)
    for axis in range(image.ndim):
        image = ndimage.correlate1d(image, weights, axis=axis, mode=edge, cval=0.0)
    return image


def _halve(image: Voxels) -> Voxels:
    """Means over 2 x 2 x 2 voxels; an odd side is filled up with 0."""
    image = np.pad(image, [(0, side % 2) for side in image.shape])
    x, y, z = (side // 2 for side in image.shape)
    means: Voxels = image.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))
    return means


def _window(taps: int, sigma: float) -> Sequence[float]:
    """Gaussian weights at whole voxels around the middle, with sum 1."""
    offsets = np.arange(taps) - (taps - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return list(weights / weights.sum())
