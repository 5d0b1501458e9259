"""Images as the channels a network sees: the wavelet transform and the scaling of its bands.

Source: WDM (Friedrich et al. 2024, arXiv 2402.19043) and cWDM (arXiv 2411.17203).
"""

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from cwdm.errors import InputError
from cwdm.wavelet import dwt3, filters, idwt3

__all__ = ["IDENTITY", "LLL_SCALE", "Transform"]

LLL_SCALE = 3.0
"""Published divisor of the LLL band. LLL of an image in [0, 1] lies in [0, 2*sqrt(2)]; a third of
it is about [0, 1]. Noise is *not* divided."""

IDENTITY = "identity"
"""Name of no transform at all: diffusion of the voxels themselves."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Transform:
    """How an image becomes channels. The default is that of WDM: Haar, one level, 8 channels.

    With more levels every band is split again (a wavelet packet), so that all of them keep one
    size: 8**levels channels on a grid 2**levels times coarser.
    """

    wavelet: str = "haar"
    """``haar``, any orthogonal wavelet of PyWavelets (``db2``, ``sym4``, ...) or ``identity``."""
    levels: int = 1
    """How often the volume is halved."""
    lll_scale: float = LLL_SCALE
    """Divisor of the lowest band, per level."""
    scale: float = 1.0
    """Divisor of all bands, per level (fastWDM3D: sqrt(8), with ``lll_scale`` = 1)."""

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 3:
            raise ValueError(f"levels must lie within 1..3, got {self.levels}")
        if self.wavelet != IDENTITY:
            try:
                filters(self.wavelet)
            except InputError as error:
                raise ValueError(str(error)) from error

    @property
    def _halvings(self) -> int:
        return 0 if self.wavelet == IDENTITY else self.levels

    @property
    def channels(self) -> int:
        """Channels of one image."""
        return int(8**self._halvings)

    @property
    def factor(self) -> int:
        """How many times coarser the grid of the channels is along each axis."""
        return int(2**self._halvings)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, X, Y, Z) -> (B, channels*C, X/factor, ...), bands scaled."""
        if self._halvings == 1:
            lll, rest = 1 / (self.scale * self.lll_scale), 1 / self.scale
            return dwt3(images, self.wavelet, lll=lll, rest=rest)
        for _ in range(self._halvings):
            images = dwt3(images, self.wavelet)
        return images / self._band_scale(images)

    def decode(self, coefficients: Tensor) -> Tensor:
        """(B, channels*C, X, Y, Z) -> images (B, C, factor*X, ...); inverse of ``encode``."""
        if self._halvings == 1:
            lll = self.scale * self.lll_scale
            return idwt3(coefficients, self.wavelet, lll=lll, rest=self.scale)
        images = coefficients * self._band_scale(coefficients)
        for _ in range(self._halvings):
            images = idwt3(images, self.wavelet)
        return images

    def clamp(self, coefficients: Tensor, low: float, high: float) -> Tensor:
        """Coefficients of the same image with its voxels clamped to [low, high]."""
        return self.encode(self.decode(coefficients).clamp(low, high))

    def _band_scale(self, coefficients: Tensor) -> Tensor:
        """(channels*C, 1, 1, 1): the divisor of each channel."""
        scale = torch.full((coefficients.shape[1], 1, 1, 1), self.scale**self._halvings)
        scale[:: self.channels] *= self.lll_scale**self._halvings
        return scale.to(coefficients)
