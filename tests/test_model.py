"""Models on disk: a round trip, and refusal of what is not a model."""

import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from cwdm.config import Config
from cwdm.errors import InputError
from cwdm.intensity import ScalePrior
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.model import build_denoiser, default_model, load_model, save_model
from cwdm.unet import UNetConfig
from cwdm.wavunet import WavUNetConfig

TINY = Config(
    name="tiny",
    target=Modality.T2F,
    network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4),
)
PRIORS = {Modality.T2F: ScalePrior({m: 0.5 for m in others(Modality.T2F)}, 4.0, 2.0)}


def random_weights(config=TINY):
    torch.manual_seed(0)
    state = build_denoiser(config).backbone.state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    path, weights = tmp_path / "tiny.safetensors", random_weights()
    save_model(TINY, weights, PRIORS, path, overwrite=False)
    model = load_model(path)
    assert (model.config, model.priors) == (TINY, PRIORS)
    for name, value in model.denoiser.backbone.state_dict().items():
        assert_close(value, weights[name], rtol=0, atol=0)
    with pytest.raises(InputError, match="exists"):
        save_model(TINY, weights, PRIORS, path, overwrite=False)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("loading a model ran code",))


def foreign_files(folder):
    yield "missing", folder / "gone.safetensors", "no such file"
    text = folder / "text.safetensors"
    text.write_text("these are no weights")
    yield "text", text, "not a readable"
    pickled = folder / "model.pt"
    with zipfile.ZipFile(pickled, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Bomb()))
    yield "pickle", pickled, "not a readable checkpoint"
    (folder / "run.safetensors").mkdir()
    yield "folder", folder / "run.safetensors", "found a folder, expected a model"
    other = folder / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    yield "foreign", other, "not a cwdm model"
    damaged = folder / "damaged.safetensors"
    save_file({"a": torch.zeros(2)}, damaged, {"format": "cwdm-model-1", "config": "{"})
    yield "damaged", damaged, "metadata are damaged"
    good = folder / "good.safetensors"
    save_model(TINY, random_weights(), PRIORS, good, overwrite=False)
    cut = folder / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    yield "truncated", cut, "not a readable"
    headless = folder / "headless.safetensors"
    save_model(TINY, random_weights(), {}, headless, overwrite=False)
    yield "no prior", headless, "metadata are damaged: no prior for t2f"
    wider = replace(TINY, network=replace(TINY.network, channels=16))
    misfit = folder / "misfit.safetensors"
    save_model(wider, random_weights(), PRIORS, misfit, overwrite=False)
    yield "misfit", misfit, "do not fit"


def test_what_is_not_a_model_is_refused_by_name(tmp_path):
    for kind, path, message in foreign_files(tmp_path):
        with pytest.raises(InputError, match=message) as caught:
            load_model(path)
        assert str(path) in str(caught.value), kind
        assert "\n" not in str(caught.value), kind


@pytest.mark.parametrize("target", SEQUENCES)
def test_a_model_ships_for_every_target_with_its_card(target):
    path = default_model(target)
    model = load_model(path)
    assert model.config == Config.read(f"small-{target}")
    assert set(model.priors) == {target}
    assert all(np.isfinite(r) for r in model.priors[target].ratios.values())
    card = path.with_suffix(".md").read_text()
    assert "Research use only" in card
    assert model.sha256 in card


def test_a_model_of_every_sequence_keeps_a_prior_for_each(tmp_path):
    config = replace(TINY, target="any", network=replace(TINY.network, classes=len(SEQUENCES)))
    priors = {m: ScalePrior({o: 0.1 for o in others(m)}, 1.0) for m in SEQUENCES}
    path = tmp_path / "any.safetensors"
    save_model(config, random_weights(config), priors, path, overwrite=False)
    model = load_model(path)
    assert (model.config, model.priors) == (config, priors)


def test_tensors_that_a_network_shares_are_written_twice(tmp_path):
    network = WavUNetConfig(channels=8, groups=4, multipliers=(1, 1), res_blocks=1)
    config = replace(TINY, network=network)
    state = build_denoiser(config).backbone.state_dict()
    path = tmp_path / "shared.safetensors"
    save_model(config, state, PRIORS, path, overwrite=False)
    read = load_model(path).denoiser.backbone.state_dict()
    assert list(read) == list(state)
    for name, value in state.items():
        assert_close(read[name], value, rtol=0, atol=0)


def test_the_shipped_models_are_small():
    sizes = [default_model(target).stat().st_size for target in SEQUENCES]
    assert sum(sizes) <= 12_000_000
