"""Images on disk: NIfTI in and out, and the grid they lie on. The only user of nibabel.

Inside, every volume is in canonical orientation: axes X, Y, Z run to the right, to the front and up
(RAS+) as nearly as the grid allows. On disk it is whatever the file was.
"""

# mypy: untyped-calls-exclude="nibabel"

import gzip
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.casting import float_to_int
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage

from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.masks import extent
from cwdm.modality import Modality

_SAME_GRID_MM = 1e-2
"""How far grids may be apart: single-precision quaternions err that much, a patient moves more."""
_DUST = 1e-5
"""Of the range of intensities: what interpolation leaves in an empty background."""
_MARK = "cwdm "
"""What the `descrip` of every file that we write begins with."""
_BLOCK = 64
"""Voxels along two axes that are brought into order at a time."""
_FINEST_MM, _COARSEST_MM = 0.05, 50.0
"""Of a voxel along an axis: images of brains have 0.1 to 10, in the wrong unit 1000 times that."""
_UNITS = {1: "meters", 3: "micrometers"}
"""What the lowest bits of `xyzt_units` may say besides mm; in files that say nothing it is mm."""
_MOST_LABELS = 8
"""Different values: an image has more, in 8 bits as well; a segmentation of tumors has 2 to 5."""
_SAMPLE = 20_000
"""Voxels that mostly tell whether there are more."""
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, eq=False)
class Volume:
    """The voxels of one image in canonical orientation, and how its file describes them."""

    voxels: NDArray[np.float32]
    """(X, Y, Z) in scanner units."""
    affine: NDArray[np.float64]
    """(4, 4), canonical voxel index -> world in mm."""
    header: nib.Nifti1Header
    """As stored, scaling included: what `write_volume` needs to go back to the file's grid."""
    path: Path
    """The file it came from."""


def new_volume(
    voxels: NDArray[Any],
    affine: NDArray[np.float64],
    dtype: DTypeLike = np.int16,
    *,
    lps: bool = False,
) -> Volume:
    """A volume that has no file yet: voxels (X, Y, Z) in canonical orientation, affine in mm.

    `write_volume(voxels, new_volume(voxels, affine), path, ...)` makes its file.

    Args:
        lps: store it with X and Y turned round, as BraTS images are.
    """
    stored = np.array(affine, np.float64)
    if lps:
        turn = np.diag([-1.0, -1.0, 1.0, 1.0])
        turn[:2, 3] = np.array(voxels.shape[:2]) - 1
        stored = stored @ turn
    header = nib.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(dtype)
    header.set_qform(stored, code=1)
    header.set_sform(stored, code=1)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1.0, 0.0)
    return Volume(voxels.astype(np.float32), np.array(affine, np.float64), header, Path("(new)"))


def stored_as(dtype: DTypeLike, header: nib.Nifti1Header) -> nib.Nifti1Header:
    """The same header for voxels stored in another type, unscaled."""
    header = header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1.0, 0.0)
    return header


def holding(volume: Volume) -> Volume:
    """The same, to be stored as int16 or float32 if its file's integers are too narrow for it.

    Those of a file that scales them never are.
    """
    header, dtype = volume.header, volume.header.get_data_dtype()
    if np.issubdtype(dtype, np.floating) or header.get_slope_inter() != (1.0, 0.0):
        return volume
    low, high = np.rint(volume.voxels.min()), np.rint(volume.voxels.max())
    for wider in (dtype, np.dtype(np.int16)):
        if np.iinfo(wider).min <= low and high <= np.iinfo(wider).max:
            break
    else:
        wider = np.dtype(np.float32)
    return volume if wider == dtype else replace(volume, header=stored_as(wider, header))


