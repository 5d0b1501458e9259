"""`cwdm evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cwdm.case import Case
    from cwdm.engine import Precision
    from cwdm.evaluate import Predict
    from cwdm.floors import VoxelRegression
    from cwdm.modality import Modality
    from cwdm.model import Model
    from cwdm.protocols import ProtocolName
    from cwdm.synthesis import Synthesizer

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--truth", required=True, type=FOLDER, help="Complete cases, at or below a folder.")
@click.option(
    "--pred",
    type=FOLDER,
    help="Predictions to judge, named <id>-<modality>.nii.gz, anywhere below a folder. "
    "Without it the images are synthesized, each from the other three modalities.",
)
@click.option(
    "--fit",
    type=FOLDER,
    help="Other complete cases, to fit regressions on that a model has to beat. "
    "Without it the only floors are blank images and copies of the other modalities.",
)
@click.option(
    "--seg",
    type=FOLDER,
    help="Segmentations <id>-seg.nii.gz, anywhere below a folder, instead of those of the cases.",
)
@click.option(
    "--protocol",
    type=click.Choice(["aligned", "brasyn", "published"]),
    default="aligned",
    show_default=True,
    help="How images are scaled and where they are compared: after a fit of the intensities in the "
    "brain; as in the BraSyn challenge; or as published for cWDM.",
)
@click.option(
    "--model",
    "models",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Model to use for its target instead of the one that ships; repeatable.",
)
@click.option("--modality", "names", multiple=True, help="Judge only this modality; repeatable.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--name", default="cwdm", show_default=True, help="Of what is judged, in the tables.")
@click.option("--pictures", is_flag=True, help="Draw <id>-<modality>.png for every image too.")
@options.device
@options.precision
@options.seed
@options.overwrite
def evaluate(
    truth: Path,
    pred: Path | None,
    fit: Path | None,
    seg: Path | None,
    protocol: "ProtocolName",
    models: tuple[Path, ...],
    names: tuple[str, ...],
    output: Path,
    name: str,
    pictures: bool,
    device: str,
    precision: "Precision",
    seed: int,
    overwrite: bool,
) -> None:
    """Compare a model with simpler predictions on held-out cases.

    Each modality of each complete case is withheld and predicted. Writes metrics.csv (one row per
    image, method and region), summary.csv, summary.json and summary.md, and prints the table.
    """
    from tqdm import tqdm

    from cwdm.case import find_cases
    from cwdm.errors import InputError
    from cwdm.evaluate import (
        FILES,
        Predictions,
        compare,
        complete_cases,
        markdown,
        picture,
        summarize,
        tabulate,
        verdicts,
        with_segmentations,
        write_tables,
    )
    from cwdm.modality import parse_modality
    from cwdm.montage import write_png
    from cwdm.protocols import PROTOCOLS

    there = [output / file for file in FILES if (output / file).exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]}: already exists, expected a new folder or --overwrite")
    if pred is not None and models:
        raise InputError("found both --pred and --model, expected one of them")
    found = find_cases(truth)
    cases = complete_cases(found)
    if len(cases) < len(found):
        click.echo(f"Left out {len(found) - len(cases)} cases that are not complete.", err=True)
    if seg is not None:
        cases = with_segmentations(cases, seg)
    targets = [parse_modality(each) for each in names]
    notes: dict[str, object] = {"method": name}
    if pred is not None:
        predictions = Predictions.find(pred, cases)
        targets = targets or list(predictions.targets)
        predictions.require(cases, targets)
        predict: Predict = predictions
    else:
        synthesizers = _synthesizers(models, targets, device, precision)
        targets = list(synthesizers)
        predict = _predict_with(synthesizers, seed)
        digests = {target: each.model.sha256 for target, each in synthesizers.items()}
        notes |= {"models": digests, "seed": seed}
    regressions: list[VoxelRegression] = []
    if fit is not None:
        fit_cases = complete_cases(find_cases(fit))
        regressions = _regressions(fit_cases, cases, targets)
        notes["floors fitted on"] = [case.id for case in fit_cases]
    else:
        click.echo("Without --fit the only floors are blank images and copies.", err=True)
    scores = []
    with tqdm(total=len(cases) * len(targets), unit="image", disable=None) as bar:
        for case in cases:
            bar.set_description(case.id)
            for comparison in compare(
                case,
                predict,
                targets=targets,
                regressions=regressions,
                name=name,
                protocol=PROTOCOLS[protocol],
            ):
                scores += comparison.scores
                if pictures:
                    file = output / f"{case.id}-{comparison.target}.png"
                    write_png(picture(comparison), file, overwrite=overwrite)
                bar.update()
    table = tabulate(scores)
    write_tables(table, output, notes=notes, overwrite=overwrite)
    summary = summarize(table)
    text = PROTOCOLS[protocol].text
    click.echo("\n".join([text, "", markdown(summary), *verdicts(summary), f"Written to {output}"]))


def _synthesizers(
    models: "Sequence[Path]", targets: "Sequence[Modality]", device: str, precision: "Precision"
) -> "dict[Modality, Synthesizer]":
    """One per target; without targets, for the targets of the models, without models for all."""
    from cwdm.errors import InputError
    from cwdm.modality import SEQUENCES
    from cwdm.model import default_model, load_model
    from cwdm.synthesis import Synthesizer

    given: dict[Modality, Model] = {}
    for path in models:
        model = load_model(path)
        wanted = [target for target in model.config.targets if target in (targets or SEQUENCES)]
        if not wanted or any(target in given for target in wanted):
            expected = "one model each" if wanted else ", ".join(targets or SEQUENCES)
            raise InputError(
                f"{path}: a model for {', '.join(model.config.targets)}, expected {expected}"
            )
        given |= dict.fromkeys(wanted, model)
    return {
        target: Synthesizer(
            given.get(target) or load_model(default_model(target)),
            target,
            device=device,
            precision=precision,
        )
        for target in targets or list(given) or list(SEQUENCES)
    }


def _predict_with(synthesizers: "dict[Modality, Synthesizer]", seed: int) -> "Predict":
    """Predictions by synthesis, every case with the same seed."""
    return lambda case, target: synthesizers[target](case, seed=seed).volume.voxels


def _regressions(
    fit_cases: "Sequence[Case]", cases: "Sequence[Case]", targets: "Sequence[Modality]"
) -> "list[VoxelRegression]":
    """Fitted floors; InputError if they would have seen the truth."""
    from tqdm import tqdm

    from cwdm.errors import InputError
    from cwdm.evaluate import draw_sample, fit_regressions

    seen = {case.id for case in cases} & {case.id for case in fit_cases}
    if seen:
        raise InputError(f"--fit: case {min(seen)} is also among --truth, expected other cases")
    sample = draw_sample(tqdm(fit_cases, "reading --fit", unit="case", leave=False, disable=None))
    bar = tqdm(targets, "fitting floors", unit="modality", leave=False, disable=None)
    return [regression for target in bar for regression in fit_regressions(sample, [target])]
