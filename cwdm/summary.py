"""What the scores of an evaluation say: means, tests, verdicts in words, and the tables on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from cwdm import __version__
from cwdm.files import atomic_write
from cwdm.modality import SEQUENCES
from cwdm.protocols import FIGURES, PERCEPTUAL, PROTOCOLS, REGIONS
from cwdm.significance import METHODS, intervals, paired

__all__ = [
    "ERASED",
    "FILES",
    "RELIABILITY_FILE",
    "contests",
    "differences",
    "markdown",
    "summarize",
    "trust",
    "verdicts",
    "write_tables",
]

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
SATURATED = 0.95
"""An SSIM that one of them gets in a tumor leaves no room to tell a good image from it."""


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
