"""The door: help, options, and what a person sees when something is wrong."""

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import cwdm as library
from cwdm.cli import main, options
from cwdm.cli.main import COMMANDS, cwdm
from cwdm.errors import InputError

HEAVY = ("torch", "numpy", "monai", "torchio", "nibabel", "pandas", "scipy", "sklearn")


def python(code: str, *, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter, somewhere else than in the checkout."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


Run = Callable[..., Result]


@pytest.fixture
def run_raising(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `cwdm fail`, a command that raises the given error."""

    def run(error: BaseException, *words: str) -> Result:
        @click.command()
        def fail() -> None:
            raise error

        monkeypatch.setitem(main.COMMANDS, "fail", (".main:fail", "Fail."))
        monkeypatch.setattr(main, "fail", fail, raising=False)
        return CliRunner().invoke(cwdm, ["fail", *words])

    return run


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from cwdm.cli.main import cwdm
try:
    cwdm(["--help"])
except SystemExit:
    print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code, cwd=tmp_path).endswith("loaded: []\n")


def test_help_answers_in_a_third_of_a_second(tmp_path: Path) -> None:
    def seconds(code: str) -> float:
        """Processor time, the least of a few runs: other work on the machine is not ours."""
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            python(code, cwd=tmp_path)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        return min(times)

    assert seconds("from cwdm.cli.main import cwdm; cwdm(['--help'])") < 0.3


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(words: list[str]) -> None:
    result = CliRunner().invoke(cwdm, words)
    assert result.exit_code == 0
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert summary in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = cwdm.get_command(click.Context(cwdm), name)
    assert command is not None
    assert command.help
    assert command.name == name
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, option.name
    result = CliRunner().invoke(cwdm, [name, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cwdm {name}")


def test_version_is_the_library_s() -> None:
    result = CliRunner().invoke(cwdm, ["--version"])
    assert result.stdout == f"cwdm {library.__version__}\n"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["synthesise"], "'synthesise' is not a command"),
        (["synthesise"], "did you mean synthesize?"),
        (["--colour"], "No such option '--colour'"),
        (["simulate", "--colour"], "No such option '--colour'"),
    ],
)
def test_a_word_it_does_not_know_is_one_line_and_exit_2(words: list[str], fragment: str) -> None:
    result = CliRunner().invoke(cwdm, words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("cwdm: error: ")
    assert result.stderr.count("\n") == 1
    assert fragment in result.stderr
    assert "--help)" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.nii.gz: found 4D, expected 3D"), 2, "a.nii.gz: found 4D, expected 3D"),
        (InputError("two\nlines"), 2, "two lines"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: Permission denied"),
        (MemoryError(), 2, "out of memory, expected a smaller image or a machine with more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            2,
            "out of memory, expected a smaller image or a machine with more",
        ),
        (
            ModuleNotFoundError("No module named 'nilearn.image'", name="nilearn.image"),
            2,
            "nilearn.image is not installed, expected pip install 'cwdm[simulate]'",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "unexpected ZeroDivisionError: division by zero; "
            "run again with --debug for the traceback",
        ),
        (
            EOFError("ended early"),
            1,
            "unexpected EOFError: ended early; run again with --debug for the traceback",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line(run_raising: Run, error: Exception, code: int, line: str) -> None:
    result = run_raising(error)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.strip() == f"cwdm: error: {line}"


@pytest.mark.parametrize("error", [InputError("wrong"), ValueError("wrong"), OSError("wrong")])
def test_debug_shows_the_traceback_before_the_line(run_raising: Run, error: Exception) -> None:
    quiet, debug = run_raising(error), run_raising(error, "--debug")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in debug.stderr
    assert "in fail" in debug.stderr
    assert debug.stderr.splitlines()[-1] == quiet.stderr.strip()
    assert debug.exit_code == quiet.exit_code


def test_python_callers_get_the_exception(run_raising: Run) -> None:
    run_raising(InputError("wrong"))
    with pytest.raises(InputError, match="wrong"):
        cwdm(["fail"], standalone_mode=False)


def test_warnings_of_dependencies_are_not_shown() -> None:
    code = """
import click, warnings
from cwdm.cli import main
@click.command()
def warn():
    warnings.warn("old numpy", FutureWarning)
main.warn = warn
main.COMMANDS["warn"] = (".main:warn", "Warn.")
main.cwdm(["warn", *{words}])
"""
    for words, shown in (([], False), (["--debug"], True)):
        command = [sys.executable, "-c", code.format(words=words)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ("old numpy" in result.stderr) is shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("auto", "auto", 0, False)),
        (
            ["--device", "cuda:1", "--precision", "bf16", "--seed", "7", "--overwrite"],
            ("cuda:1", "bf16", 7, True),
        ),
    ],
)
def test_shared_options_reach_the_command(words: list[str], expected: tuple[object, ...]) -> None:
    seen: list[tuple[object, ...]] = []

    @click.command()
    @options.device
    @options.precision
    @options.seed
    @options.overwrite
    def command(device: str, precision: str, seed: int, overwrite: bool) -> None:
        seen.append((device, precision, seed, overwrite))

    assert CliRunner().invoke(command, words).exit_code == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--device", "gpu"], "'gpu' is not a device, expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "'cuda:x' is not a device"),
        (["--precision", "fp16"], "'fp16' is not one of"),
        (["--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_wrong_values_of_shared_options_are_refused(words: list[str], fragment: str) -> None:
    @click.command()
    @options.device
    @options.precision
    @options.seed
    def command(device: str, precision: str, seed: int) -> None:
        raise AssertionError

    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2
    assert fragment in result.stderr


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        (["check", "--input", "."], ".csv"),
        (["report", "."], ".html"),
        (["bench", "machine"], ".json"),
        (["calibrate", "--model", "small-t2f", "--cases", "."], ".safetensors"),
    ],
)
def test_an_image_is_no_place_for_a_table_or_a_page(
    words: list[str], ending: str, tmp_path: Path
) -> None:
    image = tmp_path / "x-t1n.nii.gz"
    image.write_bytes(b"acquired")
    result = CliRunner().invoke(cwdm, [*words, "--output", str(image), "--overwrite"])
    assert result.exit_code == 2
    assert f"{image}: expected a name that ends in {ending}" in result.stderr
    assert image.read_bytes() == b"acquired"
