"""Orthonormal wavelet transform of volumes, one level, periodic at the borders.

Haar, the wavelet of WDM (Friedrich et al. 2024, arXiv 2402.19043, section 3.1), is built in: along
each axis the low band is ``(x[2i] + x[2i+1]) / sqrt(2)`` and the high band
``(x[2i] - x[2i+1]) / sqrt(2)``. Every other orthogonal wavelet takes its filters from PyWavelets
(extra ``cwdm[wavelets]``) and equals its mode "periodization", so that n samples become n/2 in each
band whatever the length of the filter.

The transform keeps the energy of a volume, turns white noise into white noise, and its inverse is
its transpose (Mallat 1989).
"""

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cwdm.compilers import kernels
from cwdm.errors import InputError

__all__ = ["BANDS", "dwt3", "filters", "idwt3"]

BANDS = tuple("".join(letters) for letters in product("lh", repeat=3))
"""Sub-bands in channel order, one letter per axis X, Y, Z: lll, llh, lhl, lhh, hll, ..., hhh."""


@cache
def filters(wavelet: str) -> Tensor:
    """Low and high pass of a wavelet, (2, L) float64, so that band = sum_k filter[k] x[2i + k].

    Raises:
        InputError: no such wavelet, or not an orthogonal one, or PyWavelets is not installed.
    """
    if wavelet == "haar":
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise InputError(
            f"wavelet {wavelet!r} needs PyWavelets: pip install 'cwdm[wavelets]'"
        ) from error
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise InputError(f"{wavelet!r} is not a wavelet, expected one such as haar, db2 or sym4")
    found = pywt.Wavelet(wavelet)
    if not found.orthogonal:
        raise InputError(f"wavelet {wavelet!r} is not orthogonal, expected one such as db2 or sym4")
    pair = torch.tensor([found.dec_lo, found.dec_hi], dtype=torch.float64)
    return pair.flip(1)  # a convolution runs backwards


def dwt3(x: Tensor, wavelet: str = "haar", *, lll: float = 1.0, rest: float = 1.0) -> Tensor:
    """Forward transform: (B, C, X, Y, Z) -> (B, 8*C, X/2, Y/2, Z/2).

    Channel ``8*c + b`` of the result is band ``BANDS[b]`` of channel ``c``.

    Args:
        lll: what the lowest band is multiplied with afterwards.
        rest: the same of the other seven.

    Raises:
        ValueError: if ``x`` is not 5D or an axis has an odd length or is shorter than the filter.
    """
    if x.ndim != 5 or any(n % 2 for n in x.shape[2:]):
        raise ValueError(f"expected (B, C, X, Y, Z) with even X, Y, Z, got {tuple(x.shape)}")
    bank = _long_enough(filters(wavelet), x.shape[2:])
    b, c, *size = x.shape
    if bank.shape[1] == 2:
        y = _haar(x.reshape(b * c, *size), lll, rest)
        return y.reshape(b, 8 * c, *y.shape[2:])
    y = x.reshape(b * c, 1, *size)
    before, after = _overhang(bank)
    for axis in range(3):
        around = [0] * 6
        around[4 - 2 * axis : 6 - 2 * axis] = before, after
        weight, stride = _along(bank, axis)
        y = F.conv3d(F.pad(y, around, "circular"), weight.to(x), stride=stride)
        y = y.reshape(-1, 1, *y.shape[2:])
    y = y.reshape(b * c, 8, *y.shape[2:]) * _gains(lll, rest).view(8, 1, 1, 1).to(y)
    return y.reshape(b, 8 * c, *y.shape[2:])


