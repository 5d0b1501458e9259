"""Where cases are found, in every layout, and what is named instead of used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cwdm.case import find_cases
from cwdm.dicom import Series
from cwdm.errors import InputError
from cwdm.layouts import Found, Problem, find, merge
from cwdm.modality import SEQUENCES, Modality

MakeImage = Callable[..., Path]
MakeCase = Callable[..., Path]

T1N, T1C, T2W, T2F = SEQUENCES


def images(found: Found) -> dict[str, dict[Modality, str]]:
    """The names of the files of each case."""
    return {case.id: {m: path.name for m, path in case.images.items()} for case in found.cases}


@pytest.fixture
def touch(tmp_path: Path) -> Callable[..., Path]:
    """Empty files of these names below a folder: the layouts look at names alone."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "data"

    return make


def nnunet(root: Path, description: object) -> Path:
    (root / "dataset.json").write_text(json.dumps(description))
    return root


V2 = {"channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}, "labels": {}}
V1 = {"modality": {"0": "flair", "1": "t1w", "2": "t1gd", "3": "t2w"}, "numTraining": 2}


@pytest.mark.parametrize(
    ("description", "order"), [(V2, (T1N, T1C, T2W, T2F)), (V1, (T2F, T1N, T1C, T2W))]
)
def test_nnunet_numbers_channels_and_its_json_names_them(
    touch: Callable[..., Path], description: object, order: tuple[Modality, ...]
) -> None:
    names = [f"imagesTr/BRATS_00{case}_000{i}.nii.gz" for case in (2, 1) for i in range(4)]
    root = touch(*names, "labelsTr/BRATS_001.nii.gz", "imagesTs/BRATS_003_0000.nii.gz")
    found = find(nnunet(root, description))
    assert [case.id for case in found.cases] == ["BRATS_001", "BRATS_002"]
    first, second = found.cases
    assert list(first.images) == list(SEQUENCES)
    for number, modality in enumerate(order):
        assert first.images[modality] == root / "imagesTr" / f"BRATS_001_000{number}.nii.gz"
    assert first.segmentation == root / "labelsTr" / "BRATS_001.nii.gz"
    assert second.segmentation is None
    assert found.problems == []


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ({"background": 0, "NCR": 1, "ED": 2, "ET": 3}, None),
        (
            {"background": 0, "edema": 1, "necrosis": 2, "enhancing tumor": 3},
            {0: 0, 1: 2, 2: 1, 3: 3},
        ),
        ({"0": "background", "1": "edema", "2": "necrosis", "3": "ET"}, {0: 0, 1: 2, 2: 1, 3: 3}),
        ({"background": 0, "lesion": 1}, {}),
        (None, None),
    ],
)
def test_nnunet_says_what_its_labels_are(
    touch: Callable[..., Path], labels: object, numbers: dict[int, int] | None
) -> None:
    root = touch("imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz")
    found = find(nnunet(root, {**V2, "labels": labels}))
    assert [case.numbers for case in found.cases] == [numbers, None]  # b has no segmentation


def test_other_channels_of_nnunet_are_left_alone(touch: Callable[..., Path]) -> None:
    root = touch("imagesTr/a_0000.nii", "imagesTr/a_0001.nii", "imagesTr/b_0000.nii")
    found = find(nnunet(root, {"channel_names": {"0": "ADC", "1": "CT"}}))
    assert images(found) == {"a": {Modality.CT: "a_0001.nii"}}
    assert [problem.case for problem in found.problems] == ["b"]


