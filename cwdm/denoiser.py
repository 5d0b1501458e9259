"""The denoiser: a network, what it puts out, and the estimate of x_0 that follows from it."""

from typing import Literal

import torch
from torch import Tensor, nn

from cwdm.conditioning import mean_of_conditions
from cwdm.process import Process, at

__all__ = ["Denoiser", "Prediction"]

Prediction = Literal["x_0", "residual", "velocity"]
"""What the network puts out: the clean coefficients (WDM, arXiv 2402.19043, eq. 3); their
difference from the mean of the conditioning images (an untrained network then returns that mean);
or x_0 - start, the velocity of a flow (WFM, arXiv 2604.21146)."""


class Denoiser(nn.Module):
    """Estimates clean coefficients from noisy ones, given conditioning images.

    Args:
        backbone: maps (B, channels*(1 + C), X, Y, Z) and times (B,) to (B, channels, X, Y, Z).
        process: what its times mean.
        prediction: what it puts out.
        channels: channels of one image.
        availability: whether the conditions say which of them are there, see ``condition``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        process: Process,
        prediction: Prediction = "x_0",
        channels: int = 8,
        *,
        availability: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.process = process
        self.prediction = prediction
        self.channels = channels
        self.availability = availability

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """What the network puts out.

        Args:
            x_t: (B, channels, X, Y, Z).
            t: (B,) in 0..T.
            cond: what ``conditioning.condition`` made, or None without conditions.
            label: (B,) number of the target, for a network with classes.
        """
        parts = [x_t] if cond is None else [x_t, cond]
        time = self.process.network_time(t)
        labels = () if label is None else (label,)
        if joining := getattr(self.backbone, "joining", None):  # in as little memory as it can
            output: Tensor = joining(parts, time, *labels)
            return output
        dtype = getattr(self.backbone, "dtype", x_t.dtype)  # what it would make of them anyway
        inputs = x_t if cond is None else torch.cat([part.to(dtype) for part in parts], dim=1)
        output = self.backbone(inputs, time, *labels)
        return output

    def start(self, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Where a chain begins, given N(0, 1) of its shape (B, channels, X, Y, Z)."""
        return self.process.start(noise, None if cond is None else self._mean(cond))

    def x_0(self, output: Tensor, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The estimate of x_0 (B, channels, X, Y, Z) an output at the times t (B,) stands for."""
        if self.prediction == "velocity":
            return x_t + at(self.process.noises, t, x_t) * output
        return output + self._base(cond) if self.prediction == "residual" else output

    def goal(self, x_0: Tensor, start: Tensor, cond: Tensor | None = None) -> Tensor:
        """What the output should be."""
        if self.prediction == "velocity":
            return x_0 - start
        return x_0 - self._base(cond) if self.prediction == "residual" else x_0

    def _base(self, cond: Tensor | None) -> Tensor:
        if cond is None:
            raise ValueError("the residual is taken from the mean of the conditions: there is none")
        return self._mean(cond)

    def _mean(self, cond: Tensor) -> Tensor:
        return mean_of_conditions(cond, self.channels, availability=self.availability)
