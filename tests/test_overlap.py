"""Segmentations against the truth: known figures, the rules for empty ones, and the command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.case import read_case
from cwdm.cli.main import cwdm
from cwdm.errors import InputError
from cwdm.imputation import Imputation, impute
from cwdm.layouts import Layout, find
from cwdm.lesions import count_lesions
from cwdm.modality import SEQUENCES, Modality
from cwdm.overlap import (
    FIGURES,
    FILES,
    PENALTY_MM,
    Row,
    compare,
    differences,
    find_segmentations,
    summarize,
    tabulate,
)
from cwdm.volume import read_labels, read_volume

MakeImage = Callable[..., Path]
Labels = NDArray[np.uint8]
SHAPE = (20, 18, 16)
MM = (1.0, 1.0, 1.0)


def block(x: int, label: int = 3, *, shape: tuple[int, ...] = SHAPE, side: int = 4) -> Labels:
    """A cube that begins at (x, 3, 3)."""
    labels = np.zeros(shape, np.uint8)
    labels[x : x + side, 3 : 3 + side, 3 : 3 + side] = label
    return labels


def row(found: Labels, truth: Labels, region: str, spacing: tuple[float, ...] = MM) -> Row:
    (only,) = [each for each in compare(found, truth, spacing) if each.region == region]
    return only


def figures(each: Row) -> tuple[float, float, float]:
    return each.dice, each.hd95_mm, each.nsd


def test_the_truth_is_perfect_in_every_region() -> None:
    labels = block(3, 2, side=10)
    labels[5:9, 5:9, 5:9], labels[6:8, 6:8, 6:8] = 1, 3
    rows = compare(labels, labels, MM)
    assert [each.region for each in rows] == ["WT", "TC", "ET", "NCR", "ED"]
    assert [figures(each) for each in rows] == [(1.0, 0.0, 1.0)] * 5
    assert [each.truth_ml for each in rows] == [1.0, 0.064, 0.008, 0.056, 0.936]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 1.0)])
def test_a_shifted_cube(spacing: tuple[float, ...]) -> None:
    """By two of four voxels: half of it is shared, and the far face is two voxels away."""
    found = row(block(5), block(3), "ET", spacing)
    assert found.dice == pytest.approx(0.5)
    assert found.hd95_mm == pytest.approx(2 * spacing[0])
    assert found.truth_ml == pytest.approx(0.064 * spacing[0])


def test_surfaces_within_the_tolerance_agree() -> None:
    assert figures(row(block(4), block(3), "WT"))[1:] == (1.0, 1.0)
    assert row(block(4), block(3), "WT", (1.5, 1.0, 1.0)).nsd < 1


def test_two_balls_have_the_distance_of_their_radii() -> None:
    grid = np.indices((40, 40, 40)) - 19.5
    radius = np.sqrt((grid**2).sum(axis=0))
    small, large = (np.where(radius < r, 3, 0).astype(np.uint8) for r in (9, 14))
    found = row(small, large, "ET")
    assert found.dice == pytest.approx(2 * 9**3 / (9**3 + 14**3), rel=0.03)
    assert found.hd95_mm == pytest.approx(5, abs=0.5)
    assert found.nsd == 0


def surface_distances(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """From each surface voxel of `one` to the nearest of `other`, by comparing all of them."""

    def points(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        edge: NDArray[np.bool_] = mask & ~ndimage.binary_erosion(mask)
        scaled: NDArray[np.float64] = np.argwhere(edge) * np.array([1.0, 2.0, 1.5])
        return scaled

    a, b = points(one), points(other)
    nearest: NDArray[np.float64] = np.linalg.norm(a[:, None] - b[None], axis=-1).min(axis=1)
    return nearest


def test_figures_equal_brute_force_on_random_shapes() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        ndimage.gaussian_filter(rng.normal(size=SHAPE), 2, mode="constant") > 0.02 for _ in "ab"
    )
    there, back = surface_distances(one, other), surface_distances(other, one)
    found = row(
        np.where(one, 2, 0).astype(np.uint8),
        np.where(other, 2, 0).astype(np.uint8),
        "ED",
        (1.0, 2.0, 1.5),
    )
    assert found.dice == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
    assert found.hd95_mm == pytest.approx(max(np.quantile(there, 0.95), np.quantile(back, 0.95)))
    assert found.nsd == pytest.approx(np.mean(np.concatenate([there, back]) <= 1))


def test_empty_regions_follow_the_rules_of_the_challenge() -> None:
    nothing = np.zeros(SHAPE, np.uint8)
    assert figures(row(nothing, nothing, "ET")) == (1.0, 0.0, 1.0)
    assert figures(row(block(3), nothing, "ET")) == (0.0, PENALTY_MM, 0.0)
    assert figures(row(nothing, block(3), "ET")) == (0.0, PENALTY_MM, 0.0)
    assert figures(row(block(3, 2), block(3, 1), "TC")) == (0.0, PENALTY_MM, 0.0)
    assert pytest.approx(np.linalg.norm([240, 240, 155]), abs=1) == PENALTY_MM


def test_labels_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one grid"):
        compare(block(3), block(3, shape=(20, 18, 17)), MM)


def table(**methods: list[float]) -> pd.DataFrame:
    return tabulate(
        Row(f"p{number}", method, "ET", value, 10 * value, value / 2, 1.0, 1.0)
        for method, values in methods.items()
        for number, value in enumerate(values)
    )


def test_means_are_those_of_the_cases() -> None:
    summary = summarize(table(a=[0.2, 0.4, 0.9], b=[0.1, 0.1, 0.1]))
    means = {(r["method"], r["figure"]): r["mean"] for r in summary.to_dict("records")}
    assert means["a", "dice"] == pytest.approx(0.5)
    assert means["a", "hd95_mm"] == pytest.approx(5)
    assert means["b", "nsd"] == pytest.approx(0.05)
    assert summarize(table(a=[0.2]))["low"].tolist() == [None] * 3
    assert (summary["low"] <= summary["mean"] + 1e-12).all()
    assert (summary["mean"] <= summary["high"] + 1e-12).all()


def test_the_test_is_the_exact_one_paired_by_case() -> None:
    """Of six differences that all have one sign, 2 of 2^6 assignments of signs are as extreme."""
    first = [0.1, 0.3, 0.2, 0.6, 0.5, 0.4]
    better = [value + 0.1 + 0.01 * number for number, value in enumerate(first)]
    both = table(first=first, better=better, same=first)
    shuffled = both.sample(frac=1, random_state=1).sort_values("method", key=lambda m: m != "first")
    found = differences(shuffled).set_index(["method", "figure"])
    assert set(found["against"]) == {"first"}
    assert found.loc[("better", "dice"), "p"] == pytest.approx(2 / 2**6)
    assert found.loc[("better", "dice"), "difference"] == pytest.approx(0.125)
    assert found.loc[("same", "dice"), "p"] == 1
    assert differences(table(only=first)).empty


@pytest.fixture
def cases(make_image: MakeImage, tmp_path: Path) -> Path:
    """Two cases with a cube as tumor, one without a segmentation; predictions in `a` and `b`."""
    for number in (1, 2, 3):
        make_image(f"cases/p{number}/p{number}-t1n.nii.gz", voxels=block(1, 9).astype(np.int16))
    for number in (1, 2):
        make_image(f"cases/p{number}/p{number}-seg.nii.gz", voxels=block(3))
        make_image(f"a/deep/p{number}-seg.nii.gz", voxels=block(3, 4))
        make_image(f"b/p{number}-seg.nii.gz", voxels=block(3 + 2 * number))
    return tmp_path / "cases"


def run(*words: object) -> Result:
    return CliRunner().invoke(cwdm, ["overlap", *map(str, words)])


def test_the_command_compares_two_folders(cases: Path, tmp_path: Path) -> None:
    a, b, output = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    result = run("--truth", cases, "--pred", a, "--pred", b, "--output", output)
    assert result.exit_code == 0, result.output
    assert "left out 1 case(s) without a segmentation" in result.stderr
    assert "374 mm" in result.stdout
    rows = pd.read_csv(output / FILES[0]).set_index(["method", "case", "region"])
    assert len(rows) == 2 * 2 * 5
    assert list(rows.loc[(str(a), "p1", "ET"), FIGURES]) == [1, 0, 1]
    assert rows.loc[(str(b), "p1", "ET"), "dice"] == pytest.approx(0.5)
    assert rows.loc[(str(b), "p2", "ET"), "dice"] == 0
    assert rows.loc[(str(b), "p2", "ET"), "hd95_mm"] == pytest.approx(4)
    record = json.loads((output / FILES[2]).read_text())
    assert record["cases"] == ["p1", "p2"]
    tests = [each for each in record["tests"] if (each["region"], each["figure"]) == ("ET", "dice")]
    assert [(each["method"], each["difference"]) for each in tests] == [(str(b), -0.75)]
    again = run("--truth", cases, "--pred", a, "--output", output)
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def lesions() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two in the truth; of two in the prediction one is shifted by a voxel, one is nowhere."""
    truth, found = np.zeros((2, 20, 20, 20), dtype=np.uint8)
    truth[2:6, 2:6, 2:6] = truth[12:16, 12:16, 12:16] = 3
    found[2:6, 2:6, 3:7] = found[2:5, 12:15, 2:5] = 3
    return found, truth


