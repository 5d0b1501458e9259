"""`cwdm doctor`: the records of a training run in, what is wrong with it out."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cwdm.diagnosis import Finding, Run

TITLES = {"problem": "Problems", "hint": "Hints", "good": "Good"}
WIDTH = 100
"""Columns of the text."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, run: Path, as_json: bool) -> None:
    """Say in words what is wrong with a training run.

    RUN is the --output of cwdm train, of a run that has ended or is still at work. Exits with 1 if
    there is a problem, with 0 if there is none.

    \b
    cwdm doctor runs/t2f
    """
    from cwdm.diagnosis import diagnose, read_run

    records = read_run(run)
    findings = diagnose(records)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        click.echo("\n".join([*told(findings), *times(records), *bands(records)]))
    ctx.exit(int(any(finding.severity == "problem" for finding in findings)))


def told(findings: "list[Finding]") -> Iterator[str]:
    """Lines with the findings, under the title of their severity."""
    for severity, title in TITLES.items():
        group = [finding for finding in findings if finding.severity == severity]
        if group:
            yield title
        for finding in group:
            indent = f"  {finding.about:<14} "
            yield from textwrap.wrap(
                finding.message,
                WIDTH,
                initial_indent=indent,
                subsequent_indent=" " * len(indent),
                break_on_hyphens=False,
            )


def times(run: "Run") -> Iterator[str]:
    """Lines of a table of the error over time; none before there is an error."""
    from cwdm.diagnosis import errors_by_time

    rows = errors_by_time(run)
    if rows:
        yield "\nMean squared error of the estimate of x_0, by time t"
        yield f"  {'t':>10} {'trained':>10} {'held-out':>10} {'trivial':>10}"
    for row in rows:
        span = f"{row.first}" if row.first == row.last else f"{row.first}..{row.last}"
        yield f"  {span:>10} " + " ".join(map(number, row[2:]))


def bands(run: "Run") -> Iterator[str]:
    """Lines of a table of the energy of sub-bands; none before it is known."""
    from cwdm.diagnosis import energies

    rows = energies(run)
    if rows:
        yield "\nEnergy (mean square) of each sub-band"
        yield f"  {'band':>10} {'data':>10} {'samples':>10} {'ratio':>10}"
    for row in rows:
        ratio = None if row.samples is None or not row.data else row.samples / row.data
        yield f"  {row.band:>10} " + " ".join(map(number, (row.data, row.samples, ratio)))


def number(value: float | None) -> str:
    """Three digits in ten columns."""
    return f"{'-' if value is None else format(value, '.3g'):>10}"