def read_volume(path: Path) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file, compressed or not. The whole file is read and verified.

    Raises:
        InputError: unreadable, truncated or not NIfTI; not 3D (trailing axes of length 1 are fine);
            complex or RGB; no usable affine; voxels measured in something else than mm, or of a
            size that no brain is imaged in; NaN or infinite voxels; all voxels the same.
    """
    volume = _read(path)
    if (low := volume.voxels.min()) == volume.voxels.max():
        raise InputError(f"{path}: every voxel is {low:g}, expected an image")
    return volume


def read_image(path: Path) -> Volume:
    """Read what stands for a modality of a case.

    Raises:
        InputError: as `read_volume`; or a mask or a segmentation, by how few values it has.
    """
    volume = read_volume(path)
    if count := _few_values(volume.voxels):
        raise InputError(
            f"{path}: found {count} different values, expected an image (is it a segmentation?)"
        )
    return volume


def read_labels(path: Path, like: Volume) -> NDArray[np.int32]:
    """Read a segmentation (X, Y, Z) on the grid of `like`; it may be empty.

    Raises:
        InputError: as `read_volume`; another grid than `like`; or values that are not whole.
    """
    volume = _read(path)
    _check_same_grid(like, volume)
    labels = np.rint(volume.voxels)
    if (labels != volume.voxels).any():
        raise InputError(f"{path}: has voxels that are not whole numbers, expected labels")
    return labels.astype(np.int32)


def read_map(path: Path, like: Volume) -> NDArray[np.float32]:
    """Read an image (X, Y, Z) on the grid of `like` that may be the same everywhere.

    Raises:
        InputError: as `read_volume` for all else; another grid than `like`.
    """
    volume = _read(path)
    _check_same_grid(like, volume)
    return volume.voxels


def read_volumes(case: Case, modalities: Iterable[Modality]) -> dict[Modality, Volume]:
    """Read some modalities of a case, which have to lie on one grid.

    Raises:
        InputError: as `read_image`; a modality that the case lacks; or two grids.
    """
    modalities = list(modalities)
    for modality in modalities:
        if modality not in case.images:
            present = ", ".join(case.images) or "none"
            raise InputError(f"case {case.id}: no image of {modality}, found {present}")
    with ThreadPoolExecutor() as threads:
        read = list(threads.map(read_image, (case.images[m] for m in modalities)))
    for volume in read[1:]:
        _check_same_grid(read[0], volume)
    return dict(zip(modalities, read, strict=True))


def write_volume(
    voxels: NDArray[Any],
    like: Volume,
    path: Path,
    description: str,
    overwrite: bool = False,
) -> None:
    """Write voxels (X, Y, Z), in canonical orientation, onto the grid of `like`'s file.

    Shape, affine, sform and qform with their codes, voxel size, units and data type are those of
    that file. Integers are rounded and clipped to their range. If that file scales its integers
    (`scl_slope`), the new one does too, with the slope that just holds the new voxels and keeps 0
    exact. What only describes the other image (display range, extensions, ...) is left out.

    Args:
        description: the header's `descrip`, at most 79 ASCII characters; begins with "cwdm " and
            says that the image is synthetic.
        overwrite: replace an existing image, though never one that we did not write.

    Raises:
        InputError: see `atomic_write`.
        ValueError: voxels of another shape than `like`, or not finite; an unmarked description.
    """
    if voxels.shape != like.voxels.shape:
        raise ValueError(f"{path}: voxels have shape {voxels.shape}, not {like.voxels.shape}")
    if not np.isfinite(voxels).all():
        raise ValueError(f"{path}: the voxels to write are not all finite")
    if not description.startswith(_MARK):
        raise ValueError(f"the description {description!r} does not begin with {_MARK!r}")
    if overwrite and path.exists() and not is_ours(path):
        raise InputError(f"{path}: not written by cwdm, an acquired image is never overwritten")
    header = like.header.copy()
    header["descrip"] = description.encode("ascii", "replace")[:79]
    header["cal_min"] = header["cal_max"] = 0
    header["aux_file"] = b""
    header.extensions.clear()
    header.set_data_offset(0)  # nibabel's "right after the header"
    slope, inter = _scaling(voxels, header)
    orientation = orientations.io_orientation(header.get_best_affine())
    back = orientations.ornt_transform(_RAS, orientation)
    stored = orientations.apply_orientation(voxels, back).reshape(header.get_data_shape())
    dtype = header.get_data_dtype()
    if np.issubdtype(dtype, np.integer):
        exact = np.issubdtype(stored.dtype, np.floating) and dtype.itemsize <= 2
        if (slope, inter) != (1, 0) or not exact:  # in float32, limits of int32 are others
            stored = (stored.astype(np.float64) - inter) / slope
        stored = float_to_int(stored, dtype.type)
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(stored, None, header)  # without an affine, the header's sform and qform are kept
    image.header.set_slope_inter(slope, inter)  # only now, the constructor resets them
    with atomic_write(path, overwrite) as temporary:
        image.to_filename(temporary)


def is_synthetic(path: Path) -> bool:
    """Whether the image's header says that it is synthetic; InputError if it cannot be read."""
    return "SYNTHETIC" in _description(path)


