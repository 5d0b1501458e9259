"""`cwdm train` on the command line: its data, its plan, what it says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cwdm.cli.main import cwdm
from cwdm.config import Config
from cwdm.modality import SEQUENCES
from cwdm.model import load_model
from cwdm.run import read_lines


@pytest.fixture
def cwdm_train(tmp_path, monkeypatch):
    """Run the command in `tmp_path` with a configuration that takes a moment."""
    monkeypatch.chdir(tmp_path)

    def run(*words, config="smoke"):
        line = ["train", "--config", config, "--tracker", "none", "--workers", "0"]
        return CliRunner().invoke(cwdm, [*line, *map(str, words)])

    return run


@pytest.fixture
def brains(make_image, ball):
    """Cases of four noisy balls below a folder: c0, c1, ... or of other names."""

    def make(n=2, folder="data", name="c"):
        for i in range(n):
            for j, modality in enumerate(SEQUENCES):
                noise = np.random.default_rng([i, j]).integers(0, 60, (30, 28, 26))
                voxels = (ball((30, 28, 26)) + (ball((30, 28, 26)) > 0) * noise).astype(np.int16)
                make_image(f"{folder}/{name}{i}/{name}{i}-{modality}.nii.gz", voxels=voxels)
        return folder

    return make


def test_cases_are_packed_first_and_again_only_if_they_change(cwdm_train, brains, tmp_path):
    result = cwdm_train("--data", brains(), "--output", "run")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "run/model.safetensors"
    packed = sorted(path.name for path in (tmp_path / "run/cache/0").glob("c?.safetensors"))
    assert packed == ["c0.safetensors", "c1.safetensors"]
    times = [(tmp_path / "run/cache/0" / name).stat().st_mtime_ns for name in packed]
    assert cwdm_train("--data", "data", "--output", "run").exit_code == 0
    assert times == [(tmp_path / "run/cache/0" / name).stat().st_mtime_ns for name in packed]


def test_a_case_that_was_taken_away_is_not_trained_on(cwdm_train, brains, tmp_path):
    brains(3)
    assert cwdm_train("--data", "data", "--output", "run").exit_code == 0
    for path in (tmp_path / "run").glob("checkpoints/*"):
        path.unlink()
    (tmp_path / "data/c1").rename(tmp_path / "c1")
    assert cwdm_train("--data", "data", "--output", "run").exit_code == 0
    assert json.loads((tmp_path / "run/data.json").read_text())["ids"] == ["c0", "c2"]


def test_a_case_that_cannot_be_used_is_named(cwdm_train, brains, tmp_path):
    broken = tmp_path / brains(3) / "c1" / "c1-t2w.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-100])
    result = cwdm_train("--data", "data", "--output", "run")
    assert result.exit_code == 0
    assert re.search(r"c1: left out, .*c1-t2w.nii.gz: truncated", result.stderr)
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert data["ids"] == ["c0", "c2"]


def test_sources_have_weights(cwdm_train, brains, tmp_path):
    brains()
    brains(1, "other")
    result = cwdm_train("--data", "data=3", "--data", "other/c0=0.5", "--output", "run")
    assert result.exit_code == 0, result.output
    sources = json.loads((tmp_path / "run/data.json").read_text())["sources"]
    assert sources == [
        {"name": "data", "cases": 2, "weight": 3.0},
        {"name": "other/c0", "cases": 1, "weight": 0.5},
    ]
    for weight in ("0", "inf", "nan"):
        result = cwdm_train("--data", f"data={weight}", "--output", "other-run")
        assert result.exit_code == 2
        assert "expected a weight above 0" in result.stderr


def test_validation_says_how_it_is_beside_a_copy(cwdm_train, brains):
    brains()
    brains(1, "val", "v")
    result = cwdm_train("--data", "data", "--val", "val", "--output", "run")
    assert result.exit_code == 0, result.output
    line = r"step 20: error [\d.]+ \(trivial [\d.]+\), PSNR [\d.]+ dB, SSIM [\d.]+ \(best copy "
    assert re.search(line, result.stdout)


def test_held_out_cases_are_other_ones(cwdm_train, brains):
    brains()
    result = cwdm_train("--data", "data", "--val", "data/c1", "--output", "run")
    assert result.exit_code == 2
    assert "case c1 is among the training and the held-out cases" in result.stderr
    assert cwdm_train("--data", "data/c0", "--output", "run").exit_code == 0
    result = cwdm_train("--data", "data/c0", "--val", "run/cache/0", "--output", "again")
    assert result.exit_code == 2
    assert "is a cache, expected the cases themselves" in result.stderr


def test_a_dry_run_says_what_it_would_take_and_does_nothing(cwdm_train, tmp_path):
    result = cwdm_train(
        "--data", "simulate", "--output", "run", "--dry-run", "--precision", "fp32", config="wfm"
    )
    assert result.exit_code == 0
    said = result.stdout
    config = Config.parse(json.loads(said[: said.rindex("}") + 1]), "plan")
    assert config == Config.read("wfm")
    assert "81.51 million parameters" in said
    gib = float(re.search(r"about ([\d.]+) GiB", said)[1])
    assert 50 < gib < 90  # four volumes of 224x224x160
    assert not list(tmp_path.iterdir())
    result = cwdm_train("--data", "nowhere", "--output", "run", "--dry-run")
    assert result.exit_code == 2
    assert "nowhere: no such file or folder" in result.stderr
    result = cwdm_train("--data", "simulated", "--output", "run", "--dry-run")
    assert result.exit_code == 2
    assert "simulated: no such file or folder" in result.stderr
    result = cwdm_train("--data", "simulate", "--init", "none.pt", "--output", "run", "--dry-run")
    assert result.exit_code == 2
    assert "none.pt" in result.stderr


@pytest.mark.slow
def test_simulated_cases_mix_with_others(cwdm_train, brains, make_image, tmp_path):
    radius = np.sqrt(((np.indices((120, 120, 120)) - 59.5) ** 2).sum(axis=0))
    labels = np.select([radius < 8, radius < 44, radius < 54], [4, 2, 3], 0).astype(np.uint8)
    make_image("maps/brain.nii.gz", voxels=labels)
    smoke = (Path(__file__).parents[1] / "configs" / "smoke.toml").read_text()
    (tmp_path / "few.toml").write_text(smoke.replace("iterations = 20", "iterations = 4"))
    result = cwdm_train(
        "--data", brains(), "--data", "simulate:maps=2", "--output", "run", config="few.toml"
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert data["sources"][1] == {"name": "simulate:maps", "cases": None, "weight": 2.0}
    assert len(list(read_lines(tmp_path / "run/steps.jsonl"))) == 4
    assert load_model(tmp_path / "run/model.safetensors").config.training.iterations == 4