def test_lesions_are_counted_and_paired() -> None:
    """Of 64 voxels 48 overlap: an intersection over union of 0.6, a Dice of 0.75."""
    pytest.importorskip("panoptica")
    found, truth = lesions()
    rows = {row.region: row for row in count_lesions(found, truth)}
    row = rows["ET"]
    assert (row.truth, row.found, row.matched) == (2, 2, 1)
    assert (row.rq, row.sq, row.pq) == pytest.approx((0.5, 0.75, 0.375))
    assert (rows["ED"].truth, rows["ED"].pq) == (0, 1)  # none in either
    (missed,) = [r for r in count_lesions(np.zeros_like(truth), truth) if r.region == "ET"]
    assert (missed.truth, missed.found, missed.rq, missed.sq) == (2, 0, 0, 0)


def test_the_command_counts_lesions(cases: Path, tmp_path: Path) -> None:
    pytest.importorskip("panoptica")
    output = tmp_path / "out"
    result = run("--truth", cases, "--pred", tmp_path / "a", "--output", output, "--lesions")
    assert result.exit_code == 0, result.output
    assert "ET: 2 of 2 lesions found, 0 that are none" in result.stdout
    assert set(pd.read_csv(output / "lesions.csv")["region"]) == {"WT", "TC", "ET", "NCR", "ED"}