def is_ours(path: Path) -> bool:
    """Whether cwdm wrote the image; InputError if its header cannot be read."""
    return _description(path).startswith(_MARK)


def is_result(path: Path) -> bool:
    """Whether cwdm made it from images, and can again: not if it is of a simulated case."""
    return is_ours(path) and "simulated" not in _description(path)


def acquired(case: Case) -> Case:
    """The case without the images that are marked as synthetic; InputError as `is_synthetic`."""
    made = [modality for modality, path in case.images.items() if is_synthetic(path)]
    return case.without(*made)


def brain_mask(volume: Volume) -> NDArray[np.bool_]:
    """(X, Y, Z): where there is something, with holes filled.

    Background is the most common value on the six faces if at least half of them have it, else 0:
    some files have no zeros outside the head.
    """
    voxels = volume.voxels
    faces = np.concatenate([voxels.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    background = values[counts.argmax()] if 2 * counts.max() >= faces.size else 0
    away = voxels - background if background else voxels
    dust = _DUST * np.ptp(voxels)
    mask: NDArray[np.bool_] = (away > dust) | (away < -dust)
    if mask.any():
        # quicker than ndimage.binary_fill_holes, which dilates step by step
        inside = mask[extent(mask)]
        labels, _ = ndimage.label(np.pad(~inside, 1, constant_values=True))
        inside |= labels[1:-1, 1:-1, 1:-1] != labels[0, 0, 0]
    return mask


def _description(path: Path) -> str:
    """What the header says. The voxels are not looked at."""
    path = Path(path)
    data = _read_bytes(path, nib.Nifti2Header.template_dtype.itemsize)
    header = _kind(data, path).header_class
    with _damage(path), LoggingOutputSuppressor():
        parsed = header(data[: header.template_dtype.itemsize], check=False)
    description: bytes = parsed["descrip"].item()
    return description.decode("ascii", "replace")


def _read(path: Path) -> Volume:
    """`read_volume`, except that all voxels may be the same."""
    path = Path(path)
    image = _parse(path)
    shape, dtype = image.shape, image.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1 or set(shape[3:]) - {1}:
        raise InputError(f"{path}: found shape {shape}, expected one 3D image")
    if not (np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating)):
        kind = "RGB" if dtype.fields else f"{dtype}"
        raise InputError(f"{path}: found {kind} voxels, expected integers or real numbers")
    if not _is_regular(image.affine):
        raise InputError(f"{path}: the affine is singular or not finite, expected a usable one")
    if unit := _UNITS.get(int(image.header["xyzt_units"]) & 7):
        raise InputError(f"{path}: found voxels measured in {unit}, expected mm")
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    if spacing.min() < _FINEST_MM or spacing.max() > _COARSEST_MM:
        found = " x ".join(f"{mm:.4g}" for mm in spacing)
        raise InputError(
            f"{path}: found voxels of {found} mm, expected {_FINEST_MM:g} to {_COARSEST_MM:g} mm "
            "along each axis"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused below
        stored = image.get_fdata(dtype=np.float32).reshape(shape[:3])
    orientation = orientations.io_orientation(image.affine)
    voxels = _in_order(orientations.apply_orientation(stored, orientation))
    if not np.isfinite(voxels).all():
        raise InputError(f"{path}: found NaN or infinite voxels, expected finite numbers")
    affine = image.affine @ orientations.inv_ornt_aff(orientation, shape[:3])
    header = image.header.copy()
    header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)  # loading has moved them there
    return Volume(voxels, affine, header, path)


def _few_values(voxels: NDArray[np.float32]) -> int:
    """How many different values there are if they are few, else 0."""
    left = voxels.ravel()
    if len(np.unique(left[:: 1 + left.size // _SAMPLE])) > _MOST_LABELS:
        return 0
    for count in range(_MOST_LABELS + 1):  # quicker than sorting all of them
        if not left.size:
            return count
        left = left[left != left[0]]
    return 0


def _in_order(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(X, Y, Z) contiguous, copied in blocks: in another order, whole planes leave the cache."""
    ordered = np.empty(voxels.shape, voxels.dtype)
    blocks = [range(0, n, _BLOCK) for n in (voxels.shape[0], voxels.shape[2])]
    for x, z in itertools.product(*blocks):
        block = np.s_[x : x + _BLOCK, :, z : z + _BLOCK]
        ordered[block] = voxels[block]
    return ordered


def _parse(path: Path) -> Any:
    """The nibabel image in the file, from all its bytes: gzip checks its CRC only at the end."""
    data = _read_bytes(path)
    kind = _kind(data, path)
    with _damage(path), LoggingOutputSuppressor():
        image = kind.from_bytes(data)
    voxel_bytes = math.prod(image.shape) * image.get_data_dtype().itemsize
    if len(data) < image.dataobj.offset + voxel_bytes:
        found = max(len(data) - image.dataobj.offset, 0)
        raise InputError(
            f"{path}: truncated, found {found} bytes of voxels, expected {voxel_bytes}"
        )
    return image


def _read_bytes(path: Path, count: int = -1) -> bytes:
    """All the bytes of a file, unpacked, or the first few."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed:
                return file.read(count)
            if count < 0:
                return gzip.decompress(file.read())
            with gzip.GzipFile(fileobj=file) as unpacked:
                return unpacked.read(count)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged, {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read, {error.strerror or error}") from error


def _kind(data: bytes, path: Path) -> Any:
    """nibabel's class for NIfTI-1 or NIfTI-2."""
    if data[344:348] == b"n+1\0":
        return nib.Nifti1Image
    if data[4:8] == b"n+2\0":
        return nib.Nifti2Image
    size = path.stat().st_size  # of `data` there may be no more than the header
    raise InputError(f"{path}: not NIfTI data ({size} bytes), expected .nii or .nii.gz")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """InputError for what nibabel says of a header it cannot use."""
    try:
        yield
    except (HeaderDataError, WrapStructError, ValueError, OverflowError, OSError) as error:
        raise InputError(f"{path}: the NIfTI header is damaged, {error}") from error


def _is_regular(affine: NDArray[np.float64]) -> bool:
    """Whether three axes, of any length, span a space."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (lengths > 0).all()):
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6)


def _check_same_grid(a: Volume, b: Volume) -> None:
    """InputError unless shapes are equal and no two corresponding corners are far apart."""
    if a.voxels.shape != b.voxels.shape:
        found = f"shapes {a.voxels.shape} and {b.voxels.shape}"
    else:
        corners = np.indices((2, 2, 2)).reshape(3, 8) * (np.array(a.voxels.shape)[:, None] - 1)
        offsets = (a.affine - b.affine) @ np.vstack([corners, np.ones(8)])
        apart_mm = np.linalg.norm(offsets[:3], axis=0).max()
        if apart_mm <= _SAME_GRID_MM:
            return
        found = f"grids {apart_mm:.3g} mm apart"
    raise InputError(f"{a.path} and {b.path}: found {found}, expected one grid for the whole case")


def _scaling(voxels: NDArray[Any], header: nib.Nifti1Header) -> tuple[float, float]:
    """Slope and intercept to store `voxels` with: image = slope * stored + intercept."""
    dtype = header.get_data_dtype()
    if header.get_slope_inter() == (1.0, 0.0) or np.issubdtype(dtype, np.floating):
        return 1.0, 0.0
    limits = np.iinfo(dtype)
    low, high = min(float(voxels.min()), 0.0), max(float(voxels.max()), 0.0)
    if limits.min or not low:
        slope = float(np.float32(max(high / limits.max, low / limits.min if limits.min else 0.0)))
        return slope or 1.0, 0.0
    # Unsigned, yet there are negative values: level `zero` stands for 0. The header holds single
    # precision, 24 bits: 16 for `zero` leave 8 for the slope, then -slope * zero is exact.
    levels = min(limits.max, 2**16 - 1) - 1
    mantissa, exponent = math.frexp((high - low) / levels)
    slope = math.ldexp(math.ceil(mantissa * 2**8), exponent - 8)
    zero = math.ceil(-low / slope)
    return slope, -slope * zero
