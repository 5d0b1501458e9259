"""Hold out each modality of complete cases, have it predicted, and compare, always beside floors.

Rows are tidy: one per case, modality, method and region. What the figures mean is in `protocols`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from cwdm import __version__
from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.floors import (
    CaseFeatures,
    VoxelRegression,
    VoxelSample,
    blurred,
    constant_brain,
    erased,
    zeros,
)
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.montage import montage, voxel_size_mm
from cwdm.protocols import FIGURES, PROTOCOLS, REGIONS, Protocol
from cwdm.segmentation import Labels, brats_labels
from cwdm.volume import Volume, brain_mask, read_labels, read_volumes

__all__ = [
    "FILES",
    "Comparison",
    "Predict",
    "Predictions",
    "Score",
    "compare",
    "complete_cases",
    "draw_sample",
    "evaluate",
    "fit_regressions",
    "markdown",
    "picture",
    "summarize",
    "tabulate",
    "verdicts",
    "with_segmentations",
    "write_tables",
]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]

Predict = Callable[[Case, Modality], Voxels]
"""(a case without the target, the target) -> (X, Y, Z) in canonical orientation."""

ALIGNED = PROTOCOLS["aligned"]
FILES = ("metrics.csv", "summary.csv", "summary.json", "summary.md")
LOWER_IS_BETTER = {"mae", "mse"}
SHOWN_FIGURES = ("psnr", "ssim", "mae")
SHOWN_REGIONS = ("brain", "WT", "ET")
TUMOR_REGIONS = ("WT", "TC", "ET")
KINDS = ("model", "floor", "spoilt truth")
ERASED = "tumor erased"
BLANK = ("zeros", "constant brain", ERASED)
"""Images that know nothing of a tumor."""
SATURATED = 0.95
"""An SSIM that one of them gets in a tumor leaves no room to tell a good image from it."""
NAMES = {"ridge": "ridge regression", "boosting": "boosted regression"}


@dataclass(frozen=True)
class Score:
    """One prediction of one image in one region."""

    case: str
    modality: str
    method: str
    kind: str
    """"model" for what is judged, "floor" for what it has to beat, "spoilt truth" for the truth
    made worse on purpose, which no method can reach."""
    protocol: str
    """What the figures mean, see `protocols.PROTOCOLS`."""
    region: str
    """One of `protocols.REGIONS`; those of a tumor only where there is a segmentation."""
    voxels: int
    psnr: float
    ssim: float
    mae: float
    ms_ssim: float
    mse: float
    ncc: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """One withheld image: what was predicted, what was acquired, and how near they are."""

    case: Case
    target: Modality
    scores: list[Score]
    predicted: Voxels | None
    """(X, Y, Z) by the model; None where only floors were asked for."""
    volumes: Mapping[Modality, Volume]
    """All acquired images, the truth among them."""
    tumor: Mask | None


def evaluate(
    cases: Iterable[Case],
    predict: Predict | None,
    *,
    targets: Sequence[Modality] = SEQUENCES,
    regressions: Sequence[VoxelRegression] = (),
    name: str = "cwdm",
    protocol: Protocol = ALIGNED,
) -> pd.DataFrame:
    """Withhold each target of each case, predict it, and compare. One row per `Score`.

    Args:
        cases: complete ones, see `complete_cases`.
        predict: the model to judge, called with the case without the target; None for floors alone.
        regressions: fitted floors, see `fit_regressions`. The others need no fit and are always
            there.
        name: the model's name in the table.
        protocol: how predictions are compared with the truth.
    """
    comparisons = (
        comparison
        for case in cases
        for comparison in compare(
            case, predict, targets=targets, regressions=regressions, name=name, protocol=protocol
        )
    )
    return tabulate(score for comparison in comparisons for score in comparison.scores)


def compare(
    case: Case,
    predict: Predict | None,
    *,
    targets: Sequence[Modality] = SEQUENCES,
    regressions: Sequence[VoxelRegression] = (),
    name: str = "cwdm",
    protocol: Protocol = ALIGNED,
) -> Iterator[Comparison]:
    """As `evaluate`, for one case, one target at a time, so that a caller can show progress.

    Raises:
        InputError: a modality is absent or unreadable, a prediction lies on another grid, or the
            segmentation has other labels than those of BraTS.
    """
    volumes = read_volumes(case, SEQUENCES)
    labels: Labels | None = None
    if case.segmentation:
        found = read_labels(case.segmentation, volumes[targets[0]])
        labels = brats_labels(found, case.segmentation)
    tumor = None if labels is None else labels > 0
    features = CaseFeatures.of(volumes) if regressions else None
    for target in targets:
        truth = volumes[target]
        brain = brain_mask(truth)
        predicted = None
        if predict is not None:
            predicted = predict(case.without(target), target)
            _check(predicted, truth, f"{name}: {target} of case {case.id}")
        images = chain(
            [] if predicted is None else [(name, "model", predicted)],
            _floors(volumes, features, regressions, target),
            _spoilt(truth, tumor),
        )
        scores = [
            Score(case.id, target.value, method, kind, protocol.name, region, size, **figures)
            for method, kind, image in images
            for region, size, figures in protocol.figures(image, truth.voxels, brain, labels)
        ]
        yield Comparison(case, target, scores, predicted, volumes, tumor)


def complete_cases(cases: Iterable[Case]) -> list[Case]:
    """Those that have all four modalities; InputError if there is none."""
    complete = [case for case in cases if not case.missing]
    if not complete:
        raise InputError(f"found no case with all of {', '.join(SEQUENCES)}, expected at least one")
    return complete


def with_segmentations(cases: Iterable[Case], root: Path) -> list[Case]:
    """The cases with the segmentations in `<id>-seg.nii.gz` (or `.nii`) anywhere below `root`.

    Raises:
        InputError: not a folder; no segmentation for one of the cases, or two.
    """
    if not root.is_dir():
        raise InputError(f"{root}: not a folder, expected one with segmentations")
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*-seg.nii*")):
        case_id = path.name.removesuffix(".gz").removesuffix("-seg.nii")
        if case_id in files:
            raise InputError(f"{files[case_id]} and {path}: two segmentations of one case")
        files[case_id] = path
    segmented = []
    for case in cases:
        if case.id not in files:
            raise InputError(f"{root}: found no {case.id}-seg.nii.gz, expected one for every case")
        segmented.append(replace(case, segmentation=files[case.id]))
    return segmented


def draw_sample(cases: Iterable[Case], *, seed: int = 0) -> VoxelSample:
    """Read complete cases one by one and draw the voxels that regressions are fitted on."""
    return VoxelSample.of(
        (CaseFeatures.of(read_volumes(case, SEQUENCES)) for case in cases), seed=seed
    )


def fit_regressions(
    sample: VoxelSample, targets: Sequence[Modality] = SEQUENCES, *, seed: int = 0
) -> list[VoxelRegression]:
    """Ridge and gradient-boosted regressions for each target."""
    return [
        VoxelRegression.fit(sample, target, kind, seed=seed)
        for target in targets
        for kind in ("ridge", "boosting")
    ]


@dataclass(frozen=True)
class Predictions:
    """Predicted images in a folder; called like a model (`Predict`)."""

    paths: Mapping[tuple[str, Modality], Path]

    @classmethod
    def find(cls, root: Path, cases: Iterable[Case]) -> Self:
        """Find `<id>-<modality>.nii.gz` (or `.nii`) of these cases anywhere below `root`.

        Raises:
            InputError: none found; two files for one image; or a file that is the truth itself.
        """
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root}: not a folder, expected one with predictions")
        images = {
            (case.id, modality): truth for case in cases for modality, truth in case.images.items()
        }
        keys = {
            f"{case_id}-{modality}{suffix}": (case_id, modality)
            for case_id, modality in images
            for suffix in (".nii.gz", ".nii")
        }
        paths: dict[tuple[str, Modality], Path] = {}
        for path in sorted(root.rglob("*.nii*")):
            key = keys.get(path.name)
            if key is None:
                continue
            if path.samefile(images[key]):
                raise InputError(f"{path}: is the truth itself, expected a folder of predictions")
            if key in paths:
                raise InputError(f"{paths[key]} and {path}: two predictions of one image")
            paths[key] = path
        if not paths:
            raise InputError(f"{root}: found no prediction, expected names like {next(iter(keys))}")
        return cls(paths)

    @property
    def targets(self) -> tuple[Modality, ...]:
        """The modalities that some prediction is there for."""
        return tuple(m for m in SEQUENCES if any(target is m for _, target in self.paths))

    def require(self, cases: Iterable[Case], targets: Sequence[Modality]) -> None:
        """InputError unless every target of every case was predicted: no choosing the easy ones."""
        wanted = [(case.id, target) for case in cases for target in targets]
        absent = [key for key in wanted if key not in self.paths]
        if absent:
            raise InputError(
                f"{len(absent)} of {len(wanted)} predictions are missing, "
                f"such as {absent[0][0]}-{absent[0][1]}.nii.gz, expected all"
            )

    def __call__(self, case: Case, target: Modality) -> Voxels:
        """Read one; InputError if it lies on another grid than the case. KeyError if not there."""
        filled = replace(case, images={**case.images, target: self.paths[case.id, target]})
        return read_volumes(filled, [next(iter(case.images)), target])[target].voxels


def tabulate(scores: Iterable[Score]) -> pd.DataFrame:
    """One row per score; the columns are its fields."""
    return pd.DataFrame([asdict(score) for score in scores], columns=list(Score.__annotations__))


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Means over cases, a row per modality, region and method: the model first, then the best."""
    keys = ["modality", "region", "kind", "method"]
    means = table.groupby(keys, sort=False).agg(
        cases=("case", "nunique"), **{figure: (figure, "mean") for figure in FIGURES}
    )
    order = {
        "modality": [m.value for m in SEQUENCES],
        "region": list(REGIONS),
        "kind": list(KINDS),
    }
    summary = means.reset_index()
    for column, values in order.items():
        summary[column] = pd.Categorical(summary[column], values, ordered=True)
    summary = summary.sort_values(
        ["modality", "region", "kind", "psnr"], ascending=[True, True, True, False]
    ).reset_index(drop=True)
    return summary.astype({column: str for column in order})


