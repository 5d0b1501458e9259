"""Where the files of a data set are: BraTS-like folders, nnU-Net, BIDS, or a table. No voxels.

What is wrong with one case is a `Problem` of that case; the others are found all the same.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from cwdm.case import Case, Kind, is_case, nifti_names, read_case, walk
from cwdm.dicom import Series
from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.modality import SEQUENCES, Modality, find_modality
from cwdm.segmentation import brats_numbers

__all__ = ["DESCRIPTIONS", "Found", "Layout", "Problem", "describe", "find", "image_path", "merge"]

Layout = Literal["brats", "nnunet", "bids", "brasyn"]
"""How the files of a data set are named."""

_CHANNEL = re.compile(r"(?P<id>.+)_(?P<number>\d{4})\.nii(\.gz)?", re.IGNORECASE)
_LABELS = re.compile(r"(?P<id>.+)\.nii(\.gz)?", re.IGNORECASE)
_SUFFIXES: dict[str, Kind] = {"T2w": Modality.T2W, "FLAIR": Modality.T2F, "dseg": "seg"}
_BIDS_ENDINGS: dict[Kind, str] = {
    Modality.T1N: "T1w",
    Modality.T1C: "ce-gadolinium_T1w",
    Modality.T2W: "T2w",
    Modality.T2F: "FLAIR",
    "seg": "dseg",
}
_LAYOUTS = "BraTS folders, nnU-Net, BIDS or a CSV file"

Source = TypeVar("Source", Case, Series)
Files = list[tuple[Kind, Path]]


class Problem(NamedTuple):
    """Why a case cannot be used."""

    case: str
    """Its id, or the name of its folder where the id is not known."""
    message: str


class Found(NamedTuple):
    """The cases of a data set, and what looks like one and is none."""

    cases: list[Case]
    problems: list[Problem]
    series: tuple[Series, ...] = ()
    """DICOM series, each of them a case of CT."""

    @property
    def problem_names(self) -> list[str]:
        """What each problem is called: by its place if a case that is well bears its name."""
        well = {case.id for case in self.cases} | {each.id for each in self.series}
        return [
            each.message.partition(": ")[0] if each.case in well else each.case
            for each in self.problems
        ]


def find(path: Path) -> Found:
    """All cases of a data set, sorted by id.

    Args:
        path: a CSV file (`id`, a column per modality, perhaps `seg`; paths relative to the file);
            an nnU-Net folder (`dataset.json`, `imagesTr/<id>_0000.nii.gz`, else `imagesTs`,
            `labelsTr`); a BIDS folder (`sub-<id>[/ses-<id>]/anat/*_T1w.nii.gz`; `ce-` makes it
            T1c); or any folder with a folder per case at or below it, as `case.read_case` reads
            them.

    Raises:
        InputError: nothing there at all, or a description of the data that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        found = _from_table(path)
    elif (path / "dataset.json").is_file():
        found = _from_nnunet(path)
    elif any(path.glob("sub-*/anat")) or any(path.glob("sub-*/ses-*/anat")):
        found = _from_bids(path)
    else:
        found = _from_folders(path)
    if not (found.cases or found.problems):
        raise InputError(f"{path}: found no case in it or below, expected {_LAYOUTS}")
    return merge([found])


def merge(parts: Iterable[Found]) -> Found:
    """Several data sets as one. A case found twice counts once; two with one id are a problem."""
    parts = list(parts)
    cases, twice = _unique([case for part in parts for case in part.cases])
    series, again = _unique([each for part in parts for each in part.series])
    problems = [problem for part in parts for problem in part.problems]
    return Found(cases, list(dict.fromkeys([*problems, *twice, *again])), tuple(series))


def _unique(sources: Sequence[Source]) -> tuple[list[Source], list[Problem]]:
    """Those that have their id for themselves, sorted, and a problem for each of the other ids."""
    by_id: dict[str, list[Source]] = {}
    for source in sources:
        same = by_id.setdefault(source.id, [])
        if source not in same:
            same.append(source)
    problems = [
        Problem(name, f"{_place(same[0])} and {_place(same[1])} both are {name}, expected one")
        for name, same in sorted(by_id.items())
        if len(same) > 1
    ]
    return [same[0] for _, same in sorted(by_id.items()) if len(same) == 1], problems


def _place(source: Case | Series) -> Path:
    """A path to tell it by: its first image, or the folder of the series."""
    return next(iter(source.images.values())) if isinstance(source, Case) else source.folder


def _from_folders(root: Path) -> Found:
    """One case per folder. Of the other folders only those that hold nothing else are suspicious:
    images that are not named like a case's, or nothing at all."""
    cases, problems = [], []
    for folder, names in walk(root):
        try:
            cases.append(read_case(folder))
        except InputError as error:
            if is_case(names) or _is_odd(folder, names, root):
                problems.append(Problem(folder.resolve().name, str(error)))
    return Found(cases, problems)


