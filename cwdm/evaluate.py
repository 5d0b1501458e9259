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
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from cwdm import __version__
from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.files import atomic_write, sha256
from cwdm.floors import (
    CaseFeatures,
    VoxelRegression,
    VoxelSample,
    blurred,
    constant_brain,
    erased,
    zeros,
)
from cwdm.metrics import Aligned, psnr
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.montage import montage, voxel_size_mm
from cwdm.protocols import FIGURES, PERCEPTUAL, PROTOCOLS, REGIONS, Distances, Protocol
from cwdm.provenance import read_interval
from cwdm.segmentation import Labels, brats_labels
from cwdm.significance import METHODS, intervals, paired
from cwdm.uncertainty import Uncertainty, agreement, in_units_of
from cwdm.volume import Volume, acquired, brain_mask, read_labels, read_map, read_volumes

if TYPE_CHECKING:
    from cwdm.synthesis import Synthesis  # loads torch, which no comparison needs

__all__ = [
    "FILES",
    "Comparison",
    "Predict",
    "Prediction",
    "Predictions",
    "Reliability",
    "Score",
    "compare",
    "complete_cases",
    "contests",
    "differences",
    "draw_sample",
    "evaluate",
    "fit_regressions",
    "images",
    "markdown",
    "picture",
    "reliability",
    "summarize",
    "tabulate",
    "trust",
    "verdicts",
    "with_segmentations",
    "write_tables",
]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A predicted image."""

    voxels: Voxels
    """(X, Y, Z) in canonical orientation."""
    uncertainty: Uncertainty | None = None
    """Of several samples."""
    calibrated: bool = False
    """Whether the interval is."""

    @classmethod
    def of(cls, synthesis: Synthesis) -> Self:
        """What was synthesized."""
        interval = synthesis.provenance.interval
        calibrated = interval is not None and interval.calibrated
        return cls(synthesis.volume.voxels, synthesis.uncertainty, calibrated)


Predict = Callable[[Case, Modality], Prediction]
"""(a case without the target, the target) -> its prediction."""

ALIGNED = PROTOCOLS["aligned"]
FILES = ("metrics.csv", "summary.csv", "tests.csv", "summary.json", "summary.md")
RELIABILITY_FILE = "uncertainty.csv"
LOWER_IS_BETTER = {"mae", "mse", "perceptual"}
SHOWN_FIGURES = ("psnr", "ssim", "mae")
SHOWN_REGIONS = ("brain", "WT", "ET")
TUMOR_REGIONS = ("WT", "TC", "ET")
KINDS = ("model", "floor", "spoilt truth")
ERASED = "tumor erased"
BLANK = ("zeros", "constant brain", ERASED)
"""Images that know nothing of a tumor."""
NAMES = {"ridge": "ridge regression", "boosting": "boosted regression"}
RESERVED = {*BLANK, "blurred", *NAMES, *(f"copy {modality}" for modality in SEQUENCES)}
"""Names in the tables that no method can have."""
TOO_GOOD_DB = 60.0
"""A prediction nearer to the truth than this in the brain is the truth, in other units."""
SATURATED = 0.95
"""An SSIM that one of them gets in a tumor leaves no room to tell a good image from it."""


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
    perceptual: float | None = None
    """Only with a network, and not of floors."""


@dataclass(frozen=True)
class Reliability:
    """What the interval and the deviation of a prediction of several samples are worth there."""

    case: str
    modality: str
    method: str
    region: str
    """As of a `Score`, but never the background."""
    promised: float
    """Share of the brain that the interval was to hold."""
    covered: float
    """Share of the region that it holds."""
    agreement: float
    """Spearman's correlation of standard deviation and |error|."""
    wide: float
    """Share where the interval says no more than that it is brain."""
    calibrated: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """One withheld image: what was predicted, what was acquired, and how near they are."""

    case: Case
    target: Modality
    scores: list[Score]
    reliabilities: list[Reliability]
    predictions: Mapping[str, Prediction]
    """By method; none where only floors were asked for."""
    volumes: Mapping[Modality, Volume]
    """All acquired images, the truth among them."""
    tumor: Mask | None


