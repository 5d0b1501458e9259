"""`cwdm segment`: complete cases in, tumor segmentations out."""

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
    help="Folder of a case, of cases (BraTS, nnU-Net, BIDS), or a CSV file.",
)
@click.option(
    "--model",
    default="default",
    show_default=True,
    metavar="SPEC",
    help="The segmenter: default, monai-bundle:DIR, nnunet:DIR, onnx:FILE, torchscript:FILE, "
    "msnet:FILE, brats:NAME or command:'PROGRAM ... {input} {output}'.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for <id>-seg.nii.gz and its .json; outside the input.",
)
@click.option(
    "--impute-missing",
    is_flag=True,
    help="Synthesize what is missing first, into OUTPUT/completed.",
)
@click.option(
    "--replace",
    multiple=True,
    metavar="MODALITY",
    help="With --impute-missing: synthesize this even where it was acquired; repeatable.",
)
@click.option(
    "--enhancing",
    type=click.Choice(["3", "4"]),
    default="3",
    show_default=True,
    help="Label of enhancing tumor in the output: 3 since BraTS 2023, 4 before.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For a program: how long it may take for a case. [default: an hour]",
)
@options.device
@options.precision
@shared.placement
@click.pass_context
def segment(
    ctx: click.Context,
    source: Path,
    model: str,
    output: Path,
    impute_missing: bool,
    replace: tuple[str, ...],
    enhancing: str,
    timeout: float | None,
    device: str,
    precision: str,
    place: shared.Place,
) -> None:
    """Segment the tumor of a case, or of every case of a cohort.

    The segmenter need not be ours. Labels are 1 necrosis, 2 edema, 3 enhancing tumor, on the case's
    own grid; the .json says which inputs were synthetic. The same command goes on after an
    interruption. A case that fails is reported and the others go on; then the exit code is 1.
    Research use only.

    \b
    cwdm segment --input completed/ --output segmented/
    cwdm segment --input cohort/ --impute-missing --model nnunet:results/ --output segmented/
    """
    from cwdm.errors import InputError
    from cwdm.handoff import segment as segment_all
    from cwdm.imputation import Imputation
    from cwdm.segmenters import PROGRAMS

    if replace and not impute_missing:
        raise InputError("--replace: found without --impute-missing")
    spreads = model.partition(":")[0] not in PROGRAMS
    executor = place.executor(device, output, spreads=spreads)
    how = Imputation(replace=replace, precision=precision)  # type: ignore[arg-type]
    with shared.progress("segmenting") as report:
        table = segment_all(
            source,
            output,
            model=model,
            impute_missing=how if impute_missing else False,
            enhancing=int(enhancing),
            precision=precision,  # type: ignore[arg-type]
            timeout_s=timeout,
            executor=executor,
            report=report,
        )
    ctx.exit(shared.finish(table, output / "segment.csv"))
