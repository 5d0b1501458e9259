"""`cwdm prepare`: checks cases and packs them for training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cwdm.cache import Dtype, Report
    from cwdm.layouts import Found

REPORT = "report.csv"


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Folder of cases (BraTS, nnU-Net, BIDS) or a CSV file; repeatable.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder of the cache."
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "uint8"]),
    default="float16",
    show_default=True,
    help="How voxels are stored; uint8 takes 60 % of the space.",
)
@click.option(
    "--accept",
    type=click.Choice(
        [
            *("skull", "duplicate", "registration"),
            *("field-of-view", "noise", "blur", "motion", "intensity"),
        ]
    ),
    multiple=True,
    help="Use cases in spite of this finding; repeatable.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cases that are read at a time. [default: one per core, if there are enough cases]",
)
@click.option("--dicom", is_flag=True, help="--data holds DICOM: each CT series is a case.")
@click.pass_context
def prepare(
    ctx: click.Context,
    data: tuple[Path, ...],
    output: Path,
    dtype: Dtype,
    accept: tuple[str, ...],
    workers: int | None,
    dicom: bool,
) -> None:
    """Check cases and pack them for training.

    Every image is read once. What is wrong is listed, a line per problem, and such cases are left
    out; the others go into a cache that training reads without decoding NIfTI again. Run it again
    after an interruption or a change: what is there already is not done twice.

    Exits with 1 if a case was left out, with 2 if no case can be used.

    \b
    cwdm prepare --data cases/ --output cache/
    """
    from cwdm.cache import open_cache
    from cwdm.dicom import find_series
    from cwdm.errors import InputError
    from cwdm.layouts import Found, find, merge

    found = merge(Found([], [], tuple(find_series(each))) if dicom else find(each) for each in data)
    reports = pack(found, output, dtype=dtype, accept=accept, workers=workers)
    path = _write_report(reports, output)
    for line in _table(reports):
        click.echo(line)
    counts = {
        status: sum(report.status == status for report in reports)
        for status in ("written", "unchanged", "left out")
    }
    cached = open_cache(output)
    click.echo(
        f"{', '.join(f'{count} {status}' for status, count in counts.items())}; "
        f"{output} holds {len(cached)} cases, {sum(case.size for case in cached) / 1e6:.1f} MB"
    )
    click.echo(path)
    if counts["left out"] == len(reports):
        raise InputError(f"{', '.join(map(str, data))}: found no case that can be used, see {path}")
    ctx.exit(1 if counts["left out"] else 0)


def pack(
    found: Found,
    folder: Path,
    *,
    dtype: Dtype = "float16",
    accept: Sequence[str] = (),
    workers: int | None = None,
) -> list[Report]:
    """Fill a cache, showing how far it is; `cwdm train` does the same for cases not packed yet."""
    from tqdm import tqdm

    from cwdm.cache import fill

    total = len({*found.problem_names}) + len(found.cases) + len(found.series)
    work = fill(found, folder, dtype=dtype, accept=frozenset(accept), workers=workers)
    with closing(work):
        return sorted(tqdm(work, "preparing", total=total, unit="case", disable=None))


def _table(reports: Sequence[Report]) -> list[str]:
    """A line for each problem, under a heading; nothing if there is none."""
    rows = [("case", "status", "problem")]
    rows += [(each.case, each.status, problem) for each in reports for problem in each.problems]
    if len(rows) == 1:
        return []
    width = max(len(case) for case, _, _ in rows)
    return [f"{case:<{width}}  {status:<9}  {problem}" for case, status, problem in rows]


def _write_report(reports: Sequence[Report], folder: Path) -> Path:
    """The same as a table for programs, with the cases that have no problem."""
    from cwdm.files import atomic_write

    path = folder / REPORT
    with (
        atomic_write(path, overwrite=True) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("case", "status", "images", "problem"))
        for each in reports:
            for problem in each.problems or ("",):
                writer.writerow((each.case, each.status, " ".join(each.images), problem))
    return path
