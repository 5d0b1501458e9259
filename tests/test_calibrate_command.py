"""`cwdm calibrate`: what it measures, what it writes, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cwdm.case import find_cases, read_case
from cwdm.cli.main import cwdm as command
from cwdm.config import Config, Images, Sampling, Training
from cwdm.intensity import ScalePrior
from cwdm.metrics import affine_fit
from cwdm.modality import Modality, others
from cwdm.model import build_denoiser, load_model, save_model
from cwdm.synthesis import Synthesizer
from cwdm.unet import UNetConfig
from cwdm.volume import brain_mask, read_volumes

TARGET = Modality.T1C
WORDS = ("--samples", 3, "--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A network of small weights: the mean of the inputs, and a little noise."""
    config = Config(
        name="tiny-t1c",
        target=TARGET,
        prediction="residual",
        images=Images(spacing_mm=8.0),
        network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4),
        sampling=Sampling(sampler="ddpm", steps=2),
        training=Training(drop_conditions=0.1),
    )
    torch.manual_seed(0)
    state = build_denoiser(config).backbone.state_dict()
    weights = {k: torch.randn_like(v) * 0.05 for k, v in state.items()}
    priors = {TARGET: ScalePrior({m: 0.0 for m in others(TARGET)}, 4.0)}
    path = tmp_path_factory.mktemp("model") / "tiny-t1c.safetensors"
    save_model(config, weights, priors, path, overwrite=False)
    return path


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_what_is_measured_holds_when_it_is_used(model_file, simulated, tmp_path):
    output = tmp_path / "calibrated.safetensors"
    words = ["--model", model_file, "--cases", simulated, "--output", output, *WORDS]
    result = run("calibrate", *words, "--coverage", 0.7)
    assert result.exit_code == 0, result.output
    calibration = load_model(output).calibration[TARGET]
    assert (calibration.samples, calibration.sampler, calibration.steps) == (3, "ddpm", 2)
    assert (calibration.coverage, calibration.cases) == (0.7, 4)
    report = json.loads(output.with_suffix(".json").read_text())["targets"]["t1c"]
    assert report["q"] == calibration.q
    rows = report["left_out"]
    assert [row["coverage"] for row in rows] == list(calibration.held_out)
    assert [row["case"] for row in rows] == [case.id for case in find_cases(simulated)]
    assert all(0 <= row["coverage_tumor"] <= 1 for row in rows)
    assert all(-1 <= row["agreement"] <= 1 for row in rows)
    for row in rows:
        assert f"{row['coverage']:.1%}" in result.stdout
    # the interval that synthesis writes covers that share of the voxels of these four cases
    synthesizer = Synthesizer.load(TARGET, output, device="cpu", precision="fp32")
    inside, voxels = 0, 0
    for case in find_cases(simulated):
        made = synthesizer(case.without(TARGET), samples=3)
        assert made.provenance.interval.calibrated
        truth, maps = read_volumes(case, [TARGET])[TARGET], made.uncertainty
        brain = brain_mask(truth) & maps.brain
        slope, offset = affine_fit(made.volume.voxels, truth.voxels, brain)
        on_scale = (truth.voxels - offset) / slope
        inside += ((maps.low <= on_scale) & (on_scale <= maps.high))[brain].sum()
        voxels += brain.sum()
    assert inside / voxels == pytest.approx(0.7, abs=0.002)


def test_the_command_uses_the_calibration(model_file, simulated, tmp_path):
    output, out = tmp_path / "calibrated.safetensors", tmp_path / "out"
    words = ["--model", model_file, "--cases", simulated, "--output", output, *WORDS]
    assert run("calibrate", *words).exit_code == 0
    folder = find_cases(simulated)[0].images[TARGET].parent
    words = ["--input", folder, "--missing", "t1c", "--model", output, "--output", out]
    result = run("synthesize", *words, "--samples", 3)
    assert result.exit_code == 0, result.output
    assert "not calibrated" not in result.stderr
    assert "of the brain; " in result.stderr
    (record,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert record["interval"]["calibrated"] is True
    assert record["interval"]["q"] == load_model(output).calibration[TARGET].q
    told = run("models", "info", output)
    assert "t1c: calibrated for 80% on 4 cases, 3 samples by ddpm, steps 2; held " in told.stdout
    found = json.loads(run("models", "info", output, "--json").stdout)
    assert found["calibration"]["t1c"]["q"] == record["interval"]["q"]
    again = run("calibrate", "--model", output, "--cases", simulated, *WORDS, "--output", output)
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def test_other_targets_keep_their_calibration(any_model, simulated, tmp_path):
    model, first, second = (tmp_path / f"{n}.safetensors" for n in ("model", "one", "two"))
    config = replace(load_model(any_model).config, prediction="residual")  # follows the truth
    state = build_denoiser(config).backbone.state_dict()
    weights = {k: torch.full_like(v, 1e-3) for k, v in state.items()}
    save_model(config, weights, load_model(any_model).priors, model, overwrite=False)
    for source, output, target in ((model, first, "t2f"), (first, second, "t1c")):
        words = ["--model", source, "--cases", simulated, "--output", output, *WORDS]
        result = run("calibrate", *words, "--modality", target, "--steps", 1)
        assert result.exit_code == 0, result.output
    kept, both = load_model(first).calibration, load_model(second).calibration
    assert set(both) == {Modality.T2F, Modality.T1C}
    assert both[Modality.T2F] == kept[Modality.T2F]


def test_mistakes_are_one_line_and_exit_code_2(model_file, simulated, make_case, tmp_path):
    output = tmp_path / "new.safetensors"
    lone, part = make_case(folder="lone/a"), make_case(folder="part/a", endings=("-t1n", "-t2w"))
    checkpoint = tmp_path / "brats_t2f_1200000.pt"
    config = Config(
        name="tiny",
        target=Modality.T2F,
        network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4),
    )
    torch.save(build_denoiser(config).backbone.state_dict(), checkpoint)
    table = {
        "found 1 complete cases, expected at least 2": (model_file, lone.parent, output),
        "found 0 complete cases, expected at least 2": (model_file, part.parent, output),
        "no such model": ("large-t2f", simulated, output),
        "a checkpoint holds no calibration": (checkpoint, simulated, output),
        "ends in .safetensors": (model_file, simulated, tmp_path / "new.pt"),
        "already exists": (model_file, simulated, model_file),
    }
    for message, (model, cases, path) in table.items():
        words = ("--model", model, "--cases", cases, "--output", path)
        result = run("calibrate", *words, *WORDS)
        assert result.exit_code == 2, (message, result.output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("cwdm: error:")]
        assert len(lines) == 1, (message, result.stderr)
        assert message in lines[0], lines
        assert not output.exists()
    words = ("--model", model_file, "--cases", simulated, "--output", output, *WORDS)
    assert "a model for t1c" in run("calibrate", *words, "--modality", "t2w").stderr
    for option, value in (("--samples", 1), ("--coverage", 1), ("--coverage", 0)):
        assert run("calibrate", *words, option, value).exit_code == 2
    assert read_case(lone).missing == ()
    assert np.all([not path.exists() for path in (output, output.with_suffix(".json"))])
