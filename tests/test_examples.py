"""The examples run from end to end and leave behind what they say."""

import importlib.util
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from cwdm.case import read_case
from cwdm.volume import is_synthetic, read_volume

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = EXAMPLES / "demo.py"
LEFT_BEHIND = {
    "synthesize_case": ("synthetic/*-t2f.nii.gz", "synthetic/*-t2f.json", "synthetic/*-t2f.png"),
    "impute_and_segment": ("completed/*/*-t1n.nii.gz", "segmented/*-seg.nii.gz"),
    "compare_models": ("comparison/summary.md", "comparison/tests.csv", "*-t2f.png"),
    "train_your_own": ("run/model.safetensors", "own/*-t2f.nii.gz"),
}


@pytest.mark.slow
def test_the_demo_draws_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)

    picture = demo.main(tmp_path)

    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 500
    (image,) = (tmp_path / "synthetic").glob("*-t2f.nii.gz")
    assert is_synthetic(image)
    assert image.with_name(image.name.replace(".nii.gz", ".json")).is_file()
    (clinic,) = (tmp_path / "clinic").iterdir()
    case = read_case(clinic)
    assert case.missing == (demo.MISSING,)
    assert read_volume(image).voxels.shape == (240, 240, 155)

    printed = capsys.readouterr().out
    rows = [line.split("|")[2:-1] for line in printed.splitlines() if line.startswith("| t2f")]
    methods = [row[0].strip() for row in rows]
    assert methods[0] == "cwdm"
    assert {"copy t1n", "copy t1c", "copy t2w"} <= set(methods)
    assert {"ridge regression", "boosted regression"} <= set(methods)
    figures = [float(re.sub(r"[*\s]", "", cell)) for row in rows for cell in row[1:]]
    assert len(figures) == len(methods) * len(rows[0][1:])
    assert all(math.isfinite(figure) for figure in figures)
    assert str(picture) in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_an_example_runs_on_cases_of_the_user(
    name: str,
    simulated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in sorted(simulated.iterdir())[:2]:
        shutil.copytree(folder, tmp_path / "cases" / folder.name)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    for pattern in LEFT_BEHIND[name]:
        assert list(tmp_path.glob(pattern)), pattern
    printed = capsys.readouterr().out
    if name == "compare_models":
        assert "t2f: two steps against one step: brain PSNR" in printed
    if name == "impute_and_segment":
        assert printed.count("done") == 2
        assert "segmented-with-gaps segmented-acquired" in " ".join(printed.split())


@pytest.mark.slow
def test_an_example_simulates_what_it_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["synthesize_case", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "synthesize_case.py"))
    (picture,) = (tmp_path / "synthetic").glob("*.png")
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 500
