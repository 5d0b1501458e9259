"""`cwdm models`: which models there are, what is in one, and how to get published ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    from cwdm.config import Config
    from cwdm.model import Model

_PREDICTIONS = {
    "x_0": "the image",
    "residual": "the difference from the mean of the other sequences",
    "velocity": "the way from the start to the image",
}


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List models, look into them, convert and download published ones.

    \b
    cwdm models list
    cwdm models info small-t2f
    cwdm models fetch cwdm-t2f --output published/
    cwdm models convert published/brats_t2f_1200000.pt --preset cwdm-t2f --output models/
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@models.command("list", short_help="Show which models and presets there are.")
def list_() -> None:
    """Show the models that ship, those that can be downloaded, and the presets."""
    from cwdm.config import Config, presets
    from cwdm.hub import PUBLISHED
    from cwdm.model import shipped_models

    shipped = [
        (path.stem, _megabytes(path.stat().st_size), _makes(Config.read(path.stem)))
        for path in shipped_models()
    ]
    published = [
        (
            name,
            f"{entry.repository}/{entry.pattern}",
            entry.licence,
            _makes(Config.read(name)),
        )
        for name, entry in PUBLISHED.items()
    ]
    others = [name for name in presets() if name not in {row[0] for row in shipped}]
    click.echo("Models that ship with cwdm:")
    _table(["name", "size", "makes"], shipped)
    click.echo("\nPublished models, for cwdm models fetch NAME:")
    _table(["name = preset", "on Hugging Face", "code's licence", "makes"], published)
    click.echo("\nPresets, for cwdm train --config NAME (and those of the models that ship):")
    _table(["name", "makes"], [(name, _makes(Config.read(name))) for name in others])


@models.command(short_help="Say what is in a model.")
@click.argument("model", metavar="NAME|FILE")
@options.preset
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def info(model: str, preset: str | None, as_json: bool) -> None:
    """Say what is in a model that ships or in a file: .safetensors, or a published .pt."""
    from cwdm.model import find_model, load_model

    loaded = load_model(find_model(model), preset=preset)
    if as_json:
        click.echo(json.dumps(_record(loaded), indent=2))
        return
    rows = _words(loaded)
    width = max(len(key) for key, _ in rows)
    for key, text in rows:
        click.echo(f"{key:<{width}}  {text}")


@models.command(short_help="Turn a published checkpoint into a model file.")
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="FILE.pt")
@options.preset
@click.option("--target", help="What the model makes, where neither file nor preset tells.")
@click.option(
    "--groups",
    type=click.IntRange(min=1),
    help="Of its group normalizations, which no file tells. [default: the preset's, or 32]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder for <name>.safetensors.",
)
@options.overwrite
def convert(
    checkpoint: Path,
    preset: str | None,
    target: str | None,
    groups: int | None,
    output: Path,
    overwrite: bool,
) -> None:
    """Turn a published checkpoint into a model file that holds its configuration."""
    from tempfile import TemporaryDirectory

    import torch

    from cwdm.checkpoints import assumed_priors, identify, read_weights
    from cwdm.errors import InputError
    from cwdm.files import atomic_write, check_target
    from cwdm.modality import parse_modality
    from cwdm.model import load_model, save_model

    path = output / f"{checkpoint.stem}.safetensors"
    wanted = parse_modality(target) if target else None
    weights = read_weights(checkpoint)
    config = identify(weights, checkpoint, preset=preset, target=wanted, groups=groups)
    check_target(path, overwrite)
    with TemporaryDirectory(dir=output, prefix=".cwdm-") as folder:  # shown once it has been read
        draft = Path(folder) / path.name
        save_model(config, weights, assumed_priors(config), draft, overwrite=False)
        try:
            read = load_model(draft)
        except InputError as error:  # about the checkpoint, not about the draft
            raise InputError(str(error).replace(str(draft), str(checkpoint))) from error
        for name, value in read.denoiser.backbone.state_dict().items():
            if not torch.equal(value, weights[name]):
                raise InputError(f"{path}: {name} did not come back as it was written")
        with atomic_write(path, overwrite) as temporary:
            draft.replace(temporary)
    click.echo(path)


@models.command(short_help="Download a published model.")
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("published"),
    show_default=True,
    help="Folder for the file.",
)
def fetch(name: str, output: Path) -> None:
    """Download a published model, by a name that `cwdm models list` shows.

    An interrupted download is continued by the same command.
    """
    import logging

    from cwdm.hub import fetch as download

    logging.getLogger("huggingface_hub").propagate = False  # it writes to stderr by itself
    click.echo(download(name, output))


def _makes(config: Config) -> str:
    """What goes in and what comes out."""
    what = "any sequence" if config.target == "any" else str(config.target)
    given = {
        "others": "the other sequences",
        "any": "whatever sequences there are",
        "none": "noise",
        "inpainting": "itself around a hole",
    }[config.conditioning]
    size = f", {'x'.join(map(str, config.images.size))}" if config.images.size else ""
    return f"{what} from {given}{size}"


def _table(heads: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    lines = [tuple(heads), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo(f"  {'  '.join(cells)}".rstrip())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _record(model: Model) -> dict[str, Any]:
    """Everything about a model, for JSON."""
    from dataclasses import asdict

    return {
        "name": model.config.name,
        "path": str(model.path),
        "bytes": model.path.stat().st_size,
        "sha256": model.sha256,
        "targets": list(model.config.targets),
        "parameters": _parameters(model),
        "config": model.config.as_dict(),
        "priors": {target: asdict(prior) for target, prior in model.priors.items()},
        "priors_assumed": _assumed(model),
        "calibration": {target: asdict(each) for target, each in model.calibration.items()},
    }


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.denoiser.parameters())


def _assumed(model: Model) -> bool:
    """Whether the intensity scales were not learnt from training cases."""
    from cwdm.checkpoints import assumed_priors

    return bool(model.priors == assumed_priors(model.config))


def _words(model: Model) -> list[tuple[str, str]]:
    """The same, to read."""
    from cwdm.intensity import NORMALIZATIONS

    config = model.config
    images, transform, network = config.images, config.transform, config.network
    process, sampling = config.process, config.sampling
    normalization = NORMALIZATIONS[images.normalization]
    kind = {"unet": "U-Net", "wavunet": "WavU-Net"}[network.kind]
    if network.kind == "unet":
        kind += f", {'averaged' if network.additive_skips else 'concatenated'} skips"
    bands = f"{transform.wavelet}, {transform.levels} level(s), {transform.channels} channels"
    if transform.channels == 1:
        bands = "none, voxels themselves"
    elif transform.lll_scale != 1:
        bands += f", lowest band / {transform.lll_scale:g}"
    if transform.scale != 1:
        bands += f", all bands / {transform.scale:.4g}"
    if process.kind == "flow":
        path = f"flow from {process.source}, noise {process.bridge_noise:g} on the way"
    else:
        path = f"diffusion, {process.schedule} schedule"
        if process.subset_of:
            path += f", a subset of {process.subset_of} times"
    steps = sampling.steps if isinstance(sampling.steps, tuple) else (sampling.steps,)
    size = "x".join(map(str, images.size)) if images.size else "the brain's own box"
    scales = (
        "assumed (the file has none): absolute intensities mean little"
        if _assumed(model)
        else "learnt from the training cases"
    )
    return [
        ("name", config.name),
        ("file", f"{model.path} ({_megabytes(model.path.stat().st_size)})"),
        ("SHA-256", model.sha256),
        ("makes", _makes(config)),
        (
            "network",
            f"{kind}; {network.channels} channels x {', '.join(map(str, network.multipliers))}; "
            f"{network.res_blocks} residual block(s) per level, {network.groups} groups; "
            f"{config.in_channels} channels in; {_parameters(model):,} parameters",
        ),
        ("puts out", _PREDICTIONS[config.prediction]),
        ("transform", bands),
        ("process", f"{path}, T = {process.steps}"),
        (
            "sampling",
            f"{sampling.sampler}, {', '.join(map(str, steps))} step(s)"
            f"{', estimates clamped' if sampling.clamp else ''}",
        ),
        (
            "images",
            f"normalization {images.normalization!r} to {normalization.low:g}..."
            f"{normalization.high:g}; voxels of {images.spacing_mm:g} mm, {images.orientation}; "
            f"{size}",
        ),
        ("scales", scales),
        *(
            (
                "interval",
                f"{target}: calibrated for {each.coverage:.0%} on {each.cases} cases, "
                f"{each.samples} samples by {each.sampler}, steps {each.steps}; held "
                f"{min(each.held_out):.0%} to {max(each.held_out):.0%} in cases left out",
            )
            for target, each in model.calibration.items()
        ),
    ]
