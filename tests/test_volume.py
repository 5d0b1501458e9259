import errno
import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.case import find_cases, read_case
from cwdm.errors import InputError
from cwdm.masks import extent
from cwdm.modality import SEQUENCES, Modality
from cwdm.volume import (
    _few_values,
    brain_mask,
    is_synthetic,
    new_volume,
    read_image,
    read_labels,
    read_map,
    read_volume,
    read_volumes,
    write_volume,
)

Voxels = NDArray[Any]
Grid = tuple[tuple[int, int, int], NDArray[np.float64], tuple[int, int]]
Ball = Callable[[tuple[int, int, int]], NDArray[np.float64]]
MakeImage = Callable[..., Path]
MakeCase = Callable[..., Path]

RAMP = np.arange(64.0).reshape(4, 4, 4)
MARK = "cwdm 0 SYNTHETIC t2f, not acquired; research use only"


def load(path: Path) -> Any:
    """The file as nibabel sees it, without its types, which promise less than there is."""
    return nib.load(path)


def assert_same_place(written: Path, original: Path) -> None:
    """Everything but voxels and description, as nibabel sees it."""
    ours, theirs = load(written), load(original)
    assert type(ours) is type(theirs)
    assert ours.shape == theirs.shape
    assert ours.get_data_dtype() == theirs.get_data_dtype()
    assert ours.header.endianness == theirs.header.endianness
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert nib.aff2axcodes(ours.affine) == nib.aff2axcodes(theirs.affine)
    for field in (
        *("dim", "pixdim", "datatype", "bitpix", "xyzt_units", "sform_code", "qform_code"),
        *("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"),
        *("qoffset_x", "qoffset_y", "qoffset_z"),
    ):
        np.testing.assert_array_equal(ours.header[field], theirs.header[field], err_msg=field)


def stored(path: Path) -> Voxels:
    return np.asarray(load(path).dataobj.get_unscaled())


