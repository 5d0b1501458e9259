"""Where which tissue is: maps of tissue fractions to simulate from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from cwdm.errors import InputError
from cwdm.relaxation import Tissue
from cwdm.volume import read_volume

CHANNELS = (Tissue.CSF, Tissue.CORTEX, Tissue.DEEP, Tissue.WHITE)

FREESURFER = {
    Tissue.CSF: (4, 5, 14, 15, 24, 43, 44, 72),
    Tissue.CORTEX: (3, 8, 17, 18, 42, 47, 53, 54),
    Tissue.DEEP: (9, 10, 11, 12, 13, 26, 48, 49, 50, 51, 52, 58),
    Tissue.WHITE: (2, 7, 16, 28, 41, 46, 60, 77, 85, 251, 252, 253, 254, 255),
}
"""Labels of FreeSurfer's aseg per tissue; others count as what is nearest."""

SHARPEN = 2.5
"""Exponent that gives the blurred average of many brains the edges of a single one."""

BLUR_MM = 0.7
"""Standard deviation that turns hard labels into fractions of voxels."""

SULCAL_MM = 3.0
"""How far cerebrospinal fluid reaches over the cortex after skull stripping."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """One brain."""

    name: str
    fractions: Tensor
    """(4, X, Y, Z) in CHANNELS order, float32; they sum to 1 in the brain and to 0 outside."""
    affine: NDArray[np.float64]
    """(4, 4), voxel index -> world in mm (RAS+)."""


def mni152() -> Anatomy:
    """The average brain that ships with nilearn: ICBM 152, 2009, 1 mm.

    Raises:
        InputError: nilearn is not installed.
    """
    try:
        from nilearn.datasets import (
            load_mni152_brain_mask,
            load_mni152_gm_template,
            load_mni152_wm_template,
        )
    except ImportError as error:
        raise InputError(
            "nilearn is not installed, expected it for the MNI152 anatomy: "
            'pip install "cwdm[simulate]", or give label maps'
        ) from error
    image = load_mni152_gm_template(resolution=1)
    affine = np.asarray(image.affine, dtype=np.float64)
    grey = np.asarray(image.dataobj, dtype=np.float32)
    white = np.asarray(load_mni152_wm_template(resolution=1).dataobj, dtype=np.float32)
    mask = np.asarray(load_mni152_brain_mask(resolution=1).dataobj) > 0
    # the maps have no class for basal ganglia and thalami: grey matter in this ellipsoid (MNI mm)
    where = np.meshgrid(*(np.arange(n) for n in grey.shape), indexing="ij")
    x, y, z = (
        (axis + affine[i, 3] - centre) / radius
        for i, (axis, centre, radius) in enumerate(
            zip(where, (0, -5, 4), (33, 33, 17), strict=True)
        )
    )
    deep = grey * (x * x + y * y + z * z < 1)
    csf = np.clip(1 - grey - white, 0, 1)
    maps = np.stack([csf, grey - deep, deep, white]) ** SHARPEN
    return _anatomy("mni152", maps, mask, affine)


def from_labels(path: Path) -> Anatomy:
    """The brain in a label map with FreeSurfer's numbers (`aseg`, SynthSeg, ...).

    Raises:
        InputError: not a readable image, or without white matter and cortex.
    """
    volume = read_volume(path)
    labels = np.rint(volume.voxels).astype(np.int64)
    onehot = np.stack([np.isin(labels, FREESURFER[tissue]) for tissue in CHANNELS])
    if not (onehot[Tissue.CORTEX].any() and onehot[Tissue.WHITE].any()):
        raise InputError(
            f"{path}: no white matter (2, 41) and cortex (3, 42), expected a FreeSurfer label map"
        )
    solid = _largest(onehot[1:].any(0))
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    mask = ndimage.distance_transform_edt(~solid, sampling=spacing) < SULCAL_MM + 4
    mask = ndimage.distance_transform_edt(mask, sampling=spacing) > 4  # closes sulci, ventricles
    mask = ndimage.binary_fill_holes(mask)
    onehot[Tissue.CSF] |= mask & ~onehot.any(0)
    sigma = (0, *(BLUR_MM / spacing))
    maps = ndimage.gaussian_filter(onehot.astype(np.float32), sigma, truncate=3)
    return _anatomy(Path(path).name.split(".")[0], maps, mask, volume.affine)


def _anatomy(
    name: str, fractions: NDArray[np.float32], mask: NDArray[np.bool_], affine: NDArray[np.float64]
) -> Anatomy:
    total = fractions.sum(0)
    fractions = np.divide(fractions, total, out=np.zeros_like(fractions), where=total > 0)
    return Anatomy(name, torch.from_numpy(fractions * mask).float(), affine)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, n = ndimage.label(mask)
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:])) if n else mask
