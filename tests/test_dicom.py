"""CT series are found among DICOM files, and read as SimpleITK and nibabel read them as NIfTI."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cwdm.dicom import Series, find_series, read_series
from cwdm.errors import InputError

WriteSeries = Callable[..., sitk.Image]

OBLIQUE = Rotation.from_euler("xyz", [20, -15, 10], degrees=True).as_matrix()
DIRECTIONS = {
    "axial": np.eye(3),
    "axial, prone": np.diag([-1.0, -1.0, 1.0]),
    "axial, slices downwards": np.diag([1.0, -1.0, -1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "oblique": OBLIQUE,
    "oblique, slices downwards": OBLIQUE @ np.diag([1.0, -1.0, -1.0]),
}


@pytest.fixture
def write_series() -> WriteSeries:
    """Write a series of slices, as a scanner does, and return the image in HU."""

    def write(
        folder: Path,
        *,
        uid: int = 1,
        patient: str = "LIDC-IDRI-0001",
        modality: str = "CT",
        direction: NDArray[np.float64] = DIRECTIONS["axial"],
        slices: int = 18,
        low: int = -1000,
        slope: float = 1,
        leave_out: tuple[int, ...] = (),
    ) -> sitk.Image:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(uid)
        hounsfield = slope * rng.integers(int(low / slope), int(2000 / slope), (slices, 10, 12))
        image = sitk.GetImageFromArray(hounsfield.astype(np.float64 if slope % 1 else np.int16))
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetOrigin((-120.5, 33.25, -310.0))
        image.SetDirection(direction.ravel())
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        for k in range(slices):
            if k in leave_out:
                continue
            part = image[:, :, k]
            position = image.TransformIndexToPhysicalPoint((0, 0, k))
            tags = {
                "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
                "0008|0018": f"1.2.826.0.1.3680043.2.1125.{uid}.{k + 1}",
                "0008|0060": modality,
                "0010|0020": patient,
                "0018|0050": "2.5",
                "0020|000d": "1.2.826.0.1.3680043.2.1125.999",
                "0020|000e": f"1.2.826.0.1.3680043.2.1125.{uid}",
                "0020|0013": str(slices - k),  # numbered against the axis, files too
                "0020|0032": "\\".join(f"{each:.10g}" for each in position),
                "0020|0037": "\\".join(f"{each:.10g}" for each in direction.T[:2].ravel()),
                **{"0028|0100": "16", "0028|0101": "16", "0028|0102": "15", "0028|0103": "1"},
                "0028|1052": "-1024",
                "0028|1053": f"{slope:g}",
            }
            for tag, value in tags.items():
                part.SetMetaData(tag, value)
            writer.SetFileName(str(folder / f"{uid}-{slices - k:03d}.dcm"))
            writer.Execute(part)
        return image

    return write


def as_nifti(image: sitk.Image, path: Path) -> Any:
    """The image as nibabel reads it in canonical orientation from what SimpleITK writes."""
    sitk.WriteImage(image, str(path))
    loaded: Any = nib.load(path)
    return nib.as_closest_canonical(loaded)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_voxels_and_affine_are_those_of_the_same_image_in_nifti(
    direction: NDArray[np.float64], write_series: WriteSeries, tmp_path: Path
) -> None:
    image = write_series(tmp_path / "study" / "series", direction=direction)
    (series,) = find_series(tmp_path)
    volume = read_series(series)
    truth = as_nifti(image, tmp_path / "truth.nii")
    np.testing.assert_array_equal(volume.voxels, truth.get_fdata())
    np.testing.assert_allclose(volume.affine, truth.affine, atol=1e-4)
    np.testing.assert_allclose(volume.header.get_best_affine(), truth.affine, atol=1e-4)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.flags.c_contiguous
    assert volume.path == series.folder == tmp_path / "study" / "series"


def test_a_rescale_slope_that_is_no_whole_number_counts(
    write_series: WriteSeries, tmp_path: Path
) -> None:
    image = write_series(tmp_path, slope=0.5)
    (series,) = find_series(tmp_path)
    truth = as_nifti(image, tmp_path / "truth.nii").get_fdata()
    np.testing.assert_array_equal(read_series(series).voxels, truth)
    assert (truth % 1 != 0).any()


def test_what_is_outside_the_field_of_view_is_no_denser_than_air(
    write_series: WriteSeries, tmp_path: Path
) -> None:
    image = write_series(tmp_path, low=-2000)
    truth = as_nifti(image, tmp_path / "truth.nii").get_fdata()
    assert truth.min() < -1900
    volume = read_series(*find_series(tmp_path))
    np.testing.assert_array_equal(volume.voxels, truth.clip(-1024))


def test_a_folder_like_lidc_gives_one_series_per_patient(
    write_series: WriteSeries, tmp_path: Path
) -> None:
    for number in (1, 2):
        folder = tmp_path / f"LIDC-IDRI-{number:04d}" / "01-01-2000-NA"
        write_series(folder / "3000566-NA", uid=number, patient=f"LIDC-IDRI-{number:04d} ")
        write_series(folder / "11.0-DX", uid=10 + number, modality="DX", slices=2)
        (folder / "3000566-NA" / "069.xml").write_text("<LidcReadMessage/>")
    found = find_series(tmp_path)
    assert [each.id for each in found] == ["LIDC-IDRI-0001", "LIDC-IDRI-0002"]
    assert [each.folder.name for each in found] == ["3000566-NA"] * 2
    assert [len(each.files) for each in found] == [18, 18]


def test_several_series_of_a_patient_have_ids_of_their_own_that_stay(
    write_series: WriteSeries, tmp_path: Path
) -> None:
    write_series(tmp_path / "a", uid=1, patient="A/B: 7")
    write_series(tmp_path / "a", uid=2, patient="A/B: 7", leave_out=(0,))  # in the same folder
    write_series(tmp_path / "copy", uid=1, patient="A/B: 7")
    before = {each.id for each in find_series(tmp_path)}
    assert len(before) == 3
    assert all(each.startswith("A-B-7-") for each in before)
    write_series(tmp_path / "0", uid=3, patient="A/B: 7")
    assert before < {each.id for each in find_series(tmp_path)}


def test_a_patient_without_an_id_has_a_name(write_series: WriteSeries, tmp_path: Path) -> None:
    write_series(tmp_path, patient="")
    assert [each.id for each in find_series(tmp_path)] == ["unnamed"]


def test_a_localizer_is_left_out_with_a_warning(
    write_series: WriteSeries, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_series(tmp_path / "scan", uid=1)
    write_series(tmp_path / "scout", uid=2, slices=15)
    with caplog.at_level(logging.WARNING):
        assert [each.folder.name for each in find_series(tmp_path)] == ["scan"]
    assert "found 15 slices, expected at least 16" in caplog.text
    assert "scout" in caplog.text


def test_no_ct_at_all_is_an_error(write_series: WriteSeries, tmp_path: Path) -> None:
    write_series(tmp_path / "mr", modality="MR")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(InputError, match="found no CT series in it or below, expected DICOM files"):
        find_series(tmp_path)


def test_a_missing_slice_is_an_error(write_series: WriteSeries, tmp_path: Path) -> None:
    write_series(tmp_path, leave_out=(7,))
    with pytest.raises(InputError, match=r"1-010.dcm: found it 5 mm .*, expected 2.5 mm"):
        read_series(*find_series(tmp_path))


def test_a_slice_that_is_there_twice_is_an_error(write_series: WriteSeries, tmp_path: Path) -> None:
    write_series(tmp_path)
    (series,) = find_series(tmp_path)
    twice = Series(series.id, series.folder, (*series.files, series.files[3]))
    with pytest.raises(InputError, match=r"found it 0 mm .*, expected 2.5 mm"):
        read_series(twice)


def test_slices_in_any_order_make_the_same_volume(
    write_series: WriteSeries, tmp_path: Path
) -> None:
    write_series(tmp_path, direction=OBLIQUE)
    (series,) = find_series(tmp_path)
    shuffled = Series(series.id, series.folder, (*series.files[5:], *series.files[4::-1]))
    ours, theirs = read_series(series), read_series(shuffled)
    np.testing.assert_array_equal(ours.voxels, theirs.voxels)
    np.testing.assert_array_equal(ours.affine, theirs.affine)


def test_a_tilted_gantry_is_an_error(write_series: WriteSeries, tmp_path: Path) -> None:
    image = write_series(tmp_path, slices=18)
    for k, path in enumerate(sorted(tmp_path.glob("*.dcm"), reverse=True)):
        part = sitk.ReadImage(str(path))
        x, y, z = image.TransformIndexToPhysicalPoint((0, 0, k))
        part.SetMetaData("0020|0032", f"{x:g}\\{y + 0.5 * k:g}\\{z:g}")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path))
        writer.Execute(part)
    with pytest.raises(InputError, match=r"along their normal"):
        read_series(*find_series(tmp_path))


def test_slices_of_two_sizes_or_directions_are_an_error(
    write_series: WriteSeries, tmp_path: Path
) -> None:
    write_series(tmp_path / "a", uid=1)
    write_series(tmp_path / "b", uid=2, direction=OBLIQUE)
    sitk.WriteImage(sitk.Image(8, 8, 1, sitk.sitkInt16), str(tmp_path / "small.dcm"))
    straight, oblique = find_series(tmp_path)
    for other, message in [
        (str(tmp_path / "small.dcm"), r"small.dcm: found slices of \(8, 8\) and \(12, 10\) voxels"),
        (oblique.files[0], "found slices in two orientations or spacings, expected one"),
    ]:
        with pytest.raises(InputError, match=message):
            read_series(Series("x", straight.folder, (*straight.files, other)))


def test_color_is_an_error(write_series: WriteSeries, tmp_path: Path) -> None:
    write_series(tmp_path)
    (series,) = find_series(tmp_path)
    color = sitk.Image((12, 10, 1), sitk.sitkVectorUInt8, 3)
    sitk.WriteImage(color, str(tmp_path / "color.dcm"))
    with pytest.raises(InputError, match=r"color.dcm: found 3 components .*, expected one slice"):
        read_series(Series("x", tmp_path, (str(tmp_path / "color.dcm"), *series.files)))


def test_a_damaged_slice_is_named_in_one_line_and_nothing_is_printed(
    write_series: WriteSeries, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path)
    (series,) = find_series(tmp_path)
    broken = Path(series.files[4])
    broken.write_bytes(broken.read_bytes()[:-100])
    (tmp_path / "notes.txt").write_text("nothing here")
    find_series(tmp_path)
    with pytest.raises(InputError, match=f"{broken.name}: cannot be read as DICOM") as error:
        read_series(series)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
