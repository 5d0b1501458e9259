"""Training: what is learnt, what a step minimizes, what any configuration leaves behind."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.cache import fill, open_cache
from cwdm.case import find_cases
from cwdm.coefficients import Transform
from cwdm.config import Augmentation, Config, Sampling, Training
from cwdm.dataset import Source, TrainingData
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.layouts import find
from cwdm.metrics import RANGE_QUANTILES
from cwdm.modality import Modality
from cwdm.model import build_denoiser, load_model
from cwdm.train import _State, needed, train
from cwdm.unet import UNetConfig
from cwdm.validation import BY_HEART_DB, HeldOut, Validation
from cwdm.wavunet import WavUNetConfig

NETWORK = UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4)
PLAIN = Config(
    name="tiny",
    target=Modality.T2F,
    network=NETWORK,
    training=Training(iterations=2, learning_rate=1e-3, checkpoint_every=1),
)
ALIKE = frozenset({"duplicate"})
"""The four images of many a case here are the same."""
EVERYTHING = replace(
    PLAIN,
    training=Training(
        iterations=4,
        patch=(8, 8, 8),
        batch=4,
        learning_rate=1e-3,
        ema=0.9,
        drop_conditions=0.3,
        checkpoint_every=2,
        augmentation=Augmentation(flip=True, affine=1.0, bias_field=1.0, contrast=1.0),
    ),
)


@pytest.fixture
def cached(tmp_path):
    """Pack what is below a folder."""

    def make(folder, name="cache"):
        assert all(
            r.status != "left out" for r in fill(find(folder), tmp_path / name, accept=ALIKE)
        )
        return open_cache(tmp_path / name)

    return make


@pytest.fixture
def balls(make_case, cached):
    """Two cases whose four images are alike."""
    for i in range(2):
        folder = make_case(folder=f"data/c{i}", case_id=f"c{i}")
    return cached(folder.parent)


@pytest.fixture
def noises(make_case, cached):
    """A case of four images that have nothing in common."""
    rng = np.random.default_rng(0)
    for ending in ("-t1n", "-t1c", "-t2w", "-t2f"):
        voxels = rng.uniform(50, 150, (16, 16, 8)).astype(np.float32)
        folder = make_case("noises", endings=(ending,), voxels=voxels)
    return cached(folder)


def steps_of(config, cases, run_dir, **options):
    options = {"device": "cpu", "precision": "fp32", "workers": 0, **options}
    return list(train(config, [Source("cases", cases)], run_dir, **options))


def weights(run):
    return load_model(run / "model.safetensors").denoiser.backbone.state_dict()


def assert_same_weights(ours, theirs, **tolerance):
    for name, value in ours.items():
        assert_close(value, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


def two_steps(config, cases, run_dir):
    """Train two steps; check what every configuration has in common, return the steps."""
    steps = steps_of(config, cases, run_dir)
    assert [step.step for step in steps] == [1, 2]
    for step in steps:
        assert step.loss_per_band.shape == (config.transform.channels,)
        assert torch.isfinite(step.loss_per_band).all()
    model = load_model(run_dir / "model.safetensors")
    assert model.config == config
    assert set(model.priors) == set(config.targets)
    torch.manual_seed(config.training.seed)
    untrained = build_denoiser(config).backbone.state_dict()
    trained = model.denoiser.backbone.state_dict()
    assert set(trained) == set(untrained)
    moved = [name for name in trained if (trained[name] - untrained[name]).abs().max() > 1e-4]
    assert any(name.startswith("out.") for name in moved)
    return steps


def test_training_learns_a_simple_relation(balls, tmp_path):
    """All four images are the same ball: the target is any of the conditions."""
    settings = replace(
        EVERYTHING.training,
        iterations=100,
        batch=1,
        learning_rate=5e-3,
        ema=0.0,
        noise_share=1.0,
        drop_conditions=0.0,
        augmentation=Augmentation(),
    )
    steps = steps_of(replace(EVERYTHING, training=settings), balls, tmp_path / "run")
    losses = [step.loss for step in steps]
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])


def test_a_run_leaves_its_records(balls, tmp_path):
    run = tmp_path / "run"
    steps = steps_of(EVERYTHING, balls, run)
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, step in zip(lines, steps, strict=True):
        assert line["loss"] == step.loss
        assert len(line["times"]) == len(line["errors"]) == 4
        assert np.mean(line["errors"]) == pytest.approx(np.mean(line["bands"]), rel=1e-5)
        assert line["norm"] > 0
    assert Config.parse(json.loads((run / "config.json").read_text()), "x") == EVERYTHING
    data = json.loads((run / "data.json").read_text())
    assert data["sources"] == [{"name": "cases", "cases": 2, "weight": 1.0}]
    assert data["mean"]["t1n"] == pytest.approx(0, abs=0.3)
    assert data["deviation"]["t2f"] == pytest.approx(1, abs=0.4)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
    ]


def test_only_the_last_checkpoints_are_kept(balls, tmp_path):
    settings = replace(PLAIN.training, iterations=4, keep=2)
    steps_of(replace(PLAIN, training=settings), balls, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000003.safetensors", "step-00000004.safetensors"]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_parts_of_a_batch_add_up_to_it(accumulation, balls, tmp_path):
    settings = replace(EVERYTHING.training, structure_weight=0.3)
    whole = replace(EVERYTHING, training=settings)
    parts = replace(whole, training=replace(settings, accumulation=accumulation))
    ours = steps_of(whole, balls, tmp_path / "whole")
    theirs = steps_of(parts, balls, tmp_path / "parts")
    for one, other in zip(ours, theirs, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert_close(one.loss_per_band, other.loss_per_band, rtol=1e-4, atol=1e-6)


def test_recomputing_features_changes_nothing(balls, tmp_path):
    ours = steps_of(EVERYTHING, balls, tmp_path / "kept")
    settings = replace(EVERYTHING.training, recompute=True)
    theirs = steps_of(replace(EVERYTHING, training=settings), balls, tmp_path / "again")
    assert [s.loss for s in ours] == pytest.approx([s.loss for s in theirs], rel=1e-6)
    assert_same_weights(weights(tmp_path / "kept"), weights(tmp_path / "again"))


def test_recomputing_features_takes_less_memory():
    settings = Training(patch=(224, 224, 160))
    config = Config(name="x", target=Modality.T2F, training=settings)
    much = needed(config, "fp32", "cpu")
    less = needed(replace(config, training=replace(settings, recompute=True)), "fp32", "cpu")
    assert much[0] == less[0] > 70e6
    assert less[1] < 0.75 * much[1]
    assert needed(config, "bf16", "cpu")[1] < much[1]


def test_the_gradient_is_clipped(balls, tmp_path):
    """Adam does not see the scale of gradients, but it sees that of one among others."""
    settings = replace(EVERYTHING.training, clip=1e-3)
    clipped = replace(EVERYTHING, training=settings)
    ours = steps_of(EVERYTHING, balls, tmp_path / "free")
    theirs = steps_of(clipped, balls, tmp_path / "clipped")
    assert ours[0].loss == theirs[0].loss
    assert ours[-1].loss != theirs[-1].loss
    norms = [
        json.loads(line)["norm"]
        for line in (tmp_path / "clipped" / "steps.jsonl").read_text().splitlines()
    ]
    assert min(norms) > 1e-3  # as it was before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision, balls, tmp_path):
    # with one image of 8 voxels oneDNN's gradients in bf16 are not finite
    config = replace(EVERYTHING, training=replace(EVERYTHING.training, patch=(16, 16, 16)))
    ours = steps_of(config, balls, tmp_path / "fp32")
    theirs = steps_of(config, balls, tmp_path / "half", precision=precision)
    for one, other in zip(ours, theirs, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=0.05)


@pytest.mark.parametrize("target", [Modality.T2F, Modality.T1N])
def test_a_model_without_conditions_needs_its_target_only(target, make_case, cached, tmp_path):
    cases = cached(make_case(folder="data", endings=(f"-{target}",)))
    config = replace(PLAIN, target=target, conditioning="none")
    steps = two_steps(config, cases, tmp_path / "run")
    # an untrained network puts out zero: the error is the image itself
    image = TrainingData([Source("cases", cases)], config)[0, 0].images[None]
    error = config.transform.encode(image).square().mean(dim=(0, 2, 3, 4))
    assert_close(steps[0].loss_per_band, error)
    prior = load_model(tmp_path / "run" / "model.safetensors").priors[target]
    assert prior.predict({}).scale == pytest.approx(cases[0].scales["robust"][target].scale)


@pytest.mark.parametrize("source", ["conditions", "noise"])
@pytest.mark.parametrize("conditioning", ["others", "any"])
def test_one_model_of_all_targets_learns_their_velocities(source, conditioning, noises, tmp_path):
    config = replace(
        PLAIN,
        target="any",
        conditioning=conditioning,
        prediction="velocity",
        network=replace(NETWORK, classes=4),
        process=Flow(source=source),
        sampling=Sampling(sampler="euler", steps=5),
        training=replace(PLAIN.training, drop_conditions=0.5),
    )
    steps = two_steps(config, noises, tmp_path / "run")
    if source == "noise":
        return
    # the first velocity is that from the mean of what is given to the target, which the network
    # does not know yet
    sample = TrainingData([Source("cases", noises)], config)[0, 0]
    velocity = sample.images[sample.target] - sample.images[sample.given].mean(dim=0)
    error = config.transform.encode(velocity[None, None]).square().mean(dim=(0, 2, 3, 4))
    assert_close(steps[0].loss_per_band, error, rtol=1e-4, atol=1e-6)


def test_a_wavunet_is_trained(balls, tmp_path):
    """Its checkpoint holds shared weights under two names."""
    config = replace(PLAIN, network=WavUNetConfig(channels=8, multipliers=(1, 2), groups=4))
    two_steps(config, balls, tmp_path / "whole")
    run = train(config, [Source("cases", balls)], tmp_path / "parts", device="cpu", workers=0)
    next(run)
    run.close()
    (rest,) = steps_of(config, balls, tmp_path / "parts", precision="auto")
    assert rest.step == 2
    trained = weights(tmp_path / "whole")
    shared = [(f"output_blocks.{i}.0", f"output_blocks.{i + 1}.0") for i in (1, 4)]
    for name, other in shared:
        for key in [key for key in trained if key.startswith(f"{name}.")]:
            assert torch.equal(trained[key], trained[key.replace(name, other)])


@pytest.mark.parametrize(
    "transform",
    [Transform(wavelet="identity"), Transform(levels=2), Transform(wavelet="db2")],
    ids=["identity", "packet", "db2"],
)
def test_another_transform_is_trained(transform, balls, tmp_path):
    config = replace(PLAIN, transform=transform, prediction="residual")
    steps = two_steps(config, balls, tmp_path / "run")
    # all images of a case are alike: nothing is left to predict
    assert steps[0].loss_per_band.max() < 1e-9


def test_band_weights_and_structure_make_the_loss(balls, tmp_path):
    band_weights = (9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    config = replace(PLAIN, conditioning="none")
    weighted = replace(config.training, band_weights=band_weights)
    step = steps_of(replace(config, training=weighted), balls, tmp_path / "a")[0]
    assert step.loss == pytest.approx(
        float((step.loss_per_band * torch.tensor(band_weights)).mean()), rel=1e-5
    )
    structured = replace(config.training, structure_weight=0.5)
    step = steps_of(replace(config, training=structured), balls, tmp_path / "b")[0]
    # of an image of zeros nothing is right: the structural error of a brain is nearly one
    extra = step.loss - float(step.loss_per_band.mean())
    assert 0.3 < extra < 0.6


def test_direct_regression_is_a_flow_of_one_step(noises, tmp_path):
    """Deterministic: from the mean of the conditions to the target, no noise anywhere."""
    config = replace(
        PLAIN,
        prediction="velocity",
        process=Flow(steps=1, bridge_noise=0.0),
        sampling=Sampling(sampler="euler", steps=1),
    )
    steps = two_steps(config, noises, tmp_path / "run")
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["times"] for line in lines] == [[1], [1]]
    other_seed = replace(config, training=replace(config.training, seed=0, noise_share=0.7))
    again = steps_of(other_seed, noises, tmp_path / "again")
    assert [s.loss for s in again] == [s.loss for s in steps]


def test_a_run_starts_from_a_published_checkpoint_of_its_network_only(balls, tmp_path):
    torch.manual_seed(1)
    start = build_denoiser(PLAIN).backbone.state_dict()
    path = tmp_path / "brats_1200000.pt"
    torch.save(start, path)
    settings = replace(PLAIN.training, iterations=1, learning_rate=0.0)
    steps_of(replace(PLAIN, training=settings), balls, tmp_path / "run", init=path)
    started = weights(tmp_path / "run")
    for name, value in start.items():
        assert_close(started[name], value.half().float(), rtol=0, atol=0)
    wider = replace(PLAIN, network=UNetConfig(channels=16, multipliers=(1, 1), groups=4))
    with pytest.raises(InputError, match="another network"):
        steps_of(wider, balls, tmp_path / "other", init=path)


def test_held_out_cases_are_scored_and_drawn(make_case, balls, cached, tmp_path):
    folder = make_case(folder="unseen/u", case_id="u")
    held_out = HeldOut(find_cases(folder), cached(folder, "unseen-cache"))
    config = replace(
        EVERYTHING,
        sampling=Sampling(sampler="ddpm", steps=100),
        training=replace(EVERYTHING.training, validate_every=3, validation_steps=2),
    )
    steps = steps_of(config, balls, tmp_path / "run", held_out=held_out)
    assert [step.step for step in steps if step.validation] == [3, 4]
    lines = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record, step in zip(records, (3, 4), strict=True):
        assert record["step"] == step
        assert record["times"][0] == 1000
        for errors in ("held_out", "fitted", "raw", "trivial"):
            assert len(record[errors]) == len(record["times"]) == 5
        assert record["trivial"] == pytest.approx([0] * 5, abs=1e-3)  # all images are alike
        assert len(record["energy"]["samples"]) == len(record["energy"]["data"]) == 8
        (score,) = record["scores"]
        assert (score["case"], score["modality"]) == ("u", "t2f")
        assert score["floor"].startswith("copy")
        assert (tmp_path / "run" / "validation" / f"step-{step:08d}-u-t2f.png").stat().st_size
    best = max(records, key=lambda record: record["scores"][0]["psnr"])
    if best is records[-1]:
        assert_same_weights(
            weights(tmp_path / "run"),
            load_model(tmp_path / "run" / "best.safetensors").denoiser.backbone.state_dict(),
        )
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_strides_that_do_not_make_so_many_steps_are_no_obstacle(make_case, balls, cached, tmp_path):
    folder = make_case(folder="unseen/u", case_id="u")
    held_out = HeldOut(find_cases(folder), cached(folder, "unseen-cache"))
    config = replace(
        EVERYTHING,
        process=Diffusion(steps=100),
        sampling=Sampling(sampler="ddpm", steps=100, spacing="stride"),
        training=replace(EVERYTHING.training, validate_every=4, validation_steps=40),
    )
    with pytest.raises(ValueError, match="stride"):
        config.process.timesteps(40, "stride")
    steps = steps_of(config, balls, tmp_path / "run", held_out=held_out)
    assert [step.step for step in steps if step.validation] == [4]


def test_a_picture_stays_in_the_run_whatever_its_case_is_called(make_case, balls, cached, tmp_path):
    """In a table an id can be anything."""
    folder = make_case(folder="unseen/u", case_id="u")
    (case,) = find_cases(folder)
    held_out = HeldOut([replace(case, id="a/../../../escaped/x")], cached(folder, "unseen-cache"))
    settings = replace(PLAIN.training, iterations=1)
    steps_of(replace(PLAIN, training=settings), balls, tmp_path / "run", held_out=held_out)
    assert not (tmp_path / "escaped").exists()
    (picture,) = (tmp_path / "run" / "validation").iterdir()
    assert picture.name == "step-00000001-a%2F..%2F..%2F..%2Fescaped%2Fx-t2f.png"


def test_an_inverted_block_has_the_score_of_a_constant_one():
    truth = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, (1, 1, 12, 12, 12)))
    score = Validation._patch_score(SimpleNamespace(config=PLAIN), 5 - truth, truth)
    low, high = np.quantile(truth.numpy(), RANGE_QUANTILES)
    assert score["psnr"] == pytest.approx(
        10 * np.log10((high - low) ** 2 / truth.numpy().var()), abs=1e-3
    )


def test_a_run_is_saved_before_it_is_validated(make_case, balls, cached, tmp_path, monkeypatch):
    folder = make_case(folder="unseen/u", case_id="u")
    held_out = HeldOut(find_cases(folder), cached(folder, "unseen-cache"))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cwdm.validation.Validation.__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps_of(EVERYTHING, balls, tmp_path / "run", held_out=held_out)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004.safetensors").exists()


def test_the_best_validation_is_the_best_also_after_one_that_failed():
    state = _State.fresh(PLAIN, torch.device("cpu"), torch.float32, compiled=False, ema=0.0)
    records = [
        {"scores": [{"psnr": value}], "held_out": None, "fitted": [0.1]}
        for value in (20.0, float("nan"), 25.0, 24.0, 30.0)
    ]
    assert [state.improved(record) for record in records] == [True, False, True, False, True]
    error = {"scores": [], "held_out": [0.3], "fitted": [0.1]}
    fresh = _State.fresh(PLAIN, torch.device("cpu"), torch.float32, compiled=False, ema=0.0)
    better = {**error, "held_out": [0.2]}
    assert [fresh.improved(record) for record in (error, better, error)] == [True, True, False]


def test_a_tracker_that_is_not_there_is_missed_at_once(balls, tmp_path):
    with pytest.raises(InputError, match="mlflow is not installed"):
        steps_of(PLAIN, balls, tmp_path / "run", tracker="mlflow")


@pytest.mark.slow
def test_a_run_learns_its_one_case_by_heart(noises, tmp_path):
    """Nothing in the conditions tells the target: what is right has been learnt by heart."""
    config = replace(
        PLAIN,
        prediction="residual",
        network=replace(NETWORK, channels=32, multipliers=(1, 2)),
        training=Training(
            iterations=400, patch=(16, 16, 8), learning_rate=2e-3, decay=True, noise_share=1.0
        ),
        sampling=Sampling(sampler="one-step", steps=1),
    )
    steps = steps_of(config, noises, tmp_path / "run", overfit=1)
    (score,) = steps[-1].validation["scores"]
    assert score["psnr"] > BY_HEART_DB
    assert len(steps) < 400  # it need not go on
