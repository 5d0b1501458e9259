"""From the volumes of a case to the network's images, and back to the grid on disk.

Forward: measure and normalize each modality, cut out the brain, resample to the model's voxel size,
pad to a size the network can halve often enough. Backward: the same steps inverted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cwdm.intensity import Normalization, Scale
from cwdm.modality import Modality
from cwdm.volume import Volume, brain_mask

__all__ = ["Box", "Prepared", "prepare"]

_SAME_SPACING = 0.1
"""Voxels within 10 % of the model's size are taken as they are: brains differ by more."""


@dataclass(frozen=True)
class Box:
    """A block of a grid. ``start`` may be negative and the block may end outside: zeros there."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]

    @classmethod
    def around(cls, mask: NDArray[np.bool_], multiple: int) -> "Box":
        """The smallest block around the mask, centred, with sides that are multiples."""
        start, size = [], []
        for axis in range(3):
            other = tuple(a for a in range(3) if a != axis)
            (inside,) = np.nonzero(mask.any(axis=other))
            length = int(inside[-1] - inside[0] + 1)
            padded = -(-length // multiple) * multiple
            start.append(int(inside[0]) - (padded - length) // 2)
            size.append(padded)
        return cls((start[0], start[1], start[2]), (size[0], size[1], size[2]))

    def crop(self, voxels: NDArray[np.generic]) -> NDArray[np.generic]:
        """The block, zero where it lies outside of ``voxels`` (X, Y, Z)."""
        cropped = np.zeros(self.size, dtype=voxels.dtype)
        cropped[self._inside(voxels.shape, shift=False)] = voxels[self._inside(voxels.shape)]
        return cropped

    def uncrop(self, voxels: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
        """The whole grid with the block in its place and zeros around; inverse of ``crop``."""
        whole = np.zeros(shape, dtype=voxels.dtype)
        whole[self._inside(shape)] = voxels[self._inside(shape, shift=False)]
        return whole

    def _inside(self, shape: tuple[int, ...], *, shift: bool = True) -> tuple[slice, ...]:
        """Where block and grid overlap, in grid indices or (``shift=False``) in block indices."""
        return tuple(
            slice(max(a, 0) - (0 if shift else a), min(a + n, end) - (0 if shift else a))
            for a, n, end in zip(self.start, self.size, shape, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case as the network sees it, with all that is needed to go back."""

    images: Mapping[Modality, Tensor]
    """Normalized (X', Y', Z') float32, 0 outside the brain."""
    scales: Mapping[Modality, Scale]
    mask: NDArray[np.bool_]
    """(X, Y, Z) brain on the case's own grid: where at least half of the modalities have it."""
    box: Box
    """Where the images lie on the case's grid."""

    def restore(self, image: Tensor, scale: Scale) -> NDArray[np.float32]:
        """A network image (X', Y', Z') -> (X, Y, Z) in scanner units, exactly 0 off the brain."""
        voxels = _resize(image.detach().float().cpu(), self.box.size).numpy()
        whole = self.box.uncrop(voxels, self.mask.shape)
        restored = Normalization.denormalize(whole.astype(np.float32), self.mask, scale)
        return restored.astype(np.float32)


def prepare(
    volumes: Mapping[Modality, Volume],
    normalization: Normalization,
    *,
    multiple: int,
    spacing_mm: float,
) -> Prepared:
    """Normalize the volumes of one case (one common grid) and cut out the brain.

    Args:
        multiple: every axis of the images is a multiple of this.
        spacing_mm: voxel size of the images; a case within 10 % of it is not resampled.
    """
    masks = {modality: brain_mask(volume) for modality, volume in volumes.items()}
    stacked = np.stack(list(masks.values()))
    votes: NDArray[np.int64] = stacked.sum(axis=0)
    mask = np.greater_equal(2 * votes, len(masks))
    if not mask.any():
        mask = np.greater(votes, 0)
    spacing = np.linalg.norm(next(iter(volumes.values())).affine[:3, :3], axis=0)
    zoom = np.where(abs(spacing / spacing_mm - 1) > _SAME_SPACING, spacing / spacing_mm, 1.0)
    box = Box.around(mask, multiple if (zoom == 1).all() else 1)
    size = tuple(
        n if z == 1 else max(multiple, round(n * z / multiple) * multiple)
        for n, z in zip(box.size, zoom, strict=True)
    )
    images, scales = {}, {}
    for modality, volume in volumes.items():
        scales[modality] = normalization.measure(volume.voxels, masks[modality])
        image = normalization.normalize(volume.voxels, masks[modality], scales[modality])
        cropped = torch.from_numpy(box.crop(image).astype(np.float32))
        images[modality] = _resize(cropped, size)
    return Prepared(images, scales, mask, box)


def _resize(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """Trilinear resampling (X, Y, Z) -> size; the same tensor where nothing changes."""
    if tuple(image.shape) == tuple(size):
        return image
    return F.interpolate(image[None, None], size=size, mode="trilinear", antialias=False)[0, 0]
