"""Options that several commands share, as decorators. Torch is not asked: the library decides."""

import re
from collections.abc import Callable
from pathlib import Path

import click


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(
            f"{value!r} is not a device, expected auto, cpu, cuda or cuda:N", ctx, param
        )
    return value


device = click.option(
    "--device",
    callback=_device,
    metavar="[auto|cpu|cuda[:N]]",
    default="auto",
    show_default=True,
    help="Where the network runs; auto takes a GPU if there is one.",
)

precision = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Arithmetic of the network; auto takes bf16 where the hardware is fast at it.",
)

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(rf"(\d+\.?\d*) ?({'|'.join(_UNITS)})", value)
    if not found or float(found[1]) == 0:
        raise click.BadParameter(
            f"{value!r} is no amount, expected such as 1.5GB, 900MB, 2GiB or 900MiB", ctx, param
        )
    return int(float(found[1]) * _UNITS[found[2]])


memory_limit = click.option(
    "--memory-limit",
    callback=_bytes,
    metavar="AMOUNT",
    help="Of the process, or the GPU, as 6GB. A GPU then works on a few planes of an image at a "
    "time if all of it does not fit; what fits in no way is refused.",
)

seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the random numbers; the same seed gives the same result.",
)

overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace files that an earlier run wrote.",
)


def ending(suffix: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """For the name of a file to write: another ending could be that of an image to overwrite."""

    def check(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value is not None and value.suffix.lower() != suffix:
            raise click.BadParameter(f"{value}: expected a name that ends in {suffix}", ctx, param)
        return value

    return check


preset = click.option(
    "--preset", help="What a published checkpoint is, where its file does not tell."
)


def _steps(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(
            f"{value!r} is not a number of steps, expected 10 or 10,15,20", ctx, param
        )
    numbers = tuple(map(int, words))
    return numbers if len(numbers) > 1 else numbers[0]


steps = click.option(
    "--steps",
    callback=_steps,
    metavar="N|N,N,...",
    help="Denoising steps; several numbers are for equal sections of the time, the first nearest "
    "to the image. [default: the model's]",
)

sampler = click.option(
    "--sampler",
    help="ddpm, ddim, dpm++2m, euler, heun or one-step. [default: the model's]",
)


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Voxels along X, Y, Z, of one number or three: a callback."""
    if value is None:
        return None
    words = value.split(",")
    if len(words) not in (1, 3) or not all(word.strip().isdecimal() for word in words):
        raise click.BadParameter(f"{value!r} is not a size, expected 128 or X,Y,Z", ctx, param)
    return tuple(int(word) for word in words) * (3 // len(words))
