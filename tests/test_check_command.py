"""`cwdm check`: what a person sees of good and of spoilt images."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from cwdm.cli.main import cwdm
from cwdm.modality import SEQUENCES

Write = Callable[[str], Path]
SHAPE = (16, 18, 20)


def run(*words: object) -> Result:
    return CliRunner().invoke(cwdm, ["check", *map(str, words)])


def image(seed: int) -> NDArray[Any]:
    voxels = np.random.default_rng(seed).uniform(100, 200, SHAPE)
    return np.pad(voxels, 2).astype(np.int16)


@pytest.fixture
def write(make_image: Callable[..., Path], tmp_path: Path) -> Write:
    """A case of four images in `cohort`; returns its folder."""

    def write(case_id: str) -> Path:
        for seed, modality in enumerate(SEQUENCES):
            make_image(f"cohort/{case_id}/{case_id}-{modality}.nii.gz", voxels=image(seed))
        return tmp_path / "cohort" / case_id

    return write


def test_good_cases_are_fine(write: Write, tmp_path: Path) -> None:
    folder = write("a")
    write("b")
    result = run("--input", tmp_path / "cohort")
    assert (result.exit_code, result.stdout) == (0, "2 fine, 0 flagged, 0 unreadable\n")
    result = run("--input", folder)
    assert (result.exit_code, result.stdout) == (0, "1 fine, 0 flagged, 0 unreadable\n")


def test_a_folder_that_bears_the_name_of_a_good_case_is_counted_by_itself(
    write: Write, tmp_path: Path
) -> None:
    write("a")
    empty = tmp_path / "cohort" / "old" / "a"
    empty.mkdir(parents=True)
    result = run("--input", tmp_path / "cohort")
    assert result.stdout.splitlines()[1].startswith(f"{empty} ")
    assert result.stdout.splitlines()[-1] == "1 fine, 0 flagged, 1 unreadable"


def spoil(write: Write, make_image: Callable[..., Path]) -> dict[str, Path]:
    """Five cases, of which one is good."""
    folders = {name: write(name) for name in ("broken", "copied", "good", "grid", "twice")}
    path = folders["broken"] / "broken-t1c.nii.gz"
    path.write_bytes(path.read_bytes()[:-500])
    make_image("cohort/copied/copied-t2w.nii.gz", voxels=image(3))
    make_image("cohort/grid/grid-t2f.nii.gz", voxels=image(3), affine=np.diag([1, 1, 1.5, 1]))
    make_image("cohort/twice/twice_t1.nii.gz", voxels=image(5))
    return folders


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_wrong_is_told_by_case_and_image(
    write: Write, make_image: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    folders = spoil(write, make_image)
    table = tmp_path / "table.csv"
    result = run("--input", tmp_path / "cohort", "--output", table, "--workers", workers)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:4] for line in lines[:5]] == [
        ["case", "image", "kind", "finding"],
        ["broken", "t1c", "file", f"{folders['broken'] / 'broken-t1c.nii.gz'}:"],
        ["copied", "t2w", "t2f", "duplicate"],
        ["grid", "t2f", "grid", f"{folders['grid'] / 'grid-t1n.nii.gz'}"],
        ["twice", "case", f"{folders['twice']}:", "twice-t1n.nii.gz"],
    ]
    assert lines[5:] == [
        "To replace what cannot be mended:",
        f"  cwdm impute --input {folders['broken']} --output completed --replace t1c",
        f"  cwdm impute --input {folders['grid']} --output completed --replace t2f",
        "1 fine, 2 flagged, 2 unreadable",
        str(table),
    ]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["modality"], row["kind"]) for row in rows] == [
        ("broken", "t1c", "file"),
        ("copied", "t2w t2f", "duplicate"),
        ("grid", "t2f", "grid"),
        ("twice", "", "case"),
    ]
    assert all(row["message"] in result.stdout for row in rows)


def test_no_line_is_offered_that_would_take_other_cases_along(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    for case_id in ("a", "b"):
        for seed in (0, 1):
            make_image(f"images/{case_id}{seed}.nii.gz", voxels=image(seed))
    (tmp_path / "images" / "a0.nii.gz").write_bytes(b"")
    (tmp_path / "cases.csv").write_text(
        "id,t1n,t2w\na,images/a0.nii.gz,images/a1.nii.gz\nb,images/b0.nii.gz,images/b1.nii.gz\n"
    )
    result = run("--input", tmp_path / "cases.csv")
    assert result.exit_code == 1
    assert "impute" not in result.stdout
    assert "1 fine, 0 flagged, 1 unreadable" in result.stdout


def test_a_segmentation_in_place_of_an_image_is_named(
    write: Write, make_image: Callable[..., Path]
) -> None:
    folder = write("a")
    path = make_image("cohort/a/a-t2f.nii.gz", voxels=(image(0) > 150).astype(np.uint8))
    result = run("--input", folder)
    assert result.exit_code == 1
    expected = f"{path}: found 2 different values, expected an image (is it a segmentation?)"
    assert expected in result.stdout


def test_a_table_is_only_replaced_when_told_to(write: Write, tmp_path: Path) -> None:
    words = ("--input", write("a"), "--output", tmp_path / "table.csv")
    assert run(*words).exit_code == 0
    assert (tmp_path / "table.csv").read_text().splitlines() == ["case,modality,kind,message"]
    (tmp_path / "table.csv").write_text("mine")
    result = run(*words)
    assert result.exit_code == 2
    assert "already exists" in result.stderr
    assert (tmp_path / "table.csv").read_text() == "mine"
    assert run(*words, "--overwrite").exit_code == 0
    assert (tmp_path / "table.csv").read_text() != "mine"


def test_no_case_at_all_exits_with_2(tmp_path: Path) -> None:
    result = run("--input", tmp_path)
    assert result.exit_code == 2
    assert "found no case" in result.stderr
