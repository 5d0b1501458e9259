"""Flow matching: a straight path from a start to the data.

``x_t = (1 - t/T) x_0 + (t/T) start`` (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023,
arXiv 2209.03003). WFM (wavelet flow matching, arXiv 2604.21146) starts from the mean of the
conditioning images, which is close to the data, instead of from noise.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from cwdm.process import Process, Spacing, at

__all__ = ["Flow"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Flow(Process):
    """A start at t = T, data at t = 0. The defaults are those of WFM."""

    kind: Literal["flow"] = "flow"
    source: Literal["conditions", "noise"] = "conditions"
    """What a chain starts from: the mean of the conditioning images, or noise."""
    bridge_noise: float = 0.5
    """Deviation of the noise added in training, times sqrt(t/T (1 - t/T)); none at the ends."""
    steps: int = 1000
    """T: how finely time is divided. Sampling takes a few of these steps."""

    @cached_property
    def noises(self) -> Tensor:
        """t / T."""
        return torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)

    @cached_property
    def signals(self) -> Tensor:
        """1 - t / T."""
        return 1 - self.noises

    def start(self, noise: Tensor, mean_of_conditions: Tensor | None) -> Tensor:
        """The mean of the conditions, or the noise.

        Raises:
            ValueError: the source is the conditions and there are none.
        """
        if self.source == "noise":
            return noise
        if mean_of_conditions is None:
            raise ValueError("a flow from the conditions needs conditions")
        return mean_of_conditions

    def network_time(self, t: Tensor) -> Tensor:
        """0 at the start, 1000 at the data: the other way round, as in the literature on flows."""
        return (self.steps - t) * (1000 / self.steps)

    def timesteps(
        self, n: int | Sequence[int] | None = None, spacing: Spacing = "even"
    ) -> list[int]:
        """``n`` equal steps from T to 0 (as WFM); other spacings as for a diffusion."""
        if isinstance(n, int) and spacing == "even" and 1 <= n <= self.steps:
            return [round(self.steps * (n - i) / n) for i in range(n + 1)]
        return super().timesteps(n, spacing)

    def mix(self, x_0: Tensor, start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The straight path and, between its ends, some noise around it."""
        around = self.bridge_noise * (self.signals * self.noises).sqrt()
        return super().mix(x_0, start, noise, t) + at(around, t, x_0) * noise
