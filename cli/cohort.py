"""What commands that work on a whole cohort share: where to work, how far it is, how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import pandas as pd

    from cwdm.cohort import Tally
    from cwdm.executors import Executor


@dataclass(frozen=True)
class Place:
    """Where to work, as the options say it."""

    name: str
    workers: int | None
    address: str | None
    slurm: tuple[str, ...]

    def executor(
        self, device: str, output: Path, *, memory_limit: int | None = None, spreads: bool = True
    ) -> Executor:
        """The executor.

        Args:
            memory_limit: bytes for each process.
            spreads: take several processes on a CPU without being told so.

        Raises:
            InputError: options that do not go together.
        """
        from cwdm.errors import InputError
        from cwdm.executors import AMPLE, Local, Ray, Slurm

        if self.address and self.name != "ray":
            raise InputError("--address: found without --executor ray")
        if device != "auto" and self.name != "local":
            raise InputError(
                f"--device {device}: found with --executor {self.name}, which knows its GPUs"
            )
        if self.slurm and self.name != "slurm":
            raise InputError("--slurm: found without --executor slurm")
        if self.name == "ray":
            return Ray(self.workers, self.address)
        if self.name == "slurm":
            parameters = _parameters(self.slurm)
            cluster = str(parameters.pop("cluster", "slurm"))
            return Slurm(output / ".cwdm" / "slurm", self.workers, parameters, cluster)
        each = memory_limit or AMPLE
        return Local(self.workers, device, bytes_each=each if spreads else None)


def _parameters(pairs: Iterable[str]) -> dict[str, Any]:
    from cwdm.errors import InputError

    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--slurm {pair}: expected KEY=VALUE")
        parameters[key] = int(value) if value.isdecimal() else value
    return parameters


def placement(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where to work; the command gets them as ``place``."""

    @click.option(
        "--executor",
        type=click.Choice(["local", "ray", "slurm"]),
        default="local",
        show_default=True,
        help="Where to work: this machine, a Ray cluster, an array job of SLURM.",
    )
    @click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Processes that work at a time. [default: one per GPU, else one per core if "
        "there are enough cases and memory]",
    )
    @click.option("--address", help="Of a Ray cluster that runs. [default: start one here]")
    @click.option(
        "--slurm",
        multiple=True,
        metavar="KEY=VALUE",
        help="For submitit, such as slurm_partition=gpu or timeout_min=600; repeatable.",
    )
    @wraps(command)
    def placed(
        *args: Any,
        executor: str,
        workers: int | None,
        address: str | None,
        slurm: tuple[str, ...],
        **options: Any,
    ) -> None:
        command(*args, place=Place(executor, workers, address, slurm), **options)

    return placed


@contextmanager
def progress(title: str) -> Iterator[Callable[[Tally], None]]:
    """A bar with the time left and how many cases failed."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="case") as bar:

        def show(tally: Tally) -> None:
            bar.total = tally.total
            bar.set_postfix(failed=tally.failed, refresh=False)
            bar.update(tally.done + tally.failed - bar.n)
            bar.refresh()

        yield show


def finish(table: pd.DataFrame, path: Path) -> int:
    """Say what became of the cases; the exit code."""
    counts = table["state"].value_counts()
    for case, message in table.loc[table["state"] == "failed", ["case", "message"]].itertuples(
        index=False
    ):
        click.echo(f"{case}: {message}", err=True)
    told = table["notes"].dropna() if "notes" in table else table["state"][:0]
    for note, number in told[told != ""].value_counts().items():
        click.echo(f"note ({number} cases): {note}", err=True)
    parts = [
        f"{counts[state]} {state}" for state in ("done", "unchanged", "failed") if state in counts
    ]
    click.echo(f"{', '.join(parts) or 'no case'}; {path}")
    return 1 if "failed" in counts else 0
