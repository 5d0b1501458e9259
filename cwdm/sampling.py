"""Samplers: from noise to an image through a denoiser's estimates of x_0.

A sampler is one function that goes from time t to a time s < t. It never asks how far apart the
two are, so every subset of the steps works with the same code.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from cwdm.coefficients import clamp_image
from cwdm.diffusion import Schedule

__all__ = [
    "SAMPLERS",
    "Denoise",
    "Step",
    "clamped",
    "ddim_step",
    "ddpm_step",
    "noise_stream",
    "sample",
]

Denoise = Callable[[Tensor, int], Tensor]
"""(x_t (B, 8, X, Y, Z), t) -> estimate of x_0, of the same shape."""

Step = Callable[[Schedule, Tensor, Tensor, int, int, Callable[[], Tensor]], Tensor]
"""(schedule, x_t, estimate of x_0, t, s, draw) -> x_s; ``draw()`` is fresh noise like x_t."""


def ddpm_step(
    schedule: Schedule, x_t: Tensor, x_0: Tensor, t: int, s: int, draw: Callable[[], Tensor]
) -> Tensor:
    """Ancestral step (Ho et al. 2020, arXiv 2006.11239, eqs. 6 and 7).

    The variance is the larger of the two they offer, beta = 1 - a_t / a_s, as published for WDM.
    Noise is drawn at the last step too, and ignored, so that the stream of random numbers is that
    of the published sampler.
    """
    a_t, a_s = schedule[t], schedule[s]
    beta = 1 - a_t / a_s
    of_x_0 = sqrt(a_s) * beta / (1 - a_t)
    of_x_t = (1 - a_s) * sqrt(1 - beta) / (1 - a_t)
    mean = of_x_0 * x_0 + of_x_t * x_t
    noise = draw()
    return mean + sqrt(beta) * noise if s > 0 else mean


def ddim_step(
    schedule: Schedule, x_t: Tensor, x_0: Tensor, t: int, s: int, draw: Callable[[], Tensor]
) -> Tensor:
    """Deterministic step (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0)."""
    a_t, a_s = schedule[t], schedule[s]
    noise = (x_t - sqrt(a_t) * x_0) / sqrt(1 - a_t)
    return sqrt(a_s) * x_0 + sqrt(1 - a_s) * noise


SAMPLERS: dict[str, Step] = {"ddpm": ddpm_step, "ddim": ddim_step}
"""Samplers by the name a configuration or the command line gives."""


def clamped(denoise: Denoise, low: float, high: float) -> Denoise:
    """The denoiser with each estimate clamped in image space, as published."""
    return lambda x_t, t: clamp_image(denoise(x_t, t), low, high)


def noise_stream(
    shape: Sequence[int], seed: int, device: torch.device | str = "cpu"
) -> Callable[[], Tensor]:
    """Successive draws of N(0, 1) of one shape that depend on the seed only.

    They come from a CPU generator of their own, so that neither other cases nor the kind of
    accelerator change a result.
    """
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(*shape, generator=generator).to(device)


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    *,
    draw: Callable[[], Tensor],
    step: Step = ddpm_step,
    times: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yields x_s after each step; the last one is the sample.

    Args:
        denoise: estimates x_0; conditioning and clamping are closed over.
        x_T: noise (B, 8, X, Y, Z).
        draw: further noise of that shape, one draw per step (see ``noise_stream``).
        times: falling times, from T to 0; all of them by default (see ``Schedule.timesteps``).
    """
    x = x_T
    for t, s in pairwise(schedule.timesteps() if times is None else times):
        x = step(schedule, x, denoise(x, t), t, s, draw)
        yield x
