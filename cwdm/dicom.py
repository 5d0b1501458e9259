"""CT series in DICOM files, as in LIDC-IDRI. The only user of SimpleITK."""

# mypy: untyped-calls-exclude="SimpleITK"

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from cwdm.errors import InputError
from cwdm.volume import Volume, new_volume

__all__ = ["Series", "find_series", "read_series"]

_log = logging.getLogger(__name__)

_MODALITY, _PATIENT_ID = "0008|0060", "0010|0020"
_FEWEST_SLICES = 16
"""Fewer are a localizer or a sample of slices, no volume."""
_UNEVEN = 0.1
"""Of the slice spacing: how far a slice may be from its place. A missing one is 1 away."""
_AIR_HU = -1024
"""The least that 12 bits with the usual offset hold."""


@dataclass(frozen=True)
class Series:
    """The files of one CT series."""

    id: str
    """The patient's id, fit for a file name; with a few digits more if there are several series."""
    folder: Path
    files: tuple[str, ...]
    """Paths of the slices, one each."""


def find_series(root: Path) -> list[Series]:
    """All CT series in the folder `root` and below, sorted by id; radiographs are left out.

    Raises:
        InputError: not a folder, or no CT series in it.
    """
    found: list[tuple[str, str, Path, tuple[str, ...]]] = []
    for walked, subfolders, names in os.walk(root):
        subfolders.sort()
        if not names:
            continue
        folder = Path(walked)
        for uid, files in _series_in(folder):
            modality, patient = _tags(files[0])
            if modality != "CT":
                continue
            if len(files) < _FEWEST_SLICES:
                _log.warning(
                    "%s: series %s left out, found %d slices, expected at least %d",
                    *(folder, uid, len(files), _FEWEST_SLICES),
                )
                continue
            identity = f"{uid} {folder.relative_to(root)}"  # a copy elsewhere has the same UID
            found.append((patient, hashlib.sha256(identity.encode()).hexdigest(), folder, files))
    if not found:
        raise InputError(f"{root}: found no CT series in it or below, expected DICOM files")
    series_of = Counter(patient for patient, *_ in found)
    series = [
        Series(patient if series_of[patient] == 1 else f"{patient}-{digest[:8]}", folder, files)
        for patient, digest, folder, files in found
    ]
    return sorted(series, key=lambda each: each.id)


def read_series(series: Series) -> Volume:
    """Read a CT series: HU (X, Y, Z) in canonical orientation, affine in mm.

    What is below -1024 HU becomes -1024: scanners put -2000 or less outside their round field of
    view, where nothing was measured.

    Raises:
        InputError: a slice that is unreadable, or no slice of grey values; slices of different size
            or orientation; or not evenly spaced along their normal, as if one is missing.
    """
    with _quiet():
        slices = [_read_slice(path) for path in series.files]
    first = slices[0]
    for path, each in zip(series.files, slices, strict=True):
        if each.GetSize() != first.GetSize():
            sizes = f"{each.GetSize()[:2]} and {first.GetSize()[:2]}"
            raise InputError(f"{path}: found slices of {sizes} voxels, expected one size")
        here, there = ((*s.GetSpacing()[:2], *s.GetDirection()) for s in (each, first))
        if not np.allclose(here, there, rtol=0, atol=1e-3):
            raise InputError(f"{path}: found slices in two orientations or spacings, expected one")
    normal = np.array(first.GetDirection()).reshape(3, 3)[:, 2]
    origins = np.array([each.GetOrigin() for each in slices])
    order = np.argsort(origins @ normal)
    image = sitk.GetImageFromArray(
        np.concatenate([sitk.GetArrayViewFromImage(slices[i]) for i in order])
    )
    spacing = _slice_spacing([series.files[i] for i in order], origins[order], normal)
    image.SetSpacing((*first.GetSpacing()[:2], spacing))
    image.SetDirection(first.GetDirection())
    image.SetOrigin(origins[order[0]])
    image = sitk.DICOMOrient(image, "RAS")
    voxels = sitk.GetArrayFromImage(image).transpose(2, 1, 0).clip(_AIR_HU)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's x and y run to the left and back
    return replace(new_volume(np.ascontiguousarray(voxels), affine), path=series.folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ITK from writing its warnings to stderr."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _series_in(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """UID and files of each series that has files in the folder itself."""
    with _quiet():
        reader = sitk.ImageSeriesReader
        uids = sorted(reader.GetGDCMSeriesIDs(str(folder)))
        return [(uid, reader.GetGDCMSeriesFileNames(str(folder), uid)) for uid in uids]


def _tags(path: str) -> tuple[str, str]:
    """Modality and patient id, fit for a file name, of a DICOM file; empty if it has none."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        with _quiet():
            reader.ReadImageInformation()
    except RuntimeError:
        return "", ""  # a report, a plan, ...: no image
    modality, patient = (
        reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""
        for tag in (_MODALITY, _PATIENT_ID)
    )
    return modality, re.sub(r"[^\w.-]+", "-", patient).strip("-.") or "unnamed"


def _read_slice(path: str) -> sitk.Image:
    """One slice in HU, float32, (X, Y, 1)."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        if components != 1 or len(size) != 3 or size[2] != 1:
            found = f"{components} components in a grid of {size}"
            raise InputError(f"{path}: found {found}, expected one slice of grey values")
        image: sitk.Image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{path}: cannot be read as DICOM, {reason}") from error
    return image


def _slice_spacing(
    files: Sequence[str], origins: NDArray[np.float64], normal: NDArray[np.float64]
) -> float:
    """mm from slice to slice, given where each begins (N, 3), in mm."""
    steps = np.diff(origins, axis=0)
    spacing = float(np.median(steps @ normal))
    errors = np.linalg.norm(steps - spacing * normal, axis=1)
    if not spacing or errors.max() > _UNEVEN * spacing:
        worst = int(errors.argmax())
        raise InputError(
            f"{files[worst + 1]}: found it {np.linalg.norm(steps[worst]):.4g} mm from the slice "
            f"before, expected {spacing:.4g} mm along their normal as elsewhere in the series"
        )
    return float(np.mean(steps @ normal))
