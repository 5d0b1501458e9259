"""The U-Net for inference in little memory: a few planes at a time.

Features are planes along the first axis, channels last. A window of planes moves along them: what
it takes in is normalized, activated, joined or averaged on the way, a convolution makes the planes
of its output, and those go where nothing is needed any more, often over the input. So what lies
between two convolutions happens in the processor's cache, and neither activated nor joined features
ever exist as a whole. Windows overlap by just what a convolution sees, and statistics of
normalizations are summed as planes are written: but for rounding, results do not depend on how many
are taken at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cwdm import winograd
from cwdm.machine import give_back
from cwdm.passes import Passes, affine, averaged, sums
from cwdm.unet import Attention, Downsample, ResBlock, UNet, Upsample, timestep_embedding

__all__ = ["StreamedUNet", "transposed"]

_FINE = 2
"""So many levels, from the finest, are convolved by `winograd`: on others it saves little, and its
weights take twice the memory."""
_USUAL = (6, 64, 64)
"""Size of a window for which weights are arranged; they do for others."""
_LARGE = 2**27
"""Bytes of features from which on every freed page counts."""

Read = Callable[[int, int, Tensor], None]
"""Puts planes from a to b into a tensor (b - a, Y, Z, C)."""
Put = Callable[[int, int, Tensor], None]
"""Takes planes from a to b, (b - a, Y, Z, C), which may be changed."""


class Features(NamedTuple):
    """Of one image."""

    planes: Tensor
    """(X, Y, Z, C)."""
    sums: Tensor
    """(2, C): of the values and of their squares over all voxels, float64."""


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
            wide = weight.new_zeros([n + (a == axis) for a, n in enumerate(weight.shape)])
            for start in (0, 1):
                wide.narrow(axis, start, 3).add_(weight)
            weight = wide
    return weight


class StreamedUNet(nn.Module):
    """Called like the network it is made of, without gradients.

    Args:
        unet: whose weights it takes as they are now.
        dtype: in which features are kept.
        passes: what lies between convolutions.
        arithmetic: in which windows are and convolutions computed; by default as features are kept.
        voxels: of a window at least; by default what suits the arithmetic.
    """

    def __init__(
        self,
        unet: UNet,
        dtype: torch.dtype = torch.float32,
        passes: Passes | None = None,
        *,
        arithmetic: torch.dtype | None = None,
        voxels: int | None = None,
    ):
        super().__init__()
        self.config, self.dtype = unet.config, dtype
        passes, arithmetic = passes or Passes("cpu"), arithmetic or dtype
        self.arithmetic = arithmetic
        if voxels is None:  # matrix units want more at a time
            single = arithmetic is torch.float32 and passes.device.type == "cpu"
            voxels = 2**12 if single else 2**16
        self.how = how = _How(dtype, arithmetic, passes, voxels, _Room())
        self.time_embed = unet.time_embed
        self.label_emb = unet.label_emb if unet.config.classes else None
        begin, *stages = unet.input_blocks
        self.begin, level = _Resampling(next(begin.children()), how, fine=True), _Level()
        self.input_blocks = nn.ModuleList(_stage(stage, how, level) for stage in stages)
        self.middle_block = _stage(unet.middle_block, how, level)
        self.output_blocks = nn.ModuleList(
            _stage(stage, how, level, spent=True) for stage in unet.output_blocks
        )
        norm, _, conv = unet.out
        self.norm, self.out = norm, _Convolution(conv, how, fine=True)

    @property
    def kept(self) -> int:
        """Bytes of windows, which the next evaluation uses again."""
        return self.how.room.kept

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As `unet.UNet.forward`, one image of the batch after the other; always float32."""
        return self.joining([x], t, label)

    @torch.inference_mode()
    def joining(self, parts: Sequence[Tensor], t: Tensor, label: Tensor | None = None) -> Tensor:
        """The same of parts that together have all channels."""
        self.config.check(parts[0])
        embedding = self.time_embed(timestep_embedding(t, self.config.channels))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(label)
        embedding = F.silu(embedding)  # every block begins with it
        first = parts[0]
        result = first.new_empty(len(first), self.out.width, *first.shape[2:], dtype=torch.float32)
        for *images, told, output in zip(*parts, embedding, result, strict=True):
            self._one([image.movedim(0, -1) for image in images], told, output.movedim(0, -1))
        return result

    def _one(self, images: Sequence[Tensor], embedding: Tensor, result: Tensor) -> None:
        h, skips = self.begin.convolved(images), []
        large = h.planes.device.type == "cpu" and h.planes.nbytes >= _LARGE
        for stage in self.input_blocks:
            h = _through(stage, [h], embedding)
            skips.append(h)
            if large:
                give_back()
        h = _through(self.middle_block, [h], embedding)
        for stage in self.output_blocks:
            # the first skip is made again rather than kept
            given = [h, skips.pop() if skips else self.begin.convolved(images)]
            del h  # a stage drops what it is given as soon as it can
            if self.config.additive_skips:
                given = [_mean(given, self.how)]
            h = _through(stage, given, embedding)
            if large:
                give_back()

        def put(a: int, b: int, planes: Tensor) -> None:
            result[a:b] = planes

        self.out(_Activated([h], self.norm, self.how), h.planes.shape[:3], put)


