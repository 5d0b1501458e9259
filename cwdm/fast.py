"""The same networks for inference, with fewer operations and fewer bytes.

On a processor it is `streamed`. `FastUNet` is for a GPU, where all of an image is worked on at a
time. Both compute what their `unet.UNet` computes, by exact algebra:

- Repeating voxels twice along each axis and convolving with 3 x 3 x 3 taps is a transposed
  convolution with 4 x 4 x 4 taps and stride 2: 64 multiplications for 8 voxels instead of 216.
- A pointwise convolution commutes with repeating voxels, and what goes around a block is repeated
  as it is added: the repeated image never exists.
- What the time embedding adds to a convolution's output is part of its bias; what it does to the
  output of a normalization is part of that one's weight and bias.
- Normalization and SiLU are one pass (`passes`), in place where the input is not needed any more.

Weights of convolutions and features are kept in the precision that is computed in; statistics of
normalizations, embeddings and attention are float32.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm.denoiser import Denoiser
from cwdm.machine import multiplies_bf16
from cwdm.passes import Passes, rows
from cwdm.streamed import StreamedUNet, transposed
from cwdm.unet import (
    Attention,
    Downsample,
    ResBlock,
    Stage,
    UNet,
    Upsample,
    timestep_embedding,
)

__all__ = ["FastUNet", "Replayed", "accelerated"]

_ORDER = torch.channels_last_3d
"""Of features in memory: what convolutions in half precision want."""


def accelerated(
    denoiser: Denoiser, passes: Passes, *, bf16: bool, streamed: bool = False
) -> Denoiser:
    """The same denoiser for inference, the fast way for the device of the passes.

    The given one is used up: they share what they can.

    Args:
        bf16: keep features in bfloat16, and compute in it unless this is a processor that is not
            made for it.
        streamed: in little memory, on a GPU as well.
    """
    network = denoiser.backbone
    if isinstance(network, UNet):
        dtype = torch.bfloat16 if bf16 else torch.float32
        backbone: nn.Module
        if streamed or passes.device.type == "cpu":
            native = passes.device.type != "cpu" or multiplies_bf16(passes.device)
            arithmetic = dtype if native else torch.float32
            backbone = StreamedUNet(network, dtype, passes, arithmetic=arithmetic)
        else:
            backbone = FastUNet(network, dtype, passes)
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


class FastUNet(nn.Module):
    """Called like the network it is made of, without gradients.

    Args:
        unet: whose weights it takes as they are now.
        dtype: in which features are kept and convolutions computed, and inputs best come.
        passes: what lies between convolutions.
    """

    def __init__(
        self, unet: UNet, dtype: torch.dtype = torch.float32, passes: Passes | None = None
    ):
        super().__init__()
        self.config, self.dtype = unet.config, dtype
        self.how = how = _How(dtype, passes or Passes("cpu"))
        self.time_embed = unet.time_embed
        self.label_emb = unet.label_emb if unet.config.classes else None
        self.input_blocks = nn.ModuleList(_stage(stage, how) for stage in unet.input_blocks)
        self.middle_block = _stage(unet.middle_block, how)
        self.output_blocks = nn.ModuleList(
            _stage(stage, how, spent=True) for stage in unet.output_blocks
        )
        norm, _, conv = unet.out
        self.norm, self.out = _NormSiLU(norm, how), _Resampling(_Convolution(conv, how))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As `unet.UNet.forward`, one image of the batch after the other; always float32."""
        self.config.check(x)
        embedding = self.time_embed(timestep_embedding(t, self.config.channels))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(label)
        embedding = F.silu(embedding)  # every block begins with it
        images = [self._one(*each) for each in zip(x.split(1), embedding, strict=True)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def _one(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = x.to(self.dtype, memory_format=_ORDER)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            skip = skips.pop()
            h = (h + skip).div_(2) if self.config.additive_skips else self._joined(h, skip)
            del skip  # before the block needs memory
            h = stage(h, embedding)
        h = self.norm(h, spent=True)
        result: Tensor = self.out(h, embedding)
        return result.to(torch.float32, memory_format=torch.contiguous_format)

    def _joined(self, one: Tensor, other: Tensor) -> Tensor:
        return _image(self.how.passes.joined(rows(one), rows(other)), one.shape[2:])


class _How(NamedTuple):
    """A network computes like this."""

    dtype: torch.dtype
    passes: Passes


class Replayed(nn.Module):
    """What a network does on a GPU for one size, recorded as a CUDA graph and replayed.

    The first call of a size runs as ever, so that kernels are made and chosen; the second records.
    Launching some hundred kernels one by one takes longer than they do.
    """

    def __init__(self, network: FastUNet):
        super().__init__()
        self.network, self.dtype = network, network.dtype
        self._shape: torch.Size | None = None
        self._recording: _Recording | None = None

    @property
    def kept(self) -> int:
        """Bytes of what a recording reads and writes."""
        if self._recording is None:
            return 0
        return sum(each.nbytes for each in (*self._recording.inputs, self._recording.output))

    def forward(self, *given: Tensor) -> Tensor:
        """As the network's."""
        if (shape := given[0].shape) != self._shape:
            self._shape, self._recording = shape, None
            result: Tensor = self.network(*given)
            return result
        if self._recording is None:
            torch.cuda.empty_cache()  # a graph has memory of its own
            inputs, graph = tuple(tensor.clone() for tensor in given), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.network(*inputs)
            self._recording = _Recording(graph, inputs, output)
        graph, inputs, output = self._recording
        for mine, tensor in zip(inputs, given, strict=True):
            mine.copy_(tensor)
        graph.replay()
        return output.clone()


class _Recording(NamedTuple):
    """Replaying the graph makes the output from the inputs, which stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


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

    def __init__(self, conv: nn.Module, how: _How, repeat: Sequence[int] = (1, 1, 1)):
        super().__init__()
        assert isinstance(conv, nn.Conv3d) and conv.bias is not None  # noqa: PT018
        self.function: Callable[..., Tensor] = F.conv3d
        self.how = how
        weight = conv.weight.detach()
        self.stride, self.padding = tuple(conv.stride), conv.padding
        if max(repeat) > 1:
            weight, self.function = transposed(weight, repeat), F.conv_transpose3d
            self.stride = tuple(repeat)
        weight = weight.to(how.dtype).contiguous(memory_format=_ORDER)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", conv.bias.detach(), persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of x (1, in, ...) without its bias, and that (out,), for the pass that follows.

        Args:
            shift: (out,) more bias.
        """
        bias = self.bias if shift is None else self.bias + shift
        h = self.function(x, self.weight, None, stride=self.stride, padding=self.padding)
        return h.contiguous(memory_format=_ORDER), bias


class _NormSiLU(nn.Module):
    """Group normalization and SiLU."""

    def __init__(self, norm: nn.Module, how: _How):
        super().__init__()
        assert isinstance(norm, nn.GroupNorm)
        self.norm, self.how = norm, how

    def forward(
        self,
        x: Tensor,
        offset: Tensor | None = None,
        told: tuple[Tensor, Tensor] | None = None,
        *,
        spent: bool,
    ) -> Tensor:
        """Of x + offset, x (1, C, ...).

        Args:
            told: the scale and the shift (C,) that an embedding puts after the normalization.
            spent: x is not needed any more.
        """
        weight: Tensor = self.norm.weight
        bias: Tensor = self.norm.bias
        if told is not None:
            scale, shift = told
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        weight, bias = weight.detach(), bias.detach()
        groups, eps = self.norm.num_groups, self.norm.eps
        flat = rows(x)
        offset = torch.zeros_like(bias) if offset is None else offset
        scale, shift = self.how.passes.scaling(flat, offset, weight, bias, groups, eps)
        if spent:
            self.how.passes.activate_(flat, scale, shift)
            return x
        return _image(self.how.passes.activate(flat, scale, shift), x.shape[2:])


class _Block(nn.Module):
    """`unet.ResBlock`.

    Args:
        spent: nobody needs its input afterwards.
    """

    def __init__(self, block: ResBlock, how: _How, *, spent: bool):
        super().__init__()
        norm, _, conv = block.in_layers
        second_norm, _, _, second_conv = block.out_layers
        self.how, self.spent = how, spent
        self.scale_shift, self.tell = block.scale_shift, block.emb_layers[1]
        self.factors, self.grows = block.factors or (1, 1, 1), block.grows
        self.first_norm, self.second_norm = _NormSiLU(norm, how), _NormSiLU(second_norm, how)
        self.first = _Convolution(conv, how, self.factors if self.grows else (1, 1, 1))
        self.second = _Convolution(second_conv, how)
        around = block.skip_connection
        self.around = _Convolution(around, how) if isinstance(around, nn.Conv3d) else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        told = self.tell(embedding)
        h: Tensor
        around, bias = x, None
        if self.around is not None:
            around, bias = self.around(x)
        h = self.first_norm(x, spent=self.spent and around is not x)
        del x
        if not self.grows:
            h, around = self._averaged(h), self._averaged(around)
        if self.scale_shift:
            h, owed = self.first(h)
            h = self.second_norm(h, owed, told.chunk(2), spent=True)
        else:
            h, owed = self.first(h, told)
            h = self.second_norm(h, owed, spent=True)
        h, owed = self.second(h)
        repeat = self.factors if self.grows else (1, 1, 1)
        owed = owed if bias is None else owed + bias
        self.how.passes.add(rows(h), rows(around), owed, h.shape[2:], repeat)
        return h

    def _averaged(self, x: Tensor) -> Tensor:
        if max(self.factors) == 1:
            return x
        flat = self.how.passes.averaged(rows(x), x.shape[2:], self.factors)
        size = [n // factor for n, factor in zip(x.shape[2:], self.factors, strict=True)]
        return _image(flat, size)


class _Resampling(nn.Module):
    """What is told no embedding: the first and the last convolution, `unet.Downsample`,
    `unet.Upsample`."""

    def __init__(self, conv: _Convolution):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor
        h, owed = self.conv(x)
        return h.add_(owed.to(h.dtype)[:, None, None, None])


class _Attention(nn.Module):
    """`unet.Attention`, in float32: it is small."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        attended: Tensor = self.attention(x.float(), embedding)
        return attended.to(x.dtype, memory_format=_ORDER)


def _image(flat: Tensor, size: Sequence[int]) -> Tensor:
    """The features (1, C, X, Y, Z) whose rows these are."""
    image: Tensor = flat.view(1, *size, flat.shape[1]).movedim(-1, 1)
    return image


def _stage(stage: nn.Module, how: _How, *, spent: bool = False) -> Stage:
    """The same layers, the fast way.

    Args:
        spent: nobody needs its input afterwards.
    """
    made: list[nn.Module] = []
    for layer in stage.children():
        if isinstance(layer, ResBlock):
            made.append(_Block(layer, how, spent=spent or bool(made)))
        elif isinstance(layer, Attention):
            made.append(_Attention(layer))
        elif isinstance(layer, Upsample):
            made.append(_Resampling(_Convolution(layer.conv, how, layer.factors)))
        else:
            conv = layer.op if isinstance(layer, Downsample) else layer
            made.append(_Resampling(_Convolution(conv, how)))
    return Stage(made)
