"""Several samples: their spread, the interval, and what a calibration promises."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from scipy import stats

from cwdm.case import read_case
from cwdm.cli.main import cwdm as command
from cwdm.config import Config, Sampling, Training
from cwdm.denoiser import Denoiser
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.files import sha256
from cwdm.flow import Flow
from cwdm.intensity import ScalePrior
from cwdm.modality import Modality, others
from cwdm.model import Model, build_denoiser, load_model, save_calibrated, save_model
from cwdm.synthesis import Synthesizer
from cwdm.uncertainty import (
    Calibration,
    Moments,
    Scores,
    Uncertainty,
    agreement,
    conformal_quantile,
    coverage,
    largest,
    leave_one_out,
    normal_quantile,
)
from cwdm.unet import UNetConfig
from cwdm.volume import is_synthetic

TARGET = Modality.T2F
ENDINGS = ("-t1n", "-t1c", "-t2w")
TINY = Config(
    name="tiny",
    target=TARGET,
    network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4),
    sampling=Sampling(sampler="ddim", steps=1),
    training=Training(drop_conditions=0.1),
)
PRIORS = {TARGET: ScalePrior({m: 0.0 for m in others(TARGET)}, 4.0)}
CALIBRATION = Calibration(
    coverage=0.9,
    q=2.5,
    floor=0.1,
    samples=3,
    sampler="ddpm",
    steps=2,
    cases=2,
    date="2026-01-02",
    held_out=(0.91, 0.88),
)
SIGMA = 0.1


class Noisy(torch.nn.Module):
    """A stand-in network: its x_0 is the first condition, plus noise with a known spread."""

    def forward(self, x, t):
        return x[:, 8:16] + SIGMA * x[:, :8]


def stand_in(calibration=None, network=None):
    denoiser = Denoiser(network or Noisy(), Diffusion())
    model = Model(TINY, denoiser, PRIORS, Path("none"), "0", calibration or {})
    return Synthesizer(model, device="cpu", precision="fp32")


@pytest.fixture
def model_file(tmp_path):
    torch.manual_seed(0)
    state = build_denoiser(TINY).backbone.state_dict()
    weights = {k: (torch.randn_like(v) * 0.05).half() for k, v in state.items()}
    path = tmp_path / "tiny.safetensors"
    save_model(TINY, weights, PRIORS, path, overwrite=False)
    return path


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_samples_of_a_known_spread_have_it(make_case):
    case = read_case(make_case(endings=ENDINGS))
    synthesizer, count = stand_in(), 400
    many = synthesizer(case, samples=count, sampler="one-step")
    brain = many.uncertainty.brain
    # the inverse Haar transform sums 8 coefficients / sqrt(8), LLL times 3: variance (9 + 7) / 8
    true = np.sqrt(2) * SIGMA * many.provenance.target_scale.scale
    std = many.uncertainty.std
    assert (std[~brain] == 0).all()
    np.testing.assert_allclose(std[brain], true, rtol=5 / np.sqrt(2 * count))
    assert abs(std[brain].mean() / true - 1) < 0.02
    exact = stand_in(network=FirstCondition())(case, sampler="one-step").volume.voxels
    np.testing.assert_allclose(many.volume.voxels, exact, atol=5 * true / np.sqrt(count))
    # another sample is inside the interval in 80 % of the brain; 8 voxels share their noise
    another = synthesizer(case, seed=count, sampler="one-step").volume.voxels
    inside = (many.uncertainty.low <= another) & (another <= many.uncertainty.high)
    assert abs(inside[brain].mean() - 0.8) < 4 * np.sqrt(0.16 * 8 / brain.sum())


class FirstCondition(torch.nn.Module):
    """The same without noise: all samples are one."""

    def forward(self, x, t):
        return x[:, 8:16]


def test_the_maps_are_those_of_separate_seeds(make_case, model_file):
    case = read_case(make_case(endings=ENDINGS))
    synthesizer = Synthesizer.load(TARGET, model_file, device="cpu", precision="fp32")
    words = {"sampler": "ddpm", "steps": 3}
    seen = []
    together = synthesizer(
        case, seed=5, samples=3, progress=lambda *part: seen.append(part), **words
    )
    apart = [synthesizer(case, seed=seed, **words).volume.voxels for seed in (5, 6, 7)]
    apart = np.stack(apart).astype(np.float64)
    np.testing.assert_allclose(together.volume.voxels, apart.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        together.uncertainty.std, apart.std(axis=0, ddof=1), rtol=1e-4, atol=1e-4
    )
    assert seen == [(done, 9) for done in range(1, 10)]
    assert (together.provenance.seed, together.provenance.samples) == (5, 3)


def test_moments_keep_their_precision_far_from_zero():
    rng = np.random.default_rng(0)
    arrays = 1e6 + rng.normal(size=(50, 4, 3)).astype(np.float32)
    moments = Moments()
    for array in arrays:
        moments.add(array)
    np.testing.assert_allclose(moments.std, arrays.astype(float).std(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(moments.mean, arrays.astype(float).mean(axis=0), rtol=1e-7)


def test_one_sample_is_what_it_was(make_case, model_file, tmp_path):
    folder = make_case(endings=ENDINGS)
    words = ["synthesize", "--input", folder, "--model", model_file, "--steps", 2, "--output"]
    assert run(*words, tmp_path / "a").exit_code == 0
    result = run(*words, tmp_path / "b", "--samples", 1)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["x-t2f.json", "x-t2f.nii.gz"]
    name = "x-t2f.nii.gz"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    records = [json.loads((tmp_path / f / "x-t2f.json").read_text()) for f in "ab"]
    assert all((r.pop("seconds") > 0) for r in records)
    assert records[0] == records[1]
    assert (records[0]["samples"], records[0]["interval"]) == (1, None)


def test_the_command_writes_maps_on_the_grid_of_the_case(make_case, model_file, tmp_path):
    folder, out = make_case(endings=ENDINGS), tmp_path / "out"
    words = ["synthesize", "--input", folder, "--model", model_file, "--output", out]
    result = run(*words, "--samples", 3, "--preview")
    assert result.exit_code == 0, result.output
    record = json.loads((out / "x-t2f.json").read_text())
    # the model's own sampling is one step: the samples would all be alike
    assert (record["sampler"], record["steps"], record["samples"]) == ("ddpm", 10, 3)
    assert any("not by the model's own sampling" in each for each in record["warnings"])
    assert "not calibrated" in result.stderr
    assert "of the brain; " not in result.stderr  # too narrow to vouch for the rest
    assert "30/30" in result.stderr
    interval = record["interval"]
    assert (interval["calibrated"], interval["coverage"]) == (False, 0.8)
    assert interval["q"] == pytest.approx(1.2816, abs=1e-4)
    like, image = nib.load(folder / "x-t1n.nii.gz"), nib.load(out / "x-t2f.nii.gz")
    maps = {kind: nib.load(out / name) for kind, name in interval["files"].items()}
    assert list(maps) == ["std", "low", "high"]
    for kind, each in maps.items():
        assert each.shape == like.shape
        np.testing.assert_array_equal(each.affine, like.affine)
        assert each.get_data_dtype() == np.float32
        assert f"SYNTHETIC t2f {kind}" in bytes(each.header["descrip"]).decode()
        assert is_synthetic(out / interval["files"][kind])
    low, high, std = (maps[kind].get_fdata() for kind in ("low", "high", "std"))
    np.testing.assert_allclose((low + high) / 2, image.get_fdata(), atol=0.51)  # int16
    np.testing.assert_allclose(high - low, 2 * interval["q"] * std, rtol=1e-4, atol=1e-3)
    assert image.get_data_dtype() == like.get_data_dtype()
    # the maps are no images of the case, also where they lie beside its own
    for path in out.glob("*.nii.gz"):
        path.rename(folder / path.name)
    assert list(read_case(folder).images) == [*(m for m in Modality if m != Modality.CT)]
    assert read_case(folder).images[TARGET].name == "x-t2f.nii.gz"


def test_a_map_that_is_there_is_not_replaced(make_case, model_file, tmp_path):
    folder, out = make_case(endings=ENDINGS), tmp_path / "out"
    out.mkdir()
    (out / "x-t2f-high.nii.gz").write_text("mine")
    words = ["synthesize", "--input", folder, "--model", model_file, "--samples", 2]
    result = run(*words, "--output", out)
    assert result.exit_code == 2
    assert "x-t2f-high.nii.gz: already exists" in result.stderr
    assert [path.name for path in out.iterdir()] == ["x-t2f-high.nii.gz"]


def test_samples_that_are_alike_are_said_to_be(make_case):
    case = read_case(make_case(endings=ENDINGS))
    alike = stand_in(network=FirstCondition())(case, samples=2)
    assert any("hardly differ" in each for each in alike.provenance.warnings)
    differing = stand_in()(case, samples=2, sampler="one-step")
    assert not any("hardly differ" in each for each in differing.provenance.warnings)


def test_a_sampling_that_is_asked_for_is_kept(make_case):
    synthesizer = stand_in({TARGET: CALIBRATION})
    sampling = lambda *words: (  # noqa: E731
        (settings := synthesizer._settings(*words)).sampler,
        settings.steps,
    )
    assert sampling(1, None, None) == ("ddim", 1)
    assert sampling(4, None, None) == ("ddpm", 2)  # as it was calibrated
    assert sampling(4, None, 5) == ("ddim", 5)
    assert sampling(4, "dpm++2m", None) == ("dpm++2m", 1)
    flow = replace(TINY, process=Flow(), sampling=Sampling(sampler="euler", steps=1))
    synthesizer = Synthesizer(Model(flow, Denoiser(Noisy(), Flow()), PRIORS, Path("none"), "0"))
    assert sampling(4, None, None) == ("euler", 10)
    for count in (0, -1):
        with pytest.raises(InputError, match="expected at least 1"):
            synthesizer._settings(count, None, None)


def test_a_calibration_is_used_only_for_what_it_was_measured_on(make_case):
    case = read_case(make_case(endings=ENDINGS))
    synthesizer = stand_in({TARGET: CALIBRATION})
    result = synthesizer(case, samples=3)
    interval = result.provenance.interval
    assert (interval.calibrated, interval.coverage, interval.q) == (True, 0.9, 2.5)
    assert not any("not calibrated" in each for each in result.provenance.warnings)
    maps, mean = result.uncertainty, result.volume.voxels
    half = 2.5 * (maps.std + 0.1 * mean[maps.brain].std())
    np.testing.assert_allclose((maps.high - maps.low)[maps.brain], 2 * half[maps.brain], rtol=1e-4)
    for other, words in (
        (case, {"samples": 4}),
        (case, {"samples": 3, "steps": 3}),
        (case, {"samples": 3, "sampler": "one-step"}),
        (case.without(Modality.T1C), {"samples": 3}),
    ):
        result = synthesizer(other, **words)
        assert not result.provenance.interval.calibrated
        (warning,) = [w for w in result.provenance.warnings if "not calibrated" in w]
        assert "for 3 samples by ddpm in 2 steps from all inputs" in warning


def test_a_synthetic_t1c_is_a_guess_however_many_samples(make_case, any_model):
    case = read_case(make_case(endings=("-t1n", "-t2w", "-t2f")))
    made = Synthesizer.load(Modality.T1C, any_model)(case, samples=2)
    assert any("Enhancement in a synthetic T1c is a guess" in w for w in made.provenance.warnings)


def test_the_places_where_the_interval_says_nothing_are_named():
    shape = (20, 20, 20)
    rng = np.random.default_rng(0)
    brain = np.ones(shape, bool)
    brain[0] = False
    mean = np.where(brain, rng.normal(size=shape), 0)  # 80 % of it within +- 1.2816
    std = np.full(shape, 0.5)
    std[3:7, 4:9, 5:8], std[12, 12, 12] = 1.1, 1.1
    maps = Uncertainty.of(mean, std, brain, q=normal_quantile(0.8), floor=0.0, coverage=0.8)
    np.testing.assert_array_equal(maps.wide, std > 1)
    (first, box), second = largest(maps.wide)
    assert (first, box) == (4 * 5 * 3, (slice(3, 7), slice(4, 9), slice(5, 8)))
    assert second == (1, (slice(12, 13),) * 3)
    assert largest(np.zeros(shape, bool)) == []


class Unsure(torch.nn.Module):
    """Noise in one place only: a corner of what the network sees."""

    def forward(self, x, t):
        noise = torch.zeros_like(x[:, :8])
        noise[:, :, :2, :2, :2] = 2 * x[:, :8, :2, :2, :2]
        return x[:, 8:16] + noise


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_regions_are_voxels_of_the_file(make_case, signs, tmp_path):
    voxels = np.random.default_rng(0).integers(400, 600, (16, 14, 12)).astype(np.int16)
    voxels[[0, -1]] = voxels[:, [0, -1]] = voxels[:, :, [0, -1]] = 0
    case = read_case(make_case(endings=ENDINGS, voxels=voxels, affine=np.diag([*signs, 1.0])))
    path = stand_in(network=Unsure())(case, samples=3, sampler="one-step").write(tmp_path / "out")
    record = json.loads(path.with_name("x-t2f.json").read_text())["interval"]
    low, high = (nib.load(path.with_name(record["files"][k])).get_fdata() for k in ("low", "high"))
    brain = voxels > 0
    ends = np.quantile(((low + high) / 2)[brain], [0.1, 0.9])
    wide = brain & (high - low >= np.ptp(ends))
    assert record["wide"] == pytest.approx(wide.sum() / brain.sum(), abs=1e-3)
    size, box = largest(wide)[0]
    assert size > 8
    assert record["regions"][0] == {
        "voxels": size,
        "first": [s.start for s in box],
        "last": [s.stop - 1 for s in box],
    }


def test_the_published_scripts_write_one_sample(make_case):
    case = read_case(make_case(endings=ENDINGS))
    with pytest.raises(InputError, match="2 samples: the published scripts write one"):
        stand_in()(case, samples=2, compat=True)


def test_the_quantile_of_few_scores_covers_what_it_promises():
    # the k-th of n uniform scores is k / (n + 1) on average: 8 / 10 for n = 9
    rng = np.random.default_rng(0)
    quantiles = [conformal_quantile(rng.random(9), 0.8) for _ in range(20_000)]
    deviation = np.sqrt(0.8 * 0.2 / 11)  # of Beta(8, 2)
    assert abs(np.mean(quantiles) - 0.8) < 4 * deviation / np.sqrt(len(quantiles))
    assert conformal_quantile(np.arange(4.0), 0.8) == 3
    with pytest.raises(InputError, match="found 3 voxels, too few"):
        conformal_quantile(np.arange(3.0), 0.8)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_fresh_scores_are_covered_whatever_their_distribution(share):
    rng = np.random.default_rng(1)
    n, fresh = 4000, 40_000
    for draw in (rng.standard_exponential, lambda k: np.abs(rng.standard_t(2, k))):
        q = conformal_quantile(draw(n), share)
        error = np.sqrt(share * (1 - share) * (1 / n + 1 / fresh))
        assert abs(coverage(draw(fresh), q) - share) < 4 * error


def truth_and_samples(seed, scale=1.0, worse=1.0):
    """A mean, its std, and a truth that differs by as much, on a scale of its own."""
    rng = np.random.default_rng(seed)
    shape = (24, 24, 24)
    brain = np.zeros(shape, bool)
    brain[2:22, 2:22, 2:22] = True
    mean = np.where(brain, 100 + 20 * rng.normal(size=shape), 0)
    std = np.where(brain, rng.uniform(0.5, 4, shape), 0)
    truth = mean + worse * std * rng.normal(size=shape)
    return mean, std, np.where(brain, 30 + scale * truth, 0), brain


def test_scores_do_not_depend_on_the_scale_of_the_truth():
    mean, std, truth, brain = truth_and_samples(0)
    _, _, scaled, _ = truth_and_samples(0, scale=7.0)
    a, b = (Scores.of("x", mean, std, t, brain) for t in (truth, scaled))
    np.testing.assert_allclose(a.brain, b.brain, rtol=1e-3, atol=1e-4)
    exact = Scores.of("x", mean, std, truth, brain, floor=0.0)
    # errors are normal with the samples' std: q is that of the normal distribution
    assert conformal_quantile(exact.brain, 0.8) == pytest.approx(normal_quantile(0.8), rel=0.05)
    np.testing.assert_allclose(exact.brain.size, brain.sum())


def test_coverage_is_that_of_the_interval_on_the_scale_of_the_truth():
    mean, std, truth, brain = truth_and_samples(3, scale=2.0)
    q, floor = 1.5, 0.1
    scores = Scores.of("x", mean, std, truth, brain, floor=floor)
    maps = Uncertainty.of(mean, std, brain, q=q, floor=floor, coverage=0.8)
    slope, offset = np.polyfit(mean[brain], truth[brain], 1)
    inside = (slope * maps.low + offset <= truth) & (truth <= slope * maps.high + offset)
    assert coverage(scores.brain, q) == pytest.approx(inside[brain].mean(), abs=1e-3)


def test_leaving_one_out_is_honest():
    scores = [
        Scores.of(str(seed), *truth_and_samples(seed, scale=3.0, worse=worse))
        for seed, worse in ((0, 2.0), (1, 2.0), (2, 2.0), (3, 4.0))
    ]
    rows = leave_one_out(scores, 0.8)
    assert [row.case for row in rows] == ["0", "1", "2", "3"]
    # the last one errs twice as much as the others said it would
    true = 2 * stats.norm.cdf(normal_quantile(0.8) / 2) - 1
    assert rows[3].coverage == pytest.approx(true, abs=0.03)
    assert all(row.coverage > 0.8 for row in rows[:3])
    assert all(row.q > rows[3].q for row in rows[:3])
    assert all(row.coverage_tumor is None for row in rows)


def test_agreement_is_a_rank_correlation():
    rng = np.random.default_rng(0)
    std = rng.random(2000)
    assert agreement(std, std**3) == pytest.approx(1)
    assert agreement(std, -std) == pytest.approx(-1)
    assert abs(agreement(std, rng.random(2000))) < 4 / np.sqrt(2000)
    assert agreement(np.ones(2000), std) is None


def test_the_tumor_has_figures_of_its_own():
    mean, std, truth, brain = truth_and_samples(0)
    tumor = np.zeros_like(brain)
    tumor[0:6, 0:6, 0:6] = True
    scores = Scores.of("x", mean, std, truth, brain, tumor)
    assert scores.tumor.size == (brain & tumor).sum()
    assert scores.agreement_tumor > 0.2
    nowhere = Scores.of("x", mean, std, truth, brain, np.zeros_like(brain))
    assert (nowhere.tumor, nowhere.agreement_tumor) == (None, None)


def test_samples_that_do_not_follow_the_truth_are_refused():
    mean, std, truth, brain = truth_and_samples(0)
    with pytest.raises(InputError, match=r"case x: .* does not rise with the truth"):
        Scores.of("x", mean, std, -truth, brain)


def test_a_calibration_travels_with_the_model(model_file, tmp_path):
    path = tmp_path / "calibrated.safetensors"
    sections = replace(CALIBRATION, steps=(1, 2, 3))
    for calibration in (CALIBRATION, sections):
        save_calibrated(model_file, {TARGET: calibration}, path, overwrite=True)
        assert load_model(path).calibration == {TARGET: calibration}
    assert load_model(model_file).calibration == {}
    with safe_open(path, "pt") as new, safe_open(model_file, "pt") as old:
        assert set(new.keys()) == set(old.keys())
        for key in old.keys():  # noqa: SIM118
            assert new.get_tensor(key).dtype == torch.float16
            assert torch.equal(new.get_tensor(key), old.get_tensor(key))
        kept = {k: v for k, v in new.metadata().items() if k != "calibration"}
        assert kept == old.metadata()
    with pytest.raises(InputError, match="exists"):
        save_calibrated(model_file, {}, path, overwrite=False)
    save_calibrated(model_file, {}, path, overwrite=True)
    assert load_model(path).calibration == {}
    assert sha256(path) != sha256(model_file)


def test_a_damaged_calibration_is_refused(model_file, tmp_path):
    from cwdm.model import _read, to_bytes

    weights, metadata = _read(model_file)
    for damaged in ("{", '{"t2f": {"q": 1}}', '{"t9": {}}'):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(to_bytes(weights, metadata | {"calibration": damaged}))
        with pytest.raises(InputError, match="metadata are damaged"):
            load_model(path)