class _How(NamedTuple):
    """A network computes like this."""

    dtype: torch.dtype
    arithmetic: torch.dtype
    passes: Passes
    voxels: int
    room: "_Room"


class _Room:
    """Memory for what lives while one window moves, used again by the next."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        """Bytes."""
        return sum(held.nbytes for held in self._held.values())

    def __call__(self, name: str, *shape: int, like: Tensor) -> Tensor:
        """A tensor of that shape, with the type and on the device of another."""
        size = torch.Size(shape).numel()
        held = self._held.get(name)
        if held is None or held.numel() < size or held.device != like.device:
            self._held.pop(name, None)
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)


class _Convolution(nn.Module):
    """A convolution with 3 x 3 x 3 taps, perhaps of repeated voxels, by a window of planes.

    Args:
        fine: of a level where `winograd` pays.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Module, how: _How, repeat: Sequence[int] = (1, 1, 1), *, fine: bool = False
    ):
        super().__init__()
        assert isinstance(conv, nn.Conv3d) and conv.bias is not None  # noqa: PT018
        self.how, self.channels, self.width = how, conv.in_channels, conv.out_channels
        self.repeat, self.stride = tuple(repeat), tuple(conv.stride)
        weight = conv.weight.detach()
        if max(repeat) > 1:
            weight = transposed(weight, repeat)
        weight = weight.to(how.arithmetic)
        self._planar: list[Tensor] = []
        on_cpu = how.passes.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if on_cpu and max(repeat) == 1:
            if fine and how.arithmetic is torch.float32 and max(self.stride) == 1:
                self._planar = [
                    _arranged(each, (1, 1), (1, 1)) for each in winograd.transformed(weight)
                ]
                weight = weight.new_empty(0)
            else:
                weight = _arranged(weight, self.stride, (0, 1, 1))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", conv.bias.detach(), persistent=False)

    def size(self, given: Sequence[int]) -> list[int]:
        """X, Y, Z of the output, for those of the input."""
        return [
            -(-n // stride) * factor
            for n, stride, factor in zip(given, self.stride, self.repeat, strict=True)
        ]

    def forward(
        self, read: Read, given: Sequence[int], put: Put, *, shift: Tensor | None = None
    ) -> None:
        """Convolve planes that are read and put those of the result.

        When planes are put, those of the input up to the last of them were read.

        Args:
            given: X, Y, Z of the input.
            shift: (out,) more bias.
        """
        length, *plane = given
        bias = self.bias if shift is None else self.bias + shift
        step, factor, size = self.stride[0], self.repeat[0], self.size(given)[0]
        in_four = winograd.PLANES * plane[0] * plane[1] * math.prod(self.repeat)
        most = -(-length // (winograd.PLANES * step))
        count = winograd.PLANES * min(-(-self.how.voxels // in_four), most)
        if count * step >= length and not self._planar:
            window = self._room("window", length, *plane, self.channels)
            read(0, length, window)
            put(0, size, self._directly(window, bias, padded=False))
            return
        kernel = self._by_planes if self._planar else self._directly
        kept = 3 - step  # planes that the next window sees again
        window = self._room("window", count * step + kept, *plane, self.channels)
        window[:kept] = 0
        there = kept - 1
        if there:
            read(0, there, window[1:kept])
        for a in range(0, size, count * factor):
            wanted = min(there + count * step, length)
            if wanted > there:
                read(there, wanted, window[kept : kept + wanted - there])
            window[kept + wanted - there :] = 0
            there = wanted
            b = min(a + count * factor, size)
            put(a, b, kernel(window, bias)[: b - a])
            if window.is_meta:
                break  # the others take no more memory
            window[:kept] = window[-kept:]

    def _directly(self, window: Tensor, bias: Tensor, *, padded: bool = True) -> Tensor:
        """Of a window that has its borders, or of a whole image."""
        x, bias = window[None].movedim(-1, 1), bias.to(window.dtype)
        if max(self.repeat) > 1:
            padding = (1 + self.repeat[0] * padded, 1, 1)
            h = F.conv_transpose3d(x, self.weight, bias, stride=self.repeat, padding=padding)
        else:
            h = _convolved(x, self.weight, bias, self.stride, (1 - padded, 1, 1))
        if h.is_meta:  # where the order in memory is not the true one
            shape = h.shape
            del h
            h = torch.empty(
                shape, dtype=x.dtype, device="meta", memory_format=torch.channels_last_3d
            )
        return h[0].movedim(0, -1).contiguous()

    def _by_planes(self, window: Tensor, bias: Tensor) -> Tensor:
        """`winograd`."""
        tiles, *plane = (len(window) - 2) // winograd.PLANES, *window.shape[1:3]
        inputs, outputs = (each.to(window.device) for each in (winograd.INPUT, winograd.OUTPUT))
        seen = self._room("seen", winograd.SEEN, tiles, *plane, self.channels)
        made = self._room("made", winograd.SEEN, tiles, *plane, self.width)
        result = self._room("result", tiles * winograd.PLANES, *plane, self.width)
        for tile in range(tiles):
            start = tile * winograd.PLANES
            given = window[start : start + winograd.SEEN].flatten(1)
            torch.mm(inputs, given, out=seen[:, tile].flatten(1))
        for k, weight in enumerate(self._planar):
            x, offset = seen[k].movedim(-1, 1), bias if k == winograd.EVERY else None
            made[k] = _convolved(x, weight, offset, (1, 1), (1, 1)).movedim(1, -1)
        for tile in range(tiles):
            start = tile * winograd.PLANES
            target = result[start : start + winograd.PLANES].flatten(1)
            torch.mm(outputs, made[:, tile].flatten(1), out=target)
        return result

    def _room(self, name: str, *shape: int) -> Tensor:
        return self.how.room(name, *shape, like=self.bias.new_empty(0, dtype=self.how.arithmetic))


def _arranged(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """A weight as oneDNN wants it, if it can; arranged anew at every call it would cost time."""
    half = weight.dtype is torch.bfloat16
    if weight.is_meta or (half and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return weight
    aten, ones, flat = torch.ops.aten, [1] * len(stride), len(stride) == 2
    reorder = aten.mkldnn_reorder_conv2d_weight if flat else aten.mkldnn_reorder_conv3d_weight
    shape = (1, weight.shape[1], *_USUAL[-len(stride) :])
    arranged: Tensor = reorder(weight.contiguous().to_mkldnn(), padding, stride, ones, 1, shape)
    return arranged


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """In two or three dimensions, with a weight that oneDNN may have arranged."""
    h: Tensor
    if weight.is_mkldnn:
        ones = [1] * len(stride)
        h = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, ones, 1, "none", [], ""
        )
    else:
        function = F.conv3d if len(stride) == 3 else F.conv2d
        h = function(x, weight, bias, stride=stride, padding=padding)
    return h


class _Activated:
    """Reads planes of joined channels, normalized, activated, and averaged.

    Args:
        norm: of all channels.
        told: the scale and the shift (C,) that an embedding puts after the normalization.
        factors: so many voxels along each axis are averaged.
    """

    def __init__(
        self,
        given: Sequence[Features],
        norm: nn.Module,
        how: _How,
        *,
        told: Sequence[Tensor] = (),
        factors: Sequence[int] = (1, 1, 1),
    ):
        self.images, self.how, self.factors = [each.planes for each in given], how, factors
        assert isinstance(norm, nn.GroupNorm)
        weight, bias = norm.weight.detach(), norm.bias.detach()
        if told:
            scale, shift = told
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        mean, square = torch.cat([each.sums for each in given], 1) / given[0].planes[..., 0].numel()
        zero = torch.zeros_like(bias)
        weight = weight.view(norm.num_groups, -1)
        self.scale, self.shift = affine(mean, square, zero, weight, bias, norm.eps)

    def __call__(self, start: int, stop: int, result: Tensor) -> None:
        if max(self.factors) == 1:
            self._activate(start, stop, result)
            return
        start, stop = start * self.factors[0], stop * self.factors[0]
        shape = (stop - start, *self.images[0].shape[1:3], result.shape[3])
        whole = self.how.room("result", *shape, like=result)
        self._activate(start, stop, whole)
        result.copy_(_averaged(whole, self.factors))

    def _activate(self, start: int, stop: int, result: Tensor) -> None:
        done = 0
        for image in self.images:
            mine = slice(done, done := done + image.shape[3])
            self.how.passes.fill(
                image[start:stop].flatten(0, 2),
                self.scale[mine],
                self.shift[mine],
                result[..., mine].flatten(0, 2),
            )


class _Block(nn.Module):
    """`unet.ResBlock`.

    Args:
        spent: nobody needs its input afterwards.
        fine: as for convolutions.
    """

    def __init__(self, block: ResBlock, how: _How, *, spent: bool, fine: bool):
        super().__init__()
        self.first_norm, _, conv = block.in_layers
        self.second_norm, _, _, second_conv = block.out_layers
        self.how, self.spent = how, spent
        self.scale_shift, self.tell = block.scale_shift, block.emb_layers[1]
        factors = block.factors or (1, 1, 1)
        self.repeat = factors if block.grows else (1, 1, 1)
        self.factors = (1, 1, 1) if block.grows else factors
        self.first = _Convolution(conv, how, self.repeat, fine=fine)
        self.second = _Convolution(second_conv, how, fine=fine)
        around = block.skip_connection
        self.around = _Pointwise(around, how) if isinstance(around, nn.Conv3d) else None

    def forward(self, given: list[Features], embedding: Tensor) -> Features:
        told = self.tell(embedding)
        shift, affine = (None, told.chunk(2)) if self.scale_shift else (told, ())
        images = [each.planes for each in given]
        read = _Activated(given, self.first_norm, self.how, factors=self.factors)
        given.clear()
        size = [n // f for n, f in zip(images[0].shape[:3], self.factors, strict=True)]
        y, aside = self._places(images, self.first.size(size))
        made = _Made(y, self.how)

        def first(a: int, b: int, planes: Tensor) -> None:
            if self.around is not None and aside is not None:
                aside[a:b] = self.around([image[a:b] for image in images])
            made(a, b, planes)

        self.first(read, size, first, shift=shift)
        read = _Activated([made.features], self.second_norm, self.how, told=affine)
        made = _Made(y, self.how)
        if aside is not None:
            images = [aside]

        def second(a: int, b: int, planes: Tensor) -> None:
            made(a, b, planes, self._around(images[0], a, b, planes))

        self.second(read, y.shape[:3], second)
        return made.features

    def _places(
        self, images: Sequence[Tensor], size: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Where its features go, and what goes around them if that is another thing than its
        input: over the input where that may be."""
        if self.around is None:
            return self._place(size), None
        free = list(images) if self.spent else []
        width = self.first.width
        y = next((image for image in reversed(free) if image.shape[3] == width), None)
        aside = next((i[..., :width] for i in free if i is not y and i.shape[3] >= width), None)
        return (
            self._place(size) if y is None else y,
            self._place(size) if aside is None else aside,
        )

    def _place(self, size: Sequence[int]) -> Tensor:
        return self.first.bias.new_empty(*size, self.first.width, dtype=self.how.dtype)

    def _around(self, x: Tensor, a: int, b: int, planes: Tensor) -> Tensor | None:
        """What is to be added to planes from a to b; None if it was."""
        (fx, *_), (rx, ry, rz) = self.factors, self.repeat
        if max(self.factors) > 1:
            return _averaged(x[a * fx : b * fx].to(planes.dtype), self.factors)
        if max(self.repeat) > 1:
            fine = planes.unflatten(2, (-1, rz)).unflatten(1, (-1, ry)).unflatten(0, (-1, rx))
            fine += x[a // rx : b // rx, None, :, None, :, None]
            return None
        return x[a:b]


class _Pointwise(nn.Module):
    """A convolution of single voxels, whose channels are joined."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv3d, how: _How):
        super().__init__()
        assert conv.bias is not None
        weight, bias = conv.weight.detach().flatten(1).t(), conv.bias.detach()
        self.register_buffer("weight", weight.to(how.arithmetic), persistent=False)
        self.register_buffer("bias", bias.to(how.arithmetic), persistent=False)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Of (..., C), each with some of the channels."""
        total = self.bias
        parts = self.weight.split([image.shape[-1] for image in images])
        for image, part in zip(images, parts, strict=True):
            total = torch.addmm(total, image.flatten(0, -2).to(part.dtype), part)
        return total.view(*images[0].shape[:-1], -1)


class _Resampling(nn.Module):
    """What is told no embedding: the first convolution, `unet.Downsample`, `unet.Upsample`."""

    def __init__(
        self, conv: nn.Module, how: _How, repeat: Sequence[int] = (1, 1, 1), *, fine: bool = False
    ):
        super().__init__()
        self.conv = _Convolution(conv, how, repeat, fine=fine)

    def forward(self, given: list[Features], embedding: Tensor) -> Features:
        return self.convolved([given.pop().planes])

    def convolved(self, images: Sequence[Tensor]) -> Features:
        """Of (X, Y, Z, C), each with some of the channels."""
        grid = images[0].shape[:3]
        how = self.conv.how
        y = self.conv.bias.new_empty(*self.conv.size(grid), self.conv.width, dtype=how.dtype)

        def read(a: int, b: int, planes: Tensor) -> None:
            done = 0
            for image in images:
                planes[..., done : (done := done + image.shape[3])] = image[a:b]

        made = _Made(y, how)
        self.conv(read, grid, made)
        return made.features


class _Attention(nn.Module):
    """`unet.Attention`, in float32: it is small."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, given: list[Features], embedding: Tensor) -> Features:
        x = given.pop().planes
        attended = self.attention(x.movedim(-1, 0)[None].float(), embedding)[0]
        y = attended.movedim(0, -1).to(x.dtype).contiguous()
        return Features(y, sums(y.flatten(0, 2)))


class _Made:
    """Features that are made by putting one plane after the other."""

    def __init__(self, planes: Tensor, how: _How):
        self._put = how.passes.put
        self.features = Features(planes, planes.new_zeros(2, planes.shape[3], dtype=torch.float64))

    def __call__(self, start: int, stop: int, planes: Tensor, around: Tensor | None = None) -> None:
        result = self.features.planes[start:stop].flatten(0, 2)
        around = None if around is None else around.flatten(0, 2)
        self.features.sums.add_(self._put(planes.flatten(0, 2), around, result))


def _mean(given: list[Features], how: _How) -> Features:
    """Of two, in the place of the first."""
    (one, _), (other, _) = given
    given.clear()
    made = _Made(one, how)
    for a in range(1 if one.is_meta else len(one)):
        made(a, a + 1, (one[a : a + 1] + other[a : a + 1]).div_(2))
    return made.features


def _averaged(planes: Tensor, factors: Sequence[int]) -> Tensor:
    """Means over so many voxels along each axis."""
    size = [n // factor for n, factor in zip(planes.shape[:3], factors, strict=True)]
    return averaged(planes.flatten(0, 2), planes.shape[:3], factors).view(*size, -1)


def _through(stage: nn.Module, given: list[Features], embedding: Tensor) -> Features:
    """Features after all layers of a stage. The list is emptied."""
    for layer in stage.children():
        given = [layer(given, embedding)]
    return given.pop()


class _Level:
    """How often the grid has been halved where a network is built."""

    halved = 0

    @property
    def fine(self) -> bool:
        return self.halved < _FINE


def _stage(stage: nn.Module, how: _How, level: _Level, *, spent: bool = False) -> nn.ModuleList:
    """The same layers.

    Args:
        level: where they begin; afterwards where they end.
        spent: nobody needs its input afterwards.
    """
    made = nn.ModuleList()
    for layer in stage.children():
        if isinstance(layer, ResBlock):
            if layer.factors:
                level.halved += -1 if layer.grows else 1
            made.append(_Block(layer, how, spent=spent or len(made) > 0, fine=level.fine))
        elif isinstance(layer, Attention):
            made.append(_Attention(layer))
        elif isinstance(layer, Upsample):
            level.halved -= 1
            made.append(_Resampling(layer.conv, how, layer.factors))
        else:
            assert isinstance(layer, Downsample)
            level.halved += 1
            made.append(_Resampling(layer.op, how))
    return made
