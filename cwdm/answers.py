"""What a run says: is it good, where is it bad, can the tumor be trusted?

A run is a folder that `cwdm evaluate` wrote, or one with cases that were completed, of which
nothing was measured. Nothing is computed here but means and tests of the run's tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import pandas as pd

from cwdm import __version__
from cwdm.case import Case, find_cases
from cwdm.errors import InputError
from cwdm.evaluate import ALIGNED
from cwdm.layouts import find
from cwdm.modality import SEQUENCES, Modality
from cwdm.montage import NAMES as MODALITY_NAMES
from cwdm.provenance import read_interval, warnings_for
from cwdm.significance import interval, paired
from cwdm.summary import ERASED, LOWER_IS_BETTER, SHOWN_FIGURES, TUMOR_REGIONS
from cwdm.summary import NAMES as METHOD_NAMES
from cwdm.volume import is_synthetic

__all__ = [
    "REGION_NAMES",
    "Answer",
    "Contest",
    "Finding",
    "Run",
    "Subject",
    "anchor",
    "answers",
    "method_name",
    "missed",
    "modality_name",
    "percent",
]

REGION_NAMES = {
    "brain": "brain",
    "healthy": "healthy brain",
    "WT": "whole tumor",
    "TC": "tumor core",
    "ET": "enhancing tumor",
    "non-tumor": "outside the tumor",
    "cuboid": "whole volume",
}
FIGURE_NAMES = {"psnr": "PSNR", "ssim": "SSIM", "mae": "MAE"}
SIGNIFICANT = 0.05
WORST = 3
"""How many cases are named as the worst."""
FAR = 0.2
"""An interval that holds so much less of a region than it promised has failed there."""


@dataclass(frozen=True)
class Subject:
    """A case of the run: where its images are."""

    case: Case
    """What was acquired."""
    predictions: Mapping[Modality, Path]
    """By the method that is judged first; none if the run does not name its images."""
    digests: Mapping[Path, str] = field(default_factory=dict)
    """SHA-256 of the files when they were measured."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a folder says, without the voxels."""

    folder: Path
    record: Mapping[str, Any]
    """`summary.json`; empty if nothing was measured."""
    scores: pd.DataFrame
    """`metrics.csv`: a row per case, modality, method and region."""
    reliabilities: pd.DataFrame
    """`uncertainty.csv` if the record names it, else empty."""
    subjects: list[Subject]
    """Worst first: by the lowest PSNR in the brain of an image."""
    untouched: int = 0
    """How many cases of a completed cohort have no synthetic image, so that none is shown."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of `cwdm evaluate`, or a folder with completed cases.

        Raises:
            InputError: neither; the tables are damaged, or of a run without predictions; or nothing
                acquired lies beside synthetic images.
        """
        folder = Path(folder)
        if (folder / "summary.json").exists():
            return cls._measured(folder)
        cases = _cases(folder)
        subjects = []
        for case in cases:
            made = {m: path for m, path in case.images.items() if is_synthetic(path)}
            if made and len(made) == len(case.images):
                raise InputError(
                    f"{next(iter(made.values())).parent}: case {case.id} has only synthetic "
                    "images, expected its acquired ones beside them, as cwdm impute writes them"
                )
            if made:
                subjects.append(Subject(case.without(*made), made))
        if not subjects:
            raise InputError(
                f"{folder}: no case has a synthetic image, expected a completed cohort"
            )
        untouched = len(cases) - len(subjects)
        return cls(folder, {}, pd.DataFrame(), pd.DataFrame(), subjects, untouched)

    @classmethod
    def _measured(cls, folder: Path) -> Self:
        path = folder / "summary.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            scores = _table(folder / "metrics.csv")
            name = record["uncertainty"]
            maps = _table(folder / name) if name else pd.DataFrame()
            if not record["methods"]:
                raise InputError(f"{path}: only floors were judged, expected predictions")
            judged = scores[(scores["method"] == record["methods"][0])]
            worst = judged[judged["region"] == "brain"].groupby("case")["psnr"].min()
            entries = {entry["case"]: entry for entry in record.get("images", ())}
            there = {*zip(judged["case"], judged["modality"], strict=True)}
            subjects = [
                _subject(folder, case, entries.get(case), record["methods"][0], there)
                for case in worst.sort_values().index
            ]
            if absent := {"version", "protocol", "verdicts", "summary"} - {*record}:
                raise ValueError(f"without {min(absent)}")
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: not there, expected a run of cwdm evaluate"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: not a run that can be shown ({error}), expected one of cwdm evaluate "
                f"{__version__}"
            ) from error
        return cls(folder, record, scores, maps, subjects)

    @property
    def measured(self) -> bool:
        """Whether there is a truth."""
        return bool(self.record)

    @property
    def main(self) -> str:
        """The method that is judged."""
        return str(self.record["methods"][0]) if self.measured else "cwdm"

    @property
    def modalities(self) -> list[Modality]:
        """That were predicted."""
        if self.measured:
            judged = {*self.scores.loc[self.scores["method"] == self.main, "modality"]}
        else:
            judged = {str(m) for each in self.subjects for m in each.predictions}
        return [m for m in SEQUENCES if str(m) in judged]

    @property
    def aligned(self) -> bool:
        """Whether the figures, if there are any, follow the protocol that the pictures follow."""
        return not self.measured or bool((self.scores["protocol"] == ALIGNED.name).all())

    @property
    def unit(self) -> str:
        """What an error of 100 % is."""
        if self.aligned:
            return "the range of the truth in the brain"
        return f"the data range of protocol {self.scores['protocol'].iloc[0]}"

    @cached_property
    def means(self) -> pd.DataFrame:
        """Mean of each figure by modality, region, kind and method."""
        keys = ["modality", "region", "kind", "method"]
        return self.scores.groupby(keys, sort=False)[list(SHOWN_FIGURES)].mean().reset_index()

    @cached_property
    def figures(self) -> dict[tuple[str, str, str], dict[str, dict[Any, Any]]]:
        """The scores by case, modality and region, then by method."""
        found: dict[tuple[str, str, str], dict[str, dict[Any, Any]]] = {}
        for row in self.scores.to_dict("records"):
            key = row["case"], row["modality"], row["region"]
            found.setdefault(key, {})[row["method"]] = row
        return found

    @cached_property
    def held(self) -> dict[tuple[str, str, str], dict[Any, Any]]:
        """What the intervals of the judged method are worth by case, modality and region."""
        return {
            (row["case"], row["modality"], row["region"]): row
            for row in self.reliabilities.to_dict("records")
            if row["method"] == self.main
        }

    def contest(self, modality: str, region: str, figure: str) -> Contest | None:
        """The judged method against its best rival there; none if the region is in no case."""
        means = self.means
        there = means[(means["modality"] == modality) & (means["region"] == region)]
        tumor = region in TUMOR_REGIONS
        rivals = there[(there["kind"] == "floor") | (tumor & (there["method"] == ERASED))]
        if rivals.empty or self.main not in set(there["method"]):
            return None
        values = rivals.set_index("method")[figure]
        rival = str(values.idxmin() if figure in LOWER_IS_BETTER else values.idxmax())
        table = self.scores
        both = table[
            (table["modality"] == modality)
            & (table["region"] == region)
            & table["method"].isin([self.main, rival])
        ]
        (test,) = paired(both, [figure], ["modality", "region"], self.main).to_dict("records")
        wide = both.pivot(index="case", columns="method", values=figure)
        sign = -1 if figure in LOWER_IS_BETTER else 1
        ahead = sign * (wide[self.main] - wide[rival])
        low, high = interval(wide[self.main])
        return Contest(
            region=region,
            figure=figure,
            value=float(wide[self.main].mean()),
            low=low,
            high=high,
            rival=rival,
            rival_value=float(wide[rival].mean()),
            better=int((ahead > 0).sum()),
            cases=len(wide),
            ahead=bool(ahead.mean() > 0),
            p=float(test["p"]),
        )


