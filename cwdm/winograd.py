"""Convolutions with 3 x 3 x 3 taps in half of the multiplications.

F(4, 3) of Winograd 1980 (as Lavin & Gray 2016, arXiv 1509.09308, write it) along the first axis:
four planes of the output take six convolutions of planes instead of twelve. Planes lie one after
the other in memory, so that the transforms are small matrix products over all that they hold.

The result is the same up to rounding: about 2e-6 in float32. In half precision the rounding of
sums of planes is too coarse, and it is not used.
"""

import torch
from torch import Tensor

__all__ = ["EVERY", "INPUT", "OUTPUT", "PLANES", "SEEN", "transformed"]

PLANES, SEEN = 4, 6
"""Planes of the output that are made at once, and of the input that they see."""

INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float32,
)
"""Six planes to six sums of planes: values at 0, 1, -1, 2, -2 and infinity."""

_WEIGHT = (
    torch.tensor(
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
        dtype=torch.float64,
    )
    / 24
)
"""Three taps to the weights of the six sums."""

OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float32,
)
"""Six convolved sums to four planes."""

EVERY = 1
"""The sum to which a bias is added, so that it is in every plane."""


def transformed(weight: Tensor) -> Tensor:
    """Weights (6, out, in, 3, 3) for planes, of a convolution's (out, in, 3, 3, 3)."""
    return torch.einsum("kx,oixyz->koiyz", _WEIGHT, weight.double()).to(weight.dtype)
