"""Checkpoints of the published implementations: what is in them, and which preset they belong to.

WDM (github.com/pfriedri/wdm-3d), cWDM (pfriedri/cwdm) and their descendants fast-cwdm, fastWDM3D
and WFM all save a bare state dict and nothing else: the network is inferred from the tensors, the
rest comes from a preset. Nothing in such a file is ever executed.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cwdm.config import Config, in_words
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.intensity import ScalePrior
from cwdm.modality import SEQUENCES, Modality, find_modality
from cwdm.unet import UNetConfig
from cwdm.wavunet import WavUNetConfig

__all__ = ["assumed_priors", "identify", "infer_network", "read_weights"]

_log = logging.getLogger(__name__)

_PREFIXES = ("module.", "_orig_mod.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_LEVELS_AT_256 = 6


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save``, float32, without prefixes of wrappers.

    Raises:
        InputError: no such file, not a checkpoint, one that would run code, or not tensors.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a checkpoint (.pt)") from None
    except UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, or is no checkpoint; it is not loaded because that "
            "could run code"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # what is no pickle makes torch stumble in any way
        raise InputError(
            f"{path}: not a readable checkpoint, expected tensors that torch saved"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(saved, Mapping) and isinstance(saved.get(wrapper), Mapping):
            saved = saved[wrapper]
    if not isinstance(saved, Mapping) or not saved:
        raise InputError(f"{path}: holds a {type(saved).__name__}, expected a state dict")
    weights = {}
    for name, tensor in saved.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name} is a {type(tensor).__name__}, expected tensors only")
        for prefix in _PREFIXES:
            name = str(name).removeprefix(prefix)
        weights[name] = tensor.float()
    return weights


def infer_network(
    weights: Mapping[str, Tensor], groups: int | None = None
) -> tuple[UNetConfig | WavUNetConfig, int]:
    """The shape of a network and how many channels it takes, from its tensors.

    Args:
        groups: of the group normalizations, which no tensor tells. Published: 32.

    Raises:
        KeyError, ValueError: not such a network.
    """
    channels, in_channels = weights["input_blocks.0.0.weight"].shape[:2]
    blocks = 1 + max(_numbers(weights, "output_blocks"), default=-1)
    wavelet = any(key.startswith("out_res.") for key in weights)
    if wavelet:
        res_blocks = 1 + max(_numbers(weights, "out_res"))
        levels, rest = divmod(blocks, res_blocks + 1)
        stride = res_blocks + 2
    else:
        up = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.")
        levels = 1 + len({match[1] for key in weights if (match := up.match(key))})
        stride, rest = divmod(blocks, levels)
        res_blocks = stride - 1
    if rest or res_blocks < 1:
        raise ValueError(f"{blocks} output blocks do not make {levels} levels")
    first = [f"input_blocks.{1 + level * stride}" for level in range(levels)]
    widths = [weights[f"{block}.0.out_layers.3.weight"].shape[0] for block in first]
    if any(width % channels for width in widths):
        raise ValueError(f"widths {widths} are not multiples of {channels}")
    shape: dict[str, Any] = {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "res_blocks": res_blocks,
        "groups": groups or (32 if channels % 32 == 0 else max(channels // 2, 1)),
        "scale_shift": weights[f"{first[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
    }
    if wavelet:
        return WavUNetConfig(**shape), in_channels
    taken = weights["output_blocks.0.0.in_layers.2.weight"].shape[1]
    return UNetConfig(
        **shape,
        additive_skips=taken == widths[-1],
        resample_in_blocks=not any(re.match(r"input_blocks\.\d+\.0\.op\.", key) for key in weights),
        attention_factors=tuple(
            2**level for level, block in enumerate(first) if f"{block}.1.qkv.weight" in weights
        ),
        middle_attention="middle_block.1.qkv.weight" in weights,
        classes=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0,
    ), in_channels


def identify(
    weights: Mapping[str, Tensor],
    path: Path,
    *,
    preset: str | None = None,
    target: Modality | None = None,
    groups: int | None = None,
) -> Config:
    """The configuration a checkpoint was trained with.

    Args:
        preset: a name of ``presets()``; found from the network and the file's name if absent.
        target: what the model is expected to make.
        groups: see ``infer_network``.

    Raises:
        InputError: not a network of this family, not that of the preset, one for another target,
            or a target that nothing tells.
    """
    if preset is not None and groups is None:
        stem, told = weights.get("input_blocks.0.0.weight"), Config.read(preset).network.groups
        groups = told if stem is not None and len(stem) % told == 0 else None
    try:
        network, in_channels = infer_network(weights, groups)
    except KeyError as error:
        raise InputError(
            f"{path}: not a published wavelet diffusion network: has no {error.args[0]}"
        ) from error
    except (ValueError, IndexError) as error:
        reason = str(error).replace("Value error, ", "").partition(" [type=")[0].splitlines()[-1]
        raise InputError(
            f"{path}: not a published wavelet diffusion network: {reason.strip()}"
        ) from error
    if isinstance(network, WavUNetConfig):
        _check_copies(weights, network, path)
    named = _named_target(path)
    if named and target and named != target:
        raise InputError(f"{path}: by its name a model for {named}, expected one for {target}")
    name = preset or _preset(network, in_channels, path, target or named)
    config = Config.read(name)
    if config.in_channels != in_channels:
        raise InputError(
            f"{path}: takes {in_channels} channels, preset {name} takes {config.in_channels}"
        )
    if name == "fast-cwdm" and (wanted := target or named):
        config = replace(config, target=wanted)
    for asked, how in ((named, "by its name"), (target, "expected")):
        if asked is not None and asked not in config.targets:
            raise InputError(
                f"{path}: {how} a model for {asked}, found one for {', '.join(config.targets)}"
            )
    if type(network) is type(config.network):  # what no tensor tells
        unseen = {"heads", "dropout", "resample_x"} & {field.name for field in fields(network)}
        network = replace(network, **{key: getattr(config.network, key) for key in unseen})
    if different := _differences(network, config.network):
        if preset:
            raise InputError(f"{path}: not the network of preset {name}: {different}")
        _log.warning("%s: not the network of %s: %s", path, name, different)
    try:
        return replace(config, name=path.stem, network=network, **_schedule(config, path))
    except ValidationError as error:
        raise InputError(f"{path}: {in_words(error)}") from error


def _check_copies(weights: Mapping[str, Tensor], network: WavUNetConfig, path: Path) -> None:
    """InputError unless the block that a WavU-Net applies twice per level is stored alike twice."""
    for level in range(len(network.multipliers)):
        again = (level + 1) * (network.res_blocks + 1) - 1
        copy, first = f"output_blocks.{again}.0.", f"output_blocks.{again - 1}.0."
        for key in (key for key in weights if key.startswith(copy)):
            other = first + key.removeprefix(copy)
            if other in weights and not torch.equal(weights[key], weights[other]):
                raise InputError(
                    f"{path}: {key} and {other} differ, expected two copies of one tensor"
                )


_RANGE = {Modality.T1N: 569.0, Modality.T1C: 857.0, Modality.T2W: 907.0, Modality.T2F: 462.0}
"""Typical range between the published quantiles, in scanner units: in the proportions of the
eleven BraTS 2018 cases the shipped models were trained on."""


def assumed_priors(config: Config) -> dict[Modality, ScalePrior]:
    """Intensity scales for weights that come without any. For CT, -1000..1000 HU is assumed."""
    if config.target == Modality.CT:
        return {Modality.CT: ScalePrior({}, offset=0.0, scale=1000.0)}
    symmetric = config.images.normalization == "published-wdm"
    return {
        target: ScalePrior(
            {m: math.log(_RANGE[target] / _RANGE[m]) for m in SEQUENCES if m != target},
            offset=1.0 if symmetric else 0.0,
            scale=_RANGE[target] / (2 if symmetric else 1),
        )
        for target in config.targets
    }


def _preset(
    network: UNetConfig | WavUNetConfig, in_channels: int, path: Path, target: Modality | None
) -> str:
    """The preset a network belongs to, by its channels, its levels and its file's name."""
    if isinstance(network, UNetConfig) and network.classes:
        return "wfm"
    if in_channels == 24:
        return "fastwdm-inpainting"
    if in_channels == 1:
        return "ddpm3d-128"
    if in_channels == 8:
        data = "lidc" if "lidc" in path.stem.lower() else "brats"
        size = 256 if len(network.multipliers) >= _LEVELS_AT_256 else 128
        return f"wdm-{data}-{size}" + ("-wavunet" if isinstance(network, WavUNetConfig) else "")
    if re.search(_STEPS, path.stem):
        return "fast-cwdm"
    if target is None:
        raise InputError(
            f"{path}: nothing in the file or its name tells what it makes, expected "
            "--preset cwdm-t1n, cwdm-t1c, cwdm-t2w or cwdm-t2f"
        )
    return f"cwdm-{target}"


