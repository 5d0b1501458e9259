"""The 3D U-Net of WDM and cWDM, which sees wavelet coefficients as channels.

The network is the one of Dhariwal & Nichol 2021 (arXiv 2105.05233) in three dimensions, with the
choices of WDM (Friedrich et al. 2024, arXiv 2402.19043, section 3.3): residual blocks that also do
the down- and upsampling, and skips that are either concatenated or averaged. Parameters carry the
names of the published checkpoints, so that those load without a mapping.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

__all__ = ["UNet", "UNetConfig", "timestep_embedding"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UNetConfig:
    """Shape of the network. The defaults are those of the published cWDM models."""

    kind: Literal["unet"] = "unet"
    channels: int = 64
    """Width at full coefficient resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    """Width of each level in ``channels``; each level but the first halves the grid."""
    res_blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    groups: int = 32
    """Groups of every group normalization; must divide every width."""
    additive_skips: bool = False
    """Average a skip with the decoder's features instead of concatenating it."""
    scale_shift: bool = False
    """Let the time embedding scale and shift the features instead of only shifting them."""
    resample_in_blocks: bool = True
    """Resample inside residual blocks rather than by a strided or plain convolution."""
    resample_x: bool = True
    """Resample all three axes; otherwise only Y and Z."""
    attention_factors: tuple[int, ...] = ()
    """Downsampling factors (of the coefficient grid) after which self-attention is added."""
    middle_attention: bool = False
    """Self-attention between the two middle blocks."""
    heads: int = 1
    """Attention heads."""
    dropout: float = 0.0
    """Dropout probability in residual blocks."""
    classes: int = 0
    """Number of labels the network can be told, 0 for none."""

    def __post_init__(self) -> None:
        if self.res_blocks < 1:
            raise ValueError(f"res_blocks = {self.res_blocks}, expected at least 1")
        widths = [self.channels * m for m in self.multipliers]
        if bad := [w for w in widths if w % self.groups]:
            raise ValueError(f"groups = {self.groups} does not divide the width {bad[0]}")

    @property
    def divisor(self) -> int:
        """Every axis of the coefficient grid must be a multiple of this."""
        return int(2 ** (len(self.multipliers) - 1))

    def check(self, x: Tensor) -> None:
        """ValueError if an axis of (B, C, X, Y, Z) that is resampled cannot be halved so often."""
        if any(n % self.divisor for n in x.shape[2 if self.resample_x else 3 :]):
            raise ValueError(
                f"coefficient grid {tuple(x.shape[2:])}: every axis must be a multiple of "
                f"{self.divisor} for {len(self.multipliers)} levels"
            )


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first: t (B,) -> (B, dim) (Vaswani et al. 2017)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class ResBlock(nn.Module):
    """(B, C, ...), (B, E) -> (B, out_channels, ...), on the same grid or a resampled one.

    Args:
        factors: average over so many voxels along each axis, or repeat them if it grows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        config: UNetConfig,
        factors: tuple[int, int, int] | None = None,
        grows: bool = False,
    ):
        super().__init__()
        self.scale_shift = config.scale_shift
        self.factors = factors
        self.grows = grows
        self.in_layers = nn.Sequential(
            nn.GroupNorm(config.groups, in_channels),
            nn.SiLU(),
            nn.Conv3d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, out_channels * (2 if config.scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.groups, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            _zero(nn.Conv3d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv3d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        h, x = self.resample(h), self.resample(x)
        h = conv(h)  # one tensor less at the peak than in one expression with what follows
        h = self.tell(h, embedding)
        return self.skip_connection(x) + h  # type: ignore[no-any-return]

    def resample(self, x: Tensor) -> Tensor:
        """On the grid of the output."""
        if self.factors is None:
            return x
        return _nearest(x, self.factors) if self.grows else F.avg_pool3d(x, self.factors)

    def tell(self, h: Tensor, embedding: Tensor) -> Tensor:
        """The second half: features (B, out_channels, ...) learn the time (B, E)."""
        shift = self.emb_layers(embedding)[:, :, None, None, None]
        if not self.scale_shift:
            h += shift
            return self.out_layers(h)  # type: ignore[no-any-return]
        scale, shift = shift.chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.out_layers[1:](h)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2)
        # in other orders in memory a processor would make the matrix of all pairs of positions
        q, k, v = (each.contiguous() for each in qkv.unbind(2))
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        attended: Tensor = flat + self.proj_out(h.flatten(1, 2))
        return attended.view_as(x)


class Downsample(nn.Module):
    """Strided convolution (only where ``resample_in_blocks`` is off)."""

    def __init__(self, channels: int, factors: tuple[int, int, int]):
        super().__init__()
        self.op = nn.Conv3d(channels, channels, 3, stride=factors, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Nearest neighbour and a convolution (only where ``resample_in_blocks`` is off)."""

    def __init__(self, channels: int, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(_nearest(x, self.factors))  # type: ignore[no-any-return]


class Stage(nn.ModuleList):
    """Layers applied in order, each given the time embedding as well."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding)
        return x


class UNet(nn.Module):
    """Coefficients and time -> coefficients.

    Args:
        config: the shape of the network.
        in_channels: those of the noisy target plus those of each conditioning image.
        out_channels: those of one image, 8 sub-bands.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int = 8):
        super().__init__()
        self.config = config
        width, embedding = config.channels, 4 * config.channels
        factors = (2 if config.resample_x else 1, 2, 2)
        block = partial(ResBlock, embedding=embedding, config=config)

        def down(channels: int) -> nn.Module:
            if config.resample_in_blocks:
                return block(channels, channels, factors=factors)
            return Downsample(channels, factors)

        def up(channels: int) -> nn.Module:
            if config.resample_in_blocks:
                return block(channels, channels, factors=factors, grows=True)
            return Upsample(channels, factors)

        def stage(in_channels: int, out_channels: int, level: int) -> Stage:
            layers: list[nn.Module] = [block(in_channels, out_channels)]
            if 2**level in config.attention_factors:
                layers.append(Attention(out_channels, config))
            return Stage(layers)

        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if config.classes:
            self.label_emb = nn.Embedding(config.classes, embedding)
        self.input_blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv3d(in_channels, width, 3, padding=1))]
        )
        skips = [width]
        last = len(config.multipliers) - 1
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.res_blocks):
                self.input_blocks.append(stage(width, multiplier * config.channels, level))
                width = multiplier * config.channels
                skips.append(width)
            if level < last:
                self.input_blocks.append(Stage([down(width)]))
                skips.append(width)

        attention = [Attention(width, config)] if config.middle_attention else []
        self.middle_block = Stage([block(width, width), *attention, block(width, width)])

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for i in range(config.res_blocks + 1):
                skip = skips.pop()
                if config.additive_skips:
                    wide, out = width, (skips[-1] if skips else config.channels)
                else:
                    wide, out = width + skip, multiplier * config.channels
                layers = stage(wide, out, level)
                if level > 0 and i == config.res_blocks:
                    layers.append(up(out))
                self.output_blocks.append(layers)
                width = out

        self.out = nn.Sequential(
            nn.GroupNorm(config.groups, width),
            nn.SiLU(),
            _zero(nn.Conv3d(width, out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, in_channels, X, Y, Z), (B,) times 0..999 -> (B, out_channels, X, Y, Z).

        Args:
            label: (B,) 0..classes-1, for a network with classes.

        Raises:
            ValueError: if a resampled axis is not a multiple of ``config.divisor``.
        """
        self.config.check(x)
        embedding = self.time_embed(timestep_embedding(t, self.config.channels))
        if self.config.classes:
            embedding = embedding + self.label_emb(label)
        h = self.input_blocks[0](x)
        skips = [h]
        for stage in self.input_blocks[1:]:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            skip = skips.pop()
            h = (h + skip) / 2 if self.config.additive_skips else torch.cat([h, skip], dim=1)
            h = stage(h, embedding)
        return self.out(h)  # type: ignore[no-any-return]


def _nearest(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    return F.interpolate(x, scale_factor=[float(f) for f in factors], mode="nearest")


def _zero(layer: nn.Conv1d | nn.Conv3d) -> nn.Module:
    """The layer with all parameters zero: a block then starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
