"""How well segmentations agree with the truth: Dice, HD95 and NSD, with the rules of BraTS.

Rows are tidy: one per case, method and region. What the figures mean is in `PROTOCOL`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from numpy.typing import NDArray

from cwdm import __version__
from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.files import atomic_write, sha256
from cwdm.segmentation import ED, NCR, Labels, brats_labels, case_labels, dice, regions
from cwdm.significance import METHODS, interval, paired
from cwdm.volume import read_labels, read_volume

__all__ = [
    "FIGURES",
    "FILES",
    "PENALTY_MM",
    "PROTOCOL",
    "TOLERANCE_MM",
    "Row",
    "compare",
    "compare_case",
    "differences",
    "find_segmentations",
    "read_pair",
    "region_masks",
    "summarize",
    "tabulate",
    "write_tables",
]

PENALTY_MM = 374.0
"""HD95 where only one of two is empty: the challenge's, the diagonal of 240 x 240 x 155 mm."""
TOLERANCE_MM = 1.0
"""How far surfaces may be apart to agree, in NSD."""

FILES = ("overlap.csv", "summary.csv", "summary.json")
FIGURES = ["dice", "hd95_mm", "nsd"]
PROTOCOL = (
    "WT: all labels; TC: 1 and 3; ET: 3; NCR: 1; ED: 2. HD95: the larger of the two 95 % quantiles "
    "of the distances from one surface to the other, in mm; a surface is the voxels of a mask that "
    f"have a neighbor outside. NSD: share of both surfaces within {TOLERANCE_MM:g} mm of the "
    "other. Both empty: Dice 1, HD95 0 mm, NSD 1. One empty: Dice 0, "
    f"HD95 {PENALTY_MM:g} mm (the challenge's penalty), NSD 0. {METHODS}"
)


@dataclass(frozen=True)
class Row:
    """One region of one segmentation."""

    case: str
    method: str
    region: str
    """WT, TC, ET (which is label 3), NCR (label 1) or ED (label 2)."""
    dice: float
    hd95_mm: float
    nsd: float
    truth_ml: float
    found_ml: float


def compare(
    found: Labels,
    truth: Labels,
    spacing_mm: Sequence[float],
    *,
    case: str = "",
    method: str = "",
) -> list[Row]:
    """Figures of every region of labels (X, Y, Z) against the truth on the same grid.

    Args:
        spacing_mm: of the voxels along X, Y and Z.
        case: what stands in the rows; so does `method`.

    Raises:
        ValueError: they have different shapes.
    """
    if found.shape != truth.shape:
        raise ValueError(f"labels of shapes {found.shape} and {truth.shape}, expected one grid")
    ml = math.prod(spacing_mm) / 1000
    pair = region_masks(found), region_masks(truth)
    return [
        Row(
            case,
            method,
            region,
            float(dice(one, other)),
            *_surfaces(one, other, spacing_mm),
            truth_ml=float(other.sum() * ml),
            found_ml=float(one.sum() * ml),
        )
        for (region, one), other in zip(pair[0].items(), pair[1].values(), strict=True)
    ]


def compare_case(case: Case, found: Path, *, method: str = "") -> list[Row]:
    """`compare` for a segmentation in a file and that of the case.

    Raises:
        InputError: a file cannot be read or holds other labels, or there are two grids.
    """
    other, truth, spacing_mm = read_pair(case, found)
    return compare(other, truth, spacing_mm, case=case.id, method=method)


def read_pair(case: Case, found: Path) -> tuple[Labels, Labels, list[float]]:
    """Labels (X, Y, Z) in a file, those of the case, and voxel size in mm along X, Y, Z.

    Raises:
        InputError: a file cannot be read or holds other labels, or there are two grids.
        ValueError: the case has no segmentation.
    """
    like = read_volume(next(iter(case.images.values())))
    truth, other = case_labels(case, like), brats_labels(read_labels(found, like), found)
    return other, truth, np.linalg.norm(like.affine[:3, :3], axis=0).tolist()


