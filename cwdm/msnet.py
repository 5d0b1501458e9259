"""The cascade of Wang et al. (BrainLes 2017, arXiv 1709.00382), second in BraTS 2017.

Three anisotropic networks, one per axis, find the whole tumor, three the core within it and three
the enhancing tumor within that. Axes inside are those of the files it was trained on: slices from
bottom to top, rows from front to back, columns from right to left.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from cwdm.errors import InputError
from cwdm.machine import Precision, choose_bf16, choose_device
from cwdm.masks import extent
from cwdm.modality import Modality
from cwdm.segmentation import Labels, Region, from_regions

__all__ = ["CHANNELS", "MSNet", "Network", "tensor_shapes"]

Voxels = NDArray[np.float32]
Mask = NDArray[np.bool_]

CHANNELS = (Modality.T2F, Modality.T1N, Modality.T1C, Modality.T2W)
"""Order of the input channels."""

_NAMES = {Region.WT: "wt", Region.TC: "tc", Region.ET: "en"}
_VIEWS = {"ax": (0, 1, 2), "sg": (2, 0, 1), "cr": (1, 0, 2)}
"""Which axes are the slices, rows and columns of a view."""
_WINDOWS = {"ax": (180, 160), "sg": (180, 160), "cr": (160, 160)}
"""Least rows and columns that the networks of the whole tumor see."""
_WINDOW = (96, 96)
"""The same, of the other networks."""
_SLICES = 11
"""Of the output of a slab; the four fusing convolutions without padding take two each."""
_LOST = 4
"""Slices on either side of the output that a slab needs."""
_SLABS = 5
"""In a batch, over which batch normalization takes its statistics."""
_PIXELS = 30_000
"""Of the slices that are worked on at a time."""
_MARGIN = 5
"""Voxels around a region in which the next network searches."""
_NEIGHBORS = ndimage.generate_binary_structure(3, 2)


def tensor_shapes(region: Region) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one network, kernels in the order of TensorFlow."""
    shapes: dict[str, tuple[int, ...]] = {}

    def normalization(layer: str, index: str, channels: int) -> None:
        for name in (f"bn_{index}/gamma", f"bn_{index}/beta", f"prelu_acti_{index}/alpha"):
            shapes[f"{layer}/{name}"] = (channels,)

    for block in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3"):
        for index in ("0", "1"):
            channels = 4 if block + index == "1_10" else 32
            normalization(f"block{block}", index, channels)
            shapes[f"block{block}/conv_{index}/w"] = (1, 3, 3, channels, 32)
    layers: dict[str, tuple[int, ...]] = {
        **{f"fuse{stage}": (3, 1, 1, 32, 32) for stage in "1234"},
        "downsample2": (1, 3, 3, 32, 32),
        "pred_up2_1": (1, 3, 3, 4, 32),
        "pred_up3_1": (1, 3, 3, 8, 32),
    }
    if region is Region.ET:
        shapes["pred1/w"] = (1, 3, 3, 32, 2)
    else:
        layers |= {
            "downsample1": (1, 3, 3, 32, 32),
            "pred_up1": (1, 3, 3, 2, 32),
            "pred_up2_2": (1, 3, 3, 4, 4),
            "pred_up3_2": (1, 3, 3, 8, 8),
        }
    for layer, kernel in layers.items():
        up = layer.startswith("pred_up")
        normalization(f"{layer}_bn_prelu", "", kernel[3] if up else kernel[4])
        shapes[f"{layer}_bn_prelu/{'deconv' if up else 'conv'}_/w"] = kernel
    return shapes | {"final_pred/w": (1, 3, 3, 14, 2)}


