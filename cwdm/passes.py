"""What a network does to features between two convolutions, in as few passes over memory as can be.

Features are rows here, (voxels, channels), as channels-last memory holds them. A group
normalization is then a scale and a shift of every channel, found in one pass (`scaling`) and
applied together with SiLU in another (`activate`), in place where the input is not needed any more.
All compute in float32, whatever the features are kept in.

There are three ways. On a GPU they are kernels (`kernels`). On a processor `torch.compile` can make
loops in C++ of them, which takes half a minute once on a machine and three seconds in every process
afterwards: chains of many steps earn that back. In these two, what goes around a block is added
together with the biases of the convolutions before it (`add`), which need no pass of their own.
Otherwise torch runs the passes piece by piece, so that a piece stays in the cache from one
operation to the next.
"""

import math
from collections.abc import Callable, Sequence
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
    "averaged",
    "joined",
    "rows",
    "scaling",
]

Way = Literal["kernels", "compiled", "torch"]


def rows(x: Tensor) -> Tensor:
    """A view (X*Y*Z, C) of features (1, C, X, Y, Z) in channels-last order."""
    return x[0].permute(1, 2, 3, 0).view(-1, x.shape[1])


_PIECE = 2**18
"""Numbers that torch works on at a time on a processor."""


def scaling(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What group normalization multiplies and adds: (C,) each, so that it is x * scale + shift.

    Args:
        x: rows (N, C).
        offset: (C,), still missing from x: the normalization is that of x + offset.
        weight: (C,), with `bias` what follows the normalization.
    """
    sums = x.new_zeros(2, x.shape[1], dtype=torch.float64)
    for piece in _pieces(x):
        part = piece.float()
        ones = part.new_ones(1, len(part))
        sums[0] += (ones @ part)[0]
        sums[1] += (ones @ part.square())[0]
    mean, square = sums / len(x)
    return _affine(mean, square, offset, weight.view(groups, -1), bias, eps)


def activate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU of rows (N, C) times `scale` (C,) plus `shift` (C,)."""
    result = torch.empty_like(x)
    _activate(x, scale, shift, result)
    return result


def activate_(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """The same, in place."""
    _activate(x, scale, shift, x)


def _activate(x: Tensor, scale: Tensor, shift: Tensor, result: Tensor) -> None:
    for piece, target in zip(_pieces(x), _pieces(result), strict=True):
        if target.dtype == torch.float32:
            F.silu(torch.addcmul(shift, piece, scale, out=target), inplace=True)
        else:
            target.copy_(F.silu(torch.addcmul(shift, piece.float(), scale), inplace=True))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Of rows; on a GPU all of them."""
    rows_each = max(1, _PIECE // x.shape[1]) if x.device.type == "cpu" else len(x)
    pieces: tuple[Tensor, ...] = x.split(rows_each)
    return pieces


def _affine(
    mean: Tensor, square: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`scaling` from the mean of each channel and of its square; weight (groups, C / groups)."""
    square = square + offset * (2 * mean + offset)
    mean = (mean + offset).view_as(weight).mean(1, keepdim=True)
    variance = square.view_as(weight).mean(1, keepdim=True) - mean.square()
    scale = weight * torch.rsqrt(variance.clamp(min=0) + eps)
    shift = (offset.view_as(weight) - mean) * scale
    return scale.flatten().float(), (shift.flatten() + bias).float()


def add(
    x: Tensor, around: Tensor, offset: Tensor, size: Sequence[int], repeat: Sequence[int]
) -> None:
    """x += around + offset, in place.

    Args:
        x: rows of the grid `size`.
        around: rows of a coarser grid, each voxel of which `repeat` voxels of x share by axis.
        offset: (C,).
    """
    _add(*_aside(x, around, size, repeat), offset)


def averaged(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Means over so many voxels along each axis of the grid `size`: rows of a coarser grid.

    A convolution of each channel by itself is quicker than pooling, and there in bfloat16.
    """
    channels = x.shape[1]
    share = x.new_full((channels, 1, *factors), 1 / math.prod(factors))
    image = x.view(1, *size, channels).movedim(-1, 1)
    means = F.conv3d(image, share, stride=tuple(factors), groups=channels)
    return rows(means.contiguous(memory_format=torch.channels_last_3d))


def joined(one: Tensor, other: Tensor) -> Tensor:
    """Rows with the channels of both."""
    return torch.cat([one, other], dim=1)


def _add(x: Tensor, around: Tensor, offset: Tensor) -> None:
    x.copy_(x.float() + around + offset)


def _aside(
    x: Tensor, around: Tensor, size: Sequence[int], repeat: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Fine and coarse rows, shaped so that they can be added."""
    coarse = [n // factor for n, factor in zip(size, repeat, strict=True)]
    return _split(x, size, repeat), _split(around, coarse, (1, 1, 1))


def _split(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Rows as (X/fx, fx, Y/fy, fy, Z/fz, fz, C)."""
    (nx, ny, nz), (fx, fy, fz) = size, factors
    return x.view(nx // fx, fx, ny // fy, fy, nz // fz, fz, x.shape[1])


def _scaling_as_loop(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`scaling` for weights by group, to be compiled."""
    x = x.float()
    return _affine(x.mean(0), x.square().mean(0), offset, weight, bias, eps)


def _activate_as_loop(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`activate`, to be compiled."""
    return F.silu(x.float() * scale + shift).to(x.dtype)


def _activate_as_loop_(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """`activate_`, to be compiled."""
    x.copy_(F.silu(x.float() * scale + shift))


_PASSES = (scaling, activate, activate_, add, averaged, joined)


def _loops() -> list[Callable[..., Any]]:
    """`_PASSES`, those compiled that gain by it.

    None of them is given whole numbers: they would be taken for sizes that may vary.
    """
    of_groups, activate, activate_, adding = map(
        loops, (_scaling_as_loop, _activate_as_loop, _activate_as_loop_, _add)
    )

    def scaling(
        x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = of_groups(x, offset, weight.view(groups, -1), bias, eps)
        return found

    def add(
        x: Tensor, around: Tensor, offset: Tensor, size: Sequence[int], repeat: Sequence[int]
    ) -> None:
        adding(*_aside(x, around, size, repeat), offset)

    return [scaling, activate, activate_, add, averaged, joined]


class Passes:
    """The passes on a device, in the way that was chosen last.

    `scaling`, `activate`, `activate_`, `add`, `averaged` and `joined` are those of this module.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.choose()

    def choose(self, *, compiled: bool = False) -> Way:
        """The way from now on: kernels where they work, else compiled if wanted and possible."""
        self.way: Way = "torch"
        functions: Sequence[Callable[..., Any]] = _PASSES
        if self.device.type == "cuda" and (found := kernels()):
            self.way, functions = "kernels", [getattr(found, each.__name__) for each in _PASSES]
        elif compiled and self.device.type == "cpu" and loops_work():
            self.way, functions = "compiled", _loops()
        self.scaling, self.activate, self.activate_, self.add, self.averaged, self.joined = (
            functions
        )
        return self.way

    def outline(self) -> "Passes":
        """The same without the work: what they return is allocated, for `memory`."""
        outline = Passes(self.device)
        outline.way = self.way
        outline.scaling = lambda x, *_: torch.empty(2, x.shape[1]).unbind()
        outline.activate = lambda x, *_: torch.empty_like(x)
        outline.activate_ = outline.add = lambda *_: None
        outline.averaged = lambda x, _, factors: x.new_empty(
            len(x) // math.prod(factors), *x.shape[1:]
        )
        outline.joined = lambda x, other: x.new_empty(len(x), x.shape[1] + other.shape[1])
        return outline

    @property
    def fused(self) -> bool:
        """Whether `add` is one pass, and so adds what convolutions owe."""
        return self.way != "torch"

    def pay(self, dtype: torch.dtype) -> bool:
        """Whether they are quicker than torch's own normalization of such features: not in half
        precision on a processor, as torch runs them."""
        return self.fused or self.device.type != "cpu" or dtype == torch.float32