# --- there and back


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Shape, affine (any orientation, oblique, anisotropic) and which forms carry it."""
    shape = draw(st.tuples(*[st.integers(2, 6)] * 3))
    angles = draw(st.lists(st.floats(-180, 180), min_size=3, max_size=3))
    zooms = draw(st.lists(st.floats(0.3, 6), min_size=3, max_size=3))
    order = draw(st.permutations(range(3)))
    flips = draw(st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))
    tilted = draw(st.booleans())
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * flips * zooms
    if tilted:
        for axis, angle in enumerate(np.deg2rad(angles)):
            turn = np.eye(3)
            i, j = [each for each in range(3) if each != axis]
            turn[i, i] = turn[j, j] = np.cos(angle)
            turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
            affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = draw(st.lists(st.floats(-200, 200), min_size=3, max_size=3))
    codes = draw(st.sampled_from([(1, 1), (1, 0), (0, 1), (2, 1), (4, 3), (0, 0)]))
    return shape, affine, codes


@settings(max_examples=60, deadline=None)
@given(
    grid=grids(),
    dtype=st.sampled_from(["u1", "i1", ">i2", "<i2", "u2", "i4", "f4", ">f4", "f8", "i8", "u8"]),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    ending=st.sampled_from([".nii", ".nii.gz"]),
    extra_axes=st.sampled_from([(), (1,), (1, 1)]),
)
def test_any_grid_comes_back_exactly(
    grid: Grid, dtype: Any, kind: Any, ending: str, extra_axes: tuple[int, ...]
) -> None:
    shape, affine, (sform_code, qform_code) = grid
    voxels = (np.arange(np.prod(shape)) % 100).reshape(shape + extra_axes).astype(dtype)
    header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = kind(voxels, affine, header)
    image.set_sform(affine, sform_code)
    image.set_qform(affine, qform_code)
    with TemporaryDirectory() as folder:
        original, written = Path(folder, f"a{ending}"), Path(folder, f"b{ending}")
        image.to_filename(original)
        volume = read_volume(original)
        write_volume(volume.voxels, volume, written, MARK)
        assert_same_place(written, original)
        np.testing.assert_array_equal(stored(written), stored(original))
        canonical = nib.as_closest_canonical(load(original))
        np.testing.assert_array_equal(volume.affine, canonical.affine)
        np.testing.assert_array_equal(
            volume.voxels, canonical.get_fdata().reshape(volume.voxels.shape)
        )


@pytest.mark.parametrize(("folder", "n_cases"), [("odd", 3), ("val", 1), ("train", 1)])
def test_real_cases_come_back_exactly(
    shared: Path, folder: str, n_cases: int, tmp_path: Path
) -> None:
    for case in find_cases(shared / "data" / folder)[:n_cases]:
        volumes = read_volumes(case, SEQUENCES)
        name, volume = next(iter(volumes.items()))
        for masked in map(brain_mask, volumes.values()):
            assert 0.15 < masked.mean() < 0.2
        path = tmp_path / f"{case.id}.nii.gz"
        write_volume(volume.voxels, volume, path, MARK)
        assert_same_place(path, case.images[name])
        np.testing.assert_array_equal(read_volume(path).voxels, volume.voxels)


def test_labels_of_a_real_case_lie_on_its_grid(shared: Path) -> None:
    case = read_case(shared / "data" / "val" / "Brats18_CBICA_AQN_1")
    volume = read_volume(case.images[Modality.T1N])
    assert case.segmentation is not None
    labels = read_labels(case.segmentation, like=volume)
    assert set(np.unique(labels)) == {0, 1, 2, 4}
    assert brain_mask(volume)[labels > 0].mean() > 0.99


def test_the_header_says_that_the_image_is_synthetic(make_image: MakeImage, tmp_path: Path) -> None:
    volume = read_volume(make_image())
    write_volume(volume.voxels, volume, tmp_path / "out.nii.gz", MARK)
    assert load(tmp_path / "out.nii.gz").header["descrip"].item().decode() == MARK
    with pytest.raises(ValueError, match="does not begin with 'cwdm '"):
        write_volume(volume.voxels, volume, tmp_path / "other.nii.gz", "acquired")


def test_what_describes_only_the_other_image_is_left_out(
    make_image: MakeImage, tmp_path: Path
) -> None:
    image = load(make_image())
    image.header["cal_max"] = 99
    image.header["aux_file"] = b"lut.txt"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the other"))
    image.to_filename(tmp_path / "rich.nii")
    volume = read_volume(tmp_path / "rich.nii")
    write_volume(volume.voxels, volume, tmp_path / "out.nii", MARK)
    header = load(tmp_path / "out.nii").header
    assert not header.extensions
    assert header["cal_max"] == 0
    assert header["aux_file"].item() == b""
    np.testing.assert_array_equal(stored(tmp_path / "out.nii"), stored(tmp_path / "rich.nii"))


def test_the_same_voxels_make_the_same_bytes(make_image: MakeImage, tmp_path: Path) -> None:
    volume = read_volume(make_image())
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(volume.voxels, volume, tmp_path / name, MARK)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_new_volume_is_written_and_read_as_it_was(ball: Ball, tmp_path: Path) -> None:
    voxels, affine = ball((7, 8, 9)).astype(np.int16), np.diag([1, 2, 3, 1.0])
    affine[:3, 3] = -4, 5, 6
    write_volume(voxels, new_volume(voxels, affine), tmp_path / "a.nii.gz", MARK)
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(volume.affine, affine)
    header = load(tmp_path / "a.nii.gz").header
    assert (header["sform_code"], header["qform_code"]) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"


# --- data types


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_integers_are_rounded_and_clipped(
    make_image: MakeImage, tmp_path: Path, dtype: Any
) -> None:
    volume = read_volume(make_image(voxels=RAMP.astype(dtype)))
    voxels = np.zeros_like(volume.voxels)
    voxels.flat[:5] = -1e20, 1e20, 1.4, 1.6, -0.4
    write_volume(voxels, volume, tmp_path / "out.nii", MARK)
    back = nib.as_closest_canonical(load(tmp_path / "out.nii"))
    assert back.get_data_dtype() == dtype
    low, high, *small = np.asarray(back.dataobj).ravel()[:5]
    limits = np.iinfo(dtype)
    assert small == [1, 2, 0]
    assert low == limits.min
    # a 64-bit limit is no floating-point number, the nearest one below is
    assert limits.max - (limits.bits == 64) * 2048 <= high <= limits.max


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_stay_floats(make_image: MakeImage, tmp_path: Path, dtype: Any) -> None:
    volume = read_volume(make_image(voxels=RAMP.astype(dtype)))
    voxels = volume.voxels / 7 - 3
    write_volume(voxels, volume, tmp_path / "out.nii", MARK)
    assert load(tmp_path / "out.nii").get_data_dtype() == dtype
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii").voxels, voxels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16])
@pytest.mark.parametrize("span", [(0.0, 5000.0), (-700.0, 5000.0), (-5000.0, 3.0), (0.0, 0.02)])
def test_scaled_integers_hold_any_range_with_an_exact_zero(
    ball: Ball, make_image: MakeImage, tmp_path: Path, dtype: Any, span: tuple[float, float]
) -> None:
    original = make_image(voxels=ball((6, 6, 6)))
    image = load(original)
    image.header.set_data_dtype(dtype)  # nibabel then chooses a slope
    image.to_filename(original)
    volume = read_volume(original)
    low, high = span
    voxels = np.interp(volume.voxels, [79, volume.voxels.max()], span).astype(np.float32)
    voxels[~brain_mask(volume)] = 0
    write_volume(voxels, volume, tmp_path / "out.nii.gz", MARK)
    assert_same_place(tmp_path / "out.nii.gz", original)
    back = read_volume(tmp_path / "out.nii.gz").voxels
    assert (back[voxels == 0] == 0).all()
    levels = np.iinfo(dtype).max
    assert abs(back - voxels).max() <= 1.02 * max(high - low, -low) / levels


# --- refusals


def refusal_of(path: Path) -> str:
    with pytest.raises(InputError) as refusal:
        read_volume(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.zeros((4, 4, 4), np.int16), "every voxel is 0, expected an image"),
        (np.full((4, 4, 4), 7.5), "every voxel is 7.5, expected an image"),
        (np.ones((4, 4, 4, 2), np.int16), "found shape (4, 4, 4, 2), expected one 3D image"),
        (np.ones((4, 4), np.int16), "found shape (4, 4), expected one 3D image"),
        (RAMP.astype(np.complex64), "found complex64 voxels, expected integers"),
        (np.ones((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "found RGB voxels"),
        (np.where(RAMP, np.nan, 1), "found NaN or infinite voxels, expected finite"),
        (np.where(RAMP, np.inf, 1), "found NaN or infinite voxels, expected finite"),
        (np.where(RAMP, 1e300, 1), "found NaN or infinite voxels, expected finite"),
    ],
)
def test_voxels_that_are_no_image_are_refused(
    make_image: MakeImage, voxels: Voxels, message: str
) -> None:
    assert message in refusal_of(make_image(voxels=voxels))


@pytest.mark.parametrize("values", [[0, 1], [0, 255], [0, 1, 2, 4], [0, 0.5, 1], [*range(8)]])
def test_a_segmentation_is_no_image(make_case: MakeCase, values: list[float]) -> None:
    voxels = np.zeros((30, 40, 50), np.float32)
    for number, value in enumerate(values):
        voxels[number + 3, 4:6, 5] = value
    folder = make_case(voxels=voxels)
    path = folder / "x-t2w.nii.gz"
    message = (
        f"{path}: found {len(values)} different values, expected an image (is it a segmentation?)"
    )
    with pytest.raises(InputError) as refusal:
        read_image(path)
    assert str(refusal.value) == message
    with pytest.raises(InputError, match=r"\(is it a segmentation\?\)"):
        read_volumes(read_case(folder), SEQUENCES)
    like = read_volume(path)
    np.testing.assert_array_equal(read_map(path, like), like.voxels)
    if 0.5 not in values:
        np.testing.assert_array_equal(read_labels(path, like), like.voxels)
    voxels[20, 4, 5] = 9
    voxels[21, 4, 5] = 10
    if len(values) == 8:
        read_volumes(read_case(make_case("other", voxels=voxels)), SEQUENCES)


def test_values_are_counted_quickly() -> None:
    voxels = np.zeros((240, 240, 155), np.float32)
    voxels[50:190, 30:200, 10:140] = np.arange(130) + 1
    labels = np.minimum(voxels, 4)
    for each, count in ((voxels, 0), (labels, 5)):
        started = time.process_time()
        assert _few_values(each) == count
        assert time.process_time() - started < 0.5  # a few hundredths


@pytest.mark.parametrize(("unit", "name"), [("meter", "meters"), ("micron", "micrometers")])
def test_another_unit_than_mm_is_refused(make_image: MakeImage, unit: str, name: str) -> None:
    path = make_image()
    image = load(path)
    image.header.set_xyzt_units(unit, "sec")
    image.to_filename(path)
    assert f"found voxels measured in {name}, expected mm" in refusal_of(path)


@pytest.mark.parametrize("unit", ["mm", "unknown"])
def test_files_without_a_unit_are_in_mm(make_image: MakeImage, unit: str) -> None:
    path = make_image(affine=np.diag([1, 2, 3, 1]))
    image = load(path)
    image.header.set_xyzt_units(unit, "sec")
    image.to_filename(path)
    np.testing.assert_array_equal(read_volume(path).affine, np.diag([1, 2, 3, 1]))


@pytest.mark.parametrize(
    ("spacing", "found"),
    [
        ((1000, 1000, 1000), "1000 x 1000 x 1000"),
        ((0.001, 0.001, 0.001), "0.001 x 0.001 x 0.001"),
        ((1, 1, 60), "1 x 1 x 60"),
        ((0.5, 0.02, 1), "0.5 x 0.02 x 1"),
    ],
)
def test_voxels_that_no_brain_is_imaged_in_are_refused(
    make_image: MakeImage, spacing: tuple[float, ...], found: str
) -> None:
    path = make_image(affine=np.diag([*spacing, 1]))
    expected = f"found voxels of {found} mm, expected 0.05 to 50 mm along each axis"
    assert expected in refusal_of(path)


def test_the_size_told_of_a_file_that_is_not_nifti_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    path.write_bytes(bytes(1900))
    for read in (read_volume, is_synthetic):
        with pytest.raises(InputError, match=r"x.nii: not NIfTI data \(1900 bytes\), expected"):
            read(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("part", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_refused(make_image: MakeImage, ending: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (12, 12, 12)).astype(np.int16)
    path = make_image(f"x-t1n{ending}", voxels=noise)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert "truncated" in refusal_of(path)


def test_a_gzip_file_that_lacks_only_its_checksum_is_refused(make_image: MakeImage) -> None:
    path = make_image()
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated or damaged" in refusal_of(path)


def test_a_flipped_bit_in_a_gzip_file_is_refused(make_image: MakeImage) -> None:
    path = make_image(voxels=np.random.default_rng(0).random((12, 12, 12)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "damaged" in refusal_of(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x1f\x8b", bytes(1000), gzip.compress(b"hi", mtime=0)]
)
def test_what_is_not_nifti_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x-t1n.nii.gz").write_bytes(content)
    message = refusal_of(tmp_path / "x-t1n.nii.gz")
    assert "not NIfTI data" in message or "damaged" in message


def test_a_compressed_file_may_lack_its_ending(make_image: MakeImage) -> None:
    path = make_image("x-t1n.nii.gz")
    assert (read_volume(path.rename(path.with_name("x-t1n.nii"))).voxels).any()


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_an_unusable_affine_is_refused(make_image: MakeImage, bad: float) -> None:
    path = make_image("x-t1n.nii")
    data = bytearray(path.read_bytes())
    data[280:296] = np.full(4, bad, np.float32).tobytes()  # srow_x
    path.write_bytes(data)
    assert "the affine is singular or not finite" in refusal_of(path)


def test_a_file_that_is_absent_or_forbidden_is_refused(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be read, No such file" in refusal_of(tmp_path / "absent.nii.gz")
    path = make_image()
    # by monkeypatch, since root may read everything
    monkeypatch.setattr(Path, "open", refuse(errno.EACCES))
    assert "cannot be read, Permission denied" in refusal_of(path)


@settings(max_examples=150, deadline=None)
@given(
    at=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_header_is_read_or_refused_but_nothing_else(
    at: list[tuple[int, int]], kind: Any
) -> None:
    image = kind(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([1, 2, 3, 1.0]))
    data = bytearray(image.to_bytes())
    for offset, value in at:
        data[offset] = value
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.nii")
        path.write_bytes(data)
        try:
            read_volume(path)
        except InputError as error:
            refusal = str(error)
        else:
            return
    assert refusal.startswith(f"{path}: ")


# --- several modalities


def test_the_modalities_of_a_case_are_read_in_the_order_asked_for(make_case: MakeCase) -> None:
    case = read_case(make_case())
    assert list(read_volumes(case, [Modality.T2F, Modality.T1N])) == [Modality.T2F, Modality.T1N]


def test_a_modality_that_is_not_there_is_refused(make_case: MakeCase) -> None:
    case = read_case(make_case(endings=("-t1n", "-t2w")))
    with pytest.raises(InputError, match="case x: no image of t2f, found t1n, t2w"):
        read_volumes(case, [Modality.T2F])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"voxels": np.indices((12, 10, 9))[0]}, "found shapes (12, 10, 8) and (12, 10, 9)"),
        ({"affine": np.diag([-1, -1, 1.1, 1])}, "found grids 0.7 mm apart"),
        ({"affine": np.diag([1.0, -1, 1, 1])}, "found grids"),
    ],
)
def test_two_grids_in_one_case_are_refused(
    make_case: MakeCase, make_image: MakeImage, other: dict[str, Any], message: str
) -> None:
    folder = make_case(endings=("-t1n",))
    second = make_image("case/x-t2w.nii.gz", **other)
    with pytest.raises(InputError) as refusal:
        read_volumes(read_case(folder), [Modality.T1N, Modality.T2W])
    assert message in str(refusal.value)
    assert str(folder / "x-t1n.nii.gz") in str(refusal.value)
    assert str(second) in str(refusal.value)


def test_one_grid_stored_in_two_orientations_is_one_grid(
    make_case: MakeCase, make_image: MakeImage
) -> None:
    folder = make_case(endings=("-t1n",))
    image = nib.as_closest_canonical(load(folder / "x-t1n.nii.gz"))
    make_image("case/x-t2w.nii.gz", voxels=np.asarray(image.dataobj), affine=image.affine)
    volumes = read_volumes(read_case(folder), [Modality.T1N, Modality.T2W])
    np.testing.assert_array_equal(volumes[Modality.T1N].voxels, volumes[Modality.T2W].voxels)


def test_an_empty_segmentation_is_fine_but_fractions_are_not(
    ball: Ball, make_image: MakeImage
) -> None:
    like = read_volume(make_image())
    empty = make_image("x-seg.nii.gz", voxels=np.zeros((12, 10, 8), np.uint8))
    assert not read_labels(empty, like).any()
    with pytest.raises(InputError, match="not whole numbers, expected labels"):
        read_labels(make_image("y-seg.nii.gz", voxels=ball((12, 10, 8)) / 7), like)
    with pytest.raises(InputError, match="expected one grid"):
        read_labels(make_image("z-seg.nii.gz", voxels=np.zeros((3, 4, 5))), like)


# --- writing


def test_an_image_is_overwritten_only_on_request_and_only_if_it_is_ours(
    make_image: MakeImage, tmp_path: Path
) -> None:
    acquired = make_image()
    before = acquired.read_bytes()
    volume = read_volume(acquired)
    with pytest.raises(InputError, match="already exists"):
        write_volume(volume.voxels, volume, acquired, MARK)
    with pytest.raises(InputError, match="an acquired image is never overwritten"):
        write_volume(volume.voxels, volume, acquired, MARK, overwrite=True)
    assert acquired.read_bytes() == before
    assert not is_synthetic(acquired)
    ours = tmp_path / "ours.nii.gz"
    write_volume(volume.voxels, volume, ours, MARK)
    write_volume(2 * volume.voxels, volume, ours, MARK, overwrite=True)
    assert is_synthetic(ours)
    np.testing.assert_array_equal(read_volume(ours).voxels, 2 * volume.voxels)


def test_a_full_disk_leaves_no_image(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(make_image("in/x-t1n.nii.gz"))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(nib.Nifti1Image, "to_filename", refuse(errno.ENOSPC))
    with pytest.raises(InputError, match=r"a.nii.gz: cannot be written, No space left"):
        write_volume(volume.voxels, volume, tmp_path / "out" / "a.nii.gz", MARK)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("voxels", "message"),
    [(np.zeros((1, 2, 3)), "have shape"), (np.full((12, 10, 8), np.nan), "not all finite")],
)
def test_voxels_that_cannot_be_meant_are_not_written(
    make_image: MakeImage, tmp_path: Path, voxels: Voxels, message: str
) -> None:
    volume = read_volume(make_image())
    with pytest.raises(ValueError, match=message):
        write_volume(voxels, volume, tmp_path / "a.nii.gz", MARK)
    assert not (tmp_path / "a.nii.gz").exists()


# --- brain mask


@pytest.mark.parametrize(("background", "offset"), [(0, 120.5), (-1024, 120)])
def test_the_brain_is_what_differs_from_the_background(
    ball: Ball, background: int, offset: float
) -> None:
    image = ball((20, 18, 16))
    voxels = np.where(image, image - offset, background)  # of both signs, in one case some 0
    mask = brain_mask(new_volume(voxels, np.eye(4)))
    np.testing.assert_array_equal(mask, image > 0)


def test_holes_in_the_brain_belong_to_it(ball: Ball) -> None:
    voxels = ball((20, 18, 16))
    brain = voxels > 0
    voxels[9:12, 8:10, 7:9] = 0
    voxels[10, 9, 8] = 5
    mask = brain_mask(new_volume(voxels, np.eye(4)))
    np.testing.assert_array_equal(mask, brain)
    np.testing.assert_array_equal(mask, ndimage.binary_fill_holes(voxels != 0))


@given(
    mask=npst.arrays(bool, st.tuples(*[st.integers(1, 5)] * 3)).filter(np.any),
    margin=st.integers(0, 3) | st.tuples(*[st.integers(0, 3)] * 3),
)
def test_the_extent_of_a_mask_is_that_of_its_dilation(
    mask: NDArray[np.bool_], margin: int | tuple[int, int, int]
) -> None:
    margins = (margin,) * 3 if isinstance(margin, int) else margin
    wide = ndimage.maximum_filter(mask, [2 * each + 1 for each in margins], mode="constant")
    (expected,) = ndimage.find_objects(wide.astype(np.uint8))
    assert extent(mask, margin) == expected


def test_interpolation_dust_is_background(ball: Ball) -> None:
    voxels = ball((20, 18, 16))
    dusty = voxels + 1e-5 * np.random.default_rng(0).standard_normal(voxels.shape)
    mask = brain_mask(new_volume(dusty, np.eye(4)))
    np.testing.assert_array_equal(mask, voxels > 0)


def test_a_brain_that_touches_every_face_is_found_whole() -> None:
    voxels = 1 + np.arange(60.0).reshape(3, 4, 5)
    assert brain_mask(new_volume(voxels, np.eye(4))).all()


def test_the_mask_of_a_full_size_image_is_quick() -> None:
    voxels = np.zeros((240, 240, 155))
    voxels[50:190, 30:200, 10:140] = np.arange(130) + 1
    voxels[::3, ::3, ::3] = 0  # many holes
    volume = new_volume(voxels, np.eye(4))
    started = time.process_time()
    assert 0.3 < brain_mask(volume).mean() < 0.4
    assert time.process_time() - started < 2


def refuse(code: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail
