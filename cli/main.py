"""The `cwdm` command: finds the subcommand, and says what went wrong in one line.

Commands are loaded when they are called, so that `cwdm --help` imports nothing of the library.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from cwdm import __version__
from cwdm.errors import InputError

COMMANDS = {
    "synthesize": (".synthesize:synthesize", "Synthesize the missing modality of a case."),
    "check": (".check:check", "Find images that are spoilt."),
    "impute": (".impute:impute", "Complete the cases of a cohort."),
    "segment": (".segment:segment", "Segment the tumors of complete cases."),
    "generate": (".generate:generate", "Generate images of no patient, from noise alone."),
    "fidelity": (".fidelity:fidelity", "How near generated images are to real ones."),
    "prepare": (".prepare:prepare", "Check cases and pack them for training."),
    "train": (".train:train", "Train a model on cases of your own."),
    "doctor": (".doctor:doctor", "Say in words what is wrong with a training run."),
    "simulate": (".simulate:simulate", "Write simulated cases with known truth."),
    "evaluate": (".evaluate:evaluate", "Compare a model with simpler predictions."),
    "report": (".report:report", "Make one page that shows an evaluation."),
    "overlap": (".overlap:overlap", "Compare segmentations with the truth."),
    "calibrate": (".calibrate:calibrate", "Measure what the spread of samples is worth."),
    "bench": (".bench:bench", "Measure how fast it is on this machine."),
    "models": (".models:models", "List, inspect, convert and download models."),
}
"""Name -> where it is, what it does."""

EXTRAS = {
    "nilearn": "simulate",
    "sklearn": "evaluate",
    "huggingface_hub": "hub",
    "accelerate": "train",
    "tensorboard": "train",
    "onnxruntime": "onnx",
    "nnunetv2": "nnunet",
    "brats": "brats",
    "loguru": "brats",
    "ray": "ray",
    "submitit": "slurm",
}
"""Module that is not always installed -> the extra that brings it."""

WRONG_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130  # exit codes


class Commands(click.Group):
    """A group that loads its commands from `COMMANDS`, and the one place that reports errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module, __package__), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            nearest = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            ctx.fail(f"{args[0]!r} is not a command, expected one of {', '.join(COMMANDS)}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit: 0, 2 for what the user can mend, 1 for what we should, 130 for Ctrl-C."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # anywhere on the line, before or after the command
        words = [word for word in words if word != "--debug"]
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.simplefilter("ignore")  # of our dependencies; ours are logged
                code = super().main(
                    words, prog_name or "cwdm", complete_var, standalone_mode=False, **extra
                )
        except Exception as error:
            if debug:
                traceback.print_exception(error)
            message, code = explain(error)
            click.echo(f"cwdm: error: {' '.join(message.split())}", err=True)
        sys.exit(code)


def explain(error: Exception) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    match error:
        case InputError():
            return str(error), WRONG_INPUT
        case click.UsageError(ctx=click.Context() as context):
            return f"{error.format_message()} (see {context.command_path} --help)", WRONG_INPUT
        case click.ClickException():
            return error.format_message(), error.exit_code
        case click.Abort(__cause__=EOFError() as cause):  # click takes a short file for Ctrl-D
            error = cause
        case click.Abort():
            return "interrupted", INTERRUPTED
        case ModuleNotFoundError(name=str(module)) if module.partition(".")[0] in EXTRAS:
            extra = EXTRAS[module.partition(".")[0]]
            return f"{module} is not installed, expected pip install 'cwdm[{extra}]'", WRONG_INPUT
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}", WRONG_INPUT
        case OSError():
            return error.strerror or str(error), WRONG_INPUT
    if _out_of_memory(error):
        return "out of memory, expected a smaller image or a machine with more", WRONG_INPUT
    return (
        f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback",
        UNEXPECTED,
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether it is Python's own, torch's for a GPU, or torch's RuntimeError for the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


@click.group(
    name="cwdm",
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="cwdm", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cwdm(ctx: click.Context) -> None:
    """Synthesize a missing MRI modality with 3D wavelet diffusion models."""
    logging.basicConfig(format="cwdm: %(message)s", level=logging.WARNING)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
