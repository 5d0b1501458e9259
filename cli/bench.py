"""`cwdm bench`: how fast it is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from cwdm.bench import Ratio, Report, Row

BUSY = 0.5
"""Processes that others run, on average, from which on times are doubtful."""


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option(
    "--preset",
    default="small-t2f",
    show_default=True,
    metavar="NAME|FILE",
    help="A preset or a TOML file; its weights are random.",
)
@click.option(
    "--size",
    callback=options.size,
    default="96",
    show_default=True,
    metavar="N|X,Y,Z",
    help="Voxels of an image.",
)
@click.option(
    "--case",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Synthesize this case, and train on it. [default: a simulated one of that size]",
)
@options.steps
@click.option("--reference", is_flag=True, help="Measure the plain path beside the fast one.")
@options.device
@options.precision
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Compile what lies between convolutions, and the network that is trained. "
    "[default: the first, for a chain of many steps on a processor]",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the processor. [default: torch's own]"
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Runs that count, after one that does not.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=options.ending(".json"),
    metavar="FILE",
    help="JSON to write.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON of an earlier run, to compare with.",
)
@options.overwrite
def bench(
    parts: tuple[str, ...],
    preset: str,
    size: tuple[int, int, int],
    case: Path | None,
    steps: int | tuple[int, ...] | None,
    reference: bool,
    device: str,
    precision: str,
    compiled: bool | None,
    threads: int | None,
    repeats: int,
    output: Path | None,
    against: Path | None,
    overwrite: bool,
) -> None:
    """Measure how fast the parts of cwdm are on this machine.

    PART is machine, import, transform, network, backward, synthesis, training or loading; by
    default all. Times stand beside what the machine can do at best, and with --reference beside
    those of the plain path, the two measured in turn.

    \b
    cwdm bench
    cwdm bench network --preset cwdm-t2f --size 64 --reference --output before.json
    """
    from tqdm import tqdm

    from cwdm.bench import (
        Setup,
        check_comparable,
        circumstances,
        ratios,
        read_report,
        speedups,
        write_report,
    )
    from cwdm.bench import bench as measure
    from cwdm.case import read_case
    from cwdm.files import check_target

    setup = Setup(
        preset=preset,
        size=size,
        case=str(case) if case else None,
        steps=steps,
        device=device,
        precision=precision,  # type: ignore[arg-type]
        compiled=compiled,
        threads=threads or 0,
        repeats=repeats,
        reference=reference,
    )
    # fail before the work, not after
    if output:
        check_target(output, overwrite)
    if case:
        read_case(case)
    earlier = read_report(against) if against else None
    if against and earlier:
        check_comparable(earlier, against, setup)
    with tqdm(unit="run", leave=False, disable=None) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name)
            bar.update(done - bar.n)

        report = measure(setup, parts, progress=show)
    if output:
        write_report(report, output, overwrite=overwrite)
    click.echo("\n".join(_about(report)))
    if report.rows:
        click.echo("\n".join(["", *_table(report.rows)]))
    if compared := ratios(report.rows):
        click.echo("\n".join(["", *_ratios("fast against reference", compared)]))
    if earlier:
        click.echo(
            "\n".join(["", *_ratios(f"this run against {against}", speedups(earlier, report))])
        )
        for note in circumstances(earlier, report):
            click.echo(f"note: {note}", err=True)
    if report.machine.load > BUSY:
        click.echo(
            f"note: the machine was busy before (load {report.machine.load:.1f}): trust ratios and "
            "CPU seconds, not seconds",
            err=True,
        )
    if output:
        click.echo(f"\nWritten to {output}")


def _about(report: Report) -> Iterator[str]:
    """What was measured, and where."""
    machine, setup = report.machine, report.setup
    size = " x ".join(map(str, setup.size))
    yield f"{setup.preset}, {size} voxels, cwdm {report.cwdm}, torch {machine.torch}"
    yield (
        f"{machine.cpu}, {machine.cores} cores, {setup.threads} threads, "
        f"{machine.memory_bytes / 2**30:.0f} GiB" + (f", {machine.gpu}" if machine.gpu else "")
    )
    for name, rate in machine.rates.items():
        what, unit = ("copy", "GB/s") if name == "copy" else (f"matrix product {name}", "GFLOP/s")
        yield f"{what:<20}  {rate / 1e9:>10.1f} {unit}"


def _table(rows: Sequence[Row]) -> list[str]:
    """A line for each, below heads with units."""
    columns: dict[str, Sequence[str]] = {
        "part": [row.name for row in rows],
        "path": [row.way for row in rows],
        "median s": [_number(row.seconds) for row in rows],
        "IQR s": [_number(row.iqr) for row in rows],
        "min s": [_number(min(row.times)) for row in rows],
        "CPU s": [_number(row.cpu_seconds) for row in rows],
        "before MiB": [_whole(row.before_bytes, 2**20) for row in rows],
        "peak MiB": [_whole(row.peak_bytes, 2**20) for row in rows],
        "GFLOP/s": [_number(row.flops and row.flops / row.seconds / 1e9) for row in rows],
        "GB/s": [_number(row.bytes and row.bytes / row.seconds / 1e9) for row in rows],
        "of rate": [f"{row.of_rate:.0%} {row.rate}" if row.of_rate else "" for row in rows],
        "of whole": [f"{row.of_whole:.1%}" if row.of_whole else "" for row in rows],
        "error": [f"{row.error:.1e}" if row.error is not None else "" for row in rows],
    }
    return _aligned(columns)


def _ratios(title: str, found: Sequence[Ratio]) -> list[str]:
    """How many times as fast, a line for each."""
    columns: dict[str, Sequence[str]] = {
        f"times as fast, {title}": [each.name for each in found],
        "path": [each.way for each in found],
        "by seconds": [f"{each.wall:.2f}" for each in found],
        "by CPU seconds": [f"{each.cpu:.2f}" if each.cpu else "" for each in found],
    }
    return _aligned(columns)


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The first two to the left, numbers to the right; without those in which nothing stands."""
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    widths = [max(map(len, (head, *cells))) for head, cells in filled.items()]
    lines = []
    for line in zip(*((head, *cells) for head, cells in filled.items()), strict=True):
        words = [
            word.ljust(width) if column < 2 else word.rjust(width)
            for column, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(words).rstrip())
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def _whole(value: int | None, unit: int) -> str:
    return "" if value is None else f"{value / unit:.0f}"
