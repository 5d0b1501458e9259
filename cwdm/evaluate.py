"""Hold out each modality of complete cases, have it predicted, and compare, always beside floors.

Rows are tidy: one per case, modality, method and region. What the figures mean is in `PROTOCOL`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from cwdm.floors import CaseFeatures, VoxelRegression, VoxelSample
from cwdm.metrics import Aligned, mae, psnr, ssim_map
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.montage import montage, voxel_size_mm
from cwdm.volume import Volume, brain_mask, read_labels, read_volumes

__all__ = [
    "FILES",
    "PROTOCOL",
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
    "write_tables",
]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]

Predict = Callable[[Case, Modality], Voxels]
"""(a case without the target, the target) -> (X, Y, Z) in canonical orientation."""

PROTOCOL = (
    "Each modality of each case is withheld in turn. In the brain of the truth, the prediction is "
    "brought to the truth by one affine intensity fit (least squares). Data range: 0.5 % to 99.5 % "
    "quantile of the truth in the brain; outside the brain both are 0. PSNR in dB; SSIM: mean over "
    "the region of the 3D SSIM map (Gaussian window, sigma 1.5, 11 voxels); MAE in shares of the "
    "range. Tumor: all labels of the segmentation, with the fit and range of the brain."
)
FILES = ("metrics.csv", "summary.csv", "summary.json", "summary.md")
FIGURES = ["psnr", "ssim", "mae"]
REGIONS = ["brain", "tumor"]
NAMES = {"ridge": "ridge regression", "boosting": "boosted regression"}


@dataclass(frozen=True)
class Score:
    """One prediction of one image in one region."""

    case: str
    modality: str
    method: str
    kind: str
    """"model" for what is judged, "floor" for what it has to beat."""
    region: str
    """"brain", or "tumor" where there is a segmentation."""
    voxels: int
    psnr: float
    ssim: float
    mae: float


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
) -> pd.DataFrame:
    """Withhold each target of each case, predict it, and compare. One row per `Score`.

    Args:
        cases: complete ones, see `complete_cases`.
        predict: the model to judge, called with the case without the target; None for floors alone.
        regressions: fitted floors, see `fit_regressions`. Copies need no fit and are always there.
        name: the model's name in the table.
    """
    comparisons = (
        comparison
        for case in cases
        for comparison in compare(
            case, predict, targets=targets, regressions=regressions, name=name
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
) -> Iterator[Comparison]:
    """As `evaluate`, for one case, one target at a time, so that a caller can show progress.

    Raises:
        InputError: a modality is absent or unreadable, or a prediction lies on another grid.
    """
    volumes = read_volumes(case, SEQUENCES)
    tumor = read_labels(case.segmentation, volumes[targets[0]]) > 0 if case.segmentation else None
    features = CaseFeatures.of(volumes) if regressions else None
    for target in targets:
        truth = volumes[target]
        regions = {"brain": brain_mask(truth)}
        if tumor is not None:
            regions["tumor"] = tumor
        scores = []
        predicted = None
        if predict is not None:
            predicted = predict(case.without(target), target)
            _check(predicted, truth, f"{name}: {target} of case {case.id}")
            scores += _score(predicted, truth, regions, case, target, name, "model")
        for method, floor in _floors(volumes, features, regressions, target):
            scores += _score(floor, truth, regions, case, target, method, "floor")
        yield Comparison(case, target, scores, predicted, volumes, tumor)


def complete_cases(cases: Iterable[Case]) -> list[Case]:
    """Those that have all four modalities; InputError if there is none."""
    complete = [case for case in cases if not case.missing]
    if not complete:
        raise InputError(f"found no case with all of {', '.join(SEQUENCES)}, expected at least one")
    return complete


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
        "region": REGIONS,
        "kind": ["model", "floor"],
    }
    summary = means.reset_index()
    for column, values in order.items():
        summary[column] = pd.Categorical(summary[column], values, ordered=True)
    summary = summary.sort_values(
        ["modality", "region", "kind", "psnr"], ascending=[True, True, True, False]
    ).reset_index(drop=True)
    return summary.astype({column: str for column in order})


def verdicts(summary: pd.DataFrame) -> list[str]:
    """One sentence per modality: does the model beat every floor in the brain, or which not."""
    sentences = []
    brain = summary[summary["region"] == "brain"]
    for modality, rows in brain.groupby("modality", sort=False):
        floors = rows[rows["kind"] == "floor"]
        for _, model in rows[rows["kind"] == "model"].iterrows():
            ahead = {
                figure: [
                    NAMES.get(m, m) for m in floors.loc[floors[figure] >= model[figure], "method"]
                ]
                for figure in ("psnr", "ssim")
            }
            lost = "; ".join(f"{f.upper()}: {', '.join(m)}" for f, m in ahead.items() if m)
            if lost:
                said = f"is not better than every floor ({lost})"
            elif floors["method"].isin(list(NAMES)).any():
                said = "beats every floor"
            else:
                said = "beats every copy of another modality; no regression was fitted"
            sentences.append(f"{modality}: {model['method']} {said}.")
    return sentences


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a table for a model card: a row per method, the best of a column in bold."""
    regions = [region for region in REGIONS if (summary["region"] == region).any()]
    columns = [(region, figure) for region in regions for figure in FIGURES]
    heads = [f"{figure.upper()} {region}" for region, figure in columns]
    table = [["modality", "method", *heads]]
    for modality, rows in summary.groupby("modality", sort=False):
        for method in rows["method"].unique():
            cells = [
                _cell(rows[rows["region"] == region].set_index("method")[figure], method)
                for region, figure in columns
            ]
            table.append([str(modality), NAMES.get(method, method), *cells])
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
    record = {
        "version": __version__,
        "protocol": PROTOCOL,
        "cases": sorted(set(table["case"])),
        **notes,
        "verdicts": judged,
        "summary": rows,
    }
    count = table["case"].nunique()
    tumors = table.loc[table["region"] == "tumor", "case"].nunique()
    counted = f"Mean over {count} case{'s' * (count != 1)}, {tumors} with a segmentation."
    texts = (
        table.to_csv(index=False),
        summary.to_csv(index=False),
        json.dumps(record, indent=2) + "\n",
        f"{markdown(summary)}\n{' '.join([*judged, counted, PROTOCOL])}\n",
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
) -> Iterator[tuple[str, Voxels]]:
    """(name, prediction) of every floor for this target, one at a time."""
    for source in others(target):
        yield f"copy {source}", volumes[source].voxels
    for regression in regressions:
        if regression.target is target and features is not None:
            yield regression.kind, regression(features)


