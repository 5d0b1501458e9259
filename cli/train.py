"""`cwdm train`: a configuration and a folder of cases in, a model out."""

from pathlib import Path

import click

from . import options


@click.command()
@click.option("--config", required=True, metavar="NAME|FILE", help="A preset or a TOML file.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Folder with cases; repeatable, and a folder given twice counts twice.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in the output folder.")
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="A model (.safetensors) of the same network to start from.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the network first (minutes).")
@options.device
@options.precision
def train(
    config: str,
    data: tuple[Path, ...],
    output: Path,
    resume: bool,
    init: Path | None,
    compiled: bool,
    device: str,
    precision: str,
) -> None:
    """Train a model.

    Writes checkpoint.safetensors (to resume from) and model.safetensors (for synthesize --model).

    \b
    cwdm train --config small-t2f --data cases/ --output runs/t2f
    """
    from tqdm import tqdm

    from cwdm.case import find_cases
    from cwdm.config import Config
    from cwdm.engine import choose_bf16, choose_device
    from cwdm.train import train as steps

    settings = Config.read(config)
    cases = [case for folder in data for case in find_cases(folder)]
    place = choose_device(device)
    run = steps(
        settings,
        cases,
        output,
        device=place,
        bf16=choose_bf16(precision, place),  # type: ignore[arg-type]
        resume=resume,
        compiled=compiled,
        init=init,
    )
    with tqdm(total=settings.training.iterations, unit="step", smoothing=0.01) as bar:
        for step in run:
            bar.update(step.step - bar.n)
            bar.set_postfix(loss=f"{step.loss:.4f}")
    click.echo(output / "model.safetensors")
