"""`cwdm overlap`: segmentations in, how well they agree with the truth out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from cwdm.lesions import LesionRow

FIGURES = {"dice": "Dice", "hd95_mm": "HD95 mm", "nsd": "NSD"}


@click.command()
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    required=True,
    help="Cases with a segmentation: a folder (BraTS, nnU-Net, BIDS) or a CSV file.",
)
@click.option(
    "--pred",
    "folders",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="Folder with <id>-seg.nii.gz of every case, in it or below; several are compared with "
    "the first.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--lesions", is_flag=True, help="Count lesions, too: RQ, SQ and PQ in lesions.csv (panoptica)."
)
@options.seed
@options.overwrite
def overlap(
    truth: Path,
    folders: tuple[Path, ...],
    output: Path,
    lesions: bool,
    seed: int,
    overwrite: bool,
) -> None:
    """Compare segmentations with the truth.

    Dice, HD95 and NSD of the tumor's regions and labels, by the rules of BraTS. Writes overlap.csv
    (one row per case, method and region), summary.csv and summary.json, and prints the means.

    \b
    cwdm overlap --truth held-out/ --pred segmented/ --output overlap/
    cwdm overlap --truth held-out/ --pred first/ --pred second/ --output overlap/
    """
    from dataclasses import asdict

    import pandas as pd
    from tqdm import tqdm

    from cwdm.errors import InputError
    from cwdm.files import atomic_write, check_target
    from cwdm.layouts import find
    from cwdm.lesions import FILE, compare_lesions
    from cwdm.overlap import (
        FILES,
        PROTOCOL,
        compare_case,
        differences,
        find_segmentations,
        summarize,
        tabulate,
        write_tables,
    )

    for file in (*FILES, FILE) if lesions else FILES:
        check_target(output / file, overwrite)
    if len(set(folders)) < len(folders):
        raise InputError("--pred: found one folder twice, expected different ones")
    found = find(truth)
    cases = [case for case in found.cases if case.segmentation]
    if not cases:
        raise InputError(f"{truth}: found no case with a segmentation, expected at least one")
    for problem in found.problems:
        click.echo(f"note: left out {problem.case}: {problem.message}", err=True)
    if unknown := len(found.cases) - len(cases):
        click.echo(f"note: left out {unknown} case(s) without a segmentation", err=True)
    predictions = {str(folder): find_segmentations(folder, cases) for folder in folders}
    rows, counted = [], []
    for case in tqdm(cases, "comparing", unit="case", disable=None):
        for method, paths in predictions.items():
            rows += compare_case(case, paths[case.id], method=method)
            if lesions:
                counted += compare_lesions(case, paths[case.id], method=method)
    table = tabulate(rows)
    write_tables(table, output, notes={"truth": str(truth)}, seed=seed, overwrite=overwrite)
    if lesions:
        with atomic_write(output / FILE, overwrite) as temporary:
            pd.DataFrame(map(asdict, counted)).to_csv(temporary, index=False)
    lines = [*_means(summarize(table, seed=seed)), *_tests(differences(table, seed=seed))]
    lines += _lesions(counted)
    click.echo("\n".join([*lines, "", PROTOCOL, f"Written to {output}"]))


def _means(summary: pd.DataFrame) -> list[str]:
    """A line per method and region."""
    width = max(map(len, summary["method"]))
    heads = "".join(f"  {name:<22}" for name in FIGURES.values())
    lines = [f"{'method':<{width}}  region  cases{heads}".rstrip()]
    for (method, region), rows in summary.groupby(["method", "region"], sort=False):
        cells = "".join(
            f"  {_cell(row['mean'], row['low'], row['high']):<22}"
            for row in rows.set_index("figure").loc[list(FIGURES)].to_dict("records")
        )
        lines.append(f"{method:<{width}}  {region:<6}  {rows['cases'].iloc[0]:>5}{cells}".rstrip())
    return lines


def _cell(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _tests(tests: pd.DataFrame) -> list[str]:
    """A line per region and figure where there are two methods."""
    return [
        f"{row['method']} against {row['against']}, {row['region']} {FIGURES[row['figure']]}: "
        f"{row['difference']:+.3f}, p = {row['p']:.2g} (Wilcoxon, {row['cases']} cases)"
        for row in tests.to_dict("records")
    ]


def _lesions(rows: Sequence[LesionRow]) -> list[str]:
    """A line per method and region: the lesions of all cases."""
    groups: dict[tuple[str, str], list[LesionRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.region), []).append(row)
    return [
        f"{method}, {region}: {sum(r.matched for r in group)} of {sum(r.truth for r in group)} "
        f"lesions found, {sum(r.found - r.matched for r in group)} that are none"
        for (method, region), group in groups.items()
    ]
