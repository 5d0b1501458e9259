"""What is worth a kernel of its own on a GPU: the passes of `passes`, and the Haar transform.

In Triton, which comes with torch for CUDA. Everything is computed in float32. Of features, which
are rows (voxels, channels), a program works on a tile of `_ROWS` rows and of as many channels as a
power of two allows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "activate",
    "activate_",
    "add",
    "averaged",
    "haar",
    "inverse_haar",
    "joined",
    "scaling",
]

_ROWS = 32
_CUBES = 256
_PROGRAMS = 1024
"""That share out a sum over all rows: several for each multiprocessor of any GPU."""


def scaling(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As `passes.scaling`."""
    n, channels = x.shape
    wide = _width(channels)
    share = triton.cdiv(triton.cdiv(n, _PROGRAMS * wide // channels or 1), _ROWS) * _ROWS
    programs = triton.cdiv(n, share)
    sums = x.new_empty(2, programs, channels, dtype=torch.float32)
    _sum[programs, channels // wide](x, sums, n, share, programs, channels, wide, _ROWS)
    result = x.new_empty(2, channels, dtype=torch.float32)
    size = channels // groups
    _scale[(groups,)](
        sums, offset, weight, bias, result, n, eps, programs,
        channels, size, triton.next_power_of_2(size), 128,
    )  # fmt: skip
    return result[0], result[1]


def activate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As `passes.activate`."""
    return _activated(x, scale, shift, torch.empty_like(x))


def activate_(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """As `passes.activate_`."""
    _activated(x, scale, shift, x)


def _activated(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    n, channels = x.shape
    wide = _width(channels)
    _silu[triton.cdiv(n, _ROWS), channels // wide](x, scale, shift, out, n, channels, wide, _ROWS)
    return out


def add(
    x: Tensor, around: Tensor, offset: Tensor, size: Sequence[int], repeat: Sequence[int]
) -> None:
    """As `passes.add`."""
    n, channels = x.shape
    wide = _width(channels)
    _add[triton.cdiv(n, _ROWS), channels // wide](
        x, around, offset, n, size[1], size[2], *repeat, channels, wide, _ROWS
    )


def averaged(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """As `passes.averaged`."""
    n, channels = x.shape
    few, wide = n // (factors[0] * factors[1] * factors[2]), _width(channels)
    out = x.new_empty(few, channels)
    _average[triton.cdiv(few, _ROWS), channels // wide](
        x, out, few, size[1] // factors[1], size[2] // factors[2], *factors, channels, wide, _ROWS
    )
    return out


def joined(one: Tensor, other: Tensor) -> Tensor:
    """As `passes.joined`."""
    n, channels = len(one), one.shape[1] + other.shape[1]
    out = one.new_empty(n, channels)
    for x, first in ((one, 0), (other, one.shape[1])):
        wide = _width(x.shape[1])
        _place[triton.cdiv(n, _ROWS), x.shape[1] // wide](
            x, out, n, first, x.shape[1], channels, wide, _ROWS
        )
    return out


def haar(x: Tensor, lll: float, rest: float) -> Tensor:
    """(N, X, Y, Z) -> (N, 8, X/2, Y/2, Z/2), as `wavelet.dwt3`."""
    n, *size = x.shape
    y = x.new_empty(n, 8, *(length // 2 for length in size))
    _transform(x, y, lll, rest, inverse=False)
    return y


def inverse_haar(y: Tensor, lll: float, rest: float) -> Tensor:
    """(N, 8, X, Y, Z) -> (N, 2*X, 2*Y, 2*Z), as `wavelet.idwt3`."""
    n, _, *size = y.shape
    x = y.new_empty(n, *(2 * length for length in size))
    _transform(x, y, lll, rest, inverse=True)
    return x


def _transform(x: Tensor, y: Tensor, lll: float, rest: float, *, inverse: bool) -> None:
    n, _, nx, ny, nz = y.shape
    cubes = nx * ny * nz
    share = 8**-0.5
    _haar[triton.cdiv(cubes, _CUBES), n](
        x, y, lll * share, rest * share, ny, nz, cubes, inverse, _CUBES
    )


def _width(channels: int) -> int:
    """The largest power of two that divides the channels, up to 128."""
    return min(channels & -channels, 128)


@triton.jit
def _sum(
    x, sums, n, share, programs,
    channels, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the rows that fall to a program, by channel: sum and sum of squares."""
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, n)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    squares = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * channels + channel[None, :]
        value = tl.load(x + at, mask=(row < last)[:, None], other=0.0).to(tl.float32)
        total += value
        squares += value * value
    at = tl.program_id(0) * channels + channel
    tl.store(sums + at, tl.sum(total, 0))
    tl.store(sums + programs * channels + at, tl.sum(squares, 0))


@triton.jit
def _scale(
    sums, offset, weight, bias, result, n, eps, programs,
    channels, SIZE: tl.constexpr, WIDE: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """From sums to what a group's channels are multiplied with, and what is added."""
    within = tl.arange(0, WIDE)
    mask = within < SIZE
    channel = tl.program_id(0) * SIZE + within
    total = tl.zeros([MANY, WIDE], tl.float32)
    squares = tl.zeros([MANY, WIDE], tl.float32)
    for start in range(0, programs, MANY):
        program = start + tl.arange(0, MANY)
        at = program[:, None] * channels + channel[None, :]
        there = (program < programs)[:, None] & mask[None, :]
        total += tl.load(sums + at, mask=there, other=0.0)
        squares += tl.load(sums + programs * channels + at, mask=there, other=0.0)
    missing = tl.load(offset + channel, mask=mask, other=0.0)
    mean = tl.sum(total, 0) / n
    square = tl.sum(squares, 0) / n + missing * (2 * mean + missing)
    mean = tl.sum(tl.where(mask, mean + missing, 0.0), 0) / SIZE
    variance = tl.sum(tl.where(mask, square, 0.0), 0) / SIZE - mean * mean
    scale = tl.load(weight + channel, mask=mask, other=0.0) / tl.sqrt(tl.maximum(variance, 0) + eps)
    shift = (missing - mean) * scale + tl.load(bias + channel, mask=mask, other=0.0)
    tl.store(result + channel, scale, mask=mask)
    tl.store(result + channels + channel, shift, mask=mask)


@triton.jit
def _silu(
    x, scale, shift, out, n,
    channels, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    mask = (row < n)[:, None]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(scale + channel)[None, :] + tl.load(shift + channel)[None, :]
    value = value / (1 + tl.exp(-value))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(
    x, around, offset, n, ny, nz,
    FX: tl.constexpr, FY: tl.constexpr, FZ: tl.constexpr,
    channels, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (row < n)[:, None]
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    source = row
    if FX * FY * FZ > 1:
        z, y, i = row % nz, row // nz % ny, row // (ny * nz)
        source = (i // FX * (ny // FY) + y // FY) * (nz // FZ) + z // FZ
    near = source[:, None].to(tl.int64) * channels + channel[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(around + near, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(offset + channel)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _average(
    x, out, n, ny, nz,
    FX: tl.constexpr, FY: tl.constexpr, FZ: tl.constexpr,
    channels, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`n`, `ny` and `nz` are those of the coarse grid."""
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (row < n)[:, None]
    z, y, i = row % nz, row // nz % ny, row // (ny * nz)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for a in tl.static_range(FX):
        for b in tl.static_range(FY):
            for c in tl.static_range(FZ):
                source = ((i * FX + a) * (ny * FY) + y * FY + b) * (nz * FZ) + z * FZ + c
                at = source[:, None].to(tl.int64) * channels + channel[None, :]
                total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    total = total / (FX * FY * FZ)
    at = row[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _place(
    x, out, n, first,
    channels, wide, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Channels of x go to the channels of `out` from `first` on."""
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (row < n)[:, None]
    value = tl.load(x + row[:, None].to(tl.int64) * channels + channel[None, :], mask=mask)
    tl.store(out + row[:, None].to(tl.int64) * wide + first + channel[None, :], value, mask=mask)


@triton.jit
def _haar(x, y, lll, rest, ny, nz, cubes, INVERSE: tl.constexpr, CUBES: tl.constexpr):
    """From the cubes of x to the bands of y, or back: the matrix of Haar is its own inverse."""
    cube = tl.program_id(0) * CUBES + tl.arange(0, CUBES)
    mask = cube < cubes
    image = tl.program_id(1).to(tl.int64) * 8 * cubes
    k, j, i = cube % nz, cube // nz % ny, cube // (ny * nz)
    corner = x + image + ((2 * i * 2 * ny + 2 * j) * (2 * nz)).to(tl.int64) + 2 * k
    along_x, along_y = 4 * ny * nz, 2 * nz
    band = y + image + cube
    one, step_x, step_y, step_z = corner, along_x, along_y, 1
    if INVERSE:
        one, step_x, step_y, step_z = band, 4 * cubes, 2 * cubes, cubes
    a = tl.load(one, mask=mask).to(tl.float32)
    b = tl.load(one + step_z, mask=mask).to(tl.float32)
    c = tl.load(one + step_y, mask=mask).to(tl.float32)
    d = tl.load(one + step_y + step_z, mask=mask).to(tl.float32)
    one += step_x
    e = tl.load(one, mask=mask).to(tl.float32)
    f = tl.load(one + step_z, mask=mask).to(tl.float32)
    g = tl.load(one + step_y, mask=mask).to(tl.float32)
    h = tl.load(one + step_y + step_z, mask=mask).to(tl.float32)
    if INVERSE:
        a, b, c, d, e, f, g, h = (
            a * lll,
            b * rest,
            c * rest,
            d * rest,
            e * rest,
            f * rest,
            g * rest,
            h * rest,
        )
    a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
    a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
    a, b, c, d, e, f, g, h = a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h
    one, step_x, step_y, step_z = band, 4 * cubes, 2 * cubes, cubes
    if INVERSE:
        one, step_x, step_y, step_z = corner, along_x, along_y, 1
    if not INVERSE:
        a, b, c, d, e, f, g, h = (
            a * lll,
            b * rest,
            c * rest,
            d * rest,
            e * rest,
            f * rest,
            g * rest,
            h * rest,
        )
    tl.store(one, a.to(y.dtype.element_ty), mask=mask)
    tl.store(one + step_z, b.to(y.dtype.element_ty), mask=mask)
    tl.store(one + step_y, c.to(y.dtype.element_ty), mask=mask)
    tl.store(one + step_y + step_z, d.to(y.dtype.element_ty), mask=mask)
    one += step_x
    tl.store(one, e.to(y.dtype.element_ty), mask=mask)
    tl.store(one + step_z, f.to(y.dtype.element_ty), mask=mask)
    tl.store(one + step_y, g.to(y.dtype.element_ty), mask=mask)
    tl.store(one + step_y + step_z, h.to(y.dtype.element_ty), mask=mask)
