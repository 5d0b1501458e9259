"""What a network does to features between two convolutions, each in one pass over memory.

Features are rows here, (voxels, channels), as channels-last memory holds them. A group
normalization is then a scale and a shift of every channel, found in one pass (`scaling`) and
applied together with SiLU in another (`activate`); what goes around a block is added together with
the biases of the convolutions before it (`add`), which therefore need no pass of their own.

There are three ways. On a GPU they are kernels (`kernels`). On a processor `torch.compile` can make
loops in C++ of them, which takes half a minute once on a machine and three seconds in every process
afterwards: chains of many steps earn that back. Otherwise torch runs them as they stand here. All
compute in float32, whatever the features are kept in.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
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


def scaling(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What group normalization multiplies and adds: (C,) each, so that it is x * scale + shift.

    Args:
        x: rows (N, C).
        offset: (C,), still missing from x: the normalization is that of x + offset.
        weight: (C,), with `bias` what follows the normalization.
    """
    x = x.float()
    mean, square = x.mean(0), x.square().mean(0)
    square = square + offset * (2 * mean + offset)
    mean = (mean + offset).view(groups, -1).mean(1, keepdim=True)
    variance = square.view(groups, -1).mean(1, keepdim=True) - mean.square()
    scale = weight.view(groups, -1) * torch.rsqrt(variance.clamp(min=0) + eps)
    shift = (offset.view(groups, -1) - mean) * scale
    return scale.flatten(), shift.flatten() + bias


def _silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = x.float() * scale + shift
    return x * torch.sigmoid(x)


def activate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU of rows (N, C) times `scale` (C,) plus `shift` (C,)."""
    return _silu(x, scale, shift).to(x.dtype)


def activate_(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """The same, in place."""
    x.copy_(_silu(x, scale, shift))


def add(
    x: Tensor, around: Tensor, offset: Tensor, size: Sequence[int], repeat: Sequence[int]
) -> None:
    """x += around + offset, in place.

    Args:
        x: rows of the grid `size`.
        around: rows of a coarser grid, each voxel of which `repeat` voxels of x share by axis.
        offset: (C,).
    """
    x = _split(x, size, repeat)
    coarse = [n // factor for n, factor in zip(size, repeat, strict=True)]
    x.copy_(x.float() + _split(around, coarse, (1, 1, 1)) + offset)


def averaged(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Means over so many voxels along each axis of the grid `size`: rows of a coarser grid."""
    return _split(x, size, factors).float().mean((1, 3, 5)).view(-1, x.shape[1]).to(x.dtype)


def joined(one: Tensor, other: Tensor) -> Tensor:
    """Rows with the channels of both."""
    return torch.cat([one, other], dim=1)


def _split(x: Tensor, size: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Rows as (X/fx, fx, Y/fy, fy, Z/fz, fz, C)."""
    (nx, ny, nz), (fx, fy, fz) = size, factors
    return x.view(nx // fx, fx, ny // fy, fy, nz // fz, fz, x.shape[1])


_PASSES = (scaling, activate, activate_, add, averaged, joined)


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
            self.way, functions = "compiled", [loops(each) for each in _PASSES]
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
    def pay(self) -> bool:
        """Not on a processor as torch runs them: there its own normalization is quicker."""
        return self.way != "torch" or self.device.type != "cpu"
