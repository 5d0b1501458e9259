"""How near a prediction is to the truth inside the brain; arrays of shape (X, Y, Z) throughout.

The scale of a missing modality cannot be known, so a prediction p is first brought to the truth t
by the least-squares line a*p + b over the brain (`affine_fit`). Both are then expressed in shares
of the truth's in-brain range (`Aligned`): 0 and 1 are its 0.5 % and 99.5 % quantiles, nothing is
clipped, and every voxel outside the brain is 0 in both. So no figure depends on the units of either
image, and none can be raised by adding background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Aligned", "affine_fit", "intensity_range", "mae", "psnr", "ssim", "ssim_map"]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]

RANGE_QUANTILES = (0.005, 0.995)  # of the truth in the brain; further out are vessels and noise
SSIM_SIGMA = (
    1.5  # voxels, with 11 taps: Wang et al. 2004, and what MONAI and torchmetrics default to
)
SSIM_TAPS = 11
SSIM_K1, SSIM_K2 = 0.01, 0.03  # Wang et al. 2004


def affine_fit(prediction: Voxels, truth: Voxels, mask: Mask) -> tuple[float, float]:
    """(a, b) that minimize the sum over `mask` of (a * prediction + b - truth)^2.

    a = cov(p, t) / var(p) and b = mean(t) - a * mean(p). It may be negative: a copy of T1 then
    serves as an inverted T2, which makes it a harder floor. A constant prediction gives a = 0.
    """
    p = prediction[mask].astype(np.float64)
    t = truth[mask].astype(np.float64)
    variance = p.var()
    slope = float(np.mean((p - p.mean()) * (t - t.mean())) / variance) if variance > 0 else 0.0
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
    def of(cls, prediction: Voxels, truth: Voxels, brain: Mask) -> Self:
        """Align (X, Y, Z) arrays; ValueError if shapes differ, brain empty or truth constant."""
        if not prediction.shape == truth.shape == brain.shape:
            raise ValueError(
                "prediction, truth and brain must have one shape, got "
                f"{prediction.shape}, {truth.shape} and {brain.shape}"
            )
        if not brain.any():
            raise ValueError("the brain mask is empty")
        x, y, z = ndimage.find_objects(brain.astype(np.uint8))[0]
        brain = brain[x, y, z]
        prediction, truth = prediction[x, y, z], truth[x, y, z]
        slope, offset = affine_fit(prediction, truth, brain)
        low, high = intensity_range(truth, brain)
        fitted = (slope * prediction.astype(np.float32) + (offset - low)) / (high - low)
        shares = (truth.astype(np.float32) - low) / (high - low)
        return cls(
            prediction=np.where(brain, fitted, 0).astype(np.float32),
            truth=np.where(brain, shares, 0).astype(np.float32),
            brain=brain,
            box=(x, y, z),
        )


def mae(prediction: Voxels, truth: Voxels, mask: Mask) -> float:
    """Mean over `mask` of |prediction - truth|, in the units of the two."""
    return float(np.mean(np.abs(prediction[mask] - truth[mask]), dtype=np.float64))


def psnr(prediction: Voxels, truth: Voxels, mask: Mask, *, data_range: float = 1.0) -> float:
    """10 log10(data_range^2 / mean over `mask` of (prediction - truth)^2) dB; infinite if equal."""
    difference = prediction[mask].astype(np.float64) - truth[mask].astype(np.float64)
    mean_square = float(np.mean(difference**2))
    return float(10 * np.log10(data_range**2 / mean_square)) if mean_square > 0 else float("inf")


def ssim(prediction: Voxels, truth: Voxels, mask: Mask, *, data_range: float = 1.0) -> float:
    """Mean of `ssim_map` over the voxels of `mask`."""
    return float(
        np.mean(ssim_map(prediction, truth, data_range=data_range)[mask], dtype=np.float64)
    )


def ssim_map(prediction: Voxels, truth: Voxels, *, data_range: float = 1.0) -> Voxels:
    """Structural similarity around every voxel, (X, Y, Z) float32 (Wang et al. 2004, equation 13).

    With means, variances and covariance under a Gaussian window (sigma 1.5, 11 voxels per axis),
    (2 m_p m_t + c1)(2 c_pt + c2) / ((m_p^2 + m_t^2 + c1)(v_p + v_t + c2)), c1 = (0.01 range)^2,
    c2 = (0.03 range)^2. Beyond the edge of the array both images go on as 0, the background: a box
    cropped from a larger background gives the same values. The window is applied axis by axis,
    33 multiplications per voxel instead of 1331.
    """
    p = np.asarray(prediction, dtype=np.float32) / np.float32(data_range)
    t = np.asarray(truth, dtype=np.float32) / np.float32(data_range)
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    mean_p, mean_t = _smooth(p), _smooth(t)
    variances = _smooth(p * p + t * t) - mean_p**2 - mean_t**2
    covariance = _smooth(p * t) - mean_p * mean_t
    luminance = (2 * mean_p * mean_t + c1) / (mean_p**2 + mean_t**2 + c1)
    result: Voxels = luminance * (2 * covariance + c2) / (variances + c2)
    return result


def _smooth(image: Voxels) -> Voxels:
    """The SSIM window along every axis, with zeros beyond the edge."""
    weights = _window(SSIM_TAPS, SSIM_SIGMA)
    for axis in range(image.ndim):
        image = ndimage.correlate1d(image, weights, axis=axis, mode="constant", cval=0.0)
    return image


def _window(taps: int, sigma: float) -> Sequence[float]:
    """Gaussian weights at whole voxels around the middle, with sum 1."""
    offsets = np.arange(taps) - (taps - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return list(weights / weights.sum())