def verdicts(summary: pd.DataFrame) -> list[str]:
    """One line per modality: is the model better than every floor, and which figures say nothing.

    Looked at are PSNR, SSIM and MAE in the brain and in the tumor. In the tumor the truth with its
    tumor erased has to be beaten, too.
    """
    lines = []
    for modality, rows in summary.groupby("modality", sort=False):
        for model in rows.loc[rows["kind"] == "model", "method"].unique():
            lost = [
                f"{region} {figure.upper()}: {NAMES.get(ahead, ahead)}"
                for region in SHOWN_REGIONS
                for figure in SHOWN_FIGURES
                if (ahead := _ahead(rows[rows["region"] == region], figure, model))
            ]
            fitted = rows["method"].isin(list(NAMES)).any()
            if lost:
                said = f"is not better than every floor ({'; '.join(lost)})"
            elif fitted:
                said = "beats every floor"
            else:
                said = "beats every floor, but no regression was fitted"
            lines.append(" ".join([f"{modality}: {model} {said}.", *_blind(rows)]))
    return lines


def _ahead(rows: pd.DataFrame, figure: str, model: str) -> str | None:
    """The best method that the model does not beat in this figure; all rows are of one region."""
    values = rows.set_index("method")[figure]
    region = rows["region"].iloc[0] if len(rows) else None
    opponents = (rows["kind"] == "floor") | ((rows["method"] == ERASED) & (region in TUMOR_REGIONS))
    against = values[opponents.to_numpy()]
    if model not in values or against.empty:
        return None
    lower = figure in LOWER_IS_BETTER
    best = str(against.idxmin() if lower else against.idxmax())
    beaten = values[model] < against[best] if lower else values[model] > against[best]
    return None if beaten else best