def evaluate(
    cases: Iterable[Case],
    methods: Mapping[str, Predict],
    *,
    targets: Sequence[Modality] = SEQUENCES,
    regressions: Sequence[VoxelRegression] = (),
    protocol: Protocol = ALIGNED,
) -> pd.DataFrame:
    """Withhold each target of each case, predict it, and compare. One row per `Score`.

    Args:
        cases: complete ones, see `complete_cases`.
        methods: the models to judge by the name they get in the table, each called with the case
            without the target; none for floors alone. Others are compared with the first.
        regressions: fitted floors, see `fit_regressions`. The others need no fit and are always
            there.
        protocol: how predictions are compared with the truth.
    """
    comparisons = (
        comparison
        for case in cases
        for comparison in compare(
            case, methods, targets=targets, regressions=regressions, protocol=protocol
        )
    )
    return tabulate(score for comparison in comparisons for score in comparison.scores)


def compare(
    case: Case,
    methods: Mapping[str, Predict],
    *,
    targets: Sequence[Modality] = SEQUENCES,
    regressions: Sequence[VoxelRegression] = (),
    protocol: Protocol = ALIGNED,
    distances: Distances | None = None,
) -> Iterator[Comparison]:
    """As `evaluate`, for one case, one target at a time, so that a caller can show progress.

    Args:
        distances: a perceptual distance, see `perceptual.Perceptual`. Floors, of which there are
            many, go without: it takes long.

    Raises:
        InputError: a modality is absent or unreadable, a prediction lies on another grid or is the
            truth, perhaps in other units; a method has the name of a floor; or the segmentation has
            other labels than those of BraTS.
    """
    if taken := RESERVED & set(methods):
        raise InputError(f"method {min(taken)!r}: that is the name of a floor, expected another")
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
        predictions = {
            name: predict(case.without(target), target) for name, predict in methods.items()
        }
        for name, prediction in predictions.items():
            _check(prediction.voxels, truth, brain, f"{name}: {target} of case {case.id}")
        candidates = chain(
            ((name, "model", prediction.voxels) for name, prediction in predictions.items()),
            _floors(volumes, features, regressions, target),
            _spoilt(truth, tumor),
        )
        scores = [
            Score(case.id, target.value, method, kind, protocol.name, region, size, **figures)
            for method, kind, image in candidates
            for region, size, figures in protocol.figures(
                image,
                truth.voxels,
                brain,
                labels,
                None if kind == "floor" else distances,
                rising=kind == "model",
            )
        ]
        reliabilities = [
            row
            for name, prediction in predictions.items()
            for row in reliability(prediction, truth.voxels, brain, labels, case.id, target, name)
        ]
        yield Comparison(case, target, scores, reliabilities, predictions, volumes, tumor)


def reliability(
    prediction: Prediction,
    truth: Voxels,
    brain: Mask,
    labels: Labels | None = None,
    case: str = "",
    target: Modality = SEQUENCES[0],
    method: str = "",
) -> list[Reliability]:
    """A row per region of the brain; none if the prediction has no interval.

    Where no line brings the truth (X, Y, Z) into the units of the prediction, because that does not
    rise with it, nothing is covered.
    """
    maps = prediction.uncertainty
    if maps is None:
        return []
    inside = brain & maps.brain
    fitted = in_units_of(prediction.voxels, truth, inside)
    rows = []
    for region, mask in ALIGNED.masks(inside, labels).items():
        if region == "cuboid" or not mask.any():
            continue
        covered, agrees = 0.0, None
        if fitted is not None:
            there = fitted[mask]
            covered = float(np.mean((maps.low[mask] <= there) & (there <= maps.high[mask])))
            agrees = agreement(maps.std[mask], np.abs(there - prediction.voxels[mask]))
        rows.append(
            Reliability(
                case,
                target.value,
                method,
                region,
                maps.coverage,
                covered,
                math.nan if agrees is None else agrees,
                float(maps.wide[mask].mean()),
                prediction.calibrated,
            )
        )
    return rows


def complete_cases(cases: Iterable[Case]) -> list[Case]:
    """Those that have all four modalities, acquired ones; InputError if there is none."""
    complete = [case for case in map(acquired, cases) if not case.missing]
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

    def __call__(self, case: Case, target: Modality) -> Prediction:
        """Read one, with the maps of several samples that its record names.

        Raises:
            InputError: it, or a map, lies on another grid than the case, or cannot be read.
            KeyError: it is not there.
        """
        path = self.paths[case.id, target]
        filled = replace(case, images={**case.images, target: path})
        image = read_volumes(filled, [next(iter(case.images)), target])[target]
        voxels, interval = image.voxels, read_interval(path)
        if interval is None:
            return Prediction(voxels)
        std, low, high = (
            read_map(path.with_name(interval.files[kind]), image) for kind in ("std", "low", "high")
        )
        uncertainty = Uncertainty.within(voxels, std, low, high, coverage=interval.coverage)
        return Prediction(voxels, uncertainty, interval.calibrated)


