"""What a process between noise and data has to say, whether it is a diffusion or a flow.

Time runs over t = 0..T with the clean coefficients x_0 at t = 0 and the start, from which sampling
begins, at t = T. In between ``x_t = signal_t x_0 + noise_t start``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

__all__ = ["Process", "Spacing", "at"]

Spacing = Literal["even", "stride"]
"""How the steps of a shortened chain are chosen, see ``Process.timesteps``."""


class Process(ABC):
    """A path of T steps from a start to data; a subclass is a record of its settings."""

    steps: int
    """T."""

    @property
    @abstractmethod
    def signals(self) -> Tensor:
        """(T + 1,) float64: the share of x_0 in x_t, one at t = 0."""

    @property
    @abstractmethod
    def noises(self) -> Tensor:
        """(T + 1,) float64: the share of the start in x_t, zero at t = 0."""

    @abstractmethod
    def start(self, noise: Tensor, mean_of_conditions: Tensor | None) -> Tensor:
        """Where a chain begins, x_T; ``noise`` is N(0, 1) of its shape (B, channels, X, Y, Z)."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told at the times t (B,)."""

    def mix(self, x_0: Tensor, start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for training, of the shape of ``x_0`` (B, ...), at times ``t`` (B,) in 0..T."""
        return at(self.signals, t, x_0) * x_0 + at(self.noises, t, x_0) * start

    def signal(self, t: int) -> float:
        """Share of x_0 in x_t."""
        return float(self.signals[t])

    def noise(self, t: int) -> float:
        """Share of the start in x_t."""
        return float(self.noises[t])

    def timesteps(
        self, n: int | Sequence[int] | None = None, spacing: Spacing = "even"
    ) -> list[int]:
        """Falling times to sample at, from T (if even) to 0: t_0 > ... > t_n = 0.

        Args:
            n: how many steps, by default all T. Several numbers cut the times into equal sections
                with so many steps each, the first number nearest to the data (Nichol & Dhariwal
                2021, arXiv 2102.09672, section 4).
            spacing: ``even`` spreads the steps from one end of each section to the other, as
                published, except that a single step begins at T. ``stride`` takes every k-th time
                from 1 on, as DDIM did, and begins a little below T.

        Raises:
            ValueError: if there are not so many times, or no stride gives ``n`` steps.
        """
        counts = [self.steps] if n is None else [n] if isinstance(n, int) else list(n)
        if self.steps < 1 or not counts:
            raise ValueError(f"expected at least one step, got {counts} of {self.steps}")
        if counts == [1]:
            return [self.steps, 0]
        if spacing == "stride":
            return [*(1 + t for t in reversed(_stride(self.steps, sum(counts)))), 0]
        chosen, first = [0], 1
        for index, count in enumerate(counts):
            length = self.steps // len(counts) + (index < self.steps % len(counts))
            chosen += [first + position for position in _even(length, count)]
            first += length
        return chosen[::-1]


def _even(size: int, n: int) -> list[int]:
    """n of the numbers 0..size-1, rising: an accumulated stride, rounded half to even."""
    if not 1 <= n <= size:
        raise ValueError(f"steps must lie within 1..{size}, got {n}")
    stride, position, chosen = (size - 1) / max(n - 1, 1), 0.0, []
    for _ in range(n):
        chosen.append(round(position))
        position += stride
    return chosen


def _stride(size: int, n: int) -> list[int]:
    """Every k-th of the numbers 0..size-1, n in all."""
    for stride in range(1, size + 1):
        if len(chosen := list(range(0, size, stride))) == n:
            return chosen
    raise ValueError(f"no stride takes {n} of {size} steps")


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The entries of a table (T + 1,) at times t (B,), to multiply (B, ...) with."""
    return table.to(t.device)[t].reshape(-1, *[1] * (like.ndim - 1)).to(like)