class Network:
    """One of the nine networks: slabs (B, 4, 19, H, W) -> probability of its region (B, 11, H, W).

    H and W are multiples of 4.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = dict(weights)

    def __call__(self, slabs: Tensor) -> Tensor:
        batch, _, _, *size = slabs.shape
        x = slabs.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        twice = "pred1/w" not in self.weights  # downsampled; the network for ET is so only once
        x = self._block("1_2", self._block("1_1", x))
        x = self._fuse("fuse1", x, batch)
        if twice:
            x = self._down("downsample1", x)
        x = self._block("2_2", self._block("2_1", x))
        x = self._fuse("fuse2", x, batch)
        inner = _inner(x, 2, batch)
        a = self._up("pred_up1", inner) if twice else self._conv("pred1", inner)
        x = self._down("downsample2", x)
        for name, dilation in {"3_1": 1, "3_2": 2, "3_3": 3}.items():
            x = self._block(name, x, dilation)
        x = self._fuse("fuse3", x, batch)
        b = self._up("pred_up2_1", _inner(x, 1, batch))
        for name, dilation in {"4_1": 3, "4_2": 2, "4_3": 1}.items():
            x = self._block(name, x, dilation)
        x = self._fuse("fuse4", x, batch)
        c = self._up("pred_up3_1", x)
        if twice:
            b, c = self._up("pred_up2_2", b), self._up("pred_up3_2", c)
        scores = self._conv("final_pred", torch.cat([a, b, c], 1)).float()
        return scores.softmax(1)[:, 1].reshape(batch, _SLICES, *size)

    def _block(self, name: str, x: Tensor, dilation: int = 1) -> Tensor:
        """Twice normalization, activation and convolution, added to x (which is overwritten)."""
        first, second = (f"block{name}/conv_{index}" for index in "01")
        added = (self.weights[f"{first}/w"].shape[0] - x.shape[1]) // 2
        activate, parts = self._activation(f"block{name}", "0", x), _parts(x)
        if added:
            x = functional.pad(x, (0, 0, 0, 0, added, added))
        y = torch.empty_like(x)
        for source, target in zip(parts, _parts(y), strict=True):
            target.copy_(self._conv(first, activate(source), dilation))
        activate = self._activation(f"block{name}", "1", y)
        for source, target in zip(_parts(y), _parts(x), strict=True):
            target += self._conv(second, activate(source), dilation)
        return x

    def _fuse(self, layer: str, x: Tensor, batch: int) -> Tensor:
        """Convolve along the slices, two of which are lost."""
        _, channels, height, width = x.shape
        # slices as rows and pixels as columns: the same memory, and a 2D convolution
        x = x.permute(0, 2, 3, 1).reshape(batch, -1, height * width, channels).permute(0, 3, 1, 2)
        x = functional.conv2d(x, self.weights[f"{layer}_bn_prelu/conv_/w"]).permute(0, 2, 3, 1)
        x = x.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return self._activated(layer, x)

    def _down(self, layer: str, x: Tensor) -> Tensor:
        """Halve rows and columns."""
        kernel = self.weights[f"{layer}_bn_prelu/conv_/w"]
        # as TensorFlow pads an even size: at the end only
        parts = (functional.pad(part, (0, 1, 0, 1)) for part in _parts(x))
        x = torch.cat([functional.conv2d(part, kernel, stride=2) for part in parts])
        return self._activated(layer, x)

    def _up(self, layer: str, x: Tensor) -> Tensor:
        """Double rows and columns."""
        kernel = self.weights[f"{layer}_bn_prelu/deconv_/w"]
        parts = [functional.conv_transpose2d(part, kernel, stride=2) for part in _parts(x)]
        return self._activated(layer, torch.cat([part[..., :-1, :-1] for part in parts]))

    def _conv(self, name: str, x: Tensor, dilation: int = 1) -> Tensor:
        """A convolution within the slices that keeps the size."""
        kernel = self.weights[f"{name}/w"]
        return functional.conv2d(x, kernel, padding=dilation, dilation=dilation)

    def _activated(self, layer: str, x: Tensor) -> Tensor:
        """Batch normalization and PReLU, in place."""
        activate = self._activation(f"{layer}_bn_prelu", "", x)
        for part in _parts(x):
            part.copy_(activate(part))
        return x

    def _activation(self, layer: str, index: str, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Batch normalization by the statistics of x, then PReLU, for parts of it."""
        gamma, beta = (self.weights[f"{layer}/bn_{index}/{name}"] for name in ("gamma", "beta"))
        alpha = self.weights[f"{layer}/prelu_acti_{index}/alpha"].to(x.dtype)
        # the running statistics are not used, but make those of bf16 tensors float32
        mean, variance = torch.batch_norm_update_stats(
            x, torch.zeros_like(gamma), torch.ones_like(gamma), 0.0
        )

        def activate(part: Tensor) -> Tensor:
            part = functional.batch_norm(part, mean, variance, gamma, beta, eps=1e-5)
            return functional.prelu(part, alpha)

        return activate