def _blind(rows: pd.DataFrame) -> Iterator[str]:
    """What SSIM in a tumor gives images that know nothing of it, where that is nearly all."""
    for region in TUMOR_REGIONS:
        values = rows[rows["region"] == region].set_index("method")["ssim"]
        high = [
            f"{method} {values[method]:.3f}"
            for method in BLANK
            if method in values and values[method] > SATURATED
        ]
        if high:
            yield f"{region} SSIM says nothing: {', '.join(high)}."


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a table for a model card: a row per method, the best of a column in bold.

    Spoilt truths are never bold: no method can reach them.
    """
    regions = [region for region in SHOWN_REGIONS if (summary["region"] == region).any()]
    columns = [(region, figure) for region in regions for figure in SHOWN_FIGURES]
    heads = [f"{figure.upper()} {region}" for region, figure in columns]
    table = [["modality", "method", *heads]]
    for modality, rows in summary.groupby("modality", sort=False):
        for kind, method in rows[["kind", "method"]].drop_duplicates().itertuples(index=False):
            cells = [
                _cell(rows[rows["region"] == region].set_index("method"), figure, method)
                for region, figure in columns
            ]
            shown = (
                f"spoilt truth: {method}" if kind == "spoilt truth" else NAMES.get(method, method)
            )
            table.append([str(modality), shown, *cells])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def picture(comparison: Comparison) -> Image.Image:
    """The montage of a comparison that has a prediction, with the best floor named below."""
    if comparison.predicted is None:
        raise ValueError("a comparison of floors alone has no picture")
    truth = comparison.volumes[comparison.target]
    floors = [s for s in comparison.scores if s.kind == "floor" and s.region == "brain"]
    best = max(floors, key=lambda score: score.psnr)
    return montage(
        {m: comparison.volumes[m].voxels for m in others(comparison.target)},
        comparison.predicted,
        comparison.target,
        brain=brain_mask(truth),
        spacing_mm=voxel_size_mm(truth.affine),
        truth=truth.voxels,
        tumor=comparison.tumor,
        case_id=comparison.case.id,
        notes=[
            f"Best of {len(floors)} trivial predictions: {NAMES.get(best.method, best.method)}, "
            f"PSNR {best.psnr:.2f} dB, SSIM {best.ssim:.3f}."
        ],
    )


def write_tables(
    table: pd.DataFrame, folder: Path, *, notes: Mapping[str, object], overwrite: bool = False
) -> list[Path]:
    """Write `FILES`; InputError as `atomic_write`.

    Args:
        table: of one protocol.
        notes: what else belongs into the JSON, such as the model and what floors were fitted on.
    """
    summary = summarize(table)
    rows = [
        {
            key: None if isinstance(v, float) and not math.isfinite(v) else v
            for key, v in row.items()
        }
        for row in summary.to_dict("records")
    ]
    judged = verdicts(summary)
    (name,) = table["protocol"].unique()
    protocol = PROTOCOLS[name]
    record = {
        "version": __version__,
        "protocol": {"name": name, "range": protocol.scaling, "mask": protocol.masking},
        "figures": FIGURES,
        "regions": {region: REGIONS[region] for region in summary["region"].unique()},
        "cases": sorted(set(table["case"])),
        **notes,
        "verdicts": judged,
        "summary": rows,
    }
    count = table["case"].nunique()
    tumors = table.loc[table["region"].isin(TUMOR_REGIONS), "case"].nunique()
    counted = f"Mean over {count} case{'s' * (count != 1)}, {tumors} with a tumor."
    texts = (
        table.to_csv(index=False),
        summary.to_csv(index=False),
        json.dumps(record, indent=2) + "\n",
        "\n".join(
            [protocol.text, "", markdown(summary), *(f"- {line}" for line in judged), "", counted]
        )
        + "\n",
    )
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, texts, strict=True):
        with atomic_write(path, overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def _floors(
    volumes: Mapping[Modality, Volume],
    features: CaseFeatures | None,
    regressions: Sequence[VoxelRegression],
    target: Modality,
) -> Iterator[tuple[str, str, Voxels]]:
    """(name, "floor", prediction) of every floor for this target, one at a time."""
    yield "zeros", "floor", zeros(volumes[target])
    yield "constant brain", "floor", constant_brain(volumes, target)
    for source in others(target):
        yield f"copy {source}", "floor", volumes[source].voxels
    for regression in regressions:
        if regression.target is target and features is not None:
            yield regression.kind, "floor", regression(features)


def _spoilt(truth: Volume, tumor: Mask | None) -> Iterator[tuple[str, str, Voxels]]:
    """(name, "spoilt truth", image), one at a time."""
    if tumor is not None and tumor.any():
        yield ERASED, "spoilt truth", erased(truth, tumor)
    yield "blurred", "spoilt truth", blurred(truth)


def _cell(rows: pd.DataFrame, figure: str, method: str) -> str:
    """One figure of one method, in bold if no other method has a better one."""
    if method not in rows.index:
        return ""
    value = float(rows[figure][method])
    reachable = rows.loc[rows["kind"] != "spoilt truth", figure]
    best = reachable.min() if figure in LOWER_IS_BETTER else reachable.max()
    text = f"{value:.2f}" if figure == "psnr" else f"{value:.3f}"
    return f"**{text}**" if method in reachable and value == best else text


def _check(predicted: Voxels, truth: Volume, what: str) -> None:
    """InputError unless the prediction is a finite image of the truth's shape."""
    if predicted.shape != truth.voxels.shape:
        shapes = f"shape {predicted.shape}, expected {truth.voxels.shape}"
        raise InputError(f"{what}: the prediction has {shapes}")
    if not np.isfinite(predicted).all():
        raise InputError(f"{what}: the prediction holds NaN or infinite voxels")
