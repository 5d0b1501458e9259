"""The library's modules import each other in one direction, and keep to their trade."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cwdm

LIBRARY = Path(__file__).parents[1] / "cwdm"
MODULES = {path.stem: ast.parse(path.read_text(), path.name) for path in LIBRARY.glob("*.py")}
MODULES.pop("__init__")

# A module imports from its own row and the rows below. The tensor row never opens a file.
ROWS = {
    "cohorts": {"cohort", "executors", "handoff", "imputation"},
    "jobs": {"answers", "bench", "calibration", "diagnosis", "endless", "engine", "evaluate"}
    | {"external", "fidelity", "floors", "generation", "lesions", "montage", "msnet", "overlap"}
    | {"perceptual", "report", "segmenters", "segnet", "simulate", "synthesis", "train"}
    | {"validation"},
    "files and records": {"alignment", "anatomy", "cache", "case", "checkpoints", "checks"}
    | {"compat", "config", "dataset", "dicom", "files", "hub", "intensity", "layouts", "ledger"}
    | {
        "model",
        "preparation",
        "protocols",
        "provenance",
        "run",
        "segmentation",
        "significance",
        "spoilt",
        "summary",
        "volume",
    },
    "tensors": {
        "coefficients",
        "conditioning",
        "denoiser",
        "diffusion",
        "fast",
        "flow",
        "losses",
        "memory",
        "metrics",
        "noise",
        "passes",
        "process",
        "relaxation",
        "sampling",
        "streamed",
        "uncertainty",
        "unet",
        "wavunet",
    },
    "leaves": {
        "compilers",
        "errors",
        "kernels",
        "machine",
        "masks",
        "modality",
        "wavelet",
        "winograd",
    },
}
ROW_OF = {module: depth for depth, modules in enumerate(ROWS.values()) for module in modules}

# Who may import it: replacing the package then touches these files.
HOMES = {
    "nibabel": {"volume"},
    "torchio": {"dataset"},
    "pandas": {
        "cohort",
        "evaluate",
        "handoff",
        "imputation",
        "answers",
        "overlap",
        "significance",
        "summary",
    },
    "ray": {"executors"},
    "submitit": {"executors"},
    "nilearn": {"anatomy"},
    "sklearn": {"floors"},
    "huggingface_hub": {"hub"},
    "pywt": {"wavelet"},
    "SimpleITK": {"dicom"},
    "panoptica": {"lesions"},
    "jinja2": {"report"},
    "accelerate": {"train", "validation"},
    "onnxruntime": {"segmenters"},
    "nnunetv2": {"external"},
    "brats": {"external"},
    "docker": {"external"},
    "loguru": {"external"},
    "triton": {"kernels"},
}


def imports(module: str) -> Iterator[str]:
    """Dotted names of everything a module imports, at its top or inside a function."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py: relative import, the library writes cwdm.x"
            yield str(node.module)
            if node.module == "cwdm":
                yield from (f"cwdm.{alias.name}" for alias in node.names)


def siblings(module: str) -> set[str]:
    """The modules of the library that a module imports."""
    parts = [name.split(".") for name in imports(module)]
    return {name[1] for name in parts if name[0] == "cwdm" and len(name) > 1} & set(MODULES)


def calls(module: str) -> Iterator[str]:
    """Names of everything a module calls, as written."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_the_rows(module: str) -> None:
    assert module in ROW_OF, f"{module}.py: give it a row in this test and in ARCHITECTURE.md"
    for other in siblings(module):
        assert ROW_OF[other] >= ROW_OF[module], f"{module}.py imports {other}, which is above it"


def test_imports_make_no_circle() -> None:
    TopologicalSorter({module: siblings(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_library_does_not_know_the_command_line(module: str) -> None:
    for name in imports(module):
        assert not name.startswith(("cli", "cwdm.cli", "click", "tqdm")), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_library_neither_prints_nor_exits(module: str) -> None:
    assert not {"print", "sys.exit", "exit", "breakpoint"} & set(calls(module))


@pytest.mark.parametrize("package", HOMES)
def test_a_dependency_has_one_home(package: str) -> None:
    users = {
        module
        for module in MODULES
        if any(name.partition(".")[0] == package for name in imports(module))
    }
    assert users <= HOMES[package]


@pytest.mark.parametrize("module", sorted(ROWS["tensors"] & set(MODULES)))
def test_tensor_modules_open_no_file(module: str) -> None:
    packages = {name.partition(".")[0] for name in imports(module)}
    assert not packages & {"io", "json", "os", "pathlib", "shutil", "tomllib", *HOMES}
    assert "open" not in set(calls(module))


def test_importing_cwdm_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = "import sys, cwdm; print({'torch', 'monai', 'numpy', 'click'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("name", cwdm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(cwdm, name) is not None
    assert name in dir(cwdm)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'synthesise'"):
        cwdm.synthesise  # noqa: B018
