"""`cwdm synthesize`: one case in, the modalities it lacks out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cwdm.engine import Engine


@click.command()
@click.option(
    "--input",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the case: <id>-t1n.nii.gz, <id>-t1c.nii.gz, ...",
)
@click.option(
    "--missing",
    multiple=True,
    metavar="MODALITY",
    help="What to synthesize: t1n, t1c, t2w or t2f; repeatable. [default: what the case lacks]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("synthetic"),
    show_default=True,
    help="Folder for <id>-<modality>.nii.gz and its .json.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A model file (.safetensors), or a published checkpoint (.pt). [default: the one that "
    "ships]",
)
@options.preset
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of several, write the mean, and <id>-<modality>-std, -low and -high.nii.gz.",
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
    help="Write what the scripts of the published cWDM write: their crop, noise and values.",
)
@options.overwrite
@click.option("--preview", is_flag=True, help="Also draw <id>-<modality>.png.")
def synthesize(
    folder: Path,
    missing: tuple[str, ...],
    output: Path,
    model: Path | None,
    preset: str | None,
    samples: int,
    steps: int | tuple[int, ...] | None,
    sampler: str | None,
    seed: int,
    device: str,
    precision: str,
    memory_limit: int | None,
    compat: str | None,
    overwrite: bool,
    preview: bool,
) -> None:
    """Synthesize the missing modality of a case.

    The image is written on the case's own grid and marked as synthetic; a JSON file beside it says
    how it was made. Nothing acquired is ever overwritten. Research use only.

    \b
    cwdm synthesize --input case/ --missing t2f --output synthetic/ --preview
    """
    from tqdm import tqdm

    from cwdm.case import read_case
    from cwdm.errors import InputError
    from cwdm.files import check_target
    from cwdm.modality import parse_modality
    from cwdm.provenance import sidecar
    from cwdm.synthesis import Synthesizer, output_paths
    from cwdm.volume import acquired

    from .memory import memory_line

    case = read_case(folder)
    targets = [parse_modality(name) for name in missing] or list(acquired(case).missing)
    if not targets:
        raise InputError(f"{folder}: no modality is missing, expected --missing MODALITY")
    for target in dict.fromkeys(targets):
        given = case.without(*(other for other in targets if other != target))
        # fail before the work, not after
        output_paths(case, target, output, overwrite=overwrite, maps=samples > 1)
        if preview and compat and target in given.images:
            raise InputError("--preview: the image of sample.py lies on no case, drop --compat")
        if preview:
            from cwdm.montage import check_picture

            picture = output / f"{case.id}-{target}.png"
            check_target(picture, overwrite)
            check_picture(picture)
        synthesizer = Synthesizer.load(
            target,
            model,
            preset=preset,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            memory_limit=memory_limit,
        )
        with tqdm(desc=f"{case.id} {target}", unit="step") as bar:

            def show(done: int, total: int, bar: tqdm = bar) -> None:  # type: ignore[type-arg]
                bar.total = total
                bar.update(done - bar.n)

            def announce(size: "Sequence[int]", engine: "Engine" = synthesizer.engine) -> None:
                tqdm.write(memory_line(engine, size), file=sys.stderr)

            synthesis = synthesizer(
                given,
                seed=seed,
                samples=samples,
                steps=steps,
                sampler=sampler,
                compat=compat is not None,
                announce=announce,
                progress=show,
            )
        path = synthesis.write(output, overwrite=overwrite)
        click.echo(path)
        if interval := synthesis.provenance.interval:
            for name in interval.files.values():
                click.echo(path.with_name(name))
            if interval.calibrated:
                told = f"the interval says nothing in {interval.wide:.1%} of the brain"
                click.echo(f"note: {told}; {sidecar(path).name} names the places", err=True)
        for warning in synthesis.provenance.warnings:
            click.echo(f"note: {warning}", err=True)
        if preview:
            from cwdm.montage import preview as draw
            from cwdm.montage import write_png

            write_png(draw(synthesis), picture, overwrite=overwrite)
            click.echo(picture)
