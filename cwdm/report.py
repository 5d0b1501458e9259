"""One HTML file that shows a run: the answers, the figures, and the images of every case.

Pictures are made here, compressed for looking: each volume is cut to the brain and stored as one
WebP mosaic of its axial slices, in the window it is shown in. The file needs nothing else, asks no
server for anything, and is written case by case.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from cwdm import __version__
from cwdm.answers import (
    REGION_NAMES,
    Run,
    Subject,
    anchor,
    answers,
    method_name,
    missed,
    modality_name,
    percent,
)
from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.files import atomic_write, sha256
from cwdm.masks import extent
from cwdm.metrics import RANGE_QUANTILES, Aligned, affine_fit, intensity_range
from cwdm.modality import SEQUENCES, Modality
from cwdm.montage import NAMES as MODALITY_NAMES
from cwdm.montage import inferno, shown_range, voxel_size_mm
from cwdm.provenance import Interval, Source, read_interval, sidecar, warnings_for
from cwdm.segmentation import case_labels, regions
from cwdm.significance import METHODS
from cwdm.summary import ERASED, SHOWN_FIGURES, TUMOR_REGIONS
from cwdm.volume import Volume, brain_mask, read_map, read_volumes

__all__ = [
    "Page",
    "Picture",
    "picture",
    "write_report",
]

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

FOLDER = Path(__file__).parent / "viewer"

QUALITY = 85  # of WebP: about 1 % of the window lost (RMS), an eighth of the size of the voxels
SCALE_ENDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of error and deviation
MARGIN_MM = 3.0  # around the brain
STILL = 288  # px: the longer side of a still picture
LABEL_STEP = 85  # gray levels between labels, so that no browser's rounding changes one
OUTLINES = {"WT": (126, 211, 114), "TC": (92, 178, 255), "ET": (255, 112, 178)}  # around the tumor


@dataclass(frozen=True)
class Panel:
    """One picture of the row of a page."""

    volume: str
    """Key of the embedded volume; "error" is computed from two of them."""
    title: str
    kind: str
    """"acquired", "synthetic", "truth", "error" or "deviation"."""
    still: str
    """A data URI."""


@dataclass(frozen=True)
class Row:
    """Figures of one image in one region."""

    region: str
    psnr: float
    ssim: float
    mae: float
    rival: str
    rival_psnr: float
    erased_psnr: float | None
    covered: float | None
    agreement: float | None

    @property
    def ahead(self) -> bool:
        """Better than the best floor, in the tumor also than the truth without it."""
        erased = self.erased_psnr if self.region in TUMOR_REGIONS else None
        return self.psnr > max(self.rival_psnr, -math.inf if erased is None else erased)


@dataclass(frozen=True)
class Page:
    """One synthetic image of one case."""

    case: str
    modality: Modality
    panels: list[Panel]
    rows: list[Row]
    warnings: list[str]
    made: str
    """From what, by what."""
    distrust: str
    """Where in the tumor its interval failed; empty if nowhere."""
    wide: str
    """What the list of places that the interval says nothing of is worth; empty without one."""
    view: dict[str, Any]
    """What the viewer needs beside the volumes."""

    @property
    def anchor(self) -> str:
        """Id of the section."""
        return f"case/{self.case}/{self.modality}"

    @property
    def title(self) -> str:
        """What the image is of."""
        return modality_name(self.modality)


@dataclass(frozen=True)
class Picture:
    """The pages of one case and the volumes they show."""

    case: str
    pages: list[Page]
    box: dict[str, Any]
    """Shape, affine and columns of the mosaics."""
    volumes: Mapping[str, str]
    """Key -> WebP mosaic in base64; empty if only stills are embedded."""


@dataclass(frozen=True)
class _Shown:
    """A volume as it is shown, cut to the box."""

    shares: Voxels
    """(x, y, z) float32 in [0, 1] of the window."""
    heat: bool = False

    def mosaic(self, columns: int) -> str:
        """Axial slices side by side, rows are Y, as WebP in base64."""
        return _webp(_tile(_bytes(self.shares), columns), quality=QUALITY, method=4)


def picture(run: Run, subject: Subject, *, volumes: bool = True) -> Picture:
    """Read the images of a case and make its pages.

    Raises:
        InputError: an image is gone, damaged, on another grid, or not the one that was measured; or
            no MRI was acquired.
    """
    case = subject.case.without(Modality.CT)  # it took no part, and shows a head, not a brain
    if not case.images:
        expected = ", ".join(SEQUENCES)
        raise InputError(
            f"case {case.id}: found no acquired image of {expected}, expected at least one"
        )
    segmentation = [case.segmentation] if case.segmentation else []
    for path in (*case.images.values(), *segmentation, *subject.predictions.values()):
        if path in subject.digests and sha256(path) != subject.digests[path]:
            raise InputError(
                f"{path}: changed since it was measured, expected the same image; run cwdm "
                "evaluate again"
            )
    acquired = read_volumes(case, case.images)
    first = next(iter(acquired.values()))
    labels: NDArray[np.uint8] | None = None
    if case.segmentation:
        labels = case_labels(case, first)
    brains = {modality: brain_mask(volume) for modality, volume in acquired.items()}
    whole = np.logical_or.reduce([*brains.values()])
    if not whole.any():
        raise InputError(f"{first.path}: the image is empty, expected a brain")
    spacing = voxel_size_mm(first.affine)
    box = extent(whole, [round(MARGIN_MM / step) for step in spacing])
    cut = None if labels is None else labels[box]
    shown = {
        str(modality): _Shown(_windowed(volume.voxels, brains[modality])[box])
        for modality, volume in acquired.items()
    }
    pages = []
    for modality, path in subject.predictions.items():
        like = {**case.images, modality: path}
        predicted = read_volumes(Case(case.id, like), [next(iter(case.images)), modality])[modality]
        page, more = _page(run, subject, modality, predicted, acquired, whole, box, shown, cut)
        pages.append(page)
        shown |= more
    columns = math.ceil(math.sqrt(first.voxels[box].shape[2]))
    encoded: dict[str, str] = {}
    if volumes:
        encoded = {key: each.mosaic(columns) for key, each in shown.items()}
        if cut is not None:
            encoded["labels"] = _webp(_tile(cut * np.uint8(LABEL_STEP), columns), lossless=True)
    affine = first.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start for side in box]
    return Picture(
        case.id,
        pages,
        {
            "shape": [side.stop - side.start for side in box],
            "spacing": spacing,
            "affine": affine.tolist(),
            "columns": columns,
            "labels": labels is not None,
        },
        encoded,
    )


def _page(
    run: Run,
    subject: Subject,
    modality: Modality,
    predicted: Volume,
    acquired: Mapping[Modality, Volume],
    whole: Mask,
    box: Box,
    shown: Mapping[str, _Shown],
    labels: NDArray[np.uint8] | None,
) -> tuple[Page, dict[str, _Shown]]:
    """The page of one prediction, and the volumes it adds."""
    case, path = subject.case, subject.predictions[modality]
    truth = acquired.get(modality) if run.measured else None
    key = f"{modality}-synthetic"
    more: dict[str, _Shown] = {}
    panels = [(str(m), MODALITY_NAMES[m], "acquired") for m in acquired if m is not modality]
    panels.append((key, MODALITY_NAMES[modality], "synthetic"))
    view: dict[str, Any] = {"synthetic": key}
    error: Voxels | None = None
    if truth is None:
        brain, slope = whole, 1.0
        more[key] = _Shown(_windowed(predicted.voxels, brain)[box])
        low, high = shown_range(predicted.voxels, brain, RANGE_QUANTILES)
    else:
        brain = brain_mask(truth)
        aligned = Aligned.of(predicted.voxels, truth.voxels, brain, rising=True)
        slope, offset = affine_fit(predicted.voxels, truth.voxels, brain, rising=True)
        window = shown_range(truth.voxels, brain)
        fitted = slope * predicted.voxels + np.float32(offset)
        more[key] = _Shown(_windowed(fitted, brain, window)[box])
        low, high = intensity_range(truth.voxels, brain)
        error = np.zeros(brain.shape, dtype=np.float32)
        error[aligned.box] = np.abs(aligned.prediction - aligned.truth)
        error_end = _end(error[brain])
        view |= {"truth": str(modality), "error": error_end}
        view["width"] = (window[1] - window[0]) / (high - low)
        panels += [(str(modality), MODALITY_NAMES[modality], "truth"), ("error", "Error", "error")]
        shown = {**shown, "error": _Shown(error[box] / error_end, heat=True)}
    found = read_interval(path)
    if found and (deviation := _deviation(path, found, predicted)) is not None:
        spread = np.where(brain, deviation * abs(slope) / (high - low), 0).astype(np.float32)
        end = _end(spread[brain])
        deviations = f"{modality}-deviation"
        more[deviations] = _Shown(spread[box] / end, heat=True)
        panels.append((deviations, "Deviation", "deviation"))
        view["deviation"] = end
    view["start"] = _start(brain[box], labels, None if error is None else error[box])
    view["regions"] = [] if found is None else _boxes(found, predicted, box)
    everything = {**shown, **more}
    start, spacing = view["start"][2], voxel_size_mm(predicted.affine)
    outline = None if labels is None else labels[:, :, start]
    warnings, made = _told(path, modality, run.measured)
    if slope == 0:
        warnings.append("It does not rise with the truth: after the fit nothing is left of it.")
    page = Page(
        case.id,
        modality,
        [
            Panel(name, title, kind, _still(everything[name], start, outline, spacing))
            for name, title, kind in panels
        ],
        _rows(run, case.id, modality),
        warnings,
        made,
        _missed(run, case.id, modality),
        "" if found is None else _wide(found),
        view,
    )
    return page, more


def _missed(run: Run, case: str, modality: Modality) -> str:
    """In words, the regions of the tumor that the interval misleads in."""
    rows = {name: run.held.get((case, str(modality), name)) for name in TUMOR_REGIONS}
    said = [
        (f"{percent(row['covered'], 0)} of the {REGION_NAMES[name]}", row["promised"])
        for name, row in rows.items()
        if row and missed(row["promised"], row["covered"])
    ]
    if not said:
        return ""
    promised = percent(said[0][1], 0)
    return f"The interval promised {promised} and held {', '.join(text for text, _ in said)}."


def _wide(interval: Interval) -> str:
    """In words, what the regions of an interval are, and are not."""
    if not interval.regions:
        return ""
    share = percent(interval.wide) if interval.wide >= 0.0005 else "less than 0.1 %"
    count = len(interval.regions)
    parts = f"the {count} largest parts" if count > 1 else "the largest part"
    text = f"In {share} of the brain the interval is as wide as the brain's own range; {parts}:"
    if interval.calibrated:
        return text
    return f"The interval is not calibrated, so that this list means little. {text}"


def _told(path: Path, modality: Modality, measured: bool) -> tuple[list[str], str]:
    """Warnings, and how the image was made, from its record; without one, what always holds."""
    record = sidecar(path)
    try:
        made = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        if not (isinstance(made, dict) and made.get("synthetic") is True and "cwdm" in made):
            made = {}  # of another program
        warnings = [*dict.fromkeys([*warnings_for(modality, ()), *made.get("warnings", ())])]
        if measured and made.get("replaces"):  # withheld, of course: it is the truth
            replaces = Source(**made["replaces"])
            known = {*warnings_for(modality, (), replaces)} - {*warnings_for(modality, ())}
            warnings = [warning for warning in warnings if warning not in known]
        model = made.get("model", {}).get("name")
        inputs = ", ".join(made.get("inputs", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{record}: not a record of cwdm, expected the one of the image"
        ) from error
    if not model:
        return warnings, "No record of how it was made."
    samples = made.get("samples", 1)
    mean = f", mean of {samples} samples" if samples > 1 else ""
    return warnings, f"Made from {inputs} by {model}{mean}, seed {made.get('seed')}."


def _deviation(path: Path, found: Interval, like: Volume) -> Voxels | None:
    """The map beside a prediction (X, Y, Z) in its units, if it is there."""
    file = path.with_name(found.files["std"])
    return read_map(file, like) if file.exists() else None


def _boxes(found: Interval, predicted: Volume, box: Box) -> list[dict[str, Any]]:
    """The regions not to be trusted, from voxels of the file to voxels of the box."""
    to_canonical = np.linalg.inv(predicted.affine) @ predicted.header.get_best_affine()
    start = np.array([side.start for side in box])
    last = np.array([side.stop for side in box]) - start - 1
    boxes = []
    for region in found.regions:
        corners = np.array([region.first, region.last]) @ to_canonical[:3, :3].T
        corners = np.rint(corners + to_canonical[:3, 3]).astype(int) - start
        first, end = corners.min(axis=0).clip(0, last), corners.max(axis=0).clip(0, last)
        boxes.append({"voxels": region.voxels, "first": first.tolist(), "last": end.tolist()})
    return boxes


def _rows(run: Run, case: str, modality: Modality) -> list[Row]:
    """The figures of one image, a row per region; none if nothing was measured."""
    rows = []
    for region in [name for name in REGION_NAMES if name != "cuboid"]:
        key = case, str(modality), region
        if key not in run.figures:
            continue
        methods, held = run.figures[key], run.held.get(key, {})
        mine = methods[run.main]
        floors = {name: row["psnr"] for name, row in methods.items() if row["kind"] == "floor"}
        best = max(floors, key=floors.__getitem__)
        rows.append(
            Row(
                region=region,
                **{figure: mine[figure] for figure in SHOWN_FIGURES},
                rival=best,
                rival_psnr=floors[best],
                erased_psnr=methods[ERASED]["psnr"] if ERASED in methods else None,
                covered=held.get("covered"),
                agreement=held.get("agreement"),
            )
        )
    return rows


def _windowed(voxels: Voxels, brain: Mask, window: tuple[float, float] | None = None) -> Voxels:
    """Shares of the window, 0 outside the brain."""
    low, high = window or shown_range(voxels, brain)
    shares: Voxels = np.where(brain, ((voxels - low) / (high - low)).clip(0, 1), 0)
    return shares.astype(np.float32)


def _end(values: Voxels) -> float:
    """The end of a scale of colors: most voxels lie below it."""
    high = float(np.quantile(values, 0.99))
    return next((end for end in SCALE_ENDS if high <= end), 1.0)


def _start(brain: Mask, labels: NDArray[np.uint8] | None, error: Voxels | None) -> list[int]:
    """The slice to begin with along each axis: most tumor, else most error, else the middle."""
    across = [tuple(a for a in range(3) if a != axis) for axis in range(3)]
    if labels is not None and labels.any():  # as in montages: slices that show brain, too
        areas = [(labels > 0).sum(axes) * brain.sum(axes) for axes in across]
    else:
        areas = [(brain if error is None else error).sum(axes) for axes in across]
    return [int(area.argmax()) for area in areas]


def _still(
    shown: _Shown, index: int, labels: NDArray[np.integer] | None, spacing: tuple[float, ...]
) -> str:
    """One axial slice in radiological view, tumor outlined, as a data URI."""
    flat = np.ascontiguousarray(shown.shares[::-1, ::-1, index].T)
    across, up = flat.shape[1] * spacing[0], flat.shape[0] * spacing[1]  # mm
    scale = STILL / max(across, up)
    size = max(1, round(across * scale)), max(1, round(up * scale))
    smooth = np.asarray(Image.fromarray(flat).resize(size, Image.Resampling.BICUBIC))
    colors = inferno(smooth) if shown.heat else np.repeat(_bytes(smooth)[..., None], 3, axis=2)
    if labels is not None:
        for region, mask in regions(labels[::-1, ::-1].T).items():
            inside = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
            area = np.asarray(inside)
            colors[area & ~ndimage.binary_erosion(area)] = OUTLINES[region]
    return "data:image/webp;base64," + _webp(colors, quality=QUALITY, method=4)


def _bytes(shares: Voxels) -> NDArray[np.uint8]:
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)


def _tile(voxels: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """(x, y, z) -> (rows * y, columns * x): axial slices from left to right, row by row."""
    x, y, z = voxels.shape
    rows = -(-z // columns)
    slices = np.zeros((rows * columns, y, x), dtype=np.uint8)
    slices[:z] = voxels.transpose(2, 1, 0)
    tiled = slices.reshape(rows, columns, y, x).transpose(0, 2, 1, 3)
    return tiled.reshape(rows * y, columns * x)


def _webp(pixels: NDArray[np.uint8], **options: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="WEBP", **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def write_report(
    run: Run,
    path: Path,
    *,
    title: str = "",
    volumes: int = 10,
    overwrite: bool = False,
    progress: Callable[[], object] | None = None,
) -> None:
    """Write the report; the images of one case at a time are in memory.

    Args:
        title: stands at the top; by default the name of the folder.
        volumes: of how many cases, the worst, whole volumes are embedded; others get stills.
        progress: is called after every case.

    Raises:
        InputError: an image of the run is gone or damaged; or as `atomic_write`.
    """

    shown = [subject for subject in run.subjects if subject.predictions]

    def pictures() -> Iterator[Picture]:
        for number, subject in enumerate(shown):
            yield picture(run, subject, volumes=number < volumes)
            if progress:
                progress()

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {
        "decibel": _decibel,
        "percent": percent,
        "method_name": method_name,
        "region_name": REGION_NAMES.__getitem__,
        "modality_name": lambda name: modality_name(Modality(name)),
        "anchor": anchor,
    }
    niivue = gzip.compress((FOLDER / "niivue.umd.js").read_bytes(), mtime=0)
    stream = pages.get_template("report.html").stream(
        title=title or f"{run.folder.absolute().name}",
        run=run,
        version=__version__,
        answers=answers(run),
        images=_images(run),
        regions=[r for r in REGION_NAMES if r in set(run.scores.get("region", []))],
        data=_data(run),
        pictures=pictures(),
        embedded=min(volumes, len(shown)),
        shown=len(shown),
        methods=METHODS,
        text=lambda name: (FOLDER / name).read_text("utf-8"),
        viewer=json.loads((FOLDER / "niivue.json").read_text("utf-8")),
        niivue=base64.b64encode(niivue).decode("ascii"),
        outlines={name: f"rgb{color}" for name, color in OUTLINES.items()},
        heat=inferno(np.linspace(0, 1, 256)).tolist(),
        label_step=LABEL_STEP,
    )
    with atomic_write(path, overwrite) as temporary:
        stream.dump(str(temporary), encoding="utf-8")


def _images(run: Run) -> list[dict[str, Any]]:
    """Rows of the table of images, worst first."""
    images = []
    for subject in run.subjects:
        for modality in run.modalities:
            rows = {row.region: row for row in _rows(run, subject.case.id, modality)}
            there = modality in subject.predictions
            if rows or there:
                images.append(
                    {
                        "case": subject.case.id,
                        "modality": str(modality),
                        "rows": rows,
                        "shown": there,
                    }
                )
    return sorted(images, key=lambda image: image["rows"]["brain"].psnr if image["rows"] else 0)


def _data(run: Run) -> dict[str, Any]:
    """What the plots are drawn from: by modality, region and method the figures of every case."""
    cases = [subject.case.id for subject in run.subjects]
    series = []
    for row in run.record.get("summary", []):
        keys = {key: row[key] for key in ("modality", "region", "kind", "method")}
        key, method = (row["modality"], row["region"]), row["method"]
        scores = [run.figures.get((case, *key), {}).get(method, {}) for case in cases]
        series.append(
            {
                **keys,
                "name": method_name(method),
                **{figure: [_finite(s.get(figure)) for s in scores] for figure in SHOWN_FIGURES},
                **{
                    f"{figure}_mean": [row[figure + end] for end in ("", "_low", "_high")]
                    for figure in SHOWN_FIGURES
                },
            }
        )
    return {"cases": cases, "series": series, "main": run.main}


def _finite(value: float | None) -> float | None:
    """As JSON can hold it."""
    return round(value, 5) if value is not None and math.isfinite(value) else None


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