def images(
    cases: Iterable[Case],
    predictions: Mapping[str, Predictions],
    targets: Sequence[Modality],
    folder: Path,
) -> list[dict[str, object]]:
    """Which images of each case were compared, for whoever wants to look at them.

    Args:
        predictions: by method.
        targets: what was judged.
        folder: paths in it are relative to it, all others absolute.
    """
    base = folder.absolute()
    entries: list[dict[str, object]] = []
    for case in cases:
        digests: dict[str, str] = {}

        def place(path: Path, digests: dict[str, str] = digests) -> str:
            path = path.absolute()
            name = str(path.relative_to(base) if path.is_relative_to(base) else path)
            digests[name] = sha256(path)
            return name

        entries.append(
            {
                "case": case.id,
                "acquired": {modality: place(path) for modality, path in case.images.items()},
                "segmentation": place(case.segmentation) if case.segmentation else None,
                "predictions": {
                    method: {target: place(found.paths[case.id, target]) for target in targets}
                    for method, found in predictions.items()
                },
                "sha256": digests,
            }
        )
    return entries


def tabulate(rows: Iterable[Score] | Iterable[Reliability]) -> pd.DataFrame:
    """One row each; columns are their fields, the perceptual distance only if some row has it."""
    table = pd.DataFrame([asdict(row) for row in rows])
    return table.drop(columns=[c for c in table if c == "perceptual" and table[c].isna().all()])


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Means over cases, a row per modality, region and method: the models first, then the best.

    `<figure>_low` and `<figure>_high` are the interval of the mean, see `significance.intervals`.
    """
    keys = ["modality", "region", "kind", "method"]
    groups = table.groupby(keys, sort=False)
    means = groups.agg(
        cases=("case", "nunique"), **{figure: (figure, "mean") for figure in _figures(table)}
    )
    bounds = np.array([intervals(rows[list(_figures(table))]) for _, rows in groups])
    for number, figure in enumerate(_figures(table)):
        means[[f"{figure}_low", f"{figure}_high"]] = bounds[:, number]
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
            if not rows["region"].isin(TUMOR_REGIONS).any():
                said += "; no tumor was compared"
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


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Every other method, floors too, against the first model; see `significance.paired`.

    Truths that were spoilt on purpose are not compared. Empty without a model.
    """
    judged = table[table["kind"] != "spoilt truth"]
    models = judged[judged["kind"] == "model"]
    if models.empty:
        return pd.DataFrame()
    return paired(judged, list(_figures(table)), ["modality", "region"], models["method"].iloc[0])


def contests(table: pd.DataFrame) -> list[str]:
    """One line per modality and further model: how it does against the first."""
    found = differences(table)
    models = table.loc[table["kind"] == "model", "method"].unique()[1:]
    if found.empty or not len(models):
        return []
    lines = []
    for (modality, method), rows in found[found["method"].isin(models)].groupby(
        ["modality", "method"], sort=False
    ):
        shown = rows[rows["region"].isin(SHOWN_REGIONS) & rows["figure"].isin(SHOWN_FIGURES[:2])]
        said = "; ".join(
            f"{row['region']} {row['figure'].upper()} {row['difference']:+.3f}, p = {row['p']:.2g}"
            f" ({row['cases']} case{'s' * (row['cases'] != 1)})"
            for row in shown.to_dict("records")
        )
        lines.append(f"{modality}: {method} against {rows['against'].iloc[0]}: {said}.")
    return lines