def test_without_panoptica_one_line_says_what_to_install(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "panoptica", None)
    output = tmp_path / "out"
    result = run("--truth", cases, "--pred", tmp_path / "a", "--output", output, "--lesions")
    assert result.exit_code == 2
    assert "pip install 'cwdm[lesions]'" in result.stderr
    assert not list(output.glob("*"))


def test_no_case_can_be_left_out(cases: Path, tmp_path: Path, make_image: MakeImage) -> None:
    found = [read_case(cases / name) for name in ("p1", "p2")]
    assert sorted(find_segmentations(tmp_path / "a", found)) == ["p1", "p2"]
    with pytest.raises(InputError, match="is the truth itself"):
        find_segmentations(cases, found)
    make_image("a/too/p1-seg.nii", voxels=block(3))
    with pytest.raises(InputError, match="two segmentations of one case"):
        find_segmentations(tmp_path / "a", found)
    direct = make_image("a/p1-seg.nii", voxels=block(4))
    assert find_segmentations(tmp_path / "a", found)["p1"] == direct
    (tmp_path / "b" / "p2-seg.nii.gz").unlink()
    with pytest.raises(InputError, match=r"1 of 2 .* such as p2-seg\.nii\.gz"):
        find_segmentations(tmp_path / "b", found)
    with pytest.raises(InputError, match="not a folder"):
        find_segmentations(tmp_path / "c", found)


