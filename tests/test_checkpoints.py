"""Published checkpoints: each is recognized from its tensors, and what is none is refused."""

import pickle
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from cwdm.checkpoints import identify, infer_network, read_weights
from cwdm.config import Config, presets
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.modality import Modality
from cwdm.model import build_denoiser, load_model
from cwdm.wavunet import WavUNetConfig

SMALL = {"channels": 8, "groups": 4, "multipliers": (1, 2)}
LEVELS_OF_256 = (1, 2, 2, 4, 4, 4)
FILES = {
    "cwdm-t1n": "brats_t1n_1200000.pt",
    "cwdm-t2f": "brats-flair.pth",
    "fast-cwdm": "brats_t1n_000050_sampled_100.pt",
    "wdm-brats-128": "brats_unet_128_1200k.pt",
    "wdm-brats-256": "brats_1200000.pt",
    "wdm-brats-128-wavunet": "brats_wnet_128.pt",
    "wdm-lidc-128": "lidc-idri_unet_128_1200k.pt",
    "wdm-lidc-256-wavunet": "lidc-idri_1200000.pt",
    "ddpm3d-128": "brats_voxels.pt",
    "fastwdm-inpainting": "brats3dimage120000.pt",
    "wfm": "wfm_unified_050000.pt",
}
"""Preset -> what its checkpoint is called."""


def small(name):
    """A preset with a network of its kind that tests can afford."""
    config = Config.read(name)
    shape = SMALL | ({"multipliers": LEVELS_OF_256} if "256" in name else {})
    return replace(config, network=replace(config.network, **shape))


def weights_of(config, seed=0):
    """Random weights; tensors that the network shares are stored twice, as published."""
    torch.manual_seed(seed)
    state = build_denoiser(config).backbone.state_dict(keep_vars=True)
    drawn = {id(value): torch.randn_like(value) * 0.1 for value in state.values()}
    return OrderedDict((key, drawn[id(value)].detach()) for key, value in state.items())


def saved(config, path):
    """A checkpoint as the published training writes it: a bare state dict."""
    weights = weights_of(config)
    torch.save(weights, path)
    return weights


