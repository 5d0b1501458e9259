"""Tumor labels, what a segmenter asks for, and what every segmenter is.

Labels are those of BraTS 2023: 1 necrosis and other core, 2 edema, 3 enhancing tumor. BraTS 2018 to
2020 call the last one 4.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwdm.case import Case
from cwdm.config import Orientation
from cwdm.errors import InputError
from cwdm.files import sha256
from cwdm.modality import Modality
from cwdm.volume import Volume, read_labels

__all__ = [
    "Descriptor",
    "Labels",
    "Region",
    "Segmenter",
    "brats_labels",
    "brats_numbers",
    "case_labels",
    "check_complete",
    "dice",
    "digest",
    "find_label",
    "find_region",
    "from_regions",
    "regions",
]

Labels = NDArray[np.uint8]
"""(X, Y, Z) in canonical orientation: 0, 1, 2 or 3."""

NCR, ED, ET = 1, 2, 3


class Region(StrEnum):
    """What BraTS scores: nested, the whole tumor first."""

    WT = "WT"  # whole tumor: everything
    TC = "TC"  # tumor core: all but edema
    ET = "ET"  # enhancing tumor


def regions(labels: NDArray[np.integer]) -> dict[Region, NDArray[np.bool_]]:
    """The masks (X, Y, Z) of the three regions."""
    return {
        Region.WT: labels > 0,
        Region.TC: (labels == NCR) | (labels == ET),
        Region.ET: labels == ET,
    }


def from_regions(masks: Mapping[Region, NDArray[np.bool_]]) -> Labels:
    """Labels from masks (X, Y, Z). What lies in an inner region lies in the outer ones, too."""
    labels = np.where(masks[Region.WT], ED, 0).astype(np.uint8)
    labels[masks[Region.TC]] = NCR
    labels[masks[Region.ET]] = ET
    return labels


def brats_labels(values: NDArray[np.integer], where: object) -> Labels:
    """Labels of either convention as 0 to 3.

    Args:
        where: file to name in an error.

    Raises:
        InputError: other values, or both 3 and 4.
    """
    found = np.unique(values)
    if not set(found) <= {0, 1, 2, 3, 4} or {3, 4} <= set(found):
        listed = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise InputError(f"{where}: found labels {listed}, expected 0, 1, 2 and either 3 or 4")
    return np.where(values == 4, ET, values).astype(np.uint8)


def case_labels(case: Case, like: Volume) -> Labels:
    """What the case's own segmentation says, on the grid of `like`, one of its images.

    Raises:
        InputError: it cannot be read, lies on another grid or has other labels than BraTS.
        ValueError: the case has none.
    """
    path = case.segmentation
    if path is None:
        raise ValueError(f"case {case.id} has no segmentation")
    values = read_labels(path, like)
    if case.numbers is not None:
        found = np.unique(values)
        if not {*found.tolist()} <= {*case.numbers}:
            raise InputError(
                f"{path}: found labels {', '.join(map(str, found[:8]))}, expected those of BraTS, "
                "and all of them named in dataset.json"
            )
        values = np.array([case.numbers[n] for n in found.tolist()])[np.searchsorted(found, values)]
    return brats_labels(values, path)


_REGION_NAMES = {
    Region.WT: {"wt", "whole", "wholetumor"},
    Region.TC: {"tc", "core", "tumorcore"},
    Region.ET: {"et", "enhancing", "enhancingtumor", "enhancingcore"},
}
_LABEL_NAMES = {
    0: {"background", "bg"},
    NCR: {
        *("ncr", "net", "netc", "ncrnet", "necrosis", "necrotic", "necroticcore", "nonenhancing"),
        *("necrotictumorcore", "nonenhancingtumor", "nonenhancingtumorcore", "nonenhancingcore"),
    },
    ED: {
        *("ed", "edema", "oedema", "peritumoraledema", "peritumoraloedema", "snfh"),
        "surroundingnonenhancingflairhyperintensity",
    },
    ET: _REGION_NAMES[Region.ET],
}


def find_region(name: str) -> Region | None:
    """The region that `name` stands for (`Tumor core`, `whole_tumour`, `ET`), or None."""
    return next((key for key, names in _REGION_NAMES.items() if _plain(name) in names), None)


def find_label(name: str) -> int | None:
    """The label that `name` stands for (`background`, `NCR`, `edema`), or None."""
    return next((key for key, names in _LABEL_NAMES.items() if _plain(name) in names), None)


def brats_numbers(labels: Any, where: Path) -> dict[int, int]:
    """nnU-Net's number of a label -> BraTS's. Theirs differ: their BraTS data sets have edema at 1.

    Args:
        labels: names either labels (`"edema": 2`; before v2 `"2": "edema"`) or regions
            (`"whole tumor": [1, 2, 3]`).
        where: file to name in an error.

    Raises:
        InputError: other labels than those of BraTS.
    """
    refusal = InputError(
        f"{where}: labels are {json.dumps(labels)}, expected background, and either whole tumor, "
        "tumor core and enhancing tumor as lists or necrosis, edema and enhancing tumor"
    )
    try:
        if labels and all(str(key).isdecimal() for key in labels):
            labels = {name: int(number) for number, name in labels.items()}
        given = {name: {int(n) for n in np.ravel(value)} for name, value in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise refusal from error
    given.pop("ignore", None)
    if given.pop("background", None) != {0}:
        raise refusal
    members = {find_region(name): numbers for name, numbers in given.items()}
    if len(given) == 3 and {*members} == {*Region}:
        whole, core, enhancing = (members[region] for region in Region)
        if enhancing < core < whole:
            return {0: 0} | {n: ET if n in enhancing else NCR if n in core else ED for n in whole}
    found = {n: find_label(name) for name, numbers in given.items() for n in numbers}
    if len(given) == len(found) == 3 and {*found.values()} == {NCR, ED, ET}:
        return {0: 0} | {n: label for n, label in found.items() if label is not None}
    raise refusal


def _plain(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower()).replace("tumour", "tumor")


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of one file, or of the sorted digests of several, wherever they lie.

    Raises:
        InputError: a file cannot be read.
    """
    found = sorted(sha256(path) for path in paths)
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|); 1 if both are empty, as in the challenge."""
    total = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero(one & other) / total if total else 1.0


class Descriptor(BaseModel):
    """What a network without a description of its own takes and puts out, from a JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: tuple[Modality, ...] = Field(min_length=1)
    """Order of the input channels."""
    orientation: Orientation = "RAS"
    """In which the network sees an image: where its axes run to."""
    spacing_mm: float | None = Field(default=None, gt=0)
    """Voxel size it was trained with; none takes images as they are."""
    normalization: Literal["nonzero-zscore", "zscore", "none"] = "nonzero-zscore"
    """Of each image: mean 0 and deviation 1 over the voxels that are not 0, or over all."""
    patch: tuple[int, int, int] | None = None
    """Voxels it sees at a time, in a sliding window; none shows it the whole image."""
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Of neighboring windows, which are blended with Gaussian weights."""
    multiple: int = Field(default=1, ge=1)
    """Without a patch: sides are padded with zeros to multiples of this."""
    labels: tuple[int, ...] | None = None
    """For outputs of which the largest counts: the label of each channel, 3 or 4 for ET."""
    regions: tuple[Region, ...] | None = None
    """For outputs that are independent (sigmoid): the region of each channel."""
    activation: Literal["none", "sigmoid"] = "sigmoid"
    """Of outputs for regions: whether they still are logits."""

    @model_validator(mode="after")
    def _one_kind_of_output(self) -> Self:
        if (self.labels is None) == (self.regions is None):
            raise ValueError("expected either labels or regions")
        if self.labels is not None and not {*self.labels} <= {0, 1, 2, 3, 4}:
            raise ValueError("labels go from 0 to 4")
        if self.regions is not None and {*self.regions} != {*Region}:
            raise ValueError("expected the regions WT, TC and ET in the order of the channels")
        return self

    @classmethod
    def parse(cls, text: str | bytes, where: object) -> Self:
        """From JSON; InputError names the file, the key and what is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "descriptor"
            raise InputError(f"{where}: {key}: {first['msg']}") from error


class Segmenter(Protocol):
    """Something that segments a case. It is not told which images are synthetic."""

    spec: str
    """How the user named it, such as `onnx:model.onnx`."""
    sha256: str
    """Of the files it consists of; for a program, of the words of its command."""
    channels: tuple[Modality, ...]
    """What it looks at."""
    partial: bool
    """Whether it copes without some of them."""

    def __call__(self, case: Case, progress: Callable[[int, int], None] | None = None) -> Labels:
        """The labels of a case on its own grid.

        Raises:
            InputError: an image cannot be read, or what came back is no segmentation of the case.
        """


class _Needs(Protocol):
    """What tells whether a case is enough."""

    @property
    def spec(self) -> str: ...

    @property
    def channels(self) -> tuple[Modality, ...]: ...

    @property
    def partial(self) -> bool: ...


def check_complete(segmenter: _Needs, case: Case) -> None:
    """InputError if the case lacks what the segmenter cannot do without."""
    absent = [modality for modality in segmenter.channels if modality not in case.images]
    if absent and (not segmenter.partial or len(absent) == len(segmenter.channels)):
        raise InputError(
            f"case {case.id}: has no {', '.join(absent)}, which {segmenter.spec} needs "
            "(--impute-missing synthesizes it)"
        )
