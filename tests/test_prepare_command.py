"""`cwdm prepare`: what a person sees of fifty cases, ten of them spoilt."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.cache import open_cache
from cwdm.cli.main import cwdm
from cwdm.dicom import Series
from cwdm.modality import SEQUENCES, Modality
from cwdm.volume import Volume, new_volume

MakeImage = Callable[..., Path]
T1N, T1C, T2W, T2F = SEQUENCES
SHAPE = (20, 18, 16)
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def run(*words: object) -> Result:
    return CliRunner().invoke(cwdm, ["prepare", *map(str, words)])


def lines(result: Result) -> list[tuple[str, str, str]]:
    """(case, status, problem) of the table that was printed."""
    start = [i for i, line in enumerate(result.stdout.splitlines()) if line.startswith("case ")]
    if not start:
        return []
    table = []
    heading = result.stdout.splitlines()[start[0]]
    status, problem = heading.index("status"), heading.index("problem")
    for line in result.stdout.splitlines()[start[0] + 1 :]:
        if line[status:problem].strip() not in ("written", "unchanged", "left out"):
            break
        table.append((line[:status].strip(), line[status:problem].strip(), line[problem:]))
    return table


def simulated(seed: int) -> dict[Modality, NDArray[np.int16]]:
    """Four contrasts of one smooth random brain."""
    rng = np.random.default_rng(seed)
    center = (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    brain = (((np.indices(SHAPE) - center) / (center - 1)) ** 2).sum(axis=0) < 1
    tissue = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5)
    tissue /= tissue.std()
    signals = (500 + 60 * tissue, 480 + 70 * tissue**2, 700 - 120 * tissue, 450 - 50 * tissue)
    return {
        modality: np.where(brain, (signal + 5 * rng.normal(size=SHAPE)).clip(1), 0).astype(np.int16)
        for modality, signal in zip(SEQUENCES, signals, strict=True)
    }


@pytest.fixture
def write_cases(make_image: MakeImage, tmp_path: Path) -> Callable[[int], Path]:
    """A folder of simulated cases, BraTS-GLI-00000-000 and so on."""

    def write(count: int) -> Path:
        for number in range(count):
            case_id = f"BraTS-GLI-{number:05d}-000"
            for modality, voxels in simulated(number).items():
                make_image(f"data/{case_id}/{case_id}-{modality}.nii.gz", voxels=voxels)
        return tmp_path / "data"

    return write


def spoil(image: Path, voxels: NDArray[Any], affine: NDArray[Any] = AFFINE) -> None:
    nib.Nifti1Image(voxels, affine, dtype=voxels.dtype).to_filename(image)


def truncate(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-1000])


def not_nifti(image: Path) -> None:
    image.write_bytes(b"<html>404 Not Found</html>")


def nan(image: Path) -> None:
    voxels = simulated(3)[T2W].astype(np.float32)
    voxels[9, 9, 9] = np.nan
    spoil(image, voxels)


def constant(image: Path) -> None:
    spoil(image, np.full(SHAPE, 3, np.int16))


def other_shape(image: Path) -> None:
    spoil(image, simulated(5)[T2W][1:])


def other_affine(image: Path) -> None:
    spoil(image, simulated(6)[T2W], np.diag([-1.0, -1.0, 1.2, 1.0]))


def four_dimensions(image: Path) -> None:
    spoil(image, np.stack([simulated(7)[T2W]] * 2, axis=3))


def twice(image: Path) -> None:
    other = image.name.replace("-t2w.nii.gz", "_t2.nii.gz")
    image.with_name(other).write_bytes(image.read_bytes())


def missing(image: Path) -> None:
    image.unlink()


def duplicate(image: Path) -> None:
    other = image.name.replace("-t2w", "-t1n")
    image.write_bytes(image.with_name(other).read_bytes())


DEFECTS: list[tuple[Callable[[Path], None], str, str]] = [
    (truncate, "left out", "truncated"),
    (not_nifti, "left out", "not NIfTI data"),
    (nan, "left out", "found NaN or infinite voxels"),
    (constant, "left out", "every voxel is 3"),
    (other_shape, "left out", "found shapes (20, 18, 16) and (19, 18, 16)"),
    (other_affine, "left out", "mm apart, expected one grid for the whole case"),
    (four_dimensions, "left out", "found shape (20, 18, 16, 2), expected one 3D image"),
    (twice, "left out", "are both t2w, expected one"),
    (missing, "written", "found no image of t2w"),
    (duplicate, "left out", ""),
]


@pytest.mark.slow
def test_all_ten_defects_among_fifty_cases_are_named(
    write_cases: Callable[[int], Path], tmp_path: Path
) -> None:
    root = write_cases(50)
    expected = {}
    for number, (defect, status, message) in enumerate(DEFECTS):
        case_id = f"BraTS-GLI-{5 * number:05d}-000"
        defect(root / case_id / f"{case_id}-t2w.nii.gz")
        expected[case_id] = (status, message)
    for workers in (1, 2):
        cache = tmp_path / f"cache{workers}"
        result = run("--data", root, "--output", cache, "--workers", workers)
        assert result.exit_code == 1, result.output
        table = lines(result)
        assert [case for case, _, _ in table] == sorted(expected)  # one line each, no other
        for case, status, problem in table:
            assert status == expected[case][0]
            assert expected[case][1] in problem
            assert f"{case}-t2w.nii.gz" in problem or "t2w" in problem
        assert "41 written, 0 unchanged, 9 left out" in result.stdout
        assert len(open_cache(cache)) == 41
    again = run("--data", root, "--output", cache, "--workers", 2)
    assert (again.exit_code, lines(again)) == (
        1,
        [(case, status.replace("written", "unchanged"), said) for case, status, said in table],
    )
    assert "0 written, 41 unchanged, 9 left out" in again.stdout


def test_good_cases_pass_without_a_word(write_cases: Callable[[int], Path], tmp_path: Path) -> None:
    result = run("--data", write_cases(2), "--output", tmp_path / "cache", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert lines(result) == []
    size = sum(case.size for case in open_cache(tmp_path / "cache"))
    summary, report = result.stdout.splitlines()
    assert summary == (
        f"2 written, 0 unchanged, 0 left out; {tmp_path / 'cache'} holds 2 cases, "
        f"{size / 1e6:.1f} MB"
    )
    assert report == str(tmp_path / "cache" / "report.csv")


def test_the_report_has_a_row_per_case_and_problem(
    write_cases: Callable[[int], Path], tmp_path: Path
) -> None:
    root = write_cases(3)
    bad = root / "BraTS-GLI-00001-000"
    (bad / f"{bad.name}-t1n.nii.gz").write_bytes(b"no image")
    (bad / f"{bad.name}-t2f.nii.gz").unlink()
    result = run("--data", root, "--output", tmp_path / "cache", "--workers", 1)
    assert result.exit_code == 1
    with (tmp_path / "cache" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"][10:15], row["status"], row["images"]) for row in rows] == [
        ("00000", "written", "t1n t1c t2w t2f"),
        ("00001", "left out", ""),
        ("00001", "left out", ""),
        ("00002", "written", "t1n t1c t2w t2f"),
    ]
    assert [bool(row["problem"]) for row in rows] == [False, True, True, False]
    assert "not NIfTI data" in rows[1]["problem"]


def test_several_sources_go_into_one_cache(
    write_cases: Callable[[int], Path], make_image: MakeImage, tmp_path: Path
) -> None:
    root = write_cases(1)
    make_image("bids/sub-1/anat/sub-1_T1w.nii.gz", voxels=simulated(7)[T1N])
    make_image("image.nii.gz", voxels=simulated(8)[T2W])
    (tmp_path / "cases.csv").write_text("id,t2\nmine,image.nii.gz\n")
    sources = [
        word
        for path in (root, tmp_path / "bids", tmp_path / "cases.csv", root)
        for word in ("--data", path)
    ]
    result = run(*sources, "--output", tmp_path / "cache", "--dtype", "uint8", "--workers", 1)
    assert result.exit_code == 0, result.output
    cases = {case.id: case.images for case in open_cache(tmp_path / "cache")}
    assert cases == {"BraTS-GLI-00000-000": SEQUENCES, "mine": (T2W,), "sub-1": (T1N,)}


def test_a_finding_can_be_accepted(write_cases: Callable[[int], Path], tmp_path: Path) -> None:
    root = write_cases(2)
    folder = root / "BraTS-GLI-00001-000"
    duplicate(folder / f"{folder.name}-t2w.nii.gz")
    words = ("--data", root, "--output", tmp_path / "cache", "--workers", 1)
    assert run(*words).exit_code == 1
    assert run(*words, "--accept", "skull").exit_code == 1
    assert run(*words, "--accept", "skull", "--accept", "duplicate").exit_code == 0
    assert len(open_cache(tmp_path / "cache")) == 2


def test_nothing_usable_exits_with_2_and_names_why(tmp_path: Path, make_image: MakeImage) -> None:
    not_nifti(make_image("data/x/x-t1n.nii.gz"))
    result = run("--data", tmp_path / "data", "--output", tmp_path / "cache", "--workers", 1)
    assert result.exit_code == 2
    assert "not NIfTI data" in lines(result)[0][2]
    assert result.stderr.splitlines()[-1] == (
        f"cwdm: error: {tmp_path / 'data'}: found no case that can be used, see "
        f"{tmp_path / 'cache' / 'report.csv'}"
    )


def test_bad_input_exits_with_2_before_anything_is_written(
    write_cases: Callable[[int], Path], tmp_path: Path
) -> None:
    root = write_cases(1)
    for words, message in (
        (("--data", tmp_path / "absent"), "absent: No such file or directory"),
        (("--data", root, "--data", tmp_path / "x.csv"), "x.csv: cannot be read"),
        (("--data", root, "--accept", "hair"), "'hair' is not one of"),
    ):
        result = run(*words, "--output", tmp_path / "cache")
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "cache").exists()
    result = run("--data", root, "--output", root)
    assert result.exit_code == 2
    assert "expected a new folder or a cache" in result.stderr


def test_dicom_series_are_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(-1024, 2000, SHAPE)

    def find_series(root: Path) -> list[Series]:
        assert root == tmp_path
        return [Series("LIDC-IDRI-0001", root, ())]

    def read_series(series: Series) -> Volume:
        return new_volume(voxels, np.eye(4))

    monkeypatch.setattr("cwdm.dicom.find_series", find_series)
    monkeypatch.setattr("cwdm.cache.read_series", read_series)
    result = run("--data", tmp_path, "--dicom", "--output", tmp_path / "cache", "--workers", 1)
    assert result.exit_code == 0, result.output
    (case,) = open_cache(tmp_path / "cache")
    assert (case.id, case.images, case.shape) == ("LIDC-IDRI-0001", (Modality.CT,), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "val", "odd"])
def test_the_real_cases_have_no_problem(shared: Path, tmp_path: Path, name: str) -> None:
    result = run("--data", shared / "data" / name, "--output", tmp_path / "cache")
    assert (result.exit_code, lines(result)) == (0, []), result.output
