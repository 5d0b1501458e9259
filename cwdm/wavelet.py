"""Orthonormal Haar wavelet transform of volumes, one level, as strided convolutions.

Along each axis the low band is ``(x[2i] + x[2i+1]) / sqrt(2)`` and the high band
``(x[2i] - x[2i+1]) / sqrt(2)`` (Mallat 1989; the sign of WDM, Friedrich et al. 2024,
arXiv 2402.19043, section 3.1). The transform is orthonormal: it keeps the energy of a volume,
turns white noise into white noise, and its inverse is its transpose.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BANDS", "dwt3", "idwt3"]

BANDS = tuple("".join(letters) for letters in product("lh", repeat=3))
"""Sub-bands in channel order, one letter per axis X, Y, Z: lll, llh, lhl, lhh, hll, ..., hhh."""


def _filters(like: Tensor) -> Tensor:
    """The eight separable 2x2x2 filters, shape (8, 1, 2, 2, 2)."""
    haar = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    bank = torch.einsum("ip,jq,kr->ijkpqr", haar, haar, haar)
    return bank.reshape(8, 1, 2, 2, 2).to(like)


def dwt3(x: Tensor) -> Tensor:
    """Forward transform: (B, C, X, Y, Z) -> (B, 8*C, X/2, Y/2, Z/2).

    Channel ``8*c + b`` of the result is band ``BANDS[b]`` of channel ``c``.

    Raises:
        ValueError: if ``x`` is not 5D or an axis has an odd length.
    """
    if x.ndim != 5 or any(n % 2 for n in x.shape[2:]):
        raise ValueError(f"expected (B, C, X, Y, Z) with even X, Y, Z, got {tuple(x.shape)}")
    b, c, *size = x.shape
    y = F.conv3d(x.reshape(b * c, 1, *size), _filters(x), stride=2)
    return y.reshape(b, 8 * c, *y.shape[2:])


def idwt3(y: Tensor) -> Tensor:
    """Inverse transform: (B, 8*C, X, Y, Z) -> (B, C, 2*X, 2*Y, 2*Z); ``idwt3(dwt3(x)) == x``.

    Raises:
        ValueError: if ``y`` is not 5D or its channels are not a multiple of eight.
    """
    if y.ndim != 5 or y.shape[1] % 8:
        raise ValueError(f"expected (B, 8*C, X, Y, Z), got {tuple(y.shape)}")
    b, c, *size = y.shape
    x = F.conv_transpose3d(y.reshape(b * c // 8, 8, *size), _filters(y), stride=2)
    return x.reshape(b, c // 8, *x.shape[2:])
