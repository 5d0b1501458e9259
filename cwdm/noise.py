"""Random numbers that depend on a seed and on nothing else."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["noise_stream"]


def noise_stream(
    shape: Sequence[int], seed: int, device: torch.device | str = "cpu"
) -> Callable[[], Tensor]:
    """Successive draws of N(0, 1) of one shape that depend on the seed only.

    They come from a CPU generator of their own, so that neither other cases nor the kind of
    accelerator change a result.
    """
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(*shape, generator=generator).to(device)
