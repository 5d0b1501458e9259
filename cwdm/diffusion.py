"""The variance-preserving diffusion process.

``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`` for t = 0..T with ``a_0 = 1`` (Ho et al. 2020,
arXiv 2006.11239, eq. 4, where a_t is written alpha-bar).
"""

from functools import cached_property
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from cwdm.process import Process

__all__ = ["Diffusion"]

_FEWEST_LINEAR = 20
"""Steps below which the linear schedule, its ends scaled by 1000 / T, ends above 1."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Diffusion(Process):
    """Noise at t = T, data at t = 0. The defaults are those of WDM and cWDM."""

    kind: Literal["diffusion"] = "diffusion"
    schedule: Literal["linear", "cosine", "continuous"] = "linear"
    """How noise rises: linear beta (Ho et al. 2020, section 4; for T != 1000 the ends 1e-4 and 0.02
    are scaled by 1000/T); squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17); or the
    continuous equation (Song et al. 2021, arXiv 2011.13456, eq. 33, beta 0.1..20) cut into T steps,
    which stays a diffusion even for T = 2 (fastWDM3D)."""
    steps: int = 1000
    """T."""
    subset_of: int | None = None
    """Take the T times from a finer schedule of this many steps, evenly spread (fast-cwdm)."""

    def __post_init__(self) -> None:
        if self.subset_of is not None and self.subset_of < self.steps:
            raise ValueError(f"subset_of = {self.subset_of} is fewer than steps = {self.steps}")
        if self.schedule == "linear" and (self.subset_of or self.steps) < _FEWEST_LINEAR:
            raise ValueError(
                f"a linear schedule needs {_FEWEST_LINEAR} steps or more, beta would exceed 1; "
                "expected subset_of or schedule = 'continuous'"
            )

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T + 1,) float64: a_t, the share of signal in the variance, falling from 1."""
        one = torch.ones(1, dtype=torch.float64)
        beta = _BETAS[self.schedule](self.subset_of or self.steps)
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        if self.subset_of:
            kept = torch.linspace(0, self.subset_of - 1, self.steps, dtype=torch.float64)
            alpha_bar = alpha_bar[kept.long()]  # rounded down
        return torch.cat([one, alpha_bar])

    @cached_property
    def signals(self) -> Tensor:
        """sqrt(a_t)."""
        return self.alpha_bar.sqrt()

    @cached_property
    def noises(self) -> Tensor:
        """sqrt(1 - a_t)."""
        return (1 - self.alpha_bar).sqrt()

    def start(self, noise: Tensor, mean_of_conditions: Tensor | None) -> Tensor:
        """The noise itself."""
        return noise

    def network_time(self, t: Tensor) -> Tensor:
        """0..T-1, as published: their time 0 is the first noisy one."""
        return t - 1


def _linear(steps: int) -> Tensor:
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, 2e-2 * scale, steps, dtype=torch.float64)


def _cosine(steps: int) -> Tensor:
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    level = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


def _continuous(steps: int, smallest: float = 0.1, largest: float = 20.0) -> Tensor:
    time = torch.linspace(1e-3, 1, steps + 1, dtype=torch.float64)
    level = torch.exp(-(time**2) * (largest - smallest) / 2 - time * smallest)
    return 1 - level[1:] / level[:-1]


_BETAS = {"linear": _linear, "cosine": _cosine, "continuous": _continuous}
