"""Samplers: from a start to an image through a denoiser's estimates of x_0.

A sampler is a generator function that walks down a list of times and yields x after each step. It
knows the process only by its two levels, ``x_t = signal_t x_0 + noise_t start``, and never asks how
far apart two times are: every subset of the steps works with the same code. To add one, write such
a function and enter it in ``SAMPLERS``.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import exp, inf, log, sqrt
from typing import Literal

from torch import Tensor

from cwdm.process import Process

__all__ = ["SAMPLERS", "Denoise", "Draw", "Sampler", "SamplerName"]

Denoise = Callable[[Tensor, int], Tensor]
"""(x_t (B, channels, X, Y, Z), t) -> estimate of x_0, of the same shape. Conditions and clamping
are closed over."""

Draw = Callable[[], Tensor]
"""Fresh N(0, 1) noise of the shape of x_t."""

Sampler = Callable[[Denoise, Tensor, Process, Sequence[int], Draw], Iterator[Tensor]]
"""(denoise, x_T, process, falling times from T to 0, draw) -> x_s after each step."""

SamplerName = Literal["ddpm", "ddim", "dpm++2m", "euler", "heun", "one-step"]


def ddpm(
    denoise: Denoise, x: Tensor, process: Process, times: Sequence[int], draw: Draw
) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, eqs. 6 and 7).

    The variance is the larger of the two they offer, beta = 1 - a_t / a_s, as published for WDM.
    Noise is drawn at the last step too, and ignored, so that the stream of random numbers is that
    of the published sampler.
    """
    for t, s in pairwise(times):
        a_t, a_s = process.signal(t) ** 2, process.signal(s) ** 2
        beta = 1 - a_t / a_s
        of_x_0 = sqrt(a_s) * beta / process.noise(t) ** 2
        of_x_t = process.noise(s) ** 2 * sqrt(1 - beta) / process.noise(t) ** 2
        mean = of_x_0 * denoise(x, t) + of_x_t * x
        noise = draw()
        x = mean + sqrt(beta) * noise if s > 0 else mean
        yield x


def ddim(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    times: Sequence[int],
    draw: Draw,
    *,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """Song et al. 2021 (arXiv 2010.02502, eqs. 12 and 16); deterministic for ``eta`` = 0.

    On the straight path of a flow this is Euler's step: with eta = 0,
    x_s - x_t = (noise_s - noise_t) (start - x_0).
    """
    for t, s in pairwise(times):
        x_0 = denoise(x, t)
        start = (x - process.signal(t) * x_0) / process.noise(t)
        fresh = 0.0
        if eta and s > 0:
            beta = 1 - (process.signal(t) / process.signal(s)) ** 2
            fresh = eta * process.noise(s) / process.noise(t) * sqrt(beta)
        kept = sqrt(process.noise(s) ** 2 - fresh**2)
        x = process.signal(s) * x_0 + kept * start
        if fresh:
            x = x + fresh * draw()
        yield x


def heun(
    denoise: Denoise, x: Tensor, process: Process, times: Sequence[int], draw: Draw
) -> Iterator[Tensor]:
    """Heun's second order step (Karras et al. 2022, arXiv 2206.00364, algorithm 1, no churn).

    Two estimates per step, except for the last. With y = x / (signal + noise) and
    r = noise / (signal + noise) every process becomes a straight flow, dy/dr = start - x_0.
    """

    def velocity(x: Tensor, t: int) -> Tensor:
        x_0 = denoise(x, t)
        return (x - process.signal(t) * x_0) / process.noise(t) - x_0

    for t, s in pairwise(times):
        size_t, size_s = (process.signal(u) + process.noise(u) for u in (t, s))
        r_t, r_s = process.noise(t) / size_t, process.noise(s) / size_s
        y, slope = x / size_t, velocity(x, t)
        x = size_s * (y + (r_s - r_t) * slope)
        if s > 0:
            x = size_s * (y + (r_s - r_t) * (slope + velocity(x, s)) / 2)
        yield x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, process: Process, times: Sequence[int], draw: Draw
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), the last step first order.

    One estimate per step; the previous one makes it second order.
    """

    def log_snr(t: int) -> float:
        signal, noise = process.signal(t), process.noise(t)
        return inf if noise == 0 else -inf if signal == 0 else log(signal / noise)

    previous, h_previous = None, 0.0
    for t, s in pairwise(times):
        x_0 = denoise(x, t)
        h = log_snr(s) - log_snr(t)
        estimate = x_0
        if previous is not None and s > 0:
            estimate = x_0 + h / (2 * h_previous) * (x_0 - previous)
        x = process.noise(s) / process.noise(t) * x + process.signal(s) * (1 - exp(-h)) * estimate
        previous, h_previous = x_0, h
        yield x


def one_step(
    denoise: Denoise, x: Tensor, process: Process, times: Sequence[int], draw: Draw
) -> Iterator[Tensor]:
    """The first estimate of x_0, whatever times follow."""
    yield denoise(x, times[0])


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++2m": dpmpp_2m,
    "euler": ddim,
    "heun": heun,
    "one-step": one_step,
}
"""Samplers by the name a configuration or the command line gives."""
