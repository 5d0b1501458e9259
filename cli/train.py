"""`cwdm train`: a configuration and cases in, a model out."""

import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cwdm.cache import CachedCase
    from cwdm.config import Config
    from cwdm.dataset import Source
    from cwdm.train import Precision
    from cwdm.validation import HeldOut


def _weighted(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, float]]:
    """(path or "simulate[:LABELS]", weight) of each."""
    sources = []
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            weight = float(number) if name else 1.0
        except ValueError:
            name, weight = "", 1.0
        if not 0 < weight < math.inf:
            raise click.BadParameter(f"{value!r}: expected a weight above 0", ctx, param)
        sources.append((name or value, weight))
    return sources


@click.command()
@click.option("--config", required=True, metavar="NAME|FILE", help="A preset or a TOML file.")
@click.option(
    "--data",
    metavar="PATH[=WEIGHT]",
    multiple=True,
    required=True,
    callback=_weighted,
    help="Cases: a cache of cwdm prepare, or whatever that reads; or 'simulate' for simulated ones "
    "without an end ('simulate:FOLDER' from label maps). Repeatable; each is drawn from equally "
    "often, or by its weight.",
)
@click.option(
    "--val",
    type=click.Path(exists=True, path_type=Path),
    help="Other complete cases, to validate on now and then.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option(
    "--init",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A model of the same network to start from.",
)
@click.option(
    "--overfit",
    metavar="N",
    type=click.IntRange(min=1),
    help="Learn a block of N cases by heart: does it learn at all?",
)
@click.option("--dry-run", is_flag=True, help="Say what would be trained and what it takes; stop.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the network first (minutes).")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Processes that make samples ahead of time, for each that trains.",
)
@click.option(
    "--tracker",
    type=click.Choice(["tensorboard", "wandb", "mlflow", "none"]),
    default="tensorboard",
    show_default=True,
    help="Where curves go.",
)
@options.device
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Arithmetic of the network; auto takes bf16 where the hardware is fast at it.",
)
def train(
    config: str,
    data: list[tuple[str, float]],
    val: Path | None,
    output: Path,
    init: Path | None,
    overfit: int | None,
    dry_run: bool,
    compiled: bool,
    workers: int,
    tracker: str,
    device: str,
    precision: "Precision",
) -> None:
    """Train a model; the same command continues a run that was stopped.

    For several GPUs or machines put `accelerate launch` or `torchrun` in front (-m cwdm.cli train).

    \b
    cwdm train --config small-t2f --data cases/ --val held-out/ --output runs/t2f
    """
    from tqdm import tqdm

    from cwdm.config import Config
    from cwdm.diagnosis import diagnose, read_run
    from cwdm.errors import InputError
    from cwdm.run import MODEL
    from cwdm.train import launched
    from cwdm.train import train as steps

    settings = Config.read(config)
    if dry_run:
        for name, _ in data:
            kind, _, labels = name.partition(":")
            path = Path(labels) if kind == "simulate" else Path(name)
            if not path.exists():
                raise InputError(f"{path}: no such file or folder, expected cases")
        click.echo(_plan(settings, precision, device))
        return
    main = int(os.environ.get("RANK", "0")) == 0  # of the processes that were launched together
    with launched(device).main_process_first():  # the others find everything prepared
        sources = _sources(data, settings, output, device, main)
        held_out = _held_out(val, output, main) if val else None
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: signals.append(received))
    run = steps(
        settings,
        sources,
        output,
        held_out=held_out,
        device=device,
        precision=precision,
        compiled=compiled,
        init=init,
        overfit=overfit or 0,
        workers=workers,
        tracker=None if tracker == "none" else tracker,
        stop=lambda: bool(signals),
    )
    done = 0
    with tqdm(
        total=settings.training.iterations,
        unit="step",
        smoothing=0.01,
        disable=None if main else True,
    ) as bar:
        for step in run:
            done = step.step
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{step.loss:.4f}")
            if step.validation is not None and main:
                tqdm.write(_line(step.validation))
    if not main:
        return
    if signals and done < settings.training.iterations:
        click.echo(f"Stopped after step {done}, which is saved; the same command continues.")
        if signal.SIGINT in signals:
            raise click.Abort
        return
    for finding in diagnose(read_run(output)):
        if finding.severity == "problem":
            click.echo(f"{finding.about}: {finding.message}", err=True)
    click.echo(output / MODEL)


def _sources(
    data: "Sequence[tuple[str, float]]", config: "Config", output: Path, device: str, main: bool
) -> "list[Source]":
    """What each --data stands for; cases that are not prepared yet are, in the run's folder."""
    from cwdm.anatomy import find_label_maps
    from cwdm.dataset import Source
    from cwdm.endless import simulator
    from cwdm.train import launched

    sources = []
    for number, (name, weight) in enumerate(data):
        kind, _, labels = name.partition(":")
        if kind == "simulate":
            training = config.training
            endless = simulator(
                find_label_maps(Path(labels)) if labels else [],
                seed=training.seed,
                per_case=training.patches_per_simulation,
                normalization=config.images.normalization,
                device=launched(device).device,
            )
            sources.append(Source(name, endless, weight))
        else:
            cases = _prepared(Path(name), output / "cache" / str(number), main)
            sources.append(Source(name, cases, weight))
    return sources


def _prepared(path: Path, folder: Path, main: bool) -> "list[CachedCase]":
    """The cases of a cache, or of anything else once it is one."""
    from cwdm.cache import is_cache, open_cache
    from cwdm.layouts import find

    from .prepare import pack

    if is_cache(path):
        return open_cache(path)
    usable = set()
    for report in pack(find(path), folder):
        if report.status != "left out":
            usable.add(report.case)
        elif main:
            click.echo(f"{report.case}: left out, {'; '.join(report.problems)}", err=True)
    return [case for case in open_cache(folder) if case.id in usable]  # others were there before


def _held_out(path: Path, output: Path, main: bool) -> "HeldOut":
    from cwdm.cache import is_cache
    from cwdm.errors import InputError
    from cwdm.evaluate import complete_cases
    from cwdm.layouts import find
    from cwdm.validation import HeldOut

    if is_cache(path):
        raise InputError(f"{path}: is a cache, expected the cases themselves to validate on")
    prepared = _prepared(path, output / "cache" / "val", main)
    usable = {case.id for case in prepared}
    cases = complete_cases(case for case in find(path).cases if case.id in usable)
    return HeldOut(cases, prepared)


def _line(record: "Mapping[str, Any]") -> str:
    """A validation in a line."""
    scores = record["scores"]
    errors = record["held_out"] or record["fitted"]
    said = f"step {record['step']}: error {errors[0]:.4f} (trivial {record['trivial'][0]:.4f})"
    if scores:
        means = [sum(s[f] for s in scores) / len(scores) for f in ("psnr", "ssim")]
        said += f", PSNR {means[0]:.2f} dB, SSIM {means[1]:.3f}"
        if "floor_psnr" in scores[0]:
            said += f" (best copy {sum(s['floor_psnr'] for s in scores) / len(scores):.2f} dB)"
    return said


def _plan(config: "Config", precision: "Precision", device: str) -> str:
    """The whole configuration, the size of the network and the memory a step takes."""
    import json

    from cwdm.train import needed

    parameters, memory, size = needed(config, precision, device)
    return "\n".join(
        [
            json.dumps(config.as_dict(), indent=2),
            f"{parameters / 1e6:.2f} million parameters",
            f"about {memory / 2**30:.2f} GiB for each process at {'x'.join(map(str, size))} voxels "
            "(weights, optimizer, features, gradients; estimated)",
        ]
    )
