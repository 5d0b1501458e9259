import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from cwdm.case import find_cases, read_case
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES

FolderWith = Callable[..., Path]

T1N, T1C, T2W, T2F = SEQUENCES


@pytest.fixture
def folder_with(tmp_path: Path) -> FolderWith:
    """A folder with empty files of these names: cases are read by name alone."""

    def make(*names: str, folder: str = "some folder") -> Path:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / folder / name).touch()
        return tmp_path / folder

    return make


@pytest.mark.parametrize(
    "names",
    [
        ("BraTS-GLI-1-000-{}.nii.gz", "t1n", "t1c", "t2w", "t2f", "seg"),
        ("BraTS18_TCIA_1_{}.nii.gz", "t1", "t1ce", "t2", "flair", "seg"),
        ("BraTS20_1_{}.nii", "t1", "t1ce", "t2", "flair", "seg"),
        ("UPENN-GBM-1_11_{}.nii.gz", "T1", "T1GD", "T2", "FLAIR", "segmentation"),
        ("p-1_{}.NII.GZ", "T1W", "T1-Gd", "T2W", "T2_FLAIR", "SEG"),
    ],
)
def test_every_naming_is_understood(folder_with: FolderWith, names: tuple[str, ...]) -> None:
    pattern, *modalities = names
    folder = folder_with(*(pattern.format(modality) for modality in modalities))
    case = read_case(folder)
    assert case.id == pattern[: pattern.index("{") - 1]
    assert list(case.images) == list(SEQUENCES)
    *images, segmentation = (folder / pattern.format(modality) for modality in modalities)
    assert list(case.images.values()) == images
    assert case.segmentation == segmentation
    assert case.missing == ()


def test_files_of_other_kinds_are_ignored(folder_with: FolderWith) -> None:
    case = read_case(
        folder_with(
            *("x-t1n.nii.gz", "x-t2w.nii.gz", "x-lesion.nii.gz", "x-t1c-mask.nii.gz"),
            *("x-t2f.json", "x-t2f.png", ".DS_Store", "._x-t2f.nii.gz", ".cwdm-01.nii.gz"),
            *("y-seg.nii.gz", "x-t2f.nii.gz.part"),
        )
    )
    assert case.id == "x"
    assert set(case.images) == {T1N, T2W}
    assert case.missing == (T1C, T2F)
    assert case.segmentation is None


def test_a_subfolder_named_like_an_image_is_ignored(folder_with: FolderWith) -> None:
    folder = folder_with("x-t1n.nii.gz")
    (folder / "x-t2f.nii.gz").mkdir()
    assert read_case(folder).missing == (T1C, T2W, T2F)


def test_files_without_an_id_take_the_folders_name(folder_with: FolderWith) -> None:
    case = read_case(folder_with("T1.nii.gz", "t2_flair.nii.gz", "seg.nii.gz", folder="Anna"))
    assert case.id == "Anna"
    assert set(case.images) == {T1N, T2F}
    assert case.segmentation is not None


def test_without_forgets_modalities_and_nothing_else(folder_with: FolderWith) -> None:
    case = read_case(folder_with(*(f"x-{modality}.nii.gz" for modality in SEQUENCES)))
    fewer = case.without(T2F, T1N)
    assert fewer.missing == (T1N, T2F)
    assert case.missing == ()
    assert fewer.id == case.id