def test_what_does_not_fit_nnunet_is_named_and_the_rest_goes_on(
    touch: Callable[..., Path],
) -> None:
    root = touch(
        *("imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTr/b_0000.nii"),
        *("imagesTr/c.nii.gz", "imagesTr/d_0007.nii.gz", "labelsTr/e.nii.gz"),
    )
    found = find(nnunet(root, V2))
    assert images(found) == {"a": {T1N: "a_0000.nii.gz"}}
    said = {problem.case: problem.message for problem in found.problems}
    assert set(said) == {"b", "c.nii.gz", "d", "e"}
    assert "b_0000.nii and " in said["b"]
    assert said["b"].endswith("are both t1n, expected one")
    assert "c.nii.gz: found another name, expected <id>_0000.nii.gz, " in said["c.nii.gz"]
    assert "d_0007.nii.gz: found another name" in said["d"]
    assert "found no image" in said["e"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged (JSONDecodeError"),
        ("[]", "damaged (AttributeError"),
        ("{}", "damaged (KeyError"),
        ('{"modality": ["T1"]}', "damaged (AttributeError"),
        ('{"modality": {"first": "T1"}}', "damaged (ValueError"),
        ('{"modality": {"0": "MRI"}}', "found channels MRI, expected T1, T1ce, T2, FLAIR or CT"),
    ],
)
def test_a_broken_description_is_refused_by_name(
    touch: Callable[..., Path], text: str, message: str
) -> None:
    root = touch("imagesTr/a_0000.nii.gz")
    (root / "dataset.json").write_text(text)
    with pytest.raises(InputError) as refusal:
        find(root)
    assert str(refusal.value).startswith(f"{root / 'dataset.json'}: {message}")


def test_bids_has_a_case_per_session(touch: Callable[..., Path]) -> None:
    root = touch(
        "dataset_description.json",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz",
        "sub-01/anat/sub-01_T2w.nii",
        "sub-01/anat/sub-01_acq-3d_FLAIR.nii.gz",
        "sub-01/anat/sub-01_T1map.nii.gz",
        "sub-01/dwi/sub-01_dwi.nii.gz",
        "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii.gz",
        "derivatives/x/sub-09/anat/sub-09_T1w.nii.gz",
    )
    found = find(root)
    assert images(found) == {
        "sub-01": {
            T1N: "sub-01_T1w.nii.gz",
            T1C: "sub-01_ce-gadolinium_T1w.nii.gz",
            T2W: "sub-01_T2w.nii",
            T2F: "sub-01_acq-3d_FLAIR.nii.gz",
        },
        "sub-02_ses-a": {T2F: "sub-02_ses-a_FLAIR.nii.gz"},
        "sub-02_ses-b": {T1N: "sub-02_ses-b_T1w.nii.gz"},
    }
    assert found.problems == []


def test_two_runs_in_bids_are_a_problem_of_that_case(touch: Callable[..., Path]) -> None:
    root = touch(
        "sub-01/anat/sub-01_run-1_T1w.nii.gz",
        "sub-01/anat/sub-01_run-2_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-03/anat/sub-03_PDw.nii.gz",
        "sub-04/func/sub-04_bold.nii.gz",
    )
    found = find(root)
    assert [case.id for case in found.cases] == ["sub-02"]
    said = {problem.case: problem.message for problem in found.problems}
    assert set(said) == {"sub-01", "sub-03", "sub-04"}
    assert "sub-01_run-2_T1w.nii.gz are both t1n, expected one" in said["sub-01"]
    assert "found no image" in said["sub-03"]
    assert "found no anat folder" in said["sub-04"]


def write_table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cases.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_has_a_row_per_case_and_paths_beside_it(tmp_path: Path) -> None:
    absolute = tmp_path / "elsewhere" / "c.nii"
    path = write_table(
        tmp_path,
        "\ufeffID, T1-Gd,flair,seg\n"
        "b,images/b1.nii.gz,images/b2.nii.gz,images/b3.nii.gz\n"
        f'"a, 1",,{absolute},\n'
        ",,,\n",
    )
    found = find(path)
    assert found.problems == []
    a, b = found.cases
    assert (a.id, dict(a.images), a.segmentation) == ("a, 1", {T2F: absolute}, None)
    assert b.images == {T1C: tmp_path / "images/b1.nii.gz", T2F: tmp_path / "images/b2.nii.gz"}
    assert b.segmentation == tmp_path / "images" / "b3.nii.gz"


