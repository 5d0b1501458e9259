"""Where in a brain which tissue is: the maps to simulate from."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from cwdm.errors import InputError
from cwdm.preparation import Box
from cwdm.relaxation import Tissue
from cwdm.volume import read_volume

CHANNELS = (Tissue.CSF, Tissue.CORTEX, Tissue.DEEP, Tissue.WHITE)

FREESURFER = {
    Tissue.CSF: (4, 5, 14, 15, 24, 43, 44, 72),
    Tissue.CORTEX: (3, 8, 17, 18, 42, 47, 53, 54),
    Tissue.DEEP: (9, 10, 11, 12, 13, 26, 48, 49, 50, 51, 52, 58),
    Tissue.WHITE: (2, 7, 16, 28, 41, 46, 60, 77, 85, 251, 252, 253, 254, 255),
}
"""FreeSurfer's numbers for each tissue. Other labels count as the nearest of these."""

SHARPEN = 2.5
"""Exponent that gives the blurred average of many brains the edges of one."""

BLUR = 0.7
"""Voxels: standard deviation of the blur that turns labels into fractions of voxels."""

SULCUS_MM = 3.0
"""The brain mask closes gaps up to twice as wide, as skull stripping does ..."""

RIM_MM = 1.5
"""... and leaves this much fluid on the cortex."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Tissue maps of one brain, with nothing around it."""

    fractions: Tensor
    """(4, X, Y, Z) float32, tissues in the order of CHANNELS: sum 1 in the brain, 0 outside."""
    affine: NDArray[np.float64]
    """(4, 4), voxel index -> mm to the right, front and top."""

    @cached_property
    def volume_mm3(self) -> float:
        """Volume of the brain."""
        return float(self.fractions.sum()) * abs(float(np.linalg.det(self.affine[:3, :3])))

    @cached_property
    def middle(self) -> tuple[float, ...]:
        """The middle of the brain's bounding box, mm."""
        inside = self.fractions.sum(0) > 0.5
        ends = [inside.movedim(axis, 0).flatten(1).any(1).nonzero()[[0, -1]] for axis in range(3)]
        index = torch.stack(ends).double().mean((1, 2)).cpu().numpy()
        return tuple(self.affine[:3, :3] @ index + self.affine[:3, 3])

    def to(self, device: torch.device) -> "Anatomy":
        """The same on a device."""
        return replace(self, fractions=self.fractions.to(device))

    def sample(self, points: Tensor) -> Tensor:
        """Fractions (4, X, Y, Z) at points (3, X, Y, Z) in mm, interpolated linearly."""
        to_index = np.linalg.inv(self.affine)[:3]
        to_index *= 2 / (np.array([self.fractions.shape[1:]]).T - 1)  # to grid_sample's [-1, 1] ...
        matrix = torch.from_numpy(to_index[::-1].copy()).to(points)  # ... and order, z first
        where = torch.addmm(matrix[:, 3:] - 1, matrix[:, :3], points.flatten(1))
        where = where.view(points.shape).movedim(0, -1)[None]
        return functional.grid_sample(self.fractions[None], where, align_corners=True)[0]


def mni152() -> Anatomy:
    """The average brain that ships with nilearn: ICBM 152 nonlinear symmetric 2009a, 1 mm.

    Raises:
        InputError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise InputError(
            "nilearn is not installed, expected it for the anatomy: pip install 'cwdm[simulate]'; "
            "or give label maps (--labels)"
        ) from error
    image = datasets.load_mni152_gm_template(resolution=1)
    affine = np.asarray(image.affine, np.float64)
    grey = np.asarray(image.dataobj, np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, np.float32)
    mask = np.asarray(datasets.load_mni152_brain_mask(resolution=1).dataobj) > 0
    # There is no map of the basal ganglia and thalami: they are the grey matter in this ellipsoid.
    center, radius = np.array([0, -5, 4]), np.array([33, 33, 17])  # MNI mm
    start, step = affine[:3, 3] - center, affine[:3, :3].diagonal()
    axes = [(start[i] + step[i] * np.arange(n)) / radius[i] for i, n in enumerate(grey.shape)]
    deep = grey * (sum(axis**2 for axis in np.ix_(*axes)) < 1)
    csf = np.clip(1 - grey - white, 0, 1)
    maps = np.stack([csf, grey - deep, deep, white])
    return _anatomy(np.power(maps, SHARPEN, dtype=np.float32), mask, affine)


def from_labels(path: Path) -> Anatomy:
    """The brain in a label map with FreeSurfer's numbers: of its `aseg`, SynthSeg, ...

    Raises:
        InputError: not a readable image, or one without white matter or cortex.
    """
    volume = read_volume(path)
    labels = np.rint(volume.voxels).astype(np.int32)
    missing = [t.name for t in (Tissue.CORTEX, Tissue.WHITE) if not _is(t, labels).any()]
    if missing:
        raise InputError(
            f"{path}: no label of {' or '.join(missing)}, expected FreeSurfer's numbers "
            "(2, 41 white matter; 3, 42 cortex; ...)"
        )
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    tight = Box.around(labels != 0)
    margin = [2 + int((SULCUS_MM + RIM_MM) / mm) for mm in spacing]  # farther than the mask reaches
    x, y, z = (first - m for first, m in zip(tight.start, margin, strict=True))
    a, b, c = (n + 2 * m for n, m in zip(tight.size, margin, strict=True))
    box = Box((x, y, z), (a, b, c))
    labels = box.crop(labels)
    solid = _largest(~np.isin(labels, (0, *FREESURFER[Tissue.CSF])))
    near = ndimage.distance_transform_edt(~solid, spacing) < SULCUS_MM + RIM_MM
    mask = ndimage.distance_transform_edt(near, spacing) > SULCUS_MM
    mask = ~_largest(~mask)  # without holes
    known = np.isin(labels, [0, *(label for tissue in CHANNELS for label in FREESURFER[tissue])])
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    labels = labels[tuple(nearest)]
    maps = np.stack([_is(tissue, labels) for tissue in CHANNELS]).astype(np.float32)
    maps[Tissue.CSF] += 1 - maps.sum(0)  # what has no label in the mask
    blurred = ndimage.gaussian_filter(maps, (0, BLUR, BLUR, BLUR), truncate=3)
    return _anatomy(blurred.astype(np.float32), mask, _moved(volume.affine, box))


def find_label_maps(folder: Path) -> list[Path]:
    """The NIfTI files in a folder, sorted; InputError if there are none."""
    paths = sorted(path for path in Path(folder).glob("*.nii*") if path.is_file())
    if not paths:
        raise InputError(f"{folder}: found no label maps, expected *.nii or *.nii.gz")
    return paths


def _anatomy(
    maps: NDArray[np.float32], mask: NDArray[np.bool_], affine: NDArray[np.float64]
) -> Anatomy:
    """Maps (4, X, Y, Z) >= 0, normalized and cut to the mask; CSF where they are all 0."""
    maps[Tissue.CSF] += 1e-6
    fractions = maps / maps.sum(0) * mask
    box = Box.around(mask)
    cut = np.stack([box.crop(channel) for channel in fractions])
    return Anatomy(torch.from_numpy(cut), _moved(affine, box))


def _moved(affine: NDArray[np.float64], box: Box) -> NDArray[np.float64]:
    """The affine of what is in the box."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ box.start
    return moved


def _is(tissue: Tissue, labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    return np.isin(labels, FREESURFER[tissue])


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part."""
    parts, _ = ndimage.label(mask)
    largest: NDArray[np.bool_] = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return largest
