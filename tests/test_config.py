"""Configurations: complete presets, and one clear line for each mistake."""

import pytest

from cwdm.config import Config, presets
from cwdm.errors import InputError
from cwdm.model import build_denoiser


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
        ("name = 'x'\ntarget = 'flair'", "target:"),
        ("name = 'x'\ntarget = 't2f'\nchanels = 3", "unknown key chanels"),
        ("name = 'x'\ntarget = 't2f'\n[network]\nchanels = 3", "unknown key network.chanels"),
        ("name = 'x'\ntarget = 't2f'\n[network]\nchannels = 'many'", "network.channels"),
        ("name = 'x'\ntarget = 't2f'\n[network]\nchannels = 20\ngroups = 8", "does not divide"),
        ("name = 'x'\ntarget = 't2f'\n[sampling]\nsampler = 'magic'", "sampling.sampler"),
        ("name = ", "TOML"),
    ],
)
def test_a_mistake_is_named(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"mine\.toml") as caught:
        Config.read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(InputError, match="small-t2f"):
        Config.read("smal-t2f")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.toml"):
        Config.read(tmp_path / "gone.toml")
