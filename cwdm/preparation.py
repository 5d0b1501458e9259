"""From the volumes of a case to the network's images, and back to the grid on disk.

Forward: measure and normalize each modality, cut out the brain, resample to the model's voxel size,
pad to a size the network can halve often enough. Backward: the same steps inverted.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cwdm.config import Images, Orientation
from cwdm.intensity import NORMALIZATIONS, Normalization, Scale
from cwdm.masks import extent
from cwdm.modality import Modality
from cwdm.volume import Volume, brain_mask

__all__ = ["FLIPS", "Box", "Frame", "Prepared", "inside", "majority", "prepare"]

Voxel = TypeVar("Voxel", bound=np.generic)

FLIPS: dict[Orientation, tuple[int, ...]] = {"RAS": (), "LPS": (0, 1), "LAS": (0,)}
"""Axes to turn round between canonical (RAS) and the orientation of a network."""

_SAME_SPACING = 0.1
"""Voxels within 10 % of the model's size are taken as they are: brains differ by more."""


@dataclass(frozen=True)
class Box:
    """A block of a grid. ``start`` may be negative and the block may end outside of it."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]

    @classmethod
    def around(cls, mask: NDArray[np.bool_]) -> "Box":
        """The smallest block around the mask."""
        x, y, z = extent(mask)
        size = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
        return cls((x.start, y.start, z.start), size)

    @classmethod
    def centred(cls, mask: NDArray[np.bool_], size: Sequence[int]) -> "Box":
        """The block of that size with the mask's extent in the middle, rounded towards it."""
        tight = cls.around(mask)
        x, y, z = (
            start + int((length - wanted) / 2)
            for start, length, wanted in zip(tight.start, tight.size, size, strict=True)
        )
        return cls((x, y, z), (size[0], size[1], size[2]))

    def crop(self, voxels: NDArray[Voxel], outside: float = 0) -> NDArray[Voxel]:
        """The block, ``outside`` where it lies outside of ``voxels`` (X, Y, Z)."""
        cropped = np.full(self.size, outside, dtype=voxels.dtype)
        cropped[self._inside(voxels.shape, shift=False)] = voxels[self._inside(voxels.shape)]
        return cropped

    def uncrop(self, voxels: NDArray[Voxel], shape: tuple[int, ...]) -> NDArray[Voxel]:
        """The whole grid with the block in its place and zeros around; inverse of ``crop``."""
        whole = np.zeros(shape, dtype=voxels.dtype)
        whole[self._inside(shape)] = voxels[self._inside(shape, shift=False)]
        return whole

    def _inside(self, shape: tuple[int, ...], *, shift: bool = True) -> tuple[slice, ...]:
        """Where block and grid overlap, in grid indices or (``shift=False``) in block indices."""
        slices = []
        for a, n, end in zip(self.start, self.size, shape, strict=True):
            first = max(a, 0)
            last = max(min(a + n, end), first)  # nothing where they do not meet
            slices.append(slice(first, last) if shift else slice(first - a, last - a))
        return tuple(slices)


