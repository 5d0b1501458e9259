"""The WavU-Net of WDM: a U-Net whose down- and upsampling and skips are wavelet transforms.

WDM (Friedrich et al. 2024, arXiv 2402.19043) calls it WavU-Net; the resampling blocks and the
pyramid of the input follow WaveDiff (Phung et al. 2023, arXiv 2211.16152). Each level passes its
low band on and keeps its seven high bands for the way back up, so the network has no other skips.
Parameters carry the names of the published checkpoints, so that those load without a mapping.
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from cwdm.coefficients import LLL_SCALE
from cwdm.unet import ResBlock, Stage, UNetConfig, timestep_embedding
from cwdm.wavelet import dwt3, idwt3

__all__ = ["WavUNet", "WavUNetConfig"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WavUNetConfig:
    """Shape of the network. The defaults are those of the published WDM model for 128^3."""

    kind: Literal["wavunet"] = "wavunet"
    channels: int = 64
    """Width at full coefficient resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    """Width of each level in ``channels``; each level, the last one too, halves the grid."""
    res_blocks: int = 2
    """Residual blocks per level on the way down, on the way up (the last twice) and at the end."""
    groups: int = 32
    """Groups of every group normalization; must divide every width."""
    scale_shift: bool = False
    """Let the time embedding scale and shift the features instead of only shifting them."""
    dropout: float = 0.0
    """Dropout probability in residual blocks."""

    def __post_init__(self) -> None:
        widths = [self.channels * m for m in self.multipliers]
        if bad := [w for w in widths if w % self.groups]:
            raise ValueError(f"groups = {self.groups} does not divide the width {bad[0]}")
        if self.res_blocks < (2 if len(set(widths)) > 1 else 1):
            raise ValueError(
                f"res_blocks = {self.res_blocks} is too few: the last one of a level on the way up "
                "is applied twice and cannot change the width"
            )

    @property
    def divisor(self) -> int:
        """Every axis of the coefficient grid must be a multiple of this."""
        return int(2 ** len(self.multipliers))


class DownBlock(ResBlock):
    """Resamples after its first convolution, unlike the U-Net's.

    (B, C, X, Y, Z), (B, E) -> (B, C, X/2, Y/2, Z/2) and high bands (B, C, 7, X/2, Y/2, Z/2).
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        bands = dwt3(self.in_layers(x)).unflatten(1, (-1, 8))
        h = bands[:, :, 0] / LLL_SCALE
        # Of x only the low band is kept, which is sqrt(8) times the mean.
        x = F.avg_pool3d(x, 2) * (8**0.5 / LLL_SCALE)
        return x + self.tell(h, embedding), bands[:, :, 1:]


class UpBlock(ResBlock):
    """(B, C, X, Y, Z), (B, E), high bands (B, C, 7, X, Y, Z) -> (B, C, 2*X, 2*Y, 2*Z)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, embedding: Tensor, high: Tensor
    ) -> Tensor:
        h, x = _join(self.in_layers(x), high), _join(x, high)
        return x + self.tell(h, embedding)


class WaveletDownsample(nn.Module):
    """One level of the pyramid of the input: (B, C, X, Y, Z) -> (B, width, X/2, Y/2, Z/2)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv3d(8 * channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # Band by band (all LLL first), where dwt3 goes channel by channel. All bands are divided.
        bands = dwt3(x).unflatten(1, (-1, 8)).transpose(1, 2).flatten(1, 2)
        return self.conv(bands / LLL_SCALE)  # type: ignore[no-any-return]


class WavUNet(nn.Module):
    """Coefficients and time -> coefficients.

    Args:
        config: the shape of the network.
        in_channels: 8 for the noisy target plus 8 per conditioning image.
        out_channels: 8, the sub-bands of one image.
    """

    def __init__(self, config: WavUNetConfig, in_channels: int, out_channels: int = 8):
        super().__init__()
        self.config = config
        width, embedding = config.channels, 4 * config.channels
        settings = UNetConfig(
            channels=config.channels,
            multipliers=config.multipliers,
            groups=config.groups,
            scale_shift=config.scale_shift,
            dropout=config.dropout,
        )
        block = partial(ResBlock, embedding=embedding, config=settings)
        down = partial(DownBlock, embedding=embedding, config=settings)
        up = partial(UpBlock, embedding=embedding, config=settings)

        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv3d(in_channels, width, 3, padding=1))]
        )
        pyramid = in_channels
        for multiplier in config.multipliers:
            for _ in range(config.res_blocks):
                self.input_blocks.append(Stage([block(width, multiplier * config.channels)]))
                width = multiplier * config.channels
            self.input_blocks.append(Stage([down(width, width)]))
            self.input_blocks.append(Stage([WaveletDownsample(pyramid, width)]))
            pyramid = width

        self.middle_block = Stage([block(width, width), block(width, width)])

        self.output_blocks = nn.ModuleList()
        for multiplier in reversed(config.multipliers):
            for _ in range(config.res_blocks):
                last = block(width, multiplier * config.channels)
                self.output_blocks.append(Stage([last]))
                width = multiplier * config.channels
            # The published network applies the last block once more, with the same weights, and
            # its checkpoints hold them under both names.
            self.output_blocks.append(Stage([last, up(width, width)]))

        self.out_res = nn.ModuleList(
            [Stage([block(width, width)]) for _ in range(config.res_blocks)]
        )
        self.out = nn.Sequential(  # not zeroed, unlike the U-Net's
            nn.GroupNorm(config.groups, width),
            nn.SiLU(),
            nn.Conv3d(width, out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, in_channels, X, Y, Z), (B,) times 0..999 -> (B, out_channels, X, Y, Z).

        Raises:
            ValueError: if an axis is not a multiple of ``config.divisor``.
        """
        if any(n % self.config.divisor for n in x.shape[2:]):
            raise ValueError(
                f"coefficient grid {tuple(x.shape[2:])}: every axis must be a multiple of "
                f"{self.config.divisor} for {len(self.config.multipliers)} levels"
            )
        embedding = self.time_embed(timestep_embedding(t, self.config.channels))
        pyramid, h = x, self.input_blocks[0](x)
        skips = []
        for stage in self.input_blocks[1:]:
            [layer] = stage.children()
            if isinstance(layer, DownBlock):
                h, high = layer(h, embedding)
                skips.append(high)
            elif isinstance(layer, WaveletDownsample):
                h = pyramid = layer(pyramid) + h
            else:
                h = layer(h, embedding)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            for layer in stage.children():
                if isinstance(layer, UpBlock):
                    h = layer(h, embedding, skips.pop())
                else:
                    h = layer(h, embedding)
        for stage in self.out_res:
            h = stage(h, embedding)
        return self.out(h)  # type: ignore[no-any-return]


def _join(low: Tensor, high: Tensor) -> Tensor:
    """Low band (B, C, X, Y, Z), high (B, C, 7, X, Y, Z) -> features (B, C, 2*X, 2*Y, 2*Z)."""
    return idwt3(torch.cat([LLL_SCALE * low[:, :, None], high], dim=2).flatten(1, 2))
