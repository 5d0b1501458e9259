"""The variance-preserving diffusion process and the denoiser trained on it.

``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`` for t = 0..T with ``a_0 = 1`` (Ho et al. 2020,
arXiv 2006.11239, eq. 4, where a_t is written alpha-bar). The network estimates ``x_0``
(WDM, arXiv 2402.19043, eq. 3).
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from cwdm.conditioning import mean_of_conditions

__all__ = ["Prediction", "Schedule", "WaveletDenoiser"]

Prediction = Literal["x_0", "residual"]
"""What the network puts out: the clean coefficients, or their difference from the mean of the
conditioning images (an informed start: an untrained network then returns that mean)."""


@dataclass(frozen=True)
class Schedule:
    """Signal level per time.

    Attributes:
        alpha_bar: (T + 1,) float64, falling from ``alpha_bar[0] = 1``.
    """

    alpha_bar: Tensor

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> Self:
        """Linear beta (Ho et al. 2020, section 4); for T != 1000 the ends scale with 1000/T."""
        scale = 1000 / steps
        beta = torch.linspace(start * scale, end * scale, steps, dtype=torch.float64)
        return cls._of(beta)

    @classmethod
    def cosine(cls, steps: int = 1000, largest_beta: float = 0.999) -> Self:
        """Squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        level = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
        return cls._of((1 - level[1:] / level[:-1]).clamp(max=largest_beta))

    @classmethod
    def _of(cls, beta: Tensor) -> Self:
        one = torch.ones(1, dtype=torch.float64)
        return cls(torch.cat([one, torch.cumprod(1 - beta, dim=0)]))

    def __getitem__(self, t: int) -> float:
        """a_t, the share of signal in the variance at time t."""
        return float(self.alpha_bar[t])

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alpha_bar) - 1

    def timesteps(self, n: int | None = None) -> list[int]:
        """``n`` times from T down to 1, evenly spread, followed by 0: T = t_0 > ... > t_n = 0.

        The published spacing (an accumulated stride, rounded half to even),
        except that a single step starts from noise, at T.

        Raises:
            ValueError: if ``n`` is not within 1..T.
        """
        n = self.steps if n is None else n
        if not 1 <= n <= self.steps:
            raise ValueError(f"steps must lie within 1..{self.steps}, got {n}")
        if n == 1:
            return [self.steps, 0]
        stride, position, times = (self.steps - 1) / (n - 1), 0.0, [0]
        for _ in range(n):
            times.append(1 + round(position))
            position += stride
        return times[::-1]

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, of the shape of ``x_0`` (B, ...), for times ``t`` (B,) in 0..T."""
        a = self.alpha_bar.to(t.device)[t].reshape(-1, *[1] * (x_0.ndim - 1))
        return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise


class WaveletDenoiser(nn.Module):
    """Estimates clean coefficients from noisy ones, given conditioning images.

    Args:
        backbone: maps (B, 8 + 8*C, X, Y, Z) and times (B,) 0..T-1 to (B, 8, X, Y, Z).
        prediction: what the backbone puts out.
    """

    def __init__(self, backbone: nn.Module, prediction: Prediction = "x_0"):
        super().__init__()
        self.backbone = backbone
        self.prediction = prediction

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """x_t (B, 8, X, Y, Z), t (B,) in 1..T, cond (B, 8*C, X, Y, Z) -> x_0 (B, 8, X, Y, Z)."""
        inputs = x_t if cond is None else torch.cat([x_t, cond], dim=1)
        output: Tensor = self.backbone(inputs, t - 1)
        if self.prediction == "residual" and cond is not None:
            output = output + mean_of_conditions(cond)
        return output