def _cases(folder: Path) -> list[Case]:
    """Those of a folder, also one that is BIDS or nnU-Net; InputError if they cannot be read."""
    try:
        return find_cases(folder)
    except InputError as error:
        with suppress(InputError):
            found = find(folder)
            if not found.problems:
                return found.cases
        raise InputError(f"{folder}: no summary.json of cwdm evaluate; {error}") from error


def _subject(
    folder: Path,
    case: str,
    entry: Mapping[str, Any] | None,
    method: str,
    judged: set[tuple[str, str]],
) -> Subject:
    """The images of a case that were judged; without an entry there are figures only."""
    if entry is None:
        return Subject(Case(case, {}), {})
    segmentation, numbers = entry["segmentation"], entry.get("numbers")
    return Subject(
        Case(
            case,
            {Modality(m): folder / place for m, place in entry["acquired"].items()},
            folder / segmentation if segmentation else None,
            {int(n): number for n, number in numbers.items()} if numbers is not None else None,
        ),
        {
            Modality(m): folder / place
            for m, place in entry["predictions"][method].items()
            if (case, m) in judged
        },
        {folder / place: digest for place, digest in entry["sha256"].items()},
    )


def _table(path: Path) -> pd.DataFrame:
    """As written by `evaluate`: a case may be called NA, a method 1."""
    text = dict.fromkeys(("case", "method"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


@dataclass(frozen=True)
class Contest:
    """The judged method against the best of the floors, in the tumor also the erased one."""

    region: str
    figure: str
    value: float
    low: float | None
    high: float | None
    rival: str
    rival_value: float
    better: int
    """In how many cases."""
    cases: int
    ahead: bool
    """In the mean."""
    p: float

    @property
    def shown(self) -> bool:
        """Whether being ahead is more than chance would do."""
        return self.ahead and self.p < SIGNIFICANT

    @property
    def against(self) -> str:
        """The rival and its value."""
        name = method_name(self.rival)
        what = (
            f"the truth with its {name}"
            if self.rival == ERASED
            else f"the best simple prediction ({name})"
        )
        return f"{what} has {self.rival_value:.1f}"

    @property
    def text(self) -> str:
        """In words, without the value itself."""
        between = "" if self.low is None else f", 95 % [{self.low:.1f}, {self.high:.1f}]"
        return (
            f"PSNR in the {REGION_NAMES[self.region]}{between}; {self.against}. "
            f"Better in {self.better} of {self.cases} cases, {probability(self.p)}."
        )


@dataclass(frozen=True)
class Finding:
    """One line of an answer."""

    subject: str
    text: str
    answer: str = ""
    """A word or two: "Better than simple", "Not proven"."""
    level: str = ""
    """"good", "unsure" or "bad": the color of the answer."""
    figure: str = ""
    """What to read first."""
    link: str = ""
    warnings: tuple[str, ...] = ()
    """What must not be overlooked, whatever the figures are."""


@dataclass(frozen=True)
class Answer:
    """To one of the questions at the top."""

    question: str
    findings: list[Finding]
    note: str = ""
    """What a word in it means."""


SIMPLE = (
    "Simple predictions are those anyone can make: a blank brain, a copy of another sequence, a "
    "regression from voxel to voxel."
)


def answers(run: Run) -> list[Answer]:
    """Is it good, where is it bad, can the tumor be trusted? In numbers."""
    if not run.measured:
        nothing = "No truth is known for these cases: nothing was measured. Look, and doubt."
        return [
            Answer("Is it good?", [Finding("", nothing, "Not measured", "unsure")]),
            Answer("Where is it bad?", _widest(run)),
            Answer(
                "Can I trust the tumor?",
                [
                    Finding(modality_name(m), "", "Not measured", "unsure", warnings=_known(m))
                    for m in run.modalities
                ],
            ),
        ]
    return [
        Answer("Is it good?", [_quality(run, m) for m in run.modalities], SIMPLE),
        Answer("Where is it bad?", [*_worst_regions(run), *_worst_cases(run)]),
        Answer("Can I trust the tumor?", [_tumor(run, m) for m in run.modalities]),
    ]


def _quality(run: Run, modality: Modality) -> Finding:
    contests = {figure: run.contest(modality, "brain", figure) for figure in SHOWN_FIGURES}
    found = {figure: each for figure, each in contests.items() if each}
    lost = [FIGURE_NAMES[figure] for figure, each in found.items() if not each.ahead]
    psnr = found["psnr"]
    floors = run.means[run.means["modality"] == modality]["method"]
    fitted = bool(floors.isin(list(METHOD_NAMES)).any())
    if len(lost) == len(found):
        answer, level = "Not better", "bad"
    elif lost:
        answer, level = "Partly better", "unsure"
    elif fitted and all(each.shown for each in found.values()):
        answer, level = "Better than simple", "good"
    else:
        answer, level = "Not proven", "unsure"
    text = psnr.text
    if level == "unsure":
        chance = [FIGURE_NAMES[f] for f, each in found.items() if each.ahead and not each.shown]
        text += f" Not better in {' and '.join(lost)}." if lost else ""
        text += f" May be chance in {' and '.join(chance)}." if chance else ""
    text += "" if fitted else " No regression was fitted, which is the hardest to beat."
    return Finding(modality_name(modality), text, answer, level, f"{psnr.value:.1f} dB")


def _worst_cases(run: Run) -> list[Finding]:
    """Those with the lowest PSNR of an image, with all their images."""
    table = run.scores
    main = table[(table["method"] == run.main) & (table["region"] == "brain")]
    means = main.groupby("modality")["psnr"].mean()
    findings = []
    for subject in run.subjects[:WORST]:
        rows = main[main["case"] == subject.case.id].sort_values("psnr").to_dict("records")
        said = [
            f"{MODALITY_NAMES[Modality(row['modality'])]} {row['psnr']:.1f} dB "
            f"(mean {means[row['modality']]:.1f})"
            for row in rows
        ]
        findings.append(
            Finding(
                subject.case.id,
                f"PSNR in the brain: {', '.join(said)}.",
                link=anchor(subject.case.id, rows[0]["modality"]) if subject.predictions else "",
            )
        )
    return findings


def _worst_regions(run: Run) -> list[Finding]:
    """The region with the largest error of each modality; without a tumor there is but one."""
    means = run.means[run.means["method"] == run.main]
    findings = []
    for modality in run.modalities:
        rows = means[means["modality"] == modality].set_index("region")["mae"]
        rows = rows[rows.index.isin(["healthy", *TUMOR_REGIONS])]
        if "WT" in rows:
            worst = str(rows.idxmax())
            other = "WT" if worst == "healthy" else "healthy"
            said = f"; {percent(rows[other])} in the {REGION_NAMES[other]}" if other in rows else ""
            findings.append(
                Finding(
                    f"{modality_name(modality)}, {REGION_NAMES[worst]}",
                    f"mean error, in % of {run.unit}{said}.",
                    figure=percent(rows[worst]),
                )
            )
    return findings


def _tumor(run: Run, modality: Modality) -> Finding:
    contests = [run.contest(modality, region, "psnr") for region in ("WT", "ET")]
    found = [each for each in contests if each]
    warnings = _known(modality)
    name = modality_name(modality)
    if not found:
        text = "There is no segmentation of a tumor."
        return Finding(name, text, "Not measured", "unsure", warnings=warnings)
    held, failed = _held(run, modality)
    if not all(each.ahead for each in found):
        answer, level = "No", "bad"
    elif failed:
        answer, level = "Interval fails", "bad"
    elif not all(each.shown for each in found):
        answer, level = "Not proven", "unsure"
    elif warnings:
        answer, level = "Not enhancement", "unsure"
    else:
        answer, level = "With care", "unsure"
    whole, *enhancing = found
    said = [whole.text]
    said += [f"Enhancing tumor: {each.value:.1f} dB; {each.against}." for each in enhancing]
    cases = sum((m, r) == (modality, "brain") for _, m, r in run.figures)
    if whole.cases < cases:
        said.append(f"{whole.cases} of {cases} cases have a segmented tumor.")
    if failed:
        warnings = (held, *warnings)
    elif held:
        said.append(held)
    return Finding(name, " ".join(said), answer, level, f"{whole.value:.1f} dB", warnings=warnings)


def _known(modality: Modality) -> tuple[str, ...]:
    """What is to be known of any synthetic image of this kind."""
    return warnings_for(modality, ())


def missed(promised: float, covered: float) -> bool:
    """Whether an interval that holds this share of a region misleads there."""
    return covered < promised - FAR


def _held(run: Run, modality: Modality) -> tuple[str, bool]:
    """What the intervals held of the tumor, if there are any, and whether they failed in it."""
    rows = [(key[2], row) for key, row in run.held.items() if key[1] == modality]
    covered = {
        region: float(np.mean([row["covered"] for name, row in rows if name == region]))
        for region in ("WT", "ET")
        if any(name == region for name, _ in rows)
    }
    if not covered:
        return "", False
    promised = rows[0][1]["promised"]
    kind = "Calibrated" if all(row["calibrated"] for _, row in rows) else "Uncalibrated"
    said = [f"{percent(share, 0)} of the {REGION_NAMES[name]}" for name, share in covered.items()]
    return (
        f"{kind} intervals: promised {percent(promised, 0)}, held {' and '.join(said)}.",
        any(missed(promised, share) for share in covered.values()),
    )


def _widest(run: Run) -> list[Finding]:
    """Where the intervals say nothing; without samples, or calibration, nobody knows."""
    found = [
        (interval, subject.case.id, modality)
        for subject in run.subjects
        for modality, path in subject.predictions.items()
        if (interval := read_interval(path))
    ]
    wide = [(each.wide, case, modality) for each, case, modality in found if each.calibrated]
    findings = [
        Finding(
            case,
            f"{modality_name(modality)}: of the brain the interval says nothing.",
            figure=percent(share, 0),
            link=anchor(case, modality),
        )
        for share, case, modality in sorted(wide, reverse=True)[:WORST]
    ]
    names = {modality_name(m): None for each, _, m in found if not each.calibrated}
    if names:
        text = f"The interval of {', '.join(names)} is not calibrated: it cannot say where."
        findings.append(Finding("", text, "Not measured", "unsure"))
    if not found:
        text = "Unknown: neither a truth nor several samples are there."
        findings.append(Finding("", text, "Not measured", "unsure"))
    return findings


def anchor(case: str, modality: str) -> str:
    """The link to a page."""
    return f"#case/{quote(case, safe='')}/{modality}"


def modality_name(modality: Modality) -> str:
    """As radiologists say it, and as the files do."""
    return f"{MODALITY_NAMES[modality]} ({modality})"


def method_name(method: str) -> str:
    """As it is said in a sentence."""
    return METHOD_NAMES.get(method, method)


def probability(p: float) -> str:
    """`p = 0.03`, never broken between lines."""
    return ("p < 0.001" if p < 0.001 else f"p = {p:.2g}").replace(" ", "\N{NO-BREAK SPACE}")


def percent(share: float | None, digits: int = 1) -> str:
    """As it is read; a dash for what is not there."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"
