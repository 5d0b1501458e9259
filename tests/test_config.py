"""Configurations: complete presets, and one clear line for each mistake."""

import pytest
import torch

from cwdm.config import Config, presets
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.modality import SEQUENCES, Modality
from cwdm.model import build_denoiser
from cwdm.unet import UNetConfig
from cwdm.wavunet import WavUNetConfig

SMALL = {"kind": "unet", "channels": 8, "multipliers": [1, 2], "res_blocks": 1, "groups": 4}
FLOW = {"process": {"kind": "flow"}, "sampling": {"sampler": "euler", "steps": 5}}
FROM_NOISE = {**FLOW, "process": {"kind": "flow", "source": "noise"}}


def parse(**values):
    return Config.parse({"name": "x", "target": "t2f", **values}, "mine.toml")


@pytest.mark.parametrize("name", presets())
def test_every_preset_builds_and_survives_a_round_trip(name):
    config = Config.read(name)
    assert config.name == name
    build_denoiser(config)
    assert Config.parse(config.as_dict(), "round trip") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'", "target: Field required"),
        ("name = 'x'\ntarget = 'flair'", "target: "),
        ("name = 'x'\ntarget = 't2f'\nchanels = 3", "unknown key chanels"),
        ("name = 'x'\ntarget = 't2f'\n[network]\nchanels = 3", "unknown key network.chanels"),
        ("name = 'x'\ntarget = 't2f'\n[network]\nchannels = 'many'", "network.channels: "),
        ("name = 'x'\ntarget = 't2f'\n[network]\nchannels = 20\ngroups = 8", "network: groups = 8"),
        ("name = 'x'\ntarget = 't2f'\n[sampling]\nsampler = 'magic'", "sampling.sampler: "),
        ("name = ", "not a readable TOML file"),
    ],
)
def test_a_mistake_is_named(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Config.read(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": {"kind": "wavunet", "chanels": 3}}, "unknown key network.chanels"),
        ({"network": {"kind": "wavunet", "classes": 4}}, "unknown key network.classes"),
        ({"process": {"kind": "flow", "schedule": "linear"}}, "unknown key process.schedule"),
        ({"process": {"bridge_noise": 0.1}}, "unknown key process.bridge_noise"),
        ({"transform": {"level": 2}}, "unknown key transform.level"),
        (
            {"training": {"augmentation": {"flipp": True}}},
            "unknown key training.augmentation.flipp",
        ),
        (
            {"network": {"kind": "resnet"}},
            "network.kind: expected one of 'unet', 'wavunet', got 'resnet'",
        ),
        (
            {"process": {"kind": "magic"}},
            "process.kind: expected one of 'diffusion', 'flow', got 'magic'",
        ),
        ({"network": 3}, "network: Input should be a dictionary"),
        ({"process": "flow"}, "process: Input should be a dictionary"),
        ({"sampling": {"steps": "ten"}}, "sampling.steps: Input should be a valid integer"),
        ({"images": {"size": [3, 4]}}, "images.size.2: Field required"),
        ({"process": {"schedule": "square"}}, "process.schedule: "),
    ],
)
def test_a_mistake_inside_a_table_is_named_as_it_stands_in_the_file(values, message):
    with pytest.raises(InputError) as caught:
        parse(**values)
    assert str(caught.value).startswith(f"mine.toml: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conditioning": "any"}, "conditioning = 'any' is learnt from missing images"),
        ({"training": {"batch": 6, "accumulation": 4}}, "training.batch = 6 is no multiple of"),
        ({"training": {"batch": 2}}, "images that are computed together need training.patch"),
        ({"training": {"validate_every": 0}}, "training.validate_every: Input should be greater"),
        ({"training": {"ema": 1.0}}, "training.ema: Input should be less than 1"),
        ({"target": "ct"}, "ct has no other sequences, expected conditioning = 'none'"),
        ({"target": "any"}, "target = 'any' with 0 network.classes, expected 4"),
        (
            {"target": "any", "network": {"kind": "wavunet"}},
            "target = 'any' with 0 network.classes, expected 4",
        ),
        ({"network": {"classes": 4}}, "target = 't2f' with 4 network.classes, expected 0"),
        (
            {"conditioning": "none", "prediction": "residual"},
            "a residual is taken from the conditions: there are none",
        ),
        ({**FLOW, "conditioning": "none"}, "a flow from the conditions needs conditions"),
        (
            {**FLOW, "sampling": {"sampler": "ddpm"}},
            "ddpm and eta belong to a diffusion, expected euler or heun",
        ),
        (
            {**FLOW, "sampling": {"sampler": "ddim", "steps": 10, "eta": 0.5}},
            "ddpm and eta belong to a diffusion, expected euler or heun",
        ),
        ({"prediction": "velocity"}, "a velocity belongs to a flow, expected prediction = 'x_0'"),
        ({"sampling": {"steps": 1001}}, "steps must lie within 1..1000, got 1001"),
        ({"sampling": {"steps": 0}}, "steps must lie within 1..1000, got 0"),
        ({"sampling": {"steps": []}}, "expected at least one step"),
        ({"sampling": {"steps": [10, 501]}}, "steps must lie within 1..500, got 501"),
        (
            {"sampling": {"steps": 600, "spacing": "stride"}},
            "no stride takes 600 of 1000 steps",
        ),
        ({"training": {"timesteps": 1001}}, "steps must lie within 1..1000, got 1001"),
        ({"process": {"steps": 100, "subset_of": 50}}, "process: subset_of = 50 is fewer"),
        (
            {"training": {"band_weights": [1.0, 2.0]}},
            "training.band_weights has 2 entries, expected 1 or 8",
        ),
        (
            {"transform": {"levels": 2}, "training": {"band_weights": [1.0] * 8}},
            "training.band_weights has 8 entries, expected 1 or 64",
        ),
        (
            {"images": {"size": [90, 96, 96]}},
            "images.size = (90, 96, 96), expected multiples of 32",
        ),
        ({"images": {"spacing_mm": 0}}, "images.spacing_mm"),
        (
            {"training": {"patch": [32, 32, 48]}},
            "training.patch = (32, 32, 48), expected multiples",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(InputError) as caught:
        parse(**values)
    assert str(caught.value).startswith(f"mine.toml: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "targets", "modalities", "in_channels"),
    [
        ({}, [Modality.T2F], SEQUENCES, 32),
        ({"conditioning": "none"}, [Modality.T2F], [Modality.T2F], 8),
        ({"target": "ct", "conditioning": "none"}, [Modality.CT], [Modality.CT], 8),
        ({"target": "any", "network": {"classes": 4}}, SEQUENCES, SEQUENCES, 32),
        (
            {"target": "any", "network": {"classes": 4}, "conditioning": "none"},
            SEQUENCES,
            SEQUENCES,
            8,
        ),
        ({"transform": {"levels": 2}}, [Modality.T2F], SEQUENCES, 256),
        ({"transform": {"wavelet": "identity"}}, [Modality.T2F], SEQUENCES, 4),
    ],
)
def test_what_a_model_makes_and_needs(values, targets, modalities, in_channels):
    config = parse(**values)
    assert config.targets == tuple(targets)
    assert config.modalities == tuple(modalities)
    assert config.in_channels == in_channels
    assert Config.parse(config.as_dict(), "round trip") == config


@pytest.mark.parametrize(
    ("network", "transform", "multiple"),
    [
        ({}, {}, 32),  # halved once by the wavelet, four times by the network
        ({"multipliers": [1, 2]}, {}, 4),
        ({"multipliers": [1, 2]}, {"levels": 3}, 16),
        ({"multipliers": [1, 2]}, {"wavelet": "identity"}, 2),
        ({"multipliers": [1]}, {"wavelet": "db2"}, 2),
        ({"kind": "wavunet", "multipliers": [1, 2]}, {}, 8),
        ({"kind": "wavunet"}, {}, 64),
    ],
)
def test_an_image_can_be_halved_as_often_as_it_is(network, transform, multiple):
    assert parse(network=network, transform=transform).multiple == multiple


def test_a_table_is_what_its_kind_says():
    plain = parse()
    assert (plain.network, plain.process) == (UNetConfig(), Diffusion())
    config = parse(network={"kind": "wavunet"}, **FLOW)
    assert (config.network, config.process) == (WavUNetConfig(), Flow())
    assert config.as_dict()["network"]["kind"] == "wavunet"
    assert config.as_dict()["process"]["kind"] == "flow"
    assert Config.parse(config.as_dict(), "round trip") == config
    assert parse(**FROM_NOISE, conditioning="none").process == Flow(source="noise")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"conditioning": "none"},
        {"target": "any", "network": {**SMALL, "classes": 4}},
        {"transform": {"levels": 2}},
        {"transform": {"wavelet": "identity"}},
        {"network": {**SMALL, "kind": "wavunet", "res_blocks": 2}},
    ],
)
def test_the_network_of_a_configuration_takes_its_images(values):
    config = parse(**{"network": SMALL, **values})
    n = config.multiple // config.transform.factor
    channels = config.transform.channels
    x = torch.zeros(1, channels, n, n, 2 * n)
    cond = torch.zeros(1, config.in_channels - channels, n, n, 2 * n)
    label = torch.tensor([3]) if config.target == "any" else None
    output = build_denoiser(config)(x, torch.tensor([1]), cond if cond.shape[1] else None, label)
    assert output.shape == x.shape


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(InputError, match="small-t2f"):
        Config.read("smal-t2f")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.toml"):
        Config.read(tmp_path / "gone.toml")


def test_a_folder_of_the_same_name_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wfm").mkdir()
    assert Config.read("wfm").name == "wfm"
