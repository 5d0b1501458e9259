"""What a run says: is it good, where is it bad, can the tumor be trusted?

A run is a folder that `cwdm evaluate` wrote, or one with cases that were completed, of which
nothing was measured. Nothing is computed here but means and tests of the run's tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import pandas as pd

from cwdm import __version__
from cwdm.case import Case, find_cases
from cwdm.errors import InputError
from cwdm.evaluate import ERASED, LOWER_IS_BETTER, RELIABILITY_FILE, SHOWN_FIGURES, TUMOR_REGIONS
from cwdm.evaluate import NAMES as METHOD_NAMES
from cwdm.modality import SEQUENCES, Modality
from cwdm.montage import NAMES as MODALITY_NAMES
from cwdm.provenance import read_interval, warnings_for
from cwdm.significance import interval, paired
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
"""How many images are named as the worst."""


@dataclass(frozen=True)
class Subject:
    """A case of the run: where its images are."""

    case: Case
    """What was acquired."""
    predictions: Mapping[Modality, Path]
    """By the method that is judged first."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a folder says, without the voxels."""

    folder: Path
    record: Mapping[str, Any]
    """`summary.json`; empty if nothing was measured."""
    scores: pd.DataFrame
    """`metrics.csv`: a row per case, modality, method and region."""
    reliabilities: pd.DataFrame
    """`uncertainty.csv`, or empty."""
    subjects: list[Subject]
    """Worst first: by the lowest PSNR in the brain of an image."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of `cwdm evaluate`, or a folder with completed cases.

        Raises:
            InputError: neither; or the tables are damaged, or of a run without predictions.
        """
        folder = Path(folder)
        if (folder / "summary.json").exists():
            return cls._measured(folder)
        try:
            cases = find_cases(folder)
        except InputError as error:
            raise InputError(
                f"{folder}: no summary.json and no completed case, expected what cwdm evaluate or "
                "cwdm impute wrote"
            ) from error
        subjects = []
        for case in cases:
            made = {m: path for m, path in case.images.items() if is_synthetic(path)}
            if made:
                subjects.append(Subject(case.without(*made), made))
        if not subjects:
            raise InputError(
                f"{folder}: no case has a synthetic image, expected a completed cohort"
            )
        return cls(folder, {}, pd.DataFrame(), pd.DataFrame(), subjects)

    @classmethod
    def _measured(cls, folder: Path) -> Self:
        path = folder / "summary.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            scores = pd.read_csv(folder / "metrics.csv", dtype={"case": str})
            table = folder / RELIABILITY_FILE
            maps = pd.read_csv(table, dtype={"case": str}) if table.exists() else pd.DataFrame()
            if not record["methods"]:
                raise InputError(f"{path}: only floors were judged, expected predictions")
            main = record["methods"][0]
            judged = scores[(scores["method"] == main) & (scores["region"] == "brain")]
            worst = judged.groupby("case")["psnr"].min()
            subjects = [
                Subject(
                    Case(
                        entry["case"],
                        {Modality(m): folder / place for m, place in entry["acquired"].items()},
                        folder / entry["segmentation"] if entry["segmentation"] else None,
                    ),
                    {Modality(m): folder / p for m, p in entry["predictions"][main].items()},
                )
                for entry in record["images"]
            ]
            subjects.sort(key=lambda subject: worst[subject.case.id])
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
        return [m for m in SEQUENCES if any(m in each.predictions for each in self.subjects)]

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
        between = "" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]"
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
    """A word or two: "Better", "Not shown"."""
    level: str = ""
    """"good", "unsure" or "bad": the color of the answer."""
    figure: str = ""
    """What to read first."""
    link: str = ""
    warning: str = ""
    """What holds whatever the figures are."""


@dataclass(frozen=True)
class Answer:
    """To one of the questions at the top."""

    question: str
    findings: list[Finding]


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
                    Finding(modality_name(m), "", "Not measured", "unsure", warning=_warning(m))
                    for m in run.modalities
                ],
            ),
        ]
    return [
        Answer("Is it good?", [_quality(run, m) for m in run.modalities]),
        Answer("Where is it bad?", [*_worst_images(run), *_worst_regions(run)]),
        Answer("Can I trust the tumor?", [_tumor(run, m) for m in run.modalities]),
    ]


