"""Images as wavelet coefficients: the transform of ``wavelet`` and the scaling networks expect.

Source: WDM (Friedrich et al. 2024, arXiv 2402.19043) and cWDM (arXiv 2411.17203).
"""

import torch
from torch import Tensor

from cwdm.wavelet import dwt3, idwt3

__all__ = ["LLL_SCALE", "clamp_image", "decode", "encode"]

LLL_SCALE = 3.0
"""Divisor of the LLL band. LLL of an image in [0, 1] lies in [0, 2*sqrt(2)]; the published code
divides by 3, which brings it to about [0, 1]. Noise is *not* divided."""


def _band_scale(coefficients: Tensor) -> Tensor:
    """(8*C, 1, 1, 1): LLL_SCALE for each LLL channel, one elsewhere."""
    scale = torch.ones(coefficients.shape[1], 1, 1, 1)
    scale[::8] = LLL_SCALE
    return scale.to(coefficients)


def encode(images: Tensor) -> Tensor:
    """Images (B, C, X, Y, Z) -> coefficients (B, 8*C, X/2, Y/2, Z/2) with the LLL bands scaled."""
    coefficients = dwt3(images)
    return coefficients / _band_scale(coefficients)


def decode(coefficients: Tensor) -> Tensor:
    """Coefficients (B, 8*C, X, Y, Z) -> images (B, C, 2*X, 2*Y, 2*Z); inverse of ``encode``."""
    return idwt3(coefficients * _band_scale(coefficients))


def clamp_image(coefficients: Tensor, low: float, high: float) -> Tensor:
    """Coefficients of the same image with its voxels clamped to [low, high]."""
    return encode(decode(coefficients).clamp(low, high))
