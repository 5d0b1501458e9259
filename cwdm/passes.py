"""What a network does to features between two convolutions, in as few passes over memory as can be.

Features are rows here, (voxels, channels), as channels-last memory holds them. A group
normalization is then a scale and a shift of every channel, found in one pass (`scaling`) and
applied together with SiLU in another (`activate`), in place where the input is not needed any more.
All compute in float32, whatever the features are kept in.

On a GPU they are kernels (`kernels`), for whole images: what goes around a block is added together
with the biases of the convolutions before it (`add`), which need no pass of their own. For windows
of an image (`streamed`), `fill` and `put` are a pass each: on a processor that multiplies in
bfloat16 `torch.compile` can make loops in C++ of them, which takes half a minute once on a machine
and three seconds in every process afterwards. Chains of many steps earn that back. Everywhere else
torch runs the passes operation by operation.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cwdm.compilers import kernels, loops, loops_work

__all__ = [
    "Passes",
    "Way",
    "activate",
    "activate_",
    "add",
    "affine",
    "averaged",
    "fill",
    "joined",
    "put",
    "rows",
    "scaling",
    "sums",
]

Way = Literal["kernels", "compiled", "torch"]

_PIECE, _PIECE_ON_GPU = 2**18, 2**22
"""Numbers that torch works on at a time: what a processor's cache holds, what keeps a GPU busy."""


def rows(x: Tensor) -> Tensor:
    """A view (X*Y*Z, C) of features (1, C, X, Y, Z) in channels-last order."""
    return x[0].permute(1, 2, 3, 0).view(-1, x.shape[1])


def sums(x: Tensor) -> Tensor:
    """(2, C) of each channel of rows (N, C) and of its square, in float64."""
    found = x.new_zeros(2, x.shape[1], dtype=torch.float64)
    for (piece,) in _pieces(x):
        part = piece.float()
        ones = part.new_ones(1, len(part))
        found[0] += (ones @ part)[0]
        found[1] += (ones @ part.square())[0]
    return found


