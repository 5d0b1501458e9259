"""`cwdm generate`: images from noise alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from cwdm.provenance import SampleProvenance
    from cwdm.volume import Volume

PICTURE = "samples.png"
ROWS = 8
"""Samples in the picture, at most."""


@click.command()
@click.option(
    "--model",
    default="small-brain",
    show_default=True,
    metavar="NAME|FILE",
    help="One that ships, or a file: .safetensors, or a published checkpoint (.pt).",
)
@options.preset
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="How many.")
@click.option(
    "--start",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the first one: splits a run.",
)
@click.option(
    "--size",
    callback=options.size,
    metavar="N|X,Y,Z",
    help="Voxels per axis. [default: the model's]",
)
@click.option("--target", help="Which sequence, for a model that makes several.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("generated"),
    show_default=True,
    help="Folder for the images.",
)
@options.steps
@options.sampler
@options.seed
@options.device
@options.precision
@options.memory_limit
@click.option(
    "--compat",
    type=click.Choice(["published"]),
    help="Write what generation_sample.py of wdm-3d writes.",
)
@options.overwrite
def generate(
    model: str,
    preset: str | None,
    count: int,
    start: int,
    size: tuple[int, ...] | None,
    target: str | None,
    output: Path,
    steps: int | tuple[int, ...] | None,
    sampler: str | None,
    seed: int,
    device: str,
    precision: str,
    memory_limit: int | None,
    compat: str | None,
    overwrite: bool,
) -> None:
    """Generate images of no patient, from noise alone.

    Sample N of a seed is always the same image. Samples that are there already are not made again,
    so that a run can be interrupted and split. Research use only.

    \b
    cwdm generate --count 4 --seed 1 --output generated/
    """
    from tqdm import tqdm

    from cwdm.files import check_target
    from cwdm.generation import Generator, is_done, sample_paths
    from cwdm.modality import parse_modality
    from cwdm.montage import check_picture

    from .memory import memory_line

    generator = Generator.load(
        model,
        preset=preset,
        device=device,
        precision=precision,  # type: ignore[arg-type]
        memory_limit=memory_limit,
    )
    wanted = {
        "seed": seed,
        "size": size,
        "steps": steps,
        "sampler": sampler,
        "target": parse_modality(target) if target else None,
        "compat": compat is not None,
    }
    plans = [generator.plan(number, **wanted) for number in range(start, start + count)]  # type: ignore[arg-type]
    check_picture(output / PICTURE)  # fail before the work, not after
    todo = [plan for plan in plans if overwrite or not is_done(plan, output)]
    for plan in todo:
        check_target(sample_paths(plan, output)[0], overwrite)
    if done := len(plans) - len(todo):
        click.echo(f"note: {done} of {count} samples are there already", err=True)
    if todo:
        generator.engine.fit(todo[0].size)
        click.echo(memory_line(generator.engine, todo[0].size), err=True)
    warnings: dict[str, None] = {}
    with tqdm(total=len(todo), unit="step", disable=not todo) as bar:
        for index, plan in enumerate(todo):

            def show(done: int, total: int, index: int = index) -> None:
                bar.total = len(todo) * total
                bar.update(index * total + done - bar.n)

            bar.set_description(f"sample {index + 1} of {len(todo)}")
            sample = generator(plan.number, **wanted, progress=show)  # type: ignore[arg-type]
            tqdm.write(str(sample.write(output, overwrite=overwrite)))
            warnings |= dict.fromkeys(sample.provenance.warnings)
    for warning in warnings:
        click.echo(f"note: {warning}", err=True)
    _draw(plans[:ROWS], output)


def _draw(plans: list[SampleProvenance], output: Path) -> None:
    """One picture of the first samples."""
    from cwdm.errors import InputError
    from cwdm.generation import sample_paths
    from cwdm.montage import sheet, write_png
    from cwdm.volume import read_volume

    def samples() -> Iterator[tuple[str, Volume]]:
        for plan in plans:
            with suppress(InputError):  # an empty one cannot be read, and would be black
                yield f"sample {plan.number}", read_volume(sample_paths(plan, output)[0])

    first, last = plans[0], plans[-1]
    numbers = f"{first.number}" if first is last else f"{first.number} to {last.number}"
    picture = sheet(
        samples(),
        heading=f"{first.model.name}, samples {numbers}",
        notes=[
            f"{first.target}, {first.steps} step(s) of {first.sampler}, seed {first.seed}; "
            f"cwdm {first.cwdm}.",
            "Generated from noise: no patient, not for diagnosis.",
        ],
    )
    write_png(picture, output / PICTURE, overwrite=True)
    click.echo(output / PICTURE)