def _is_odd(folder: Path, names: list[str], root: Path) -> bool:
    """Whether it has images and no folder in it, or is an empty folder below the root."""
    entries = list(folder.iterdir())
    if not entries:
        return folder != root
    return bool(names) and not any(entry.is_dir() for entry in entries)


def _from_nnunet(folder: Path) -> Found:
    """`imagesTr/<id>_<channel>.nii.gz`, else `imagesTs`; `dataset.json` names the channels."""
    channels, numbers = _description(folder / "dataset.json")
    files: dict[str, Files] = {}
    problems = []
    # nobody is to train on images that are for testing, unless they are all there is
    images = folder / "imagesTr"
    if not images.is_dir() and (folder / "imagesTs").is_dir():
        images = folder / "imagesTs"
    for path in (images / name for name in nifti_names(images)):
        match = _CHANNEL.fullmatch(path.name)
        if not match or int(match["number"]) not in channels:
            expected = ", ".join(f"<id>_{number:04d}.nii.gz" for number in channels)
            message = f"{path}: found another name, expected {expected}"
            problems.append(Problem(match["id"] if match else path.name, message))
            continue
        images_of_case = files.setdefault(match["id"], [])
        if modality := channels[int(match["number"])]:
            images_of_case.append((modality, path))
    labels = folder / "labelsTr"
    for name in nifti_names(labels) if labels.is_dir() else []:
        if match := _LABELS.fullmatch(name):
            files.setdefault(match["id"], []).append(("seg", labels / name))
    bad = {problem.case for problem in problems}
    found = _assemble((case_id, each) for case_id, each in files.items() if case_id not in bad)
    cases = [replace(case, numbers=numbers if case.segmentation else None) for case in found.cases]
    return Found(cases, problems + found.problems)


