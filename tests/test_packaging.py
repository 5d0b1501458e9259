"""What users get: wheel, sdist and editable install, each in an environment of its own.

Nothing is downloaded: the environments see the packages of the one that runs the tests.
"""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path
from sysconfig import get_path

import pytest

import cwdm

ROOT = Path(__file__).parents[1]


def pyproject() -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("source") / "cwdm"
    copy.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("cwdm", "cli", "configs", "tests", "examples", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=leave)
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copy(file, copy)
    for name in ("LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment without pip that also sees the packages of this one."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    site_packages = Path(get_path("purelib", "venv", {"base": str(folder)}))
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "parent.pth").write_text("\n".join(seen))
    return folder


def install(environment: Path, *words: str | Path) -> None:
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", *words, cwd=environment)


def check_installation(environment: Path, where: Path) -> None:
    """Assert that `where`'s cwdm, and nothing else of ours, is importable and runs."""
    elsewhere = environment / "elsewhere"
    elsewhere.mkdir()
    code = """
from importlib.resources import files
from importlib.util import find_spec
import cwdm, cwdm.cli.main, cwdm.configs
print(cwdm.__file__)
print([name for name in ("cli", "configs", "tests", "examples", "docs") if find_spec(name)])
print(sorted(file.name for file in files("cwdm.configs").iterdir() if file.name.endswith(".toml")))
weights = files("cwdm") / "weights"
print(sorted(file.name for file in weights.iterdir()) if weights.is_dir() else [])
"""
    file, others, configs, weights = run(
        environment / "bin" / "python", "-c", code, cwd=elsewhere
    ).splitlines()
    assert Path(file).is_relative_to(where)
    assert others == "[]"
    assert configs == str(sorted(path.name for path in ROOT.glob("configs/*.toml")))
    assert weights == str(sorted(path.name for path in ROOT.glob("cwdm/weights/*")))
    script, python = environment / "bin" / "cwdm", environment / "bin" / "python"
    assert run(script, "--help", cwd=elsewhere).startswith("Usage: cwdm ")
    assert run(python, "-m", "cwdm.cli", "--help", cwd=elsewhere).startswith("Usage: cwdm ")
    assert run(script, "--version", cwd=elsewhere) == f"cwdm {cwdm.__version__}\n"


def test_every_package_is_listed_for_the_wheel() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    on_disk = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in setuptools["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert on_disk == set(setuptools["packages"])


def test_the_wheel_holds_cwdm_and_its_data_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "cwdm",
        f"cwdm-{cwdm.__version__}.dist-info",
    }
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for package, folder in pyproject()["tool"]["setuptools"]["package-dir"].items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("cwdm/")} == expected


def test_the_sdist_holds_the_tests_and_the_documents(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "cli/main.py"} <= names
    assert "tests/test_packaging.py" in names


def test_the_wheel_runs_from_another_folder(built: tuple[Path, Path], environment: Path) -> None:
    install(environment, built[0])
    check_installation(environment, environment)


def test_the_sdist_runs_from_another_folder(built: tuple[Path, Path], environment: Path) -> None:
    install(environment, built[1])
    check_installation(environment, environment)


def test_the_editable_install_runs_from_another_folder(source: Path, environment: Path) -> None:
    install(environment, "--editable", source)
    check_installation(environment, source)


def test_the_editable_install_sees_new_files(source: Path, environment: Path) -> None:
    install(environment, "--editable", source)
    (source / "cli" / "brand_new.py").write_text("found = True\n")
    try:
        code = "from cwdm.cli.brand_new import found; print(found)"
        assert run(environment / "bin" / "python", "-c", code, cwd=environment) == "True\n"
    finally:
        (source / "cli" / "brand_new.py").unlink()


def test_every_pin_allows_what_the_project_asks_for() -> None:
    """`constraints.txt` names every direct dependency, each with an exact version; but for Triton,
    which torch with CUDA pins itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(pin.name): pin
        for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in map(Requirement, wanted):
        if requirement.name == "triton":
            continue
        pin = pins[canonicalize_name(requirement.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version), f"{requirement} and {pin}"