def _cell(column: pd.Series, method: str) -> str:
    """One figure of one method, in bold if no other method has a better one."""
    if method not in column:
        return ""
    best = column.min() if column.name == "mae" else column.max()
    text = f"{column[method]:.2f}" if column.name == "psnr" else f"{column[method]:.3f}"
    return f"**{text}**" if column[method] == best else text


def _check(predicted: Voxels, truth: Volume, what: str) -> None:
    """InputError unless the prediction is a finite image of the truth's shape."""
    if predicted.shape != truth.voxels.shape:
        shapes = f"shape {predicted.shape}, expected {truth.voxels.shape}"
        raise InputError(f"{what}: the prediction has {shapes}")
    if not np.isfinite(predicted).all():
        raise InputError(f"{what}: the prediction holds NaN or infinite voxels")


def _score(
    predicted: Voxels,
    truth: Volume,
    regions: Mapping[str, Mask],
    case: Case,
    target: Modality,
    method: str,
    kind: str,
) -> list[Score]:
    """Scores in every region that lies in the brain, with one fit and one SSIM map for all."""
    aligned = Aligned.of(predicted, truth.voxels, regions["brain"])
    similarity = ssim_map(aligned.prediction, aligned.truth)
    scores = []
    for region, mask in regions.items():
        where = mask[aligned.box] & aligned.brain
        if where.any():
            pair = (aligned.prediction, aligned.truth, where)
            similar = float(similarity[where].mean(dtype=np.float64))
            figures = {"psnr": psnr(*pair), "ssim": similar, "mae": mae(*pair)}
            size = int(where.sum())
            scores.append(Score(case.id, target.value, method, kind, region, size, **figures))
    return scores