def _description(path: Path) -> tuple[dict[int, Modality | None], dict[int, int] | None]:
    """Channel number -> modality, None for other images (`channel_names`, before v2 `modality`),
    and the numbers of a `Case`, from `labels`."""
    try:
        description: Any = json.loads(path.read_bytes())
        names: Any = description.get("channel_names") or description["modality"]
        channels = {int(number): find_modality(str(name)) for number, name in names.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read, {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError) as error:
        expected = '"channel_names": {"0": "T1", ...}'
        raise InputError(f"{path}: damaged ({error!r}), expected {expected}") from error
    if not any(channels.values()):
        listed = ", ".join(str(name) for name in names.values()) or "none"
        raise InputError(f"{path}: found channels {listed}, expected T1, T1ce, T2, FLAIR or CT")
    return channels, _numbers(description.get("labels"), path)


def _numbers(labels: Any, path: Path) -> dict[int, int] | None:
    """The numbers of a `Case`; what is not named is taken for those of BraTS."""
    if not labels:
        return None
    try:
        numbers = brats_numbers(labels, path)
    except InputError:  # a data set of something else, which matters to nobody but who asks
        return {}
    return None if all(n == number for n, number in numbers.items()) else numbers


def _from_bids(folder: Path) -> Found:
    """`sub-<id>[/ses-<id>]/anat/*_<suffix>.nii.gz`, a case per session."""
    files: list[tuple[str, Files]] = []
    problems = []
    for subject in sorted(each for each in folder.glob("sub-*") if each.is_dir()):
        anats = [*subject.glob("anat"), *sorted(subject.glob("ses-*/anat"))]
        for anat in anats:
            kinds = [(_bids_kind(name), anat / name) for name in nifti_names(anat)]
            case_id = "_".join(anat.parent.relative_to(folder).parts)
            files.append((case_id, [(kind, path) for kind, path in kinds if kind]))
        if not anats:
            problems.append(Problem(subject.name, f"{subject}: found no anat folder, expected one"))
    found = _assemble(files)
    return Found(found.cases, problems + found.problems)


def _bids_kind(name: str) -> Kind | None:
    """What `sub-1_ses-1_ce-gadolinium_T1w.nii.gz` is, or None."""
    *entities, suffix = name.split(".")[0].split("_")
    if suffix == "T1w":
        contrast = any(entity.startswith("ce-") for entity in entities)
        return Modality.T1C if contrast else Modality.T1N
    return _SUFFIXES.get(suffix)


def _from_table(path: Path) -> Found:
    """A row per case; what is left empty was not acquired."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except OSError as error:
        raise InputError(f"{path}: cannot be read, {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file, {error}") from error
    kinds = [_column_kind(name, path) for name in header]
    if sorted(kinds) != sorted(set(kinds)) or "id" not in kinds or not set(kinds) & {*Modality}:
        found = ", ".join(header) or "nothing"
        raise InputError(f"{path}: found columns {found}, expected id and one for each modality")
    cases: list[tuple[str, Files]] = []
    for number, row in enumerate(rows, start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != len(kinds):
            found = f"{len(cells)} cells in row {number}"
            raise InputError(f"{path}: found {found}, expected {len(kinds)}")
        case_id = cells[kinds.index("id")]
        if not case_id:
            raise InputError(f"{path}: found no id in row {number}, expected one")
        columns = zip(kinds, cells, strict=True)
        files = [(kind, path.parent / cell) for kind, cell in columns if cell and kind != "id"]
        cases.append((case_id, files))
    return _assemble(cases)


def _column_kind(name: str, path: Path) -> Kind | Literal["id"]:
    """What a column holds: "id", "seg" or a modality."""
    match name.strip().lower():
        case "id":
            return "id"
        case "seg":
            return "seg"
    if modality := find_modality(name.strip()):
        return modality
    raise InputError(f"{path}: found column {name!r}, expected id, seg or a modality")


def _assemble(files: Iterable[tuple[str, Files]]) -> Found:
    """The cases with these files; one with two of a kind or without an image is a problem."""
    cases, problems = [], []
    for case_id, pairs in files:
        taken: dict[Kind, Path] = {}
        twice = []
        for kind, path in pairs:
            if taken.setdefault(kind, path) is not path:
                message = f"{taken[kind]} and {path} are both {kind}, expected one"
                twice.append(Problem(case_id, message))
        images = {modality: taken[modality] for modality in Modality if modality in taken}
        if not (images or twice):
            expected = ", ".join(Modality)
            twice.append(Problem(case_id, f"{case_id}: found no image, expected any of {expected}"))
        if not twice:
            cases.append(Case(case_id, images, taken.get("seg")))
        problems += twice
    return Found(cases, problems)


def image_path(layout: Layout, case_id: str, kind: Kind, suffix: str = ".nii.gz") -> Path:
    """Where an image or the segmentation of a case belongs, relative to the data set's folder.

    brats `<id>/<id>-t1n.nii.gz`, nnunet `imagesTr/<id>_0000.nii.gz` and `labelsTr/<id>.nii.gz`,
    bids `sub-<id>/anat/sub-<id>_T1w.nii.gz`, brasyn (the challenge's) `<id>-t1n.nii.gz`.
    """
    match layout:
        case "brats":
            return Path(case_id, f"{case_id}-{kind}{suffix}")
        case "nnunet" if kind == "seg":
            return Path("labelsTr", f"{case_id}{suffix}")
        case "nnunet":
            return Path("imagesTr", f"{case_id}_{SEQUENCES.index(kind):04d}{suffix}")
        case "bids":
            entities = _bids_entities(case_id)
            return Path(*entities, "anat", f"{'_'.join(entities)}_{_BIDS_ENDINGS[kind]}{suffix}")
        case "brasyn":
            return Path(f"{case_id}-{kind}{suffix}")


def _bids_entities(case_id: str) -> list[str]:
    """`sub-1_ses-2` is taken apart; of another name the letters and digits make a subject."""
    if re.fullmatch(r"sub-[0-9A-Za-z]+(_ses-[0-9A-Za-z]+)?", case_id):
        return case_id.split("_")
    subject = re.sub("[^0-9A-Za-z]", "", case_id)
    if not subject:
        raise InputError(f"case {case_id}: found no letter or digit, expected some for BIDS")
    return [f"sub-{subject}"]


def describe(layout: Layout, output: Path, cases: int, version: str) -> None:
    """Write the file that says what a data set is, where the layout has one.

    For nnU-Net `dataset.json`, for BIDS `dataset_description.json` of a derivative.
    """
    if layout == "nnunet":
        record = {
            "channel_names": {str(number): each for number, each in enumerate(SEQUENCES)},
            "labels": {"background": 0, "NCR": 1, "ED": 2, "ET": 3},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        _write_json(output / "dataset.json", record)
    elif layout == "bids":
        record = {
            "Name": "Completed with synthetic images",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "cwdm", "Version": version}],
        }
        _write_json(output / "dataset_description.json", record)
        with atomic_write(output / ".bidsignore", overwrite=True) as temporary:
            temporary.write_text("*.csv\n.cwdm/\n")


DESCRIPTIONS: dict[Layout, tuple[str, ...]] = {
    "nnunet": ("dataset.json",),
    "bids": ("dataset_description.json", ".bidsignore"),
}
"""The files that `describe` writes."""


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
