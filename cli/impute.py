"""`cwdm impute`: a cohort in, complete cases out."""

from __future__ import annotations

from pathlib import Path

import click

from . import cohort as shared
from . import options


@click.command()
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of cases (BraTS, nnU-Net, BIDS) or a CSV file.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the complete cases; outside the input.",
)
@click.option(
    "--layout",
    type=click.Choice(["brats", "nnunet", "bids", "brasyn"]),
    default="brats",
    show_default=True,
    help="How the output is named; brasyn holds the synthetic images alone.",
)
@click.option(
    "--replace",
    multiple=True,
    metavar="MODALITY",
    help="Synthesize this even where it was acquired: it is spoilt; repeatable.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A model file, or a published checkpoint, for all modalities. [default: those that ship]",
)
@options.preset
@options.steps
@options.sampler
@options.seed
@click.option("--copy", is_flag=True, help="Copy acquired images instead of linking to them.")
@click.option("--dry-run", is_flag=True, help="Only show what there is to do.")
@options.device
@options.precision
@options.memory_limit
@shared.placement
@click.pass_context
def impute(
    ctx: click.Context,
    source: Path,
    output: Path,
    layout: str,
    replace: tuple[str, ...],
    model: Path | None,
    preset: str | None,
    steps: int | tuple[int, ...] | None,
    sampler: str | None,
    seed: int,
    copy: bool,
    dry_run: bool,
    device: str,
    precision: str,
    memory_limit: int | None,
    place: shared.Place,
) -> None:
    """Complete the cases of a cohort.

    What a case lacks is synthesized, what was acquired is linked to and never changed. The same
    command goes on after an interruption: what is finished and unchanged is not done again. A case
    that fails is reported and the others go on; then the exit code is 1. Research use only.

    \b
    cwdm impute --input cohort/ --output completed/ --dry-run
    cwdm impute --input cohort/ --output completed/
    """
    from cwdm.imputation import Imputation, apart
    from cwdm.imputation import impute as complete
    from cwdm.imputation import plan as plan_for
    from cwdm.layouts import find

    executor = place.executor(device, output, memory_limit=memory_limit)
    apart(source, output)
    found = find(source)
    job = Imputation(
        layout=layout,  # type: ignore[arg-type]
        replace=replace,  # type: ignore[arg-type]
        model=model,
        preset=preset,
        seed=seed,
        steps=steps,
        sampler=sampler,
        precision=precision,  # type: ignore[arg-type]
        memory_limit=memory_limit,
        copy=copy,
    )
    if dry_run:
        workers = executor.processes(len(found.cases))
        plan = plan_for(job, found, output, device=device, workers=workers)
        click.echo(plan.table.to_string(index=False))
        click.echo(
            f"{plan.images} images to synthesize, about {_duration(plan.seconds)} and "
            f"{plan.size / 1e6:.0f} MB"
        )
        ctx.exit(1 if (plan.table["state"] == "failed").any() else 0)
    with shared.progress("imputing") as report:
        table = complete(found, output, job=job, executor=executor, report=report)
    ctx.exit(shared.finish(table, output / "impute.csv"))


def _duration(seconds: float) -> str:
    """In words a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