def _quality(run: Run, modality: Modality) -> Finding:
    contests = {figure: run.contest(modality, "brain", figure) for figure in SHOWN_FIGURES}
    found = {figure: each for figure, each in contests.items() if each}
    lost = [FIGURE_NAMES[figure] for figure, each in found.items() if not each.ahead]
    psnr = found["psnr"]
    if len(lost) == len(found):
        answer, level = "Not better", "bad"
    elif lost:
        answer, level = "Partly better", "unsure"
    elif all(each.shown for each in found.values()):
        answer, level = "Better", "good"
    else:
        answer, level = "Not shown", "unsure"
    text = psnr.text
    if level == "unsure":
        chance = [FIGURE_NAMES[f] for f, each in found.items() if each.ahead and not each.shown]
        text += f" Not better in {' and '.join(lost)}." if lost else ""
        text += f" May be chance in {' and '.join(chance)}." if chance else ""
    return Finding(modality_name(modality), text, answer, level, f"{psnr.value:.1f} dB")


def _worst_images(run: Run) -> list[Finding]:
    table = run.scores
    main = table[(table["method"] == run.main) & (table["region"] == "brain")]
    worst = main.sort_values("psnr").head(WORST)
    return [
        Finding(
            row["case"],
            f"PSNR in the brain of its {modality_name(Modality(row['modality']))}; "
            f"mean of all {main.loc[main['modality'] == row['modality'], 'psnr'].mean():.1f}.",
            figure=f"{row['psnr']:.1f} dB",
            link=anchor(row["case"], row["modality"]),
        )
        for row in worst.to_dict("records")
    ]


def _worst_regions(run: Run) -> list[Finding]:
    """The region with the largest error of each modality."""
    means = run.means[run.means["method"] == run.main]
    findings = []
    for modality in run.modalities:
        rows = means[means["modality"] == modality].set_index("region")["mae"]
        rows = rows[rows.index.isin(["healthy", *TUMOR_REGIONS])]
        if not rows.empty:
            worst = str(rows.idxmax())
            findings.append(
                Finding(
                    f"{modality_name(modality)}, {REGION_NAMES[worst]}",
                    "mean error, in % of the range; "
                    f"{percent(rows['healthy'])} in the healthy brain.",
                    figure=percent(rows[worst]),
                )
            )
    return findings


def _tumor(run: Run, modality: Modality) -> Finding:
    contests = [run.contest(modality, region, "psnr") for region in ("WT", "ET")]
    found = [each for each in contests if each]
    warning = _warning(modality)
    name = modality_name(modality)
    if not found:
        text = "There is no segmentation of a tumor."
        return Finding(name, text, "Not measured", "unsure", warning=warning)
    if not all(each.ahead for each in found):
        answer, level = "No", "bad"
    elif not all(each.shown for each in found):
        answer, level = "Not shown", "unsure"
    elif warning:
        answer, level = "Not enhancement", "unsure"
    else:
        answer, level = "With care", "unsure"
    whole, *enhancing = found
    said = [whole.text]
    said += [f"Enhancing tumor: {each.value:.1f} dB; {each.against}." for each in enhancing]
    said += _held(run, modality)
    return Finding(name, " ".join(said), answer, level, f"{whole.value:.1f} dB", warning=warning)


def _warning(modality: Modality) -> str:
    """What is to be known of any synthetic image of this kind."""
    return " ".join(warnings_for(modality, ()))


def _held(run: Run, modality: Modality) -> list[str]:
    """What the intervals held of the tumor, if there are any."""
    rows = [run.held[key] for key in run.held if key[1:] == (modality, "WT")]
    if not rows:
        return []
    promised, covered = (np.mean([row[key] for row in rows]) for key in ("promised", "covered"))
    return [f"{percent(promised, 0)} intervals hold {percent(covered, 0)} of the tumor."]


def _widest(run: Run) -> list[Finding]:
    """Where the intervals say nothing; without samples, that nobody knows."""
    wide = [
        (found.wide, subject.case.id, modality)
        for subject in run.subjects
        for modality, path in subject.predictions.items()
        if (found := read_interval(path))
    ]
    if not wide:
        text = "Unknown: neither a truth nor several samples are there."
        return [Finding("", text, "Not measured", "unsure")]
    return [
        Finding(
            case,
            f"{modality_name(modality)}: of the brain the interval says nothing.",
            figure=percent(share, 0),
            link=anchor(case, modality),
        )
        for share, case, modality in sorted(wide, reverse=True)[:WORST]
    ]


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