def idwt3(y: Tensor, wavelet: str = "haar", *, lll: float = 1.0, rest: float = 1.0) -> Tensor:
    """Inverse transform: (B, 8*C, X, Y, Z) -> (B, C, 2*X, 2*Y, 2*Z); ``idwt3(dwt3(x)) == x``.

    Args:
        lll: what the lowest band is multiplied with before.
        rest: the same of the other seven.

    Raises:
        ValueError: if ``y`` is not 5D, its channels are not a multiple of eight, or an axis of the
            volume is shorter than the filter.
    """
    if y.ndim != 5 or y.shape[1] % 8:
        raise ValueError(f"expected (B, 8*C, X, Y, Z), got {tuple(y.shape)}")
    bank = _long_enough(filters(wavelet), [2 * n for n in y.shape[2:]])
    b, c, *size = y.shape
    if bank.shape[1] == 2:
        x = _inverse_haar(y.reshape(b * c // 8, 8, *size), lll, rest)
        return x.reshape(b, c // 8, *x.shape[1:])
    x = y.reshape(b * c // 8, 8, *size) * _gains(lll, rest).view(8, 1, 1, 1).to(y)
    before, after = _overhang(bank)
    for axis in reversed(range(3)):
        bands = x.reshape(-1, 2, *x.shape[2:])
        weight, stride = _along(bank, axis)
        x = F.conv_transpose3d(bands, weight.to(y), stride=stride)
        x = _fold(x, 2 + axis, before, after)
    return x.reshape(b, c // 8, *x.shape[2:])


_CUBES = 2**17
"""Of 2 x 2 x 2 voxels that are transformed at a time: they and their bands stay in the cache."""


def _haar(x: Tensor, lll: float, rest: float) -> Tensor:
    """(N, X, Y, Z) -> (N, 8, X/2, Y/2, Z/2), reading and writing memory once."""
    n, *size = x.shape
    nx, ny, nz = (length // 2 for length in size)
    if x.is_cuda and (found := kernels()) and not _differentiated(x):
        return found.haar(x.contiguous(), lll, rest)  # type: ignore[no-any-return]
    matrix = _cubes(lll, rest).to(x)
    if x.device.type != "cpu" or _differentiated(x):
        return F.conv3d(x[:, None], matrix.view(8, 1, 2, 2, 2), stride=2)
    cubes = x.reshape(n * nx, 2, ny, 2, nz, 2).permute(1, 3, 5, 0, 2, 4)
    y = x.new_empty(n, 8, nx, ny, nz)
    with torch.autocast("cpu", enabled=False):
        for image, first, last in _slabs(n, nx, ny * nz):
            given = cubes[..., image * nx + first : image * nx + last, :, :].reshape(8, -1)
            torch.mm(matrix, given, out=y[image, :, first:last].view(8, -1))
    return y


def _inverse_haar(y: Tensor, lll: float, rest: float) -> Tensor:
    """(N, 8, X, Y, Z) -> (N, 2*X, 2*Y, 2*Z), reading and writing memory once."""
    n, _, nx, ny, nz = y.shape
    if y.is_cuda and (found := kernels()) and not _differentiated(y):
        return found.inverse_haar(y.contiguous(), lll, rest)  # type: ignore[no-any-return]
    matrix = _cubes(lll, rest).to(y)
    if y.device.type != "cpu" or _differentiated(y) or y.dtype == torch.bfloat16:
        return F.conv_transpose3d(y, matrix.view(8, 1, 2, 2, 2), stride=2)[:, 0]
    y = y.contiguous()
    x = y.new_empty(n * nx, 2, ny, 2, nz, 2)
    pairs = torch.view_as_complex(x).permute(1, 3, 0, 2, 4)  # neighbours along Z, written at once
    with torch.autocast("cpu", enabled=False):
        for image, first, last in _slabs(n, nx, ny * nz):
            cubes = torch.mm(matrix.T, y[image, :, first:last].reshape(8, -1))
            one, other = cubes.view(2, 2, 2, -1, ny, nz).unbind(2)
            torch.complex(one, other, out=pairs[:, :, image * nx + first : image * nx + last])
    return x.view(n, 2 * nx, 2 * ny, 2 * nz)


def _slabs(n: int, planes: int, cubes: int) -> Iterator[tuple[int, int, int]]:
    """Image, first and last plane of pieces of about `_CUBES`, of n images with so many cubes in
    each plane."""
    step = max(1, _CUBES // cubes)
    for image in range(n):
        for first in range(0, planes, step):
            yield image, first, min(first + step, planes)


def _differentiated(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _gains(lll: float, rest: float) -> Tensor:
    return torch.tensor([lll] + 7 * [rest], dtype=torch.float64)


def _cubes(lll: float, rest: float) -> Tensor:
    """The eight separable 2 x 2 x 2 filters of Haar, (8, 8): band, and place in the cube."""
    bank = filters("haar")
    cubes = torch.einsum("ip,jq,kr->ijkpqr", bank, bank, bank).reshape(8, 8)
    return cubes * _gains(lll, rest)[:, None]


def _along(bank: Tensor, axis: int) -> tuple[Tensor, tuple[int, ...]]:
    """Weight and stride of a convolution along one axis, one channel to (low, high)."""
    size, stride = [1, 1, 1], [1, 1, 1]
    size[axis], stride[axis] = bank.shape[1], 2
    return bank.reshape(2, 1, *size), tuple(stride)


def _overhang(bank: Tensor) -> tuple[int, int]:
    """How far a filter reaches over the two ends, centred as PyWavelets does."""
    reach = bank.shape[1] - 2
    return reach // 2, reach - reach // 2


def _fold(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Add what hangs over the ends to the other end: the transpose of circular padding."""
    n = x.shape[axis] - before - after
    middle = x.narrow(axis, before, n).clone()
    middle.narrow(axis, n - before, before).add_(x.narrow(axis, 0, before))
    middle.narrow(axis, 0, after).add_(x.narrow(axis, before + n, after))
    return middle


def _long_enough(bank: Tensor, size: list[int] | torch.Size) -> Tensor:
    if min(size) < bank.shape[1]:
        raise ValueError(f"volume {tuple(size)} is smaller than the filter ({bank.shape[1]})")
    return bank