def _pieces(*images: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """A few rows of each at a time.

    Of tensors without numbers (`memory`) the first: the others take no more.
    """
    piece = _PIECE_ON_GPU if images[0].is_cuda else _PIECE
    count = max(1, piece // images[0].shape[1])
    parts = zip(*(image.split(count) for image in images), strict=True)
    return [next(parts)] if images[0].is_meta else parts


def affine(
    mean: Tensor, square: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`scaling` from the mean of each channel and of its square; weight (groups, C / groups)."""
    square = square + offset * (2 * mean + offset)
    mean = (mean + offset).view_as(weight).mean(1, keepdim=True)
    variance = square.view_as(weight).mean(1, keepdim=True) - mean.square()
    scale = weight * torch.rsqrt(variance.clamp(min=0) + eps)
    shift = (offset.view_as(weight) - mean) * scale
    return scale.flatten().float(), (shift.flatten() + bias).float()


def averaged(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Means over so many voxels along each axis of the grid `size`: rows of a coarser grid.

    A convolution of each channel by itself is quicker than pooling, and there in bfloat16.
    """
    channels = x.shape[1]
    share = x.new_full((channels, 1, *factors), 1 / math.prod(factors))
    image = x.view(1, *size, channels).movedim(-1, 1)
    means = F.conv3d(image, share, stride=tuple(factors), groups=channels)
    return rows(means.contiguous(memory_format=torch.channels_last_3d))


def fill(x: Tensor, scale: Tensor, shift: Tensor, result: Tensor) -> None:
    """Put SiLU of rows (N, C) times `scale` (C,) plus `shift` (C,) into other rows."""
    if x.dtype is result.dtype is torch.float32:
        torch.addcmul(shift, x, scale, out=result)
        F.silu(result, inplace=True)
        return
    for piece, target in _pieces(x, result):
        target.copy_(F.silu(torch.addcmul(shift, piece.float(), scale), inplace=True))


def put(x: Tensor, around: Tensor | None, result: Tensor) -> Tensor:
    """Put rows (N, C), with what is around them if anything, into other rows: `sums` of those.

    Where those are of another type, x is changed.
    """
    if x.dtype is not result.dtype:
        x = x if around is None else x.add_(around)
        result.copy_(x)
        return sums(x)
    if around is None:
        result.copy_(x)
    else:
        torch.add(x, around, out=result)
    return sums(result)


def _fill_as_loop(x: Tensor, scale: Tensor, shift: Tensor, result: Tensor) -> None:
    """`fill`, to be compiled."""
    result.copy_(F.silu(x.float() * scale + shift))


def _put_as_loop(x: Tensor, around: Tensor | None, result: Tensor) -> Tensor:
    """`put`, to be compiled."""
    total = x.float() if around is None else x.float() + around
    result.copy_(total)
    return torch.stack([total.sum(0), total.square().sum(0)])


def scaling(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What group normalization multiplies and adds: (C,) each, so that it is x * scale + shift.

    Args:
        x: rows (N, C).
        offset: (C,), still missing from x: the normalization is that of x + offset.
        weight: (C,), with `bias` what follows the normalization.
    """
    mean, square = sums(x) / len(x)
    return affine(mean, square, offset, weight.view(groups, -1), bias, eps)


def activate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU of rows (N, C) times `scale` (C,) plus `shift` (C,)."""
    result = torch.empty_like(x)
    fill(x, scale, shift, result)
    return result


def activate_(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """The same, in place."""
    fill(x, scale, shift, x)


def add(
    x: Tensor, around: Tensor, offset: Tensor, size: Sequence[int], repeat: Sequence[int]
) -> None:
    """x += around + offset, in place.

    Args:
        x: rows of the grid `size`.
        around: rows of a coarser grid, each voxel of which `repeat` voxels of x share by axis.
        offset: (C,).
    """
    coarse = [n // factor for n, factor in zip(size, repeat, strict=True)]
    fine = _split(x, size, repeat)
    fine.copy_(fine.float() + _split(around, coarse, (1, 1, 1)) + offset)


def joined(one: Tensor, other: Tensor) -> Tensor:
    """Rows with the channels of both."""
    return torch.cat([one, other], dim=1)


def _split(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Rows as (X/fx, fx, Y/fy, fy, Z/fz, fz, C)."""
    (nx, ny, nz), (fx, fy, fz) = size, factors
    return x.view(nx // fx, fx, ny // fy, fy, nz // fz, fz, x.shape[1])


_WHOLE = (scaling, activate, activate_, add, averaged, joined)


class Passes:
    """The passes on a device, in the way that was chosen last.

    `fill` and `put` are for windows; `scaling`, `activate`, `activate_`, `add`, `averaged` and
    `joined` for whole images.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.choose()

    def choose(self, *, compiled: bool = False) -> Way:
        """The way from now on: kernels where they work, else compiled if wanted and possible."""
        way: Way = "torch"
        whole: Sequence[Callable[..., Any]] = _WHOLE
        windows: tuple[Callable[..., Any], ...] = (fill, put)
        if self.device.type == "cuda" and (found := kernels()):
            way, whole = "kernels", [getattr(found, each.__name__) for each in _WHOLE]
        elif compiled and self.device.type == "cpu" and loops_work():
            way, windows = "compiled", (loops(_fill_as_loop), loops(_put_as_loop))
        self.way: Way = way
        self.fill, self.put = windows
        self.scaling, self.activate, self.activate_, self.add, self.averaged, self.joined = whole
        return self.way

    def outline(self) -> "Passes":
        """The same without the work: what they return is allocated, for `memory`."""
        outline = Passes(self.device)
        piece = _PIECE_ON_GPU if self.device.type == "cuda" else _PIECE

        def pieces(x: Tensor) -> None:
            torch.empty(2, min(piece, x.numel()))

        def put(x: Tensor, *_: Any) -> Tensor:
            pieces(x)
            return torch.empty(2, x.shape[1])

        outline.fill, outline.put = lambda x, *_: pieces(x), put
        outline.scaling = lambda x, *_: torch.empty(2, x.shape[1]).unbind()
        outline.activate = lambda x, *_: torch.empty_like(x)
        outline.activate_ = outline.add = lambda *_: None
        outline.averaged = lambda x, _, factors: x.new_empty(
            len(x) // math.prod(factors), *x.shape[1:]
        )
        outline.joined = lambda x, other: x.new_empty(len(x), x.shape[1] + other.shape[1])
        return outline
