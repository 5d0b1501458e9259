"""`cwdm check`: cases in, what is wrong with their images out."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from . import options

if TYPE_CHECKING:
    from cwdm.case import Case
    from cwdm.checks import Finding

UNREADABLE = ("case", "file")
"""Kinds of doubts where an image or a whole case could not be looked at."""


class Doubt(NamedTuple):
    """A row of the report."""

    case: str
    modality: str
    """Several are separated by spaces; empty if it is about the case."""
    kind: str
    message: str


@click.command()
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="A case, or a folder of cases (BraTS, nnU-Net, BIDS) or a CSV file.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=options.ending(".csv"),
    help="Write the findings as a table (CSV), too.",
)
@options.overwrite
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cases that are read at a time. [default: one per core, if there are enough cases]",
)
@click.pass_context
def check(
    ctx: click.Context, source: Path, output: Path | None, overwrite: bool, workers: int | None
) -> None:
    """Find images that are spoilt.

    Every image is read: is it whole, skull-stripped, aligned with the others, complete, and free
    of gross noise, blur, motion and outliers? Nothing is changed. A line per finding; where one
    image is to blame, how to have it replaced.

    Exits with 0 if nothing was found, with 1 if something was, with 2 if there is no case.

    \b
    cwdm check --input cohort/
    cwdm check --input cohort/ --output findings.csv
    """
    from tqdm import tqdm

    from cwdm.cache import in_processes
    from cwdm.files import check_target
    from cwdm.layouts import find

    if output:
        check_target(output, overwrite)
    found = find(source)
    doubts = [
        Doubt(name, "", "case", each.message)
        for each, name in zip(found.problems, found.problem_names, strict=True)
    ]
    to_blame: dict[str, set[str]] = {}
    with closing(in_processes(_examine, found.cases, workers)) as work:
        for case, findings in tqdm(
            work, "checking", total=len(found.cases), unit="case", disable=None
        ):
            doubts += [
                Doubt(case, " ".join(each.modalities), each.kind, each.message) for each in findings
            ]
            to_blame[case] = {m for each in findings for m in each.modalities}
    doubts.sort()
    click.echo("\n".join(_table(doubts)), nl=bool(doubts))
    for line in _advice(found.cases, to_blame):
        click.echo(line)
    total = len({*found.problem_names, *(case.id for case in found.cases)})
    flagged = {each.case for each in doubts}
    unreadable = {each.case for each in doubts if each.kind in UNREADABLE}
    click.echo(
        f"{total - len(flagged)} fine, {len(flagged - unreadable)} flagged, "
        f"{len(unreadable)} unreadable"
    )
    if output:
        _write(doubts, output, overwrite)
        click.echo(output)
    ctx.exit(int(bool(doubts)))


def _examine(case: Case) -> tuple[str, list[Finding]]:
    """Can be sent to another process."""
    from cwdm.checks import examine

    return case.id, examine(case)


def _table(doubts: list[Doubt]) -> list[str]:
    """A line for each, in columns under a heading; nothing if there is none."""
    rows = [Doubt("case", "image", "kind", "finding"), *doubts] if doubts else []
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def _advice(cases: Iterable[Case], to_blame: dict[str, set[str]]) -> Iterator[str]:
    """Command lines for the cases of which one image is bad and another good."""
    from cwdm.case import read_case
    from cwdm.errors import InputError

    lines = []
    for case in cases:
        if len(to_blame[case.id]) != 1 or len(case.images) == 1:
            continue
        (modality,) = to_blame[case.id]
        folder = next(iter(case.images.values())).parent
        try:
            alone = read_case(folder).images == case.images
        except InputError:
            alone = False
        if alone:
            words = ("--input", str(folder), "--output", "completed", "--replace", modality)
            lines.append(f"  cwdm impute {shlex.join(words)}")
    if lines:
        yield "To replace what cannot be mended:"
        yield from lines


def _write(doubts: Iterable[Doubt], path: Path, overwrite: bool) -> None:
    """The same as a table for programs."""
    from cwdm.files import atomic_write

    with (
        atomic_write(path, overwrite) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(Doubt._fields)
        writer.writerows(doubts)
