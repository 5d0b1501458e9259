"""A case: the images of one visit of one subject in a folder. File names only, no voxels.

Names are `<id>-<modality>.nii.gz` (BraTS 2023 on) or `<id>_<modality>.nii[.gz]` (BraTS 2018-2021),
with the modality under any of its aliases, in upper or lower case.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from cwdm.errors import InputError
from cwdm.modality import SEQUENCES, Modality, find_modality

Kind = Modality | Literal["seg"]

_log = logging.getLogger(__name__)

_NIFTI = re.compile(r"(?P<stem>.+)\.nii(\.gz)?", re.IGNORECASE)
_EXPECTED = "expected names like <id>-t1n.nii.gz, <id>-t1c.nii.gz, <id>-t2w.nii.gz, <id>-t2f.nii.gz"


@dataclass(frozen=True)
class Case:
    """One visit of one subject on disk: some of the four modalities, perhaps a segmentation."""

    id: str
    """What the file names share, such as `BraTS-GLI-00000-000`."""
    images: Mapping[Modality, Path]
    """The image files there are, in the order of `Modality`."""
    segmentation: Path | None = None
    numbers: Mapping[int, int] | None = None
    """Labels of the segmentation -> those of BraTS, where its data set numbers them otherwise; none
    at all where it has other labels."""

    @property
    def missing(self) -> tuple[Modality, ...]:
        """The MRI sequences there is no file for."""
        return tuple(modality for modality in SEQUENCES if modality not in self.images)

    def without(self, *modalities: Modality) -> "Case":
        """The same case, as if these modalities had not been acquired."""
        kept = {key: path for key, path in self.images.items() if key not in modalities}
        return replace(self, images=kept)


def read_case(folder: Path) -> Case:
    """The case in `folder`; files that are not named like an image of a case are ignored.

    The id is what the file names share; files without one (`t1.nii.gz`) take the folder's name.

    Raises:
        InputError: not a readable folder, nothing recognized, two files for one modality, or files
            of two cases.
    """
    folder = Path(folder)
    names = nifti_names(folder)
    found: dict[Kind, Path] = {}
    first: dict[str, str] = {}  # the first image of each id
    parsed = [(name, *_parse(name)) for name in names]
    for name, case_id, kind in parsed:
        if isinstance(kind, Modality):
            first.setdefault(case_id, name)
    if not first:
        listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise InputError(f"{folder}: found {listed or 'no NIfTI files'}, {_EXPECTED}")
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise InputError(
            f"{folder}: {one} and {other} belong to different cases, expected one case per folder"
        )
    for name, case_id, kind in parsed:
        if kind is None or case_id not in first:
            continue
        if kind in found:
            raise InputError(
                f"{folder}: {found[kind].name} and {name} are both {kind}, expected one"
            )
        found[kind] = folder / name
    (case_id,) = first
    return Case(
        id=case_id or folder.resolve().name,
        images={modality: found[modality] for modality in Modality if modality in found},
        segmentation=found.get("seg"),
    )


def find_cases(root: Path) -> list[Case]:
    """All cases at or below `root`, sorted by id. Folders that hold other images are skipped.

    Raises:
        InputError: no case at all, two with the same id, or one that `read_case` refuses.
    """
    cases: dict[str, Case] = {}
    folders: dict[str, Path] = {}
    for folder, names in walk(root):
        if not is_case(names):
            if names:
                _log.warning("%s: skipped, no file is named <id>-<modality>.nii.gz", folder)
            continue
        case = read_case(folder)
        if case.id in cases:
            raise InputError(f"{folders[case.id]} and {folder} both hold a case {case.id}")
        cases[case.id], folders[case.id] = case, folder
    if not cases:
        raise InputError(f"{root}: no case in it or below, {_EXPECTED}")
    return [cases[case_id] for case_id in sorted(cases)]


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folders at or below `root`, none below a case, with the names of their NIfTI files.

    Raises:
        InputError: a folder that cannot be read.
    """
    seen: set[Path] = set()
    for walked, subfolders, _ in os.walk(root, onerror=_refuse, followlinks=True):
        folder = Path(walked)
        subfolders[:] = sorted(each for each in subfolders if not each.startswith("."))
        if folder.resolve() in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(folder.resolve())
        names = nifti_names(folder)
        if is_case(names):
            subfolders.clear()
        yield folder, names


def is_case(names: Iterable[str]) -> bool:
    """Whether a file with one of these names is an image of a case."""
    return any(isinstance(_parse(name)[1], Modality) for name in names)


def nifti_names(folder: Path) -> list[str]:
    """Sorted names of the NIfTI files in `folder`, hidden ones left out.

    Raises:
        InputError: it cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        _refuse(error)
    return [
        entry.name
        for entry in entries
        if _NIFTI.fullmatch(entry.name) and not entry.name.startswith(".") and not entry.is_dir()
    ]


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: {error.strerror}, expected a readable folder") from error


def _parse(name: str) -> tuple[str, Kind | None]:
    """Id and kind (a modality, "seg" or None) of a file name; `x_t2_flair.nii` is FLAIR of x."""
    match = _NIFTI.fullmatch(name)
    parts = re.split(r"([-_])", match["stem"]) if match else []
    for start in (-5, -3, -1):  # the longest ending that means something
        ending = "".join(parts[start:])
        if kind := find_modality(ending):
            return "".join(parts[: start - 1]), kind
    if parts and parts[-1].lower() in ("seg", "segmentation"):
        return "".join(parts[:-2]), "seg"
    return "", None