def trust(table: pd.DataFrame) -> list[str]:
    """One line per modality and method: what the intervals of a table of `Reliability` held."""
    if table.empty:
        return []
    lines = []
    for (modality, method), rows in table.groupby(["modality", "method"], sort=False):
        means = rows.groupby("region", sort=False)[["covered", "agreement"]].mean()
        said = "; ".join(
            f"{region} {covered:.0%} held, deviation and error "
            + ("do not vary" if math.isnan(agrees) else f"correlate {agrees:.2f}")
            for region, covered, agrees in means.loc[means.index.isin(SHOWN_REGIONS)].itertuples()
        )
        kind = "calibrated" if rows["calibrated"].all() else "uncalibrated"
        promised = rows["promised"].iloc[0]
        lines.append(f"{modality}: {method}, {kind} interval for {promised:.0%}: {said}.")
    return lines


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
            shown = NAMES.get(method, method).replace("|", r"\|")
            shown = f"spoilt truth: {shown}" if kind == "spoilt truth" else shown
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
    """The montage of the first prediction of a comparison, with the best floor named below."""
    if not comparison.predictions:
        raise ValueError("a comparison of floors alone has no picture")
    predicted = next(iter(comparison.predictions.values()))
    truth = comparison.volumes[comparison.target]
    floors = [s for s in comparison.scores if s.kind == "floor" and s.region == "brain"]
    best = max(floors, key=lambda score: score.psnr)
    return montage(
        {m: comparison.volumes[m].voxels for m in others(comparison.target)},
        predicted.voxels,
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
    table: pd.DataFrame,
    folder: Path,
    *,
    notes: Mapping[str, object],
    reliabilities: pd.DataFrame | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write `FILES`, and `RELIABILITY_FILE` if there is any; InputError as `atomic_write`.

    Args:
        table: of `Score`, all of one protocol.
        notes: what else belongs into the JSON, such as the model and what floors were fitted on.
        reliabilities: a table of `Reliability`.
    """
    summary, tested = summarize(table), differences(table)
    maps = pd.DataFrame() if reliabilities is None else reliabilities
    judged = [*verdicts(summary), *contests(table), *trust(maps)]
    (name,) = table["protocol"].unique()
    protocol = PROTOCOLS[name]
    record = {
        "version": __version__,
        "protocol": {"name": name, "range": protocol.scaling, "mask": protocol.masking},
        "figures": _figures(table),
        "regions": {region: REGIONS[region] for region in summary["region"].unique()},
        "statistics": METHODS,
        "cases": sorted(set(table["case"])),
        "methods": list(table.loc[table["kind"] == "model", "method"].unique()),
        **notes,
        "uncertainty": RELIABILITY_FILE if len(maps) else None,
        "verdicts": judged,
        "summary": _records(summary),
        "tests": _records(tested),
    }
    count = table["case"].nunique()
    tumors = table.loc[table["region"].isin(TUMOR_REGIONS), "case"].nunique()
    counted = f"Mean over {count} case{'s' * (count != 1)}, {tumors} with a tumor."
    texts = [
        table.to_csv(index=False),
        summary.to_csv(index=False),
        tested.to_csv(index=False),
        json.dumps(record, indent=2) + "\n",
        "\n".join(
            [protocol.text, "", markdown(summary), *(f"- {line}" for line in judged), "", counted]
        )
        + "\n",
    ]
    paths = [folder / name for name in FILES]
    if len(maps):
        texts.append(maps.to_csv(index=False))
        paths.append(folder / RELIABILITY_FILE)
    elif overwrite:  # one of an earlier run
        (folder / RELIABILITY_FILE).unlink(missing_ok=True)
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


def _figures(table: pd.DataFrame) -> dict[str, str]:
    """What each figure of a table is, by its column."""
    return {**FIGURES, **({"perceptual": PERCEPTUAL} if "perceptual" in table else {})}


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    """The rows, as JSON can hold them: null for what is not a finite number."""
    return [
        {
            str(key): None if isinstance(v, float) and not math.isfinite(v) else v
            for key, v in row.items()
        }
        for row in table.to_dict("records")
    ]


def _cell(rows: pd.DataFrame, figure: str, method: str) -> str:
    """One figure of one method, in bold if no other method has a better one."""
    if method not in rows.index:
        return ""
    value = float(rows[figure][method])
    reachable = rows.loc[rows["kind"] != "spoilt truth", figure]
    best = reachable.min() if figure in LOWER_IS_BETTER else reachable.max()
    text = f"{value:.2f}" if figure == "psnr" else f"{value:.3f}"
    return f"**{text}**" if method in reachable and value == best else text


def _check(predicted: Voxels, truth: Volume, brain: Mask, what: str) -> None:
    """InputError unless it is a finite image of the truth's shape, and not the truth."""
    if predicted.shape != truth.voxels.shape:
        shapes = f"shape {predicted.shape}, expected {truth.voxels.shape}"
        raise InputError(f"{what}: the prediction has {shapes}")
    if not np.isfinite(predicted).all():
        raise InputError(f"{what}: the prediction holds NaN or infinite voxels")
    try:
        aligned = Aligned.of(predicted, truth.voxels, brain)
    except ValueError as error:
        raise InputError(f"{what}: nothing to compare with, {error}") from error
    near = psnr(aligned.prediction, aligned.truth, aligned.brain)
    if near > TOO_GOOD_DB:
        raise InputError(
            f"{what}: the prediction is the truth in other units (PSNR {near:.0f} dB after a fit), "
            "expected one that was made without it"
        )