@dataclass(frozen=True)
class Frame:
    """Where a network image lies on the grid of a case, and how its axes run."""

    box: Box
    size: tuple[int, ...]
    """(X', Y', Z') of the network image."""
    flips: tuple[int, ...] = ()
    """Axes the network sees the other way round, see ``FLIPS``."""

    @classmethod
    def of(
        cls,
        mask: NDArray[np.bool_],
        affine: NDArray[np.float64],
        settings: Images,
        multiple: int,
    ) -> "Frame":
        """The frame of a case with this brain mask (X, Y, Z).

        Args:
            multiple: every axis of the network image is a multiple of this. What a brain does not
                fill is background: it is padded, not stretched.
        """
        zoom = network_voxels(affine, settings)
        middle = mask
        if settings.size is not None:
            size = settings.size
            if settings.centre != "brain":
                middle = np.ones_like(mask)
        else:
            voxels = [
                math.ceil(n * z - 1e-6) for n, z in zip(Box.around(mask).size, zoom, strict=True)
            ]
            x, y, z = (-(-n // multiple) * multiple for n in voxels)
            size = (x, y, z)
        box = Box.centred(middle, [round(n / z) for n, z in zip(size, zoom, strict=True)])
        return cls(box, size, FLIPS[settings.orientation])

    def to_network(self, voxels: NDArray[np.generic]) -> Tensor:
        """What is in the box -> network image (X', Y', Z') float32."""
        image = _resize(torch.from_numpy(voxels.astype(np.float32)), self.size)
        return image.flip(self.flips)

    def from_network(self, image: Tensor) -> NDArray[np.float32]:
        """Network image -> what goes into the box; inverse of ``to_network``."""
        image = image.detach().float().cpu()
        image = _resize(image.flip(self.flips), self.box.size)
        return image.numpy()


def network_voxels(affine: NDArray[np.float64], settings: Images) -> NDArray[np.float64]:
    """(3,) voxels of the network per voxel of a case along each axis; 1 where nearly alike."""
    ratio = np.linalg.norm(affine[:3, :3], axis=0) / settings.spacing_mm
    return np.where(abs(ratio - 1) > _SAME_SPACING, ratio, 1.0)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case as the network sees it, with all that is needed to go back."""

    images: Mapping[Modality, Tensor]
    """Normalized (X', Y', Z') float32, the background's value outside the brain."""
    scales: Mapping[Modality, Scale]
    mask: NDArray[np.bool_]
    """(X, Y, Z) brain on the case's own grid: where at least half of the modalities have it."""
    frame: Frame

    def restore(self, image: Tensor, scale: Scale) -> NDArray[np.float32]:
        """A network image (X', Y', Z') -> (X, Y, Z) in scanner units, exactly 0 off the brain."""
        whole = self.frame.box.uncrop(self.frame.from_network(image), self.mask.shape)
        seen = self.frame.box.uncrop(np.ones(self.frame.box.size, dtype=bool), self.mask.shape)
        restored = Normalization.denormalize(whole, self.mask & seen, scale)
        return restored.astype(np.float32)


def prepare(volumes: Mapping[Modality, Volume], settings: Images, *, multiple: int) -> Prepared:
    """Normalize the volumes of one case (one common grid) and cut out the brain.

    Args:
        multiple: every axis of the images is a multiple of this.
    """
    normalization = NORMALIZATIONS[settings.normalization]
    with ThreadPoolExecutor() as threads:
        masks = list(threads.map(lambda volume: inside(volume, normalization), volumes.values()))
        mask = majority(masks)
        frame = Frame.of(mask, next(iter(volumes.values())).affine, settings, multiple)

        def one(volume: Volume, own: NDArray[np.bool_]) -> tuple[Tensor, Scale]:
            scale = normalization.measure(volume.voxels, own)
            within = frame.box.crop(volume.voxels), frame.box.crop(own)
            return frame.to_network(normalization.normalize(*within, scale)), scale

        images, scales = zip(*threads.map(one, volumes.values(), masks), strict=True)
    of_each = dict(zip(volumes, images, strict=True)), dict(zip(volumes, scales, strict=True))
    return Prepared(*of_each, mask, frame)


def majority(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """(X, Y, Z): where at least half of the masks have it, or any of them if that is nowhere."""
    votes: NDArray[np.uint8] = np.sum(masks, axis=0, dtype=np.uint8)
    mask = np.greater_equal(votes, (len(masks) + 1) // 2)
    return mask if mask.any() else np.greater(votes, 0)


def inside(volume: Volume, normalization: Normalization) -> NDArray[np.bool_]:
    """(X, Y, Z) the brain, or everything where a normalization has no outside."""
    return brain_mask(volume) if normalization.masked else np.ones(volume.voxels.shape, bool)


def _resize(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """Trilinear resampling (X, Y, Z) -> size; the same tensor where nothing changes."""
    if tuple(image.shape) == tuple(size):
        return image
    return F.interpolate(image[None, None], size=size, mode="trilinear", antialias=False)[0, 0]