class MSNet:
    """The cascade of the nine networks, loaded once, applied to many cases."""

    def __init__(self, networks: Mapping[tuple[Region, str], Network], device: torch.device):
        self.networks = dict(networks)
        self.device = device

    @classmethod
    def load(cls, path: Path, device: str = "cpu", precision: Precision = "auto") -> Self:
        """Read the weights, an npz file of arrays ``<region>_<view>/<layer>/...``.

        In bf16, which changes the Dice of a case by about 0.001, it takes half the time on a CPU
        that multiplies in it.

        Raises:
            InputError: no such file, not such a file, or an array that is missing or has another
                shape.
        """
        where = choose_device(device)
        dtype = torch.bfloat16 if choose_bf16(precision, where) else torch.float32
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file, expected the weights of MSNet (.npz)"
            ) from None
        except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
            raise InputError(f"{path}: not a readable npz file: {error}") from error
        networks = {}
        for region, name in _NAMES.items():
            for view in _VIEWS:
                weights = {}
                for key, shape in tensor_shapes(region).items():
                    array = arrays.get(f"{name}_{view}/{key}")
                    if array is None or array.shape != shape:
                        found = "nothing" if array is None else f"shape {array.shape}"
                        raise InputError(
                            f"{path}: {name}_{view}/{key}: found {found}, expected shape {shape}"
                        )
                    tensor = torch.from_numpy(array).to(where, torch.float32)
                    weights[key] = _kernel(tensor).to(dtype) if key.endswith("/w") else tensor
                networks[region, view] = Network(weights)
        return cls(networks, where)

    @torch.inference_mode()
    def __call__(
        self,
        images: Mapping[Modality, Voxels],
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Labels:
        """Segment one case: labels (X, Y, Z) as BraTS 2023 numbers them.

        Args:
            images: the four sequences, (X, Y, Z) in canonical orientation, 1 mm, 0 outside the
                brain. An image of zeros only stands for a missing one.
            seed: of the noise that fills the background.
            progress: called with (views done, 9); the search ends early where nothing is found.
        """
        channels = np.stack([_turn(images[modality]) for modality in CHANNELS])
        brain: Mask = np.any(channels > 0, axis=0)
        masks = {region: np.zeros_like(brain) for region in Region}
        generator = torch.Generator().manual_seed(seed)
        search, done = brain, 0
        for region in Region:
            if not search.any():
                break
            box = extent(search, _MARGIN)
            if region is Region.WT:
                channels[:, *box] = _standardize(channels[:, *box], generator)
            crop = torch.from_numpy(channels[:, *box])
            probability = torch.zeros(crop.shape[1:])
            for view, axes in _VIEWS.items():
                seen = crop.permute(0, *(1 + axis for axis in axes))
                window = _WINDOWS[view] if region is Region.WT else _WINDOW
                network = self.networks[region, view]
                part = self._probability(network, seen, window, generator)
                probability += part.permute(*np.argsort(axes).tolist()) / len(_VIEWS)
                done += 1
                if progress:
                    progress(done, len(self.networks))
            mask = probability.numpy() > 0.5
            if region is not Region.ET:  # the enhancing rim is thin, and what it encloses is not it
                mask = ndimage.binary_closing(mask, _NEIGHBORS)
            masks[region][box] = _without_specks(mask)
            masks[region] &= brain
            search = masks[region]
        return from_regions({region: mask.T[::-1, ::-1] for region, mask in masks.items()})

    def _probability(
        self, network: Network, volume: Tensor, window: tuple[int, int], generator: torch.Generator
    ) -> Tensor:
        """Of the voxels (D, H, W) of an image (4, D, H, W) for one network."""
        _, depth, *size = volume.shape
        count = -(-depth // _SLICES)
        sides = [max(-(-n // 4) * 4, least) for n, least in zip(size, window, strict=True)]
        canvas = torch.randn(4, count * _SLICES + 2 * _LOST, *sides, generator=generator)
        inner = [
            slice((side - n) // 2, (side + n) // 2) for n, side in zip(size, sides, strict=True)
        ]
        canvas[:, _LOST : _LOST + depth, *inner] = volume
        slabs = canvas.unfold(1, _SLICES + 2 * _LOST, _SLICES).permute(1, 0, 4, 2, 3)
        dtype = network.weights["final_pred/w"].dtype
        parts = [
            network(batch.to(self.device, dtype)).cpu()
            # as even as possible: the statistics of a slab left over would be a poor guess
            for batch in slabs.tensor_split(-(-count // _SLABS))
        ]
        return torch.cat(parts).flatten(0, 1)[:depth, *inner]


def _kernel(w: Tensor) -> Tensor:
    """From (slices, rows, columns, in, out) to the two axes that are not 1, (out, in, ., .).

    A kernel of an up-convolution is stored (., ., ., out, in), torch wants it (in, out, ., .).
    """
    w = w[0] if w.shape[0] == 1 else w[:, :, 0]
    return w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Slices (N, C, H, W), a few at a time: what is made from them stays in the CPU's cache."""
    return torch.split(x, max(1, _PIXELS // x[0, 0].numel()))


def _inner(x: Tensor, lost: int, batch: int) -> Tensor:
    """Slices (B * D, ...) without the outer ones of each slab."""
    return torch.unflatten(x, 0, (batch, -1))[:, lost:-lost].flatten(0, 1)


def _turn(image: Voxels) -> Voxels:
    """From (X, Y, Z) in canonical orientation to the networks' axes."""
    return np.ascontiguousarray(image[::-1, ::-1].T)


def _standardize(channels: Voxels, generator: torch.Generator) -> Voxels:
    """Mean 0 and deviation 1 in the brain, N(0, 1) noise outside."""
    result: Voxels = torch.randn(channels.shape, generator=generator).numpy()
    for channel, standardized in zip(channels, result, strict=True):
        inside = channel > 0
        if inside.any():
            values = channel[inside].astype(np.float64)
            standardized[inside] = (values - values.mean()) / (values.std() or 1)
    return result


def _without_specks(mask: Mask) -> Mask:
    """Without components of less than a tenth of the largest."""
    components, _ = ndimage.label(mask, _NEIGHBORS)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept: Mask = (sizes > 0) & (10 * sizes >= sizes.max())
    return kept[components]