def test_a_segmentation_on_another_grid_is_refused(cases: Path, make_image: MakeImage) -> None:
    path = make_image("b/p2-seg.nii.gz", voxels=block(3), affine=np.diag([-2.0, -1.0, 1.0, 1.0]))
    result = run("--truth", cases, "--pred", path.parent, "--output", path.parent / "out")
    assert result.exit_code == 2
    assert "expected one grid" in result.stderr


NNUNET = {"background": 0, "edema": 1, "necrosis": 2, "enhancing tumor": 3}


def nnunet(root: Path, make_image: MakeImage, labels: object) -> tuple[Labels, Labels]:
    """A case in nnU-Net's layout; its labels as it numbers them and as BraTS does."""
    theirs = block(3, 1, side=8)
    theirs[5:9, 5:9, 5:9], theirs[6:8, 6:8, 6:8] = 2, 3
    ours = np.array([0, 2, 1, 3], np.uint8)[theirs]
    image = np.random.default_rng(0).integers(1, 900, SHAPE, np.int16)
    channels = {str(number): name for number, name in enumerate(SEQUENCES)}
    for number in range(4):
        make_image(f"{root.name}/imagesTr/a_000{number}.nii.gz", voxels=image)
    make_image(f"{root.name}/labelsTr/a.nii.gz", voxels=theirs)
    description = {"channel_names": channels, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    return theirs, ours


def test_labels_of_nnunet_are_compared_by_their_names(
    make_image: MakeImage, tmp_path: Path
) -> None:
    _, ours = nnunet(tmp_path / "set", make_image, NNUNET)
    make_image("a/a-seg.nii.gz", voxels=ours)
    words = ("--truth", tmp_path / "set", "--pred", tmp_path / "a", "--output", tmp_path / "out")
    result = run(*words)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / FILES[0])
    assert set(table["region"]) >= {"WT", "TC", "ET", "NCR", "ED"}
    assert (table["dice"] == 1).all()


@pytest.mark.parametrize("labels", [{"background": 0, "lesion": 1}, {**NNUNET, "edema": 7}])
def test_labels_that_are_not_those_of_brats_are_refused(
    make_image: MakeImage, tmp_path: Path, labels: object
) -> None:
    nnunet(tmp_path / "set", make_image, labels)
    make_image("a/a-seg.nii.gz", voxels=block(3))
    words = ("--truth", tmp_path / "set", "--pred", tmp_path / "a", "--output", tmp_path / "out")
    result = run(*words)
    assert result.exit_code == 2
    assert "labelsTr/a.nii.gz: found labels 0, 1, 2, 3, expected those of BraTS" in result.stderr


@pytest.mark.parametrize("layout", ["brats", "nnunet"])
def test_completed_cases_of_nnunet_have_the_labels_of_brats(
    make_image: MakeImage, any_model: Path, tmp_path: Path, layout: Layout
) -> None:
    _, ours = nnunet(tmp_path / "set", make_image, NNUNET)
    (tmp_path / "set/imagesTr/a_0003.nii.gz").unlink()
    job = Imputation(layout=layout, model=any_model, precision="fp32")
    impute(tmp_path / "set", tmp_path / "out", job=job)
    (case,) = find(tmp_path / "out").cases
    assert not case.missing
    assert case.segmentation is not None
    like = read_volume(case.images[Modality.T1N])
    assert np.array_equal(read_labels(case.segmentation, like), ours[::-1, ::-1])  # RAS