def _named_target(path: Path) -> Modality | None:
    """The sequence a file is named after, as in brats_t1n_1200000.pt."""
    found = {find_modality(part) for part in re.split(r"[^a-zA-Z0-9]+", path.stem)} - {None}
    return found.pop() if len(found) == 1 else None


def _differences(found: UNetConfig | WavUNetConfig, expected: UNetConfig | WavUNetConfig) -> str:
    """In words; empty if the two are the same network."""
    if type(found) is not type(expected):
        return f"{found.kind}, expected {expected.kind}"
    return "; ".join(
        f"{field.name} = {getattr(found, field.name)}, expected {getattr(expected, field.name)}"
        for field in fields(found)
        if getattr(found, field.name) != getattr(expected, field.name)
    )


_STEPS = r"_(sampled|direct)_(\d+)"
"""How fast-cwdm names its files after their schedule: <...>_sampled_100.pt."""


def _schedule(config: Config, path: Path) -> dict[str, Any]:
    """Process and sampling as the file's name says, if it does."""
    match = re.search(_STEPS, path.stem)
    if match is None:
        return {}
    steps = int(match[2])
    return {
        "process": Diffusion(steps=steps, subset_of=1000 if match[1] == "sampled" else None),
        "sampling": replace(config.sampling, steps=steps),
    }


def _numbers(weights: Mapping[str, Tensor], prefix: str) -> set[int]:
    """The N of all keys prefix.N.<...>."""
    return {int(key.split(".")[1]) for key in weights if key.startswith(f"{prefix}.")}