def region_masks(labels: Labels) -> dict[str, NDArray[np.bool_]]:
    """Every mask that is compared, by name: the nested regions and single labels, (X, Y, Z)."""
    nested = {str(region): mask for region, mask in regions(labels).items()}
    return {**nested, "NCR": labels == NCR, "ED": labels == ED}


def _surfaces(
    one: NDArray[np.bool_], other: NDArray[np.bool_], spacing_mm: Sequence[float]
) -> tuple[float, float]:
    """(HD95 in mm, NSD) of two masks (X, Y, Z)."""
    if not (one.any() and other.any()):
        return (0.0, 1.0) if one.any() == other.any() else (PENALTY_MM, 0.0)
    pair = torch.from_numpy(one)[None, None], torch.from_numpy(other)[None, None]
    hd95 = compute_hausdorff_distance(
        *pair, include_background=True, percentile=95, spacing=spacing_mm
    )
    nsd = compute_surface_dice(
        *pair, class_thresholds=[TOLERANCE_MM], include_background=True, spacing=spacing_mm
    )
    return float(hd95), float(nsd)


def find_segmentations(root: Path, cases: Iterable[Case]) -> dict[str, Path]:
    """`<id>-seg.nii.gz` (or `.nii`) of every one of these cases in `root`, or else below it.

    Raises:
        InputError: not a folder; a case without one, so that none can be left out; two for one
            case; or a copy of the truth.
    """
    if not root.is_dir():
        raise InputError(f"{root}: not a folder, expected one with segmentations")
    truths = {case.id: case.segmentation for case in cases}
    names = {f"{name}-seg{suffix}": name for name, suffix in product(truths, (".nii.gz", ".nii"))}
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*-seg.nii*")):
        if name := names.get(path.name):
            found.setdefault(name, []).append(path)
    absent = [name for name in truths if name not in found]
    if absent:
        raise InputError(
            f"{root}: {len(absent)} of {len(truths)} segmentations are missing, "
            f"such as {absent[0]}-seg.nii.gz, expected all"
        )
    paths: dict[str, Path] = {}
    for name, below in found.items():
        # `cwdm segment --impute-missing` leaves copies of the truth in a folder below
        path, *others = [each for each in below if each.parent == root] or below
        if others:
            raise InputError(f"{path} and {others[0]}: two segmentations of one case")
        truth = truths[name]
        if truth and sha256(path) == sha256(truth):
            raise InputError(f"{path}: is the truth itself, expected a prediction")
        paths[name] = path
    return paths


def tabulate(rows: Iterable[Row]) -> pd.DataFrame:
    """One row per `Row`; the columns are its fields."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(Row.__annotations__))


def summarize(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Means over cases: a row per method, region and figure, with the interval of the mean.

    Columns: method, region, figure, cases, mean, low, high.
    """
    return pd.DataFrame(
        [
            {
                "method": method,
                "region": region,
                "figure": figure,
                "cases": len(rows),
                "mean": rows[figure].mean(),
                **dict(zip(("low", "high"), interval(rows[figure], seed), strict=True)),
            }
            for (method, region), rows in table.groupby(["method", "region"], sort=False)
            for figure in FIGURES
        ]
    )


def differences(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Every other method against the first one, see `significance.paired`."""
    return paired(table, FIGURES, ["region"], table["method"].iloc[0], seed)


def write_tables(
    table: pd.DataFrame,
    folder: Path,
    *,
    notes: Mapping[str, object],
    seed: int = 0,
    overwrite: bool = False,
) -> list[Path]:
    """Write `FILES`; InputError as `atomic_write`.

    Args:
        notes: what else belongs into the JSON.
    """
    summary = summarize(table, seed=seed)
    record = {
        "version": __version__,
        "protocol": PROTOCOL,
        "cases": sorted(set(table["case"])),
        "seed": seed,
        **notes,
        "summary": summary.to_dict("records"),
        "tests": differences(table, seed=seed).to_dict("records"),
    }
    texts = (
        table.to_csv(index=False),
        summary.to_csv(index=False),
        json.dumps(record, indent=2) + "\n",
    )
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, texts, strict=True):
        with atomic_write(path, overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths
