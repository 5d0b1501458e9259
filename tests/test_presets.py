"""Every preset: the size of its network as published, and that what it describes really runs."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from cwdm.cache import fill, open_cache
from cwdm.case import find_cases
from cwdm.config import Config, presets
from cwdm.dataset import Source
from cwdm.engine import Engine
from cwdm.errors import InputError
from cwdm.intensity import NORMALIZATIONS
from cwdm.layouts import find
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.model import build_denoiser, load_model
from cwdm.noise import noise_stream
from cwdm.synthesis import Synthesizer
from cwdm.train import train

PUBLISHED = {
    "cwdm-t1n": (394, 81_511_048),
    "cwdm-t1c": (394, 81_511_048),
    "cwdm-t2w": (394, 81_511_048),
    "cwdm-t2f": (394, 81_511_048),
    "fast-cwdm": (394, 81_511_048),
    "wfm": (395, 81_512_072),
    "wdm-brats-128": (368, 57_914_824),
    "wdm-lidc-128": (368, 57_914_824),
    "wdm-brats-256": (438, 83_158_728),
    "wdm-lidc-256": (438, 83_158_728),
    "wdm-brats-128-wavunet": (418, 89_706_056),
    "wdm-lidc-128-wavunet": (418, 89_706_056),
    "wdm-brats-256-wavunet": (490, 125_499_720),
    "wdm-lidc-256-wavunet": (490, 125_499_720),
    "fastwdm-inpainting": (568, 65_525_320),
}
"""Preset -> entries of the published state dict, parameters."""


def small(name):
    """A preset whose network and images tests can afford; all else is as it is."""
    config = Config.read(name)
    training = replace(
        config.training,
        iterations=2,
        patch=(16, 16, 16) if config.conditional else None,
        batch=1,
        accumulation=1,
    )
    return replace(
        config,
        network=replace(config.network, channels=8, groups=4, multipliers=(1, 2)),
        images=replace(config.images, size=config.images.size and (16, 16, 16)),
        training=training,
    )


@pytest.fixture
def cases(make_case, make_image, ball, tmp_path):
    """Two cases with four small brains and two scans of something in air, as in CT."""
    for n in range(2):
        make_case(folder=f"data/c{n}", case_id=f"c{n}", voxels=ball((30, 28, 26)).astype(np.int16))
        body = ball((40, 36, 34))
        scan = np.where(body > 0, body * 2 - 200, -1024).astype(np.int16)
        folder = make_image(f"data/c{n}-chest/c{n}_chest-ct.nii.gz", voxels=scan).parents[1]
    list(fill(find(folder), tmp_path / "cache", accept=frozenset({"duplicate"})))
    return find_cases(folder), [Source("cases", open_cache(tmp_path / "cache"))]


def go(config, sources, run):
    return list(train(config, sources, run, device="cpu", precision="fp32", workers=0))


def test_the_published_ones_are_all_there():
    assert {"ddpm3d-128", "fastwdm-2step", *PUBLISHED} <= set(presets())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_has_as_many_parameters_as_the_published_one(name):
    with torch.device("meta"):
        network = build_denoiser(Config.read(name)).backbone
    count = sum(parameter.numel() for parameter in network.parameters())
    assert (len(network.state_dict()), count) == PUBLISHED[name]


@pytest.mark.parametrize("name", [n for n in presets() if Config.read(n).conditional])
def test_a_preset_trains_and_fills_in_every_sequence_it_is_for(name, cases, tmp_path):
    config = small(name)
    cases, sources = cases
    steps = go(config, sources, tmp_path / "run")
    assert [step.step for step in steps] == [1, 2]
    assert all(np.isfinite(step.loss) for step in steps)
    model = load_model(tmp_path / "run" / "model.safetensors")
    assert model.config == config
    case = next(case for case in cases if Modality.T1N in case.images)
    for target in config.targets:
        synthesizer = Synthesizer(model, target, device="cpu", precision="fp32")
        synthesis = synthesizer(case.without(target), seed=1, steps=min(2, config.process.steps))
        voxels, record = synthesis.volume.voxels, synthesis.provenance
        low, high = (
            getattr(NORMALIZATIONS[config.images.normalization], end) for end in ("low", "high")
        )
        scale = record.target_scale
        assert np.isfinite(voxels).all()
        assert voxels.min() >= min(0, low * scale.scale + scale.offset) - 1e-3
        assert voxels.max() <= high * scale.scale + scale.offset + 1e-3
        assert voxels[0, 0, 0] == 0
        assert record.target == target
        assert list(record.inputs) == list(others(target))
    assert len(config.targets) == (4 if name in ("wfm", "small-any") else 1)


@pytest.mark.parametrize("name", [n for n in presets() if Config.read(n).conditioning == "none"])
def test_an_unconditional_preset_trains_and_makes_something_from_noise(name, cases, tmp_path):
    config = small(name)
    assert all(np.isfinite(s.loss) for s in go(config, cases[1], tmp_path / "run"))
    model = load_model(tmp_path / "run" / "model.safetensors")
    assert model.config == config
    assert set(model.priors) == {config.target}
    engine = Engine(model, device="cpu", precision="fp32")
    x, y, z = (n // config.transform.factor for n in config.images.size)
    draw = noise_stream((1, config.transform.channels, x, y, z), seed=1)
    image = engine.run(engine.settings(steps=2), draw).image
    assert image.shape == (1, 1, *config.images.size)
    assert image.isfinite().all()
    assert image.min() >= -1
    assert image.max() <= 1
    assert image.std() > 0


def test_inpainting_cannot_be_trained_and_says_so(cases, tmp_path):
    with pytest.raises(InputError, match="cannot train an inpainting model") as caught:
        go(Config.read("fastwdm-inpainting"), cases[1], tmp_path / "run")
    assert "fastwdm-inpainting" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_model_that_makes_any_sequence_is_told_which():
    config = small("wfm")
    torch.manual_seed(0)
    denoiser = build_denoiser(config)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, cond, t = torch.randn(1, 8, 8, 8, 8), torch.randn(1, 24, 8, 8, 8), torch.tensor([1000])
    outputs = [denoiser(x, t, cond, torch.tensor([label])) for label in range(4)]
    for a in range(4):
        for b in range(a):
            assert (outputs[a] - outputs[b]).abs().max() > 1e-3


def test_one_model_fills_every_gap_from_whatever_there_is(cases, tmp_path):
    """All 14 ways in which one to three of the four can be missing."""
    config = small("small-any")
    go(config, cases[1], tmp_path / "run")
    model = load_model(tmp_path / "run" / "model.safetensors")
    torch.manual_seed(0)
    for parameter in model.denoiser.parameters():  # in two steps it has learnt next to nothing
        torch.nn.init.normal_(parameter, std=0.1)
    case = next(case for case in cases[0] if not case.missing)
    gaps = [gap for n in (1, 2, 3) for gap in combinations(SEQUENCES, n)]
    assert len(gaps) == 14
    images = set()
    for gap in gaps:
        for target in gap:
            synthesizer = Synthesizer(model, target, device="cpu", precision="fp32")
            synthesis = synthesizer(case.without(*gap), steps=1)
            assert synthesis.provenance.absent == tuple(m for m in gap if m is not target)
            assert np.isfinite(synthesis.volume.voxels).all()
            images.add(synthesis.volume.voxels.tobytes())
    assert len(images) == 28  # every target from every subset of the others is another image