def published_keys(path):
    """{name: a tensor of its shape without numbers} from a list of a published network's keys."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if line[:1] != "#"]
    shapes = {name: [int(n) for n in re.findall(r"\d+", shape)] for name, shape, *_ in rows}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("keys", "preset"),
    [
        ("wdm_unet_128", "wdm-brats-128"),
        ("wdm_unet_128", "wdm-lidc-128"),
        ("wdm_unet_256", "wdm-brats-256"),
        ("wdm_wnet_128", "wdm-brats-128-wavunet"),
        ("wdm_wnet_256", "wdm-lidc-256-wavunet"),
        ("cwdm_unet_224", "cwdm-t2w"),
        ("cwdm_unet_224", "fast-cwdm"),
    ],
)
def test_the_published_lists_of_tensors_give_the_network_of_the_preset(keys, preset, shared):
    tensors = published_keys(shared / "golden" / f"keys_{keys}.txt")
    config = Config.read(preset)
    assert infer_network(tensors) == (config.network, config.in_channels)
    with torch.device("meta"):
        ours = build_denoiser(config).backbone.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("preset", presets())
def test_every_network_of_a_preset_is_found_from_its_tensors(preset):
    config = Config.read(preset)
    with torch.device("meta"):
        tensors = build_denoiser(config).backbone.state_dict()
    assert infer_network(tensors, config.network.groups) == (config.network, config.in_channels)


@pytest.mark.parametrize("preset", FILES)
def test_a_checkpoint_of_every_system_loads_by_its_name(preset, tmp_path):
    config, path = small(preset), tmp_path / FILES[preset]
    weights = saved(config, path)
    model = load_model(path)
    expected = config if config.name != "fast-cwdm" else replace(config, target=Modality.T1N)
    assert model.config == replace(expected, name=path.stem)
    assert set(model.priors) == set(config.targets)
    for name, value in model.denoiser.backbone.state_dict().items():
        assert_close(value, weights[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("u16_add_in8", None),
        ("u16_cat_in32", "t2w"),
        ("w8_in8", None),
    ],
)
def test_files_that_the_published_code_wrote_compute_what_it_computed(name, preset, shared, golden):
    path = shared / "golden" / f"{name}.pt"
    model = load_model(path, Modality(preset) if preset else None)
    numbers = golden(f"unet_{name}")
    for part in "ab":
        x, t, y = (torch.from_numpy(numbers[f"{key}_{part}"]) for key in "xty")
        assert_close(model.denoiser.backbone(x, t), y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_of_other_trainers_are_taken_off(wrap, prefix, tmp_path):
    config, path = small("cwdm-t1n"), tmp_path / "t1n.pt"
    weights = weights_of(config)
    torch.save({wrap: {prefix + key: value for key, value in weights.items()}, "step": 3}, path)
    read = load_model(path).denoiser.backbone.state_dict()
    for name, value in weights.items():
        assert_close(read[name], value, rtol=0, atol=0)


def test_half_precision_becomes_float32(tmp_path):
    path = tmp_path / "t1n.pt"
    torch.save({k: v.half() for k, v in weights_of(small("cwdm-t1n")).items()}, path)
    assert {value.dtype for value in read_weights(path).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("file", "process", "target"),
    [
        ("brats_t2w_BEST_sampled_10.pt", Diffusion(steps=10, subset_of=1000), "t2w"),
        ("brats_t1c_000050_sampled_100.pt", Diffusion(steps=100, subset_of=1000), "t1c"),
        ("brats_t2f_BEST_direct_100.pt", Diffusion(steps=100), "t2f"),
        ("brats_t1n_BEST_direct_1000.pt", Diffusion(steps=1000), "t1n"),
    ],
)
def test_fast_cwdm_tells_schedule_and_steps_in_the_file_s_name(file, process, target, tmp_path):
    saved(small("fast-cwdm"), tmp_path / file)
    config = load_model(tmp_path / file).config
    assert config.process == process
    assert config.sampling.steps == process.steps
    assert config.targets == (Modality(target),)


def test_groups_come_from_the_preset_or_the_caller_for_no_tensor_tells_them(tmp_path):
    config = Config.read("small-t2f")  # 32 channels in 8 groups; published: 32
    weights, path = weights_of(config), tmp_path / "t2f.pt"
    assert identify(weights, path, preset="small-t2f").network.groups == 8
    assert identify(weights, path).network.groups == 32
    assert identify(weights, path, groups=16).network.groups == 16
    with pytest.raises(InputError, match="groups = 5 does not divide"):
        identify(weights, path, groups=5)


def test_a_configuration_of_one_s_own_is_a_preset_too(tmp_path):
    """Such as that of fast-cwdm's follow-up, which was trained on another wavelet."""
    toml = tmp_path / "mine.toml"
    toml.write_text(
        'name = "mine"\ntarget = "t2w"\nimages = { normalization = "published" }\n'
        'transform = { wavelet = "db2" }\n'
        "network = { channels = 8, groups = 4, multipliers = [1, 2] }\n"
    )
    weights = saved(small("cwdm-t2w"), tmp_path / "t2w_100.pt")
    model = load_model(tmp_path / "t2w_100.pt", preset=str(toml))
    assert model.config == replace(Config.read(toml), name="t2w_100")
    assert_close(model.denoiser.backbone.state_dict()["out.2.bias"], weights["out.2.bias"])


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def refused(folder):
    """(file, part of the message) of everything that is no checkpoint we could use."""
    cwdm, wavunet = small("cwdm-t1n"), small("wdm-brats-128-wavunet")
    good = weights_of(cwdm)

    def file(name, content):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    marker = folder / "ran"
    yield folder / "gone_t1n.pt", "no such file"
    yield file("bomb_t1n.pt", {"a": Bomb(marker)}), "could run code"
    yield file("bomb2_t1n.pt", pickle.dumps({"a": Bomb(marker)})), "could run code"
    assert not marker.exists()
    torch.save(good, folder / "whole_t1n.pt")
    whole = (folder / "whole_t1n.pt").read_bytes()
    torch.jit.save(torch.jit.script(torch.nn.Identity()), folder / "script_t1n.pt")
    yield folder / "script_t1n.pt", "not a readable checkpoint, expected tensors that torch saved"
    yield file("cut_t1n.pt", whole[: len(whole) // 2]), "not a readable checkpoint"
    yield file("text_t1n.pt", b"these are no weights\n" * 9), "not a readable checkpoint"
    yield file("empty_t1n.pt", b""), "not a readable checkpoint"
    yield file("dict_t1n.pt", {}), "holds a dict, expected a state dict"
    yield file("list_t1n.pt", [torch.zeros(2)]), "holds a list, expected a state dict"
    yield file("number_t1n.pt", good | {"step": 3}), "step is a int, expected tensors only"
    yield file("other_t1n.pt", {"conv.weight": torch.zeros(2)}), "has no input_blocks.0.0.weight"
    stem = {"input_blocks.0.0.weight": torch.zeros(8, 32, 3, 3, 3)}
    yield file("stem_t1n.pt", stem), "not a published wavelet diffusion network"
    flat = good | {"input_blocks.0.0.weight": torch.zeros(8)}
    yield file("flat_t1n.pt", flat), "not a published wavelet diffusion network"
    yield file("nameless.pt", good), "expected --preset cwdm-t1n, cwdm-t1c"
    shape = good | {"time_embed.0.bias": torch.zeros(3)}
    yield file("shape_t1n.pt", shape), "weights do not fit the configuration"
    fewer = {key: value for key, value in good.items() if not key.startswith("middle_block")}
    yield file("fewer_t1n.pt", fewer), "weights do not fit the configuration"
    more = good | {"ema.weight": torch.zeros(3)}
    yield file("more_t1n.pt", more), "weights do not fit the configuration"
    extra = good | {"input_blocks.0.0.weight": torch.zeros(8, 40, 3, 3, 3)}
    yield file("extra_t1n.pt", extra), "takes 40 channels, preset cwdm-t1n takes 32"
    copies = weights_of(wavunet)
    key = "output_blocks.2.0.in_layers.2.weight"
    yield file("unequal.pt", copies | {key: copies[key] + 1}), "expected two copies of one tensor"
    yield file("t1n_direct_10.pt", good), "beta would exceed 1"


def test_what_is_no_checkpoint_is_refused_by_name_and_never_run(tmp_path):
    for path, message in refused(tmp_path):
        with pytest.raises(InputError) as caught:
            load_model(path)
        assert message in str(caught.value), path.name
        assert str(path) in str(caught.value), path.name
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "of", "options", "message"),
    [
        ("brats_t1n.pt", "cwdm-t1n", {"target": Modality.T2F}, "a model for t1n, expected one for"),
        ("x.pt", "cwdm-t1n", {"preset": "cwdm-t1c", "target": Modality.T2F}, "expected a model"),
        ("brats_t1n.pt", "cwdm-t1n", {"preset": "cwdm-t1c"}, "by its name a model for t1n, found"),
        ("wfm_t1n_050000.pt", "wfm", {"target": Modality.T2F}, "by its name a model for t1n"),
        ("brats.pt", "wdm-brats-128", {"target": Modality.T2F}, "expected a model for t2f, found"),
        ("t1n.pt", "cwdm-t1n", {"preset": "cwdm-t1n"}, "channels = 8, expected 64"),
        ("t1n.pt", "cwdm-t1n", {"preset": "wdm-brats-128"}, "takes 32 channels, preset"),
        ("x.pt", "wdm-brats-128-wavunet", {"preset": "wdm-brats-128"}, "wavunet, expected unet"),
        ("t1n.pt", "cwdm-t1n", {"preset": "cwdm-t3"}, "no such file or preset"),
    ],
)
def test_another_target_or_preset_than_that_of_the_file_is_refused(
    file, of, options, message, tmp_path
):
    saved(small(of), tmp_path / file)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / file, options.get("target"), preset=options.get("preset"))
    assert message in str(caught.value)


def test_the_two_copies_of_a_shared_block_are_told_apart_by_their_names():
    """As the published lists mark them: the last block of a level repeats the one before it."""
    config = small("wdm-brats-128-wavunet")
    assert isinstance(config.network, WavUNetConfig)
    state = build_denoiser(config).backbone.state_dict(keep_vars=True)
    first = {}
    copies = [(k, first.setdefault(id(v), k)) for k, v in state.items()]
    copies = [(key, original) for key, original in copies if key != original]
    assert copies
    for key, original in copies:
        weights = weights_of(config)
        weights[key] = weights[key] + 1
        with pytest.raises(InputError) as caught:
            identify(weights, Path("brats.pt"))
        assert key in str(caught.value)
        assert original in str(caught.value)