def test_a_case_travels_to_another_process(folder_with: FolderWith) -> None:
    case = read_case(folder_with("x-t1n.nii.gz"))
    assert pickle.loads(pickle.dumps(case)) == case


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x-t1c.nii.gz", "x_t1ce.nii.gz"), "x-t1c.nii.gz and x_t1ce.nii.gz are both t1c"),
        (("x-t1c.nii.gz", "x-t1c.nii"), "x-t1c.nii and x-t1c.nii.gz are both t1c"),
        (("x-t1n.nii", "x-seg.nii", "x_seg.nii"), "x-seg.nii and x_seg.nii are both seg"),
        (("x-t1n.nii.gz", "y-t2w.nii.gz"), "x-t1n.nii.gz and y-t2w.nii.gz belong to different"),
        (("x-t1n.nii.gz", "y-t1n.nii.gz"), "x-t1n.nii.gz and y-t1n.nii.gz belong to different"),
        (
            ("x-t1m.nii.gz", "x-pet.nii"),
            "found x-pet.nii, x-t1m.nii.gz, expected names like <id>",
        ),
        (("x-seg.nii.gz",), "found x-seg.nii.gz, expected names like"),
        (("notes.txt",), "found no NIfTI files, expected names like"),
        ((), "found no NIfTI files, expected names like"),
    ],
)
def test_what_is_not_one_case_is_refused_by_name(
    folder_with: FolderWith, names: tuple[str, ...], message: str
) -> None:
    folder = folder_with(*names)
    with pytest.raises(InputError) as refusal:
        read_case(folder)
    assert str(refusal.value).startswith(f"{folder}: ")
    assert message in str(refusal.value)


@pytest.mark.parametrize("read", [read_case, find_cases])
def test_a_folder_that_is_none_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: No such file.*expected a readable folder"):
        read(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: Not a directory.*expected a readable folder"):
        read(tmp_path / "file")


def test_find_cases_sorts_by_id_at_any_depth(folder_with: FolderWith, tmp_path: Path) -> None:
    folder_with("b-t1n.nii.gz", folder="LGG/1")
    folder_with("c-t1n.nii.gz", folder="HGG/2")
    folder_with("a-t1n.nii.gz", folder="z")
    folder_with("d-t1n.nii.gz", folder=".hidden/d")
    assert [case.id for case in find_cases(tmp_path)] == ["a", "b", "c"]


def test_find_cases_takes_a_case_as_a_root_and_looks_no_deeper(
    folder_with: FolderWith, tmp_path: Path
) -> None:
    folder_with("a-t1n.nii.gz", folder=".")
    folder_with("b-t1n.nii.gz", folder="derived")
    assert [case.id for case in find_cases(tmp_path)] == ["a"]


def test_find_cases_skips_folders_of_other_images_aloud(
    folder_with: FolderWith, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_with("a-t1n.nii.gz", folder="a")
    folder_with("a_labels.nii.gz", folder="labels")
    assert [case.id for case in find_cases(tmp_path)] == ["a"]
    assert "labels: skipped" in caplog.text


def test_find_cases_follows_links_but_not_in_circles(
    folder_with: FolderWith, tmp_path: Path
) -> None:
    folder = folder_with("a-t1n.nii.gz", folder="elsewhere/a")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(folder)
    (tmp_path / "root" / "up").symlink_to(tmp_path / "root")
    assert [case.id for case in find_cases(tmp_path / "root")] == ["a"]


def test_find_cases_refuses_two_cases_of_one_id(folder_with: FolderWith, tmp_path: Path) -> None:
    folder_with("a-t1n.nii.gz", folder="1")
    folder_with("a-t1n.nii.gz", folder="2")
    with pytest.raises(InputError, match=r"1 and .*2 both hold a case a"):
        find_cases(tmp_path)


def test_find_cases_refuses_a_tree_without_any(folder_with: FolderWith, tmp_path: Path) -> None:
    folder_with("a_labels.nii.gz", folder="labels")
    with pytest.raises(InputError, match="no case in it or below"):
        find_cases(tmp_path)


def test_the_odd_cases_are_read(shared: Path) -> None:
    cases = {case.id: case for case in find_cases(shared / "data" / "odd")}
    assert set(cases) == {"OtherEXampleFromTCIA", "aurora_case", "patient19"}
    assert all(not case.missing for case in cases.values())
    assert cases["patient19"].segmentation is None
