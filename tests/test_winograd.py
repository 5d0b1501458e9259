"""Fewer multiplications, the same convolution."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdm import winograd


@settings(deadline=None, max_examples=30)
@given(
    tiles=st.integers(1, 3),
    plane=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_six_convolutions_of_planes_are_four_planes_of_a_convolution(
    tiles: int, plane: tuple[int, int], channels: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = winograd.PLANES * tiles
    x = torch.randn(1, channels[0], length + 2, *plane, generator=generator).double()
    weight = torch.randn(channels[1], channels[0], 3, 3, 3, generator=generator).double()
    bias = torch.randn(channels[1], generator=generator).double()
    expected = F.conv3d(x, weight, bias, padding=(0, 1, 1))[0].movedim(1, 0)
    weights, planes, found = winograd.transformed(weight), x[0].movedim(1, 0), []
    for start in range(0, length, winograd.PLANES):
        given = planes[start : start + winograd.SEEN]
        seen = torch.einsum("kx,x...->k...", winograd.INPUT.double(), given)
        made = torch.stack(
            [
                F.conv2d(one, each, bias if k == winograd.EVERY else None, padding=1)
                for k, (one, each) in enumerate(zip(seen, weights, strict=True))
            ]
        )
        found.append(torch.einsum("yk,k...->y...", winograd.OUTPUT.double(), made))
    torch.testing.assert_close(torch.cat(found), expected)
