"""Training data and training: blocks that depend on their number, runs that resume exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.case import find_cases
from cwdm.coefficients import Transform
from cwdm.config import Augmentation, Config, Images, Sampling, Training
from cwdm.dataset import TrainingBlocks
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.modality import SEQUENCES, Modality
from cwdm.model import build_denoiser, load_model
from cwdm.preparation import prepare
from cwdm.train import _draw_target, train
from cwdm.unet import UNetConfig
from cwdm.volume import read_volumes
from cwdm.wavunet import WavUNetConfig

EVERYTHING = Augmentation(flip=True, affine=1.0, bias_field=1.0, contrast=1.0)
CONFIG = Config(
    name="tiny",
    target=Modality.T2F,
    network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4),
    training=Training(
        iterations=10,
        patch=(8, 8, 8),
        patches_per_case=2,
        cases_per_block=2,
        learning_rate=1e-3,
        ema=0.9,
        drop_conditions=0.3,
        checkpoint_every=5,
        augmentation=EVERYTHING,
    ),
)
CPU = torch.device("cpu")


@pytest.fixture
def cases(make_case):
    for i in range(2):
        folder = make_case(folder=f"data/c{i}", case_id=f"c{i}")
    return find_cases(folder.parent)


def weights(run: Path):
    return load_model(run / "model.safetensors").denoiser.backbone.state_dict()


def test_a_block_depends_on_seed_and_number_only(cases):
    data = TrainingBlocks(cases, CONFIG)
    first = data[3]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - that the global generator plays no part is the point
    data[0]
    again = TrainingBlocks(cases, CONFIG)[3]
    assert first.shape == (4, 4, 8, 8, 8)
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, data[4])
    assert torch.isfinite(first).all()


def test_intensity_augmentation_leaves_the_target_alone(cases):
    plain = replace(CONFIG, training=replace(CONFIG.training, patch=None, cases_per_block=1))
    settings = replace(plain.training, augmentation=Augmentation(bias_field=1.0, contrast=1.0))
    changed = TrainingBlocks(cases, replace(plain, training=settings))[0]
    settings = replace(settings, augmentation=Augmentation())
    unchanged = TrainingBlocks(cases, replace(plain, training=settings))[0]
    assert_close(changed[:, 3], unchanged[:, 3])
    for conditioning in range(3):
        assert (changed[:, conditioning] - unchanged[:, conditioning]).abs().max() > 0.05


def test_cases_without_all_modalities_are_left_out_with_a_word(cases, make_case, caplog):
    make_case(folder="data/short", case_id="short", endings=("-t1n",))
    everything = find_cases(cases[0].images[Modality.T1N].parents[1])
    assert len(TrainingBlocks(everything, CONFIG).subjects) == 2
    assert "short" in caplog.text
    with pytest.raises(InputError, match="t1n, t1c, t2w, t2f"):
        TrainingBlocks([c for c in everything if c.missing], CONFIG)


def test_ten_steps_equal_five_and_five_more(cases, tmp_path):
    whole = list(train(CONFIG, cases, tmp_path / "whole", device=CPU))
    for step in train(CONFIG, cases, tmp_path / "parts", device=CPU):
        if step.step == 5:
            break  # as if killed; the checkpoint of step 5 is there
    rest = list(train(CONFIG, cases, tmp_path / "parts", device=CPU, resume=True))
    assert [s.step for s in rest] == [6, 7, 8, 9, 10]
    for a, b in zip(whole[5:], rest, strict=True):
        assert_close(a.loss_per_band, b.loss_per_band, rtol=0, atol=0)
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=0, atol=0)


def test_a_run_is_not_overwritten_nor_continued_with_other_settings(cases, tmp_path):
    short = replace(CONFIG, training=replace(CONFIG.training, iterations=1))
    list(train(short, cases, tmp_path, device=CPU))
    with pytest.raises(InputError, match="--resume"):
        next(train(short, cases, tmp_path, device=CPU))
    with pytest.raises(InputError, match="training"):
        next(train(CONFIG, cases, tmp_path, device=CPU, resume=True))


def test_training_learns_a_simple_relation(make_case, tmp_path):
    """All four images are the same ball: the target is any of the conditions."""
    cases = find_cases(make_case(folder="one"))
    settings = replace(
        CONFIG.training,
        iterations=150,
        learning_rate=5e-3,
        ema=0.0,
        noise_share=1.0,
        drop_conditions=0.0,
        augmentation=Augmentation(),
    )
    steps = list(train(replace(CONFIG, training=settings), cases, tmp_path, device=CPU))
    losses = [step.loss for step in steps]
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])


def plain(**changes):
    """Two steps on whole images without augmentation."""
    training = Training(
        iterations=2, learning_rate=1e-3, checkpoint_every=1, augmentation=Augmentation()
    )
    return replace(CONFIG, **{"training": training, **changes})


def two_steps(config, cases, run_dir):
    """Train two steps; check what every configuration has in common, return the steps."""
    steps = list(train(config, cases, run_dir, device=CPU))
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


@pytest.mark.parametrize("target", [Modality.T2F, Modality.T1N])
def test_a_model_without_conditions_needs_its_target_only(target, make_case, tmp_path):
    cases = find_cases(make_case(folder="data", endings=(f"-{target}",)))
    config = plain(target=target, conditioning="none")
    assert TrainingBlocks(cases, config)[0].shape[:2] == (1, 1)
    steps = two_steps(config, cases, tmp_path / "run")
    # an untrained network puts out zero: the error is the image itself
    image = TrainingBlocks(cases, config)[0][:, :1]
    error = config.transform.encode(image).square().mean(dim=(0, 2, 3, 4))
    assert_close(steps[0].loss_per_band, error)
    prior = load_model(tmp_path / "run" / "model.safetensors").priors[target]
    data = TrainingBlocks(cases, config)
    assert prior.predict({}).scale == pytest.approx(data.scales[0][target].scale)
    with pytest.raises(InputError, match="training needs cases with t2w, found none"):
        TrainingBlocks(cases, plain(target=Modality.T2W, conditioning="none"))


@pytest.mark.parametrize("source", ["conditions", "noise"])
def test_one_model_of_all_targets_learns_their_velocities(source, make_case, tmp_path):
    rng = np.random.default_rng(0)
    for ending in ("-t1n", "-t1c", "-t2w", "-t2f"):
        voxels = rng.uniform(50, 150, (8, 8, 8)).astype(np.float32)
        make_case(endings=(ending,), voxels=voxels)
    cases = find_cases(tmp_path)
    config = plain(
        target="any",
        prediction="velocity",
        network=replace(CONFIG.network, classes=4),
        process=Flow(source=source),
        sampling=Sampling(sampler="euler", steps=5),
    )
    steps = two_steps(config, cases, tmp_path / "run")
    if source == "noise":
        return
    # the first velocity is that from the mean of the other three to the target, which the
    # network does not know yet
    images = TrainingBlocks(cases, config)[0]
    errors = []
    for index in range(4):
        rest = [i for i in range(4) if i != index]
        velocity = images[:, [index]] - images[:, rest].mean(dim=1, keepdim=True)
        errors.append(config.transform.encode(velocity).square().mean(dim=(0, 2, 3, 4)))
    first = steps[0].loss_per_band
    assert sum(torch.allclose(first, error, rtol=1e-4) for error in errors) == 1


def test_every_target_is_drawn_with_its_own_label():
    config = plain(target="any", network=replace(CONFIG.network, classes=4))
    generator = torch.Generator().manual_seed(0)
    drawn = [_draw_target(config, 3, generator) for _ in range(40)]
    assert {target for target, _ in drawn} == set(SEQUENCES)
    for target, label in drawn:
        assert label.tolist() == [SEQUENCES.index(target)] * 3
    assert _draw_target(plain(), 3, generator) == (Modality.T2F, None)


def test_no_image_of_a_model_of_all_targets_is_changed_alone(cases):
    changes = Augmentation(bias_field=1.0, contrast=1.0)
    config = plain(target="any", network=replace(CONFIG.network, classes=4))
    settings = replace(config.training, augmentation=changes)
    changed = TrainingBlocks(cases, replace(config, training=settings))[0]
    assert_close(changed, TrainingBlocks(cases, config)[0], rtol=0, atol=0)


def test_a_wavunet_is_trained_saved_and_resumed(cases, tmp_path):
    """Its checkpoint holds shared weights under two names."""
    config = plain(network=WavUNetConfig(channels=8, multipliers=(1, 2), groups=4))
    two_steps(config, cases, tmp_path / "whole")
    for _ in train(config, cases, tmp_path / "parts", device=CPU):
        break  # as if killed after the first checkpoint
    (rest,) = train(config, cases, tmp_path / "parts", device=CPU, resume=True)
    assert rest.step == 2
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=0, atol=0)
    shared = [(f"output_blocks.{i}.0", f"output_blocks.{i + 1}.0") for i in (1, 4)]
    for name, other in shared:
        for key in [key for key in ours if key.startswith(f"{name}.")]:
            assert torch.equal(ours[key], ours[key.replace(name, other)])


@pytest.mark.parametrize(
    "transform",
    [Transform(wavelet="identity"), Transform(levels=2), Transform(wavelet="db2")],
    ids=["identity", "packet", "db2"],
)
def test_another_transform_is_trained(transform, cases, tmp_path):
    config = plain(transform=transform, prediction="residual")
    steps = two_steps(config, cases, tmp_path / "run")
    # all images of a case are alike: nothing is left to predict
    assert steps[0].loss_per_band.max() < 1e-9


def test_band_weights_and_structure_make_the_loss(cases, tmp_path):
    band_weights = (9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    config = plain(conditioning="none")
    weighted = replace(config.training, band_weights=band_weights)
    step = next(train(replace(config, training=weighted), cases, tmp_path / "a", device=CPU))
    assert step.loss == pytest.approx(
        float((step.loss_per_band * torch.tensor(band_weights)).mean()), rel=1e-5
    )
    structured = replace(config.training, structure_weight=0.5)
    step = next(train(replace(config, training=structured), cases, tmp_path / "b", device=CPU))
    # of an image of zeros nothing is right: the structural error of a brain is nearly one
    extra = step.loss - float(step.loss_per_band.mean())
    assert 0.3 < extra < 0.6


def test_training_at_another_voxel_size_resamples(make_case, tmp_path):
    rng = np.random.default_rng(0)
    voxels = rng.uniform(50, 150, (16, 16, 8)).astype(np.float32)
    cases = find_cases(make_case(folder="data", voxels=voxels))
    fine, coarse = plain(), plain(images=Images(spacing_mm=2.0))
    images, half = TrainingBlocks(cases, fine)[0], TrainingBlocks(cases, coarse)[0]
    assert (images.shape, half.shape) == ((1, 4, 16, 16, 8), (1, 4, 8, 8, 4))
    assert_close(half, torch.nn.functional.avg_pool3d(images, 2), rtol=0, atol=1e-5)
    two_steps(coarse, cases, tmp_path / "run")


def test_training_sees_the_orientation_and_the_size_of_the_settings(make_case):
    rng = np.random.default_rng(0)
    voxels = rng.uniform(50, 150, (8, 8, 8)).astype(np.float32)
    cases = find_cases(make_case(folder="data", voxels=voxels))
    ras, lps = plain(), plain(images=Images(orientation="LPS", size=(16, 12, 8)))
    images, seen = TrainingBlocks(cases, ras)[0], TrainingBlocks(cases, lps)[0]
    assert seen.shape == (1, 4, 16, 12, 8)
    assert_close(seen[:, :, 4:12, 2:10], images.flip(2, 3), rtol=0, atol=0)
    assert seen[:, :, :4].abs().max() == 0


def test_training_sees_what_synthesis_sees(make_case):
    """The published quantiles depend on the background: they are those of the whole volume."""
    voxels = np.zeros((48, 40, 24), dtype=np.float32)
    voxels[16:32, 12:28, 8:16] = np.random.default_rng(0).uniform(50, 150, (16, 16, 8))
    (case,) = find_cases(make_case(folder="data", voxels=voxels))
    for settings in (
        Images(normalization="published"),
        Images(normalization="published-wdm", size=(64, 64, 64), orientation="LPS"),
    ):
        config = plain(images=settings)
        expected = prepare(read_volumes(case, SEQUENCES), settings, multiple=config.multiple)
        images = TrainingBlocks([case], config)[0][0]
        assert_close(images, torch.stack(list(expected.images.values())), rtol=0, atol=1e-6)


def test_an_unconditional_model_of_all_targets_is_trained(cases, tmp_path):
    network = UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4, classes=4)
    two_steps(plain(target="any", conditioning="none", network=network), cases, tmp_path / "run")


def test_a_run_starts_from_a_published_checkpoint_of_its_network_only(cases, tmp_path):
    config = plain()
    torch.manual_seed(1)
    weights = build_denoiser(config).backbone.state_dict()
    path = tmp_path / "brats_1200000.pt"
    torch.save(weights, path)
    frozen = replace(config, training=replace(config.training, iterations=1, learning_rate=0.0))
    list(train(frozen, cases, tmp_path / "run", device=CPU, init=path))
    started = load_model(tmp_path / "run/model.safetensors").denoiser.backbone.state_dict()
    for name, value in weights.items():
        assert_close(started[name], value.half().float(), rtol=0, atol=0)
    wider = plain(network=UNetConfig(channels=16, multipliers=(1, 1), res_blocks=1, groups=4))
    with pytest.raises(InputError, match="another network"):
        next(train(wider, cases, tmp_path / "other", device=CPU, init=path))
