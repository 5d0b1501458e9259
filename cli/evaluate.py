"""`cwdm evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cwdm.case import Case
    from cwdm.evaluate import Predict
    from cwdm.floors import VoxelRegression
    from cwdm.machine import Precision
    from cwdm.modality import Modality
    from cwdm.model import Model
    from cwdm.protocols import ProtocolName
    from cwdm.synthesis import Synthesizer

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--truth", required=True, type=FOLDER, help="Complete cases, at or below a folder.")
@click.option(
    "--pred",
    "folders",
    multiple=True,
    type=FOLDER,
    help="Predictions to judge, named <id>-<modality>.nii.gz, anywhere below a folder; repeatable, "
    "others are tested against the first. Without it the images are synthesized, each from the "
    "other three modalities.",
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
    help="Segmentations <id>-seg.nii.gz of every case, in a folder or else below it, instead of "
    "those of the cases.",
)
@click.option(
    "--protocol",
    type=click.Choice(["aligned", "brasyn", "published", "cwdm"]),
    callback=lambda ctx, param, value: "published" if value == "cwdm" else value,
    default="aligned",
    show_default=True,
    help="How images are scaled and where they are compared: after a fit of the intensities in the "
    "brain; as in the BraSyn challenge; or as published for cWDM, which has two names.",
)
@click.option(
    "--model",
    "models",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Model to use for its target instead of the one that ships; repeatable.",
)
@options.preset
@click.option("--modality", "names", multiple=True, help="Judge only this modality; repeatable.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--name",
    "methods",
    multiple=True,
    help="Of what is judged, in the tables; once for each --pred. [default: cwdm, or the folders]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Synthesize the mean of several, and judge their interval, too.",
)
@click.option(
    "--perceptual",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of Med3D's ResNet-50, for a perceptual distance as well.",
)
@click.option("--pictures", is_flag=True, help="Draw <id>-<modality>.png for every image too.")
@options.steps
@options.sampler
@options.seed
@options.device
@options.precision
@options.overwrite
def evaluate(
    truth: Path,
    folders: tuple[Path, ...],
    fit: Path | None,
    seg: Path | None,
    protocol: "ProtocolName",
    models: tuple[Path, ...],
    preset: str | None,
    names: tuple[str, ...],
    output: Path,
    methods: tuple[str, ...],
    samples: int,
    perceptual: Path | None,
    pictures: bool,
    steps: int | tuple[int, ...] | None,
    sampler: str | None,
    seed: int,
    device: str,
    precision: "Precision",
    overwrite: bool,
) -> None:
    """Compare a model with simpler predictions on held-out cases, or several with each other.

    Each modality of each complete case is withheld and predicted. Writes metrics.csv (one row per
    image, method and region), summary.csv, tests.csv, summary.json and summary.md, and prints the
    table; what was synthesized goes to predictions/. cwdm report makes a page of it.

    \b
    cwdm evaluate --truth held-out/ --output evaluation/
    cwdm evaluate --truth held-out/ --pred first/ --pred second/ --output both/
    """
    from dataclasses import replace

    from tqdm import tqdm

    from cwdm.case import find_cases
    from cwdm.errors import InputError
    from cwdm.evaluate import (
        Predictions,
        compare,
        complete_cases,
        images,
        picture,
        tabulate,
    )
    from cwdm.files import check_target
    from cwdm.imputation import apart
    from cwdm.modality import parse_modality
    from cwdm.montage import write_png
    from cwdm.protocols import PROTOCOLS
    from cwdm.summary import (
        FILES,
        RELIABILITY_FILE,
        write_tables,
    )
    from cwdm.synthesis import output_paths

    apart(truth, output)
    judged = _names(methods, folders)
    targets = list(dict.fromkeys(parse_modality(each) for each in names))
    notes: dict[str, object] = {"truth": str(truth)}
    distances = None
    if perceptual is not None:  # before folders are made: nothing is left of what cannot begin
        from cwdm.perceptual import Perceptual

        loaded = Perceptual.load(perceptual, device=device)
        distances, notes["perceptual"] = loaded.distances, loaded.sha256
    for file in (*FILES, RELIABILITY_FILE):
        check_target(output / file, overwrite)
    found = find_cases(truth)
    cases = complete_cases(found)
    if len(cases) < len(found):
        click.echo(f"Left out {len(found) - len(cases)} cases that are not complete.", err=True)
    if seg is not None:
        from cwdm.overlap import find_segmentations

        bare = [replace(case, segmentation=None) for case in cases]  # theirs may be there again
        segmented = find_segmentations(seg, bare)
        cases = [replace(case, segmentation=segmented[case.id]) for case in bare]
    predict: dict[str, Predict]
    if folders:
        if models or preset or samples > 1 or steps or sampler:
            raise InputError(
                "found --pred and what is for synthesis (--model, --preset, --samples, --steps, "
                "--sampler), expected one of them"
            )
        predictions = {
            name: Predictions.find(folder, cases)
            for name, folder in zip(judged, folders, strict=True)
        }
        there = [each.targets for each in predictions.values()]
        targets = targets or [target for target in there[0] if all(target in t for t in there)]
        for each in predictions.values():
            each.require(cases, targets)
        predict = dict(predictions)
        notes["predictions"] = {
            name: str(folder) for name, folder in zip(judged, folders, strict=True)
        }
    else:
        synthesizers = _synthesizers(models, preset, targets, device, precision)
        targets = list(synthesizers)
        synthesized = output / "predictions"
        for case in cases:  # fail before the work, not after
            for target in targets:
                output_paths(case, target, synthesized, overwrite=overwrite, maps=samples > 1)
        chain = {"seed": seed, "samples": samples, "steps": steps, "sampler": sampler}
        predict = {judged[0]: _predict_with(synthesizers, synthesized, overwrite, chain)}
        digests = {target: each.model.sha256 for target, each in synthesizers.items()}
        notes |= {"models": digests, **chain}
    regressions: list[VoxelRegression] = []
    if fit is not None:
        fit_cases = complete_cases(find_cases(fit))
        regressions = _regressions(fit_cases, cases, targets)
        notes["floors fitted on"] = [case.id for case in fit_cases]
    else:
        click.echo("Without --fit the only floors are blank images and copies.", err=True)
    scores, reliabilities = [], []
    with tqdm(total=len(cases) * len(targets), unit="image", disable=None) as bar:
        for case in cases:
            bar.set_description(case.id)
            for comparison in compare(
                case,
                predict,
                targets=targets,
                regressions=regressions,
                protocol=PROTOCOLS[protocol],
                distances=distances,
            ):
                scores += comparison.scores
                reliabilities += comparison.reliabilities
                if pictures:
                    drawn = output / f"{case.id}-{comparison.target}.png"
                    write_png(picture(comparison), drawn, overwrite=overwrite)
                bar.update()
    if not folders:
        predictions = {judged[0]: Predictions.find(synthesized, cases)}
    write_tables(
        tabulate(scores),
        output,
        notes={**notes, "images": images(cases, predictions, targets, output)},
        reliabilities=tabulate(reliabilities),
        overwrite=overwrite,
    )
    said = (output / "summary.md").read_text(encoding="utf-8")
    click.echo(f"{said}\nWritten to {output}")


def _names(given: "Sequence[str]", folders: "Sequence[Path]") -> list[str]:
    """One for each folder of predictions, or for what is synthesized."""
    from cwdm.errors import InputError
    from cwdm.evaluate import RESERVED

    count = max(len(folders), 1)
    if given and len(given) != count:
        raise InputError(f"found {len(given)} times --name, expected it {count} times, or not")
    names = list(given) or ([str(folder) for folder in folders] if count > 1 else ["cwdm"])
    if taken := RESERVED & set(names):
        raise InputError(f"--name {min(taken)!r}: that is the name of a floor, expected another")
    if len(set(names)) < count:
        raise InputError(f"{names[0]}: judged twice, expected different --pred and --name")
    return names


def _synthesizers(
    models: "Sequence[Path]",
    preset: str | None,
    targets: "Sequence[Modality]",
    device: str,
    precision: "Precision",
) -> "dict[Modality, Synthesizer]":
    """One per target; without targets, for the targets of the models, without models for all."""
    from cwdm.errors import InputError
    from cwdm.modality import SEQUENCES
    from cwdm.model import default_model, load_model
    from cwdm.synthesis import Synthesizer

    given: dict[Modality, Model] = {}
    for path in models:
        model = load_model(path, targets[0] if len(targets) == 1 else None, preset=preset)
        wanted = [target for target in model.config.targets if target in (targets or SEQUENCES)]
        if not wanted or any(target in given for target in wanted):
            expected = "one model each" if wanted else ", ".join(targets or SEQUENCES)
            raise InputError(
                f"{path}: a model for {', '.join(model.config.targets)}, expected {expected}"
            )
        given |= dict.fromkeys(wanted, model)
    return {
        target: Synthesizer(
            given.get(target) or load_model(default_model(target), preset=preset),
            target,
            device=device,
            precision=precision,
        )
        for target in targets or list(given) or list(SEQUENCES)
    }


def _predict_with(
    synthesizers: "dict[Modality, Synthesizer]",
    folder: Path,
    overwrite: bool,
    chain: dict[str, Any],
) -> "Predict":
    """Predictions by synthesis, written into a folder, every case with the same seed."""
    from cwdm.evaluate import Prediction

    def predict(case: "Case", target: "Modality") -> Prediction:
        synthesis = synthesizers[target](case, **chain)
        synthesis.write(folder, overwrite=overwrite)
        return Prediction.of(synthesis)

    return predict


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
