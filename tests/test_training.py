"""Training data and training: blocks that depend on their number, runs that resume exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.case import find_cases
from cwdm.config import Augmentation, Config, Training
from cwdm.dataset import TrainingBlocks
from cwdm.errors import InputError
from cwdm.modality import Modality
from cwdm.model import load_model
from cwdm.train import train
from cwdm.unet import UNetConfig

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
    data = TrainingBlocks(cases, CONFIG, multiple=4)
    first = data[3]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - that the global generator plays no part is the point
    data[0]
    again = TrainingBlocks(cases, CONFIG, multiple=4)[3]
    assert first.shape == (4, 4, 8, 8, 8)
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, data[4])
    assert torch.isfinite(first).all()


def test_intensity_augmentation_leaves_the_target_alone(cases):
    plain = replace(CONFIG, training=replace(CONFIG.training, patch=None, cases_per_block=1))
    settings = replace(plain.training, augmentation=Augmentation(bias_field=1.0, contrast=1.0))
    changed = TrainingBlocks(cases, replace(plain, training=settings), multiple=4)[0]
    unchanged = TrainingBlocks(
        cases, replace(plain, training=replace(settings, augmentation=Augmentation())), multiple=4
    )[0]
    assert_close(changed[:, 3], unchanged[:, 3])
    for conditioning in range(3):
        assert (changed[:, conditioning] - unchanged[:, conditioning]).abs().max() > 0.05


def test_cases_without_all_modalities_are_left_out_with_a_word(cases, make_case, caplog):
    make_case(folder="data/short", case_id="short", endings=("-t1n",))
    everything = find_cases(cases[0].images[Modality.T1N].parents[1])
    assert len(TrainingBlocks(everything, CONFIG, multiple=4).subjects) == 2
    assert "short" in caplog.text
    with pytest.raises(InputError, match="all four"):
        TrainingBlocks([c for c in everything if c.missing], CONFIG, multiple=4)


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