def test_bad_rows_of_a_table_are_problems(tmp_path: Path) -> None:
    found = find(write_table(tmp_path, "id,t1\na,1.nii\nb,\nc,2.nii\nc,3.nii\n"))
    assert [case.id for case in found.cases] == ["a"]
    said = {problem.case: problem.message for problem in found.problems}
    assert set(said) == {"b", "c"}
    assert "found no image, expected any of t1n, " in said["b"]
    assert "2.nii and " in said["c"]
    assert said["c"].endswith("3.nii both are c, expected one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found columns nothing, expected id and one for each modality"),
        ("id\n", "found columns id, expected"),
        ("t1,t2\n", "found columns t1, t2, expected"),
        ("id,t1,t1w\n", "found columns id, t1, t1w, expected"),
        ("id,seg\n", "found columns id, seg, expected"),
        ("id,t1,age\n", "found column 'age', expected id, seg or a modality"),
        ("id;t1\n", "found column 'id;t1', expected"),
        ("id,t1\na\n", "found 1 cells in row 2, expected 2"),
        ("id,t1\na,1.nii\n,2.nii\n", "found no id in row 3, expected one"),
        ('id,t1\n"a,1.nii\n', "not a CSV file, "),
    ],
)
def test_a_broken_table_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write_table(tmp_path, text)
    with pytest.raises(InputError) as refusal:
        find(path)
    assert str(refusal.value).startswith(f"{path}: {message}")


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv: cannot be read, No such file"):
        find(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(InputError, match=r"binary\.csv: not a CSV file"):
        find(tmp_path / "binary.csv")


def test_folders_give_what_find_cases_gives(make_case: MakeCase, tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        make_case(f"data/{name}", name[-1])
    found = find(tmp_path / "data")
    assert found == Found(find_cases(tmp_path / "data"), [])


def test_bad_folders_are_problems_and_the_rest_goes_on(touch: Callable[..., Path]) -> None:
    root = touch(
        "good/x-t1n.nii.gz",
        "two/y-t1n.nii.gz",
        "two/y_t1.nii.gz",
        "mixed/z-t1n.nii.gz",
        "mixed/w-t2w.nii.gz",
        "other/labels.nii.gz",
        "notes/read.me",
        "atlas.nii.gz",
    )
    (root / "empty").mkdir()
    found = find(root)
    assert images(found) == {"x": {T1N: "x-t1n.nii.gz"}}
    said = {problem.case: problem.message for problem in found.problems}
    assert set(said) == {"two", "mixed", "other", "empty"}
    assert "are both t1n" in said["two"]
    assert "belong to different cases" in said["mixed"]
    assert "found labels.nii.gz, expected names like" in said["other"]
    assert "found no NIfTI files" in said["empty"]


def test_two_folders_with_one_id_are_a_problem(touch: Callable[..., Path]) -> None:
    root = touch("1/x-t1n.nii.gz", "2/x-t1n.nii.gz", "3/y-t1n.nii.gz")
    found = find(root)
    assert [case.id for case in found.cases] == ["y"]
    ((case, message),) = found.problems
    assert case == "x"
    assert f"{root / '1' / 'x-t1n.nii.gz'} and {root / '2' / 'x-t1n.nii.gz'}" in message


def test_merging_counts_what_is_found_twice_once(touch: Callable[..., Path]) -> None:
    root = touch("1/x-t1n.nii.gz", "2/y-t1n.nii.gz", "other/x-t1n.nii.gz")
    one, both = find(root / "1"), find(root)
    assert [case.id for case in merge([one, find(root / "1"), find(root / "2")]).cases] == [
        "x",
        "y",
    ]
    assert [problem.case for problem in merge([one, both]).problems] == ["x"]
    assert merge([both, both]) == both


def test_merging_tells_series_apart_by_their_id() -> None:
    one, other = (Series("a", Path(folder), ("1.dcm",)) for folder in ("x", "y"))
    third = Series("b", Path("x"), ("2.dcm",))
    found = merge([Found([], [], (third, one)), Found([], [], (other, third))])
    assert found == Found([], [Problem("a", "x and y both are a, expected one")], (third,))


@pytest.mark.parametrize("names", [(), ("notes.txt",)])
def test_nothing_at_all_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="found no case in it or below, expected BraTS folders"):
        find(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").touch()
    for name in ("absent", "x.nii.gz"):
        with pytest.raises(InputError, match="expected a readable folder"):
            find(tmp_path / name)


def test_the_real_cases_are_found_without_a_problem(shared: Path) -> None:
    for name, count in (("train", 11), ("val", 2), ("odd", 3)):
        found = find(shared / "data" / name)
        assert len(found.cases) == count
        assert found.problems == []
        assert not any(case.missing for case in found.cases)
