"""Training samples: what they depend on, what is changed together, and that training sees what
synthesis sees."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.cache import fill, open_cache
from cwdm.case import find_cases
from cwdm.config import Augmentation, Config, Images, Training
from cwdm.dataset import Lanes, Source, TrainingData, inputs
from cwdm.errors import InputError
from cwdm.layouts import find
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import prepare
from cwdm.unet import UNetConfig
from cwdm.volume import read_volumes

EVERYTHING = Augmentation(flip=True, affine=1.0, bias_field=1.0, contrast=1.0)
ALIKE = frozenset({"duplicate"})
"""The four images of some cases here are the same."""
NETWORK = UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4)
WHOLE = Config(name="tiny", target=Modality.T2F, network=NETWORK, training=Training(iterations=2))
PATCHES = replace(
    WHOLE,
    training=Training(
        iterations=10,
        patch=(8, 8, 8),
        batch=2,
        drop_conditions=0.3,
        augmentation=EVERYTHING,
    ),
)


@pytest.fixture
def cached(tmp_path):
    """Pack what is below a folder."""

    def make(folder):
        assert all(
            r.status != "left out" for r in fill(find(folder), tmp_path / "cache", accept=ALIKE)
        )
        return open_cache(tmp_path / "cache")

    return make


@pytest.fixture
def brain(make_case):
    """Write a case whose four images differ."""

    def make(case_id="x", shape=(24, 20, 16), endings=("-t1n", "-t1c", "-t2w", "-t2f"), **image):
        for number, ending in enumerate(endings):
            rng = np.random.default_rng([number, *case_id.encode()])
            voxels = np.zeros(shape, dtype=np.float32)
            inner = tuple(slice(2, n - 2) for n in shape)
            voxels[inner] = rng.uniform(50, 150, [n - 4 for n in shape])
            folder = make_case(
                f"data/{case_id}", case_id, endings=(ending,), voxels=voxels, **image
            )
        return folder

    return make


def data_of(cases, config, **options):
    return TrainingData([Source("cases", cases)], config, **options)


def test_a_sample_depends_on_seed_step_and_lane_only(brain, cached):
    brain("a")
    cases = cached(brain("b").parent)
    data = data_of(cases, PATCHES)
    first = data[3, 1]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - that the global generator plays no part is the point
    data[0, 0]
    again = data_of(cases, PATCHES)[3, 1]
    assert first.images.shape == (4, 8, 8, 8)
    for ours, theirs in zip(first, again, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.isfinite(first.images).all()
    for key in ((3, 0), (4, 1)):
        assert not torch.equal(first.images, data[key].images)
    other = replace(PATCHES, training=replace(PATCHES.training, seed=1))
    assert not torch.equal(first.images, data_of(cases, other)[3, 1].images)


@pytest.mark.parametrize(
    "settings",
    [
        Images(),
        Images(normalization="published"),
        Images(normalization="published-wdm", size=(32, 32, 16), orientation="LPS"),
        Images(spacing_mm=2.0),
        Images(size=(16, 16, 8), spacing_mm=2.0, centre="grid", orientation="LAS"),
    ],
    ids=["robust", "published", "published-wdm", "coarse", "coarse grid"],
)
def test_training_sees_what_synthesis_sees(settings, brain, cached):
    folder = brain(shape=(24, 20, 16))
    (case,) = find_cases(folder)
    config = replace(WHOLE, images=settings)
    expected = prepare(read_volumes(case, SEQUENCES), settings, multiple=config.multiple)
    sample = data_of(cached(folder), config)[0, 0]
    images = torch.stack(list(expected.images.values()))
    assert_close(sample.images, images, rtol=0, atol=5e-3)  # float16 on disk
    assert sample.given.tolist() == [True, True, True, False]
    assert sample.target == 3


@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_a_patch_is_a_piece_of_the_whole_image(orientation, spacing, brain, cached):
    cases = cached(brain(shape=(40, 36, 32)))
    settings = Images(orientation=orientation, spacing_mm=spacing)
    (whole,) = data_of(cases, replace(WHOLE, images=settings))[0, 0].images[3:]
    training = replace(PATCHES.training, augmentation=Augmentation(), patch=(8, 8, 8))
    data = data_of(cases, replace(PATCHES, images=settings, training=training))
    for step in range(4):
        patch = data[step, 0].images[3]
        windows = whole.unfold(0, 8, 1).unfold(1, 8, 1).unfold(2, 8, 1)
        difference = (windows - patch).abs().amax(dim=(-3, -2, -1)).min()
        if spacing == 1:
            assert difference == 0
        else:  # its grid may lie between the voxels of the whole one
            assert patch.std() > 0


def test_a_patch_larger_than_the_brain_is_filled_up_with_background(brain, cached):
    cases = cached(brain(shape=(12, 24, 16)))
    images = Images(normalization="published-wdm")
    training = Training(iterations=1, patch=(32, 16, 16))
    sample = data_of(cases, replace(WHOLE, images=images, training=training))[0, 0]
    assert sample.images.shape == (4, 32, 16, 16)
    inside = (sample.images != -1).any(dim=0).any(dim=-1).any(dim=-1)
    assert inside.nonzero().flatten().tolist() == list(range(12, 20))  # 8 voxels, in the middle


def test_only_the_conditions_change_their_intensities(brain, cached):
    cases = cached(brain())
    changes = Augmentation(bias_field=1.0, contrast=1.0)
    changed = data_of(cases, replace(WHOLE, training=Training(augmentation=changes)))[0, 0].images
    same = data_of(cases, WHOLE)[0, 0].images
    assert torch.equal(changed[3], same[3])
    for number in range(3):
        assert (changed[number] - same[number]).abs().max() > 0.05
        assert torch.equal(changed[number] == 0, same[number] == 0)  # the background stays


def test_a_bias_field_keeps_the_median(brain, cached):
    cases = cached(brain())
    changes = Augmentation(bias_field=1.0)
    sample = data_of(cases, replace(WHOLE, training=Training(augmentation=changes)))[0, 0]
    for image in sample.images[:3]:
        assert image[image != 0].median().abs() < 0.02


def test_what_moves_anything_moves_everything(make_case, cached):
    cases = cached(make_case("data", voxels=np.random.default_rng(0).uniform(50, 150, (24,) * 3)))
    changes = Augmentation(flip=True, affine=1.0)
    settings = Training(augmentation=changes, patch=(16, 16, 16), batch=8)
    data = data_of(cases, replace(WHOLE, training=settings))
    flipped = set()
    for lane in range(8):
        images = data[0, lane].images
        assert (images == images[:1]).all()
        flipped.add(float(images.sum()))
    assert len(flipped) == 8


def test_a_turned_ball_stays_a_ball(make_case, cached):
    """Its volume changes by at most the scaling, its centre stays in place."""
    grid = np.indices((48, 48, 48)) - 23.5
    ball = np.where((grid**2).sum(axis=0) < 16**2, 100 + grid[0], 0).astype(np.float32)
    cases = cached(make_case("data", voxels=ball))
    settings = Training(augmentation=Augmentation(affine=1.0), patch=(48, 48, 48), batch=8)
    config = replace(WHOLE, images=Images(normalization="published-wdm"), training=settings)
    for lane in range(8):
        inside = (data_of(cases, config)[0, lane].images[0] > -0.99).nonzero().double()
        share = len(inside) / (ball > 0).sum()
        assert 0.85**3 * 0.95 < share < 1 / 0.85**3 * 1.05
        assert (inside.mean(dim=0) - 23.5).abs().max() < 1


def test_each_source_is_drawn_by_its_weight(brain, cached):
    brain("a")
    cases = cached(brain("b").parent)
    one, other = ([case] for case in cases)
    config = replace(PATCHES, training=replace(PATCHES.training, augmentation=Augmentation()))
    data = TrainingData([Source("one", one, 3.0), Source("other", other, 1.0)], config)
    whole = [data_of(each, WHOLE)[0, 0].images[3] for each in (one, other)]
    values = [set(image.flatten().tolist()) for image in whole]
    drawn: Counter[int] = Counter()
    for step in range(200):
        some = set(data[step, 0].images[3].flatten().tolist()) - {0.0}
        drawn[next(i for i in (0, 1) if some <= values[i])] += 1
    assert 130 < drawn[0] < 170


def test_a_model_for_all_takes_cases_with_gaps(brain, cached):
    brain("whole")
    cases = cached(brain("gaps", endings=("-t1n", "-t2f")).parent)
    training = Training(iterations=1, patch=(8, 8, 8), drop_conditions=0.6, batch=1000)
    config = Config(
        name="any",
        target="any",
        conditioning="any",
        network=replace(NETWORK, classes=4),
        training=training,
    )
    data = data_of(cases, config)
    assert len(data.cases) == 2
    seen = set()
    for lane in range(1000):
        sample = data[0, lane]
        given = tuple(sample.given.tolist())
        assert not given[sample.target]
        assert any(given)
        seen.add((int(sample.target), given))
    assert len(seen) == 4 * 7  # every target from every subset of the others
    strict = replace(config, conditioning="others", training=replace(training, drop_conditions=0.0))
    assert len(data_of(cases, strict).cases) == 1


def test_cases_without_what_the_model_needs_are_refused(brain, cached):
    cases = cached(brain("gaps", endings=("-t1n", "-t2f")))
    with pytest.raises(InputError, match="cases: training needs cases with t1n, t1c, t2w, t2f"):
        data_of(cases, WHOLE)
    alone = replace(WHOLE, conditioning="none", target=Modality.T1N)
    sample = data_of(cases, alone)[0, 0]
    assert (len(sample.images), sample.given.tolist(), int(sample.target)) == (1, [False], 0)


def test_an_overfit_run_sees_one_block_of_each_case(brain, cached):
    brain("a")
    cases = cached(brain("b").parent)
    data = data_of(cases, PATCHES, overfit=1)
    assert len(data.cases) == 1
    samples = [data[step, 0] for step in range(3)]
    for one, other in pairwise(samples):
        assert torch.equal(one.images, other.images)
        assert one.given.tolist() == [True, True, True, False]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_share_out_what_one_would_do(world, accumulation):
    training = Training(iterations=5, batch=4, accumulation=accumulation, patch=(8, 8, 8))
    config = replace(WHOLE, training=training)
    lanes = [Lanes(config, 2, rank=rank, world=world) for rank in range(world)]
    parts = [list(each) for each in lanes]
    assert [len(each) for each in parts] == [len(each) for each in lanes]
    keys = [key for each in parts for part in each for key in part]
    assert sorted(keys) == [(step, lane) for step in (2, 3, 4) for lane in range(4)]
    for each in parts:
        assert [key[0] for part in each for key in part] == sorted(
            key[0] for part in each for key in part
        )


def test_a_batch_that_cannot_be_shared_out_is_refused():
    config = replace(WHOLE, training=Training(batch=4, patch=(8, 8, 8)))
    with pytest.raises(InputError, match="batch = 4 is no multiple of 3 processes"):
        Lanes(config, 0, world=3)


def test_conditions_of_each_sample_are_its_own(brain, cached):
    cases = cached(brain())
    training = Training(patch=(8, 8, 8), batch=4, drop_conditions=0.5)
    config = Config(
        name="any",
        target="any",
        conditioning="any",
        network=replace(NETWORK, classes=4),
        training=training,
    )
    data = data_of(cases, config)
    samples = [data[0, lane] for lane in range(4)]
    batch = torch.utils.data.default_collate(samples)
    target, cond, label = inputs(config, batch, torch.device("cpu"))
    assert (target.shape, cond.shape) == ((4, 1, 8, 8, 8), (4, 36, 4, 4, 4))
    for i, sample in enumerate(samples):
        index = int(sample.target)
        assert torch.equal(target[i, 0], sample.images[index])
        assert label[i] == index
        for place in range(4):
            known = bool(sample.given[place])
            assert (cond[i, 32 + place] == known).all()
            coefficients = config.transform.encode(sample.images[None, [place]])[0]
            expected = coefficients if known else torch.zeros_like(coefficients)
            assert torch.equal(cond[i, 8 * place : 8 * place + 8], expected)
