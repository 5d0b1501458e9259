"""`cwdm calibrate`: what the spread of a model's samples is worth, measured."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from cwdm.machine import Precision
    from cwdm.uncertainty import HeldOut


@click.command()
@click.option(
    "--model",
    "name",
    required=True,
    help="A model file (.safetensors), or the name of one that ships.",
)
@click.option(
    "--cases",
    "root",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Complete cases that the model was not trained on, at or below a folder.",
)
@click.option("--modality", "names", multiple=True, help="Only this target; repeatable.")
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=6,
    show_default=True,
    help="Samples per case; the calibration is for that number.",
)
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.8,
    show_default=True,
    help="Share of the brain's voxels that the interval is to hold.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    callback=options.ending(".safetensors"),
    help="The model with its calibration (.safetensors); the figures go beside it (.json).",
)
@options.steps
@options.sampler
@options.seed
@options.device
@options.precision
@options.overwrite
def calibrate(
    name: str,
    root: Path,
    names: tuple[str, ...],
    samples: int,
    coverage: float,
    output: Path,
    steps: int | tuple[int, ...] | None,
    sampler: str | None,
    seed: int,
    device: str,
    precision: "Precision",
    overwrite: bool,
) -> None:
    """Measure how far a model's samples lie from the truth, and store it with the model.

    The target of every case is withheld and sampled. The interval that cwdm synthesize --samples
    then writes holds the truth in that share of the brain's voxels; the table says what it does on
    a case that took no part.

    \b
    cwdm calibrate --model small-t2f --cases held-out/ --output calibrated.safetensors
    """
    import json
    from dataclasses import asdict

    from tqdm import tqdm

    from cwdm.calibration import calibrate as measure
    from cwdm.calibration import calibration_cases
    from cwdm.errors import InputError
    from cwdm.files import atomic_write, check_target
    from cwdm.modality import parse_modality
    from cwdm.model import find_model, load_model, save_calibrated
    from cwdm.synthesis import Synthesizer

    figures = output.with_suffix(".json")
    for path in (output, figures):
        check_target(path, overwrite)
    model = load_model(find_model(name))
    if model.path.suffix != output.suffix:
        raise InputError(f"{name}: a checkpoint holds no calibration, expected cwdm models convert")
    synthesizers = [
        Synthesizer(model, target, device=device, precision=precision)
        for target in [parse_modality(each) for each in names] or model.config.targets
    ]
    cases = calibration_cases(root)
    calibrations, report = dict(model.calibration), {}
    for synthesizer in synthesizers:
        target = synthesizer.target
        with tqdm(total=len(cases) * samples, desc=target, unit="sample", disable=None) as bar:
            calibration, rows = measure(
                synthesizer,
                cases,
                samples=samples,
                coverage=coverage,
                seed=seed,
                steps=steps,
                sampler=sampler,
                progress=bar.update,
            )
        calibrations[target] = calibration
        report[target] = asdict(calibration) | {"left_out": [asdict(row) for row in rows]}
        click.echo(_table(target, calibration.q, rows))
    save_calibrated(model.path, calibrations, output, overwrite=overwrite)
    with atomic_write(figures, overwrite) as temporary:
        written = {"model": model.config.name, "weights_from": model.sha256, "targets": report}
        temporary.write_text(json.dumps(written, indent=2) + "\n")
    click.echo(f"{output}\n{figures}")


def _table(target: str, q: float, rows: "list[HeldOut]") -> str:
    """For each case, by the q of the others: coverage, and rank correlation of std and error."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    heads = "case", "q of others", "covered", "in tumor", "std ~ error", "in tumor"
    lines = [
        f"{target}: q = {q:.3f}",
        "".join(f"{head:>13}" for head in heads[1:]) + "  " + heads[0],
    ]
    for row in rows:
        values = (
            f"{row.q:.3f}",
            cell(row.coverage, ".1%"),
            cell(row.coverage_tumor, ".1%"),
            cell(row.agreement, ".3f"),
            cell(row.agreement_tumor, ".3f"),
        )
        lines.append("".join(f"{value:>13}" for value in values) + "  " + row.case)
    return "\n".join(lines)
