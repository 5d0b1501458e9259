"""Hold out each modality of complete cases, have it predicted, and compare, always beside floors.

Rows are tidy: one per case, modality, method and region. What the figures mean is in `protocols`.
"""

from __future__ import annotations

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

from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.files import sha256
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
from cwdm.protocols import PROTOCOLS, Distances, Protocol
from cwdm.provenance import read_interval
from cwdm.segmentation import Labels, case_labels
from cwdm.summary import BLANK, ERASED, NAMES
from cwdm.uncertainty import MAPS, Uncertainty, agreement, in_units_of
from cwdm.volume import Volume, acquired, brain_mask, read_map, read_volumes

if TYPE_CHECKING:
    from cwdm.synthesis import Synthesis  # loads torch, which no comparison needs

__all__ = [
    "Comparison",
    "Predict",
    "Prediction",
    "Predictions",
    "Reliability",
    "Score",
    "compare",
    "complete_cases",
    "draw_sample",
    "evaluate",
    "fit_regressions",
    "images",
    "picture",
    "reliability",
    "tabulate",
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
RESERVED = {*BLANK, "blurred", *NAMES, *(f"copy {modality}" for modality in SEQUENCES)}
"""Names in the tables that no method can have."""
TOO_GOOD_DB = 60.0
"""A prediction nearer to the truth than this in the brain is the truth, in other units."""


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
        labels = case_labels(case, volumes[targets[0]])
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
        std, low, high = (read_map(path.with_name(interval.files[kind]), image) for kind in MAPS)
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
                "numbers": case.numbers,
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
