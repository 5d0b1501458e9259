"""The demo runs from end to end and leaves behind what it says."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from cwdm.case import read_case
from cwdm.volume import is_synthetic, read_volume

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


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
