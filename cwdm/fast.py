"""The same networks for inference, with fewer operations and fewer bytes.

`FastUNet` computes what its `unet.UNet` computes, by exact algebra:

- Repeating voxels twice along each axis and convolving with 3 x 3 x 3 taps is a transposed
  convolution with 4 x 4 x 4 taps and stride 2: 64 multiplications for 8 voxels instead of 216.
- A pointwise convolution commutes with repeating voxels, and what goes around a block is repeated
  as it is added: the repeated image never exists.
- What the time embedding adds to a convolution's output is part of its bias; what it does to the
  output of a normalization is part of that one's weight and bias.
- Averaging is a convolution of each channel by itself.

Weights of convolutions and features are kept in the precision that is computed in; statistics of
normalizations, embeddings and attention are float32.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.denoiser import Denoiser
from cwdm.unet import (
    Attention,
    Downsample,
    ResBlock,
    Stage,
    UNet,
    Upsample,
    timestep_embedding,
)

__all__ = ["FastUNet", "accelerated", "transposed"]


def accelerated(denoiser: Denoiser, *, bf16: bool) -> Denoiser:
    """The same denoiser for inference, the fast way."""
    network = denoiser.backbone
    if isinstance(network, UNet):
        backbone: nn.Module = FastUNet(network, torch.bfloat16 if bf16 else torch.float32)
    elif bf16:
        backbone = _Autocast(network)
    else:
        return denoiser
    return Denoiser(
        backbone,
        denoiser.process,
        denoiser.prediction,
        denoiser.channels,
        availability=denoiser.availability,
    )


def transposed(weight: Tensor, factors: Sequence[int]) -> Tensor:
    """Weight (in, out, ...) of the transposed convolution that is repetition and then convolution.

    Its stride is `factors`, its padding 1. Computed in float64.

    Args:
        weight: (out, in, 3, 3, 3) of the convolution.
        factors: how often voxels are repeated along each axis, 1 or 2.
    """
    weight = weight.double().transpose(0, 1).flip(2, 3, 4)
    for axis, factor in enumerate(factors, start=2):
        if factor == 2:  # of four taps each is the sum of the two that see the same voxel
            zero = torch.zeros_like(weight.narrow(axis, 0, 1))
            weight = torch.cat([weight, zero], axis) + torch.cat([zero, weight], axis)
    return weight


class FastUNet(nn.Module):
    """Called like the network it is made of, without gradients.

    Args:
        unet: whose weights it takes as they are now; those in float32 are shared.
        dtype: in which features are kept and convolutions computed.
    """

    def __init__(self, unet: UNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = unet.config, dtype
        self.time_embed = unet.time_embed
        self.label_emb = unet.label_emb if unet.config.classes else None
        self.input_blocks = nn.ModuleList(_stage(stage, dtype) for stage in unet.input_blocks)
        self.middle_block = _stage(unet.middle_block, dtype)
        self.output_blocks = nn.ModuleList(_stage(stage, dtype) for stage in unet.output_blocks)
        norm, _, conv = unet.out
        self.norm, self.out = _NormSiLU(norm), _Convolution(conv, dtype)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As `unet.UNet.forward`, one image of the batch after the other, in the precision of x."""
        self.config.check(x)
        embedding = self.time_embed(timestep_embedding(t, self.config.channels))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(label)
        embedding = F.silu(embedding)  # every block begins with it
        images = [self._one(*each) for each in zip(x.split(1), embedding, strict=True)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def _one(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = x.to(self.dtype, memory_format=_order(self.dtype))
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            skip = skips.pop()
            h = (h + skip).div_(2) if self.config.additive_skips else torch.cat([h, skip], dim=1)
            del skip  # before the block needs memory
            h = stage(h, embedding)
        result: Tensor = self.out(self.norm(h))
        return result.to(x.dtype, memory_format=torch.contiguous_format)


class _Autocast(nn.Module):
    """Any network, with torch's own choice of what is computed in bfloat16."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, *label: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            output: Tensor = self.network(x, t, *label)
        return output.to(x.dtype)


class _Convolution(nn.Module):
    """A convolution, perhaps of repeated voxels, whose bias may change from call to call."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Module, dtype: torch.dtype, repeat: Sequence[int] = (1, 1, 1)):
        super().__init__()
        assert isinstance(conv, nn.Conv3d) and conv.bias is not None  # noqa: PT018
        self.function: Callable[..., Tensor] = F.conv3d
        weight = conv.weight.detach()
        self.stride, self.padding = tuple(conv.stride), conv.padding
        if max(repeat) > 1:
            weight, self.function = transposed(weight, repeat), F.conv_transpose3d
            self.stride = tuple(repeat)
        weight = weight.to(dtype).contiguous(memory_format=_order(dtype))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", conv.bias.detach(), persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x (1, in, ...), with `shift` (out,) added to what comes out."""
        bias = (self.bias if shift is None else self.bias + shift).to(x.dtype)
        result: Tensor = self.function(
            x, self.weight, bias, stride=self.stride, padding=self.padding
        )
        return result


class _NormSiLU(nn.Module):
    """Group normalization and SiLU."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        assert isinstance(norm, nn.GroupNorm)
        self.norm = norm

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """x (1, C, ...); `scale` and `shift` (C,) are what an embedding says about the norm."""
        weight: Tensor = self.norm.weight
        bias: Tensor = self.norm.bias
        if scale is not None and shift is not None:
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        if x.device.type != "cpu":  # which alone takes weights of another precision than x's
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        h = F.group_norm(x, self.norm.num_groups, weight, bias, self.norm.eps)
        return F.silu(h, inplace=True)


class _Block(nn.Module):
    """`unet.ResBlock`."""

    def __init__(self, block: ResBlock, dtype: torch.dtype):
        super().__init__()
        norm, _, conv = block.in_layers
        second_norm, _, _, second_conv = block.out_layers
        self.scale_shift, self.tell = block.scale_shift, block.emb_layers[1]
        self.factors, self.grows = block.factors or (1, 1, 1), block.grows
        self.first_norm, self.second_norm = _NormSiLU(norm), _NormSiLU(second_norm)
        self.first = _Convolution(conv, dtype, self.factors if self.grows else (1, 1, 1))
        self.second = _Convolution(second_conv, dtype)
        around = block.skip_connection
        self.around = _Convolution(around, dtype) if isinstance(around, nn.Conv3d) else around

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        told = self.tell(embedding)
        h: Tensor = self.first_norm(x)
        if not self.grows:
            h, x = _averaged(h, self.factors), _averaged(x, self.factors)
        if self.scale_shift:
            h = self.second_norm(self.first(h), *told.chunk(2))
        else:
            h = self.second_norm(self.first(h, told))
        h = self.second(h)
        _repeats(h, self.factors if self.grows else (1, 1, 1)).add_(
            self.around(x)[:, :, :, None, :, None, :, None]
        )
        return h


class _Resampling(nn.Module):
    """What is told no embedding: the first convolution, `unet.Downsample`, `unet.Upsample`."""

    def __init__(self, conv: _Convolution):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


class _Attention(nn.Module):
    """`unet.Attention`, in float32: it is small."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        attended: Tensor = self.attention(x.float(), embedding)
        return attended.to(x.dtype, memory_format=_order(x.dtype))


def _order(dtype: torch.dtype) -> torch.memory_format:
    """Of features: channels last is quicker in half precision only."""
    return torch.contiguous_format if dtype == torch.float32 else torch.channels_last_3d


def _stage(stage: nn.Module, dtype: torch.dtype) -> Stage:
    """The same layers, the fast way."""
    made: list[nn.Module] = []
    for layer in stage.children():
        if isinstance(layer, ResBlock):
            made.append(_Block(layer, dtype))
        elif isinstance(layer, Attention):
            made.append(_Attention(layer))
        elif isinstance(layer, Upsample):
            made.append(_Resampling(_Convolution(layer.conv, dtype, layer.factors)))
        else:
            conv = layer.op if isinstance(layer, Downsample) else layer
            made.append(_Resampling(_Convolution(conv, dtype)))
    return Stage(made)


def _averaged(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Means over so many voxels, as a convolution: quicker than pooling, and there in bfloat16."""
    if max(factors) == 1:
        return x
    share = x.new_full((x.shape[1], 1, *factors), 1 / math.prod(factors))
    return F.conv3d(x, share, stride=tuple(factors), groups=x.shape[1])


def _repeats(x: Tensor, factors: Sequence[int]) -> Tensor:
    """A view (1, C, X, fx, Y, fy, Z, fz) of x (1, C, X fx, Y fy, Z fz)."""
    for axis, factor in zip((4, 3, 2), reversed(factors), strict=True):
        x = x.unflatten(axis, (-1, factor))
    return x
