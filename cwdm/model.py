"""A model on disk: one safetensors file with the weights and, in its metadata, the configuration.

Loading never runs code: safetensors holds tensors and strings only.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cwdm.checkpoints import assumed_priors, identify, read_weights
from cwdm.config import Config
from cwdm.denoiser import Denoiser
from cwdm.errors import InputError
from cwdm.files import atomic_write, sha256
from cwdm.intensity import ScalePrior
from cwdm.modality import Modality
from cwdm.uncertainty import Calibration
from cwdm.unet import UNet
from cwdm.wavunet import WavUNet, WavUNetConfig

__all__ = [
    "Model",
    "build_denoiser",
    "default_model",
    "find_model",
    "load_model",
    "save_calibrated",
    "save_model",
    "shipped_models",
    "to_bytes",
]

CHECKPOINT_SUFFIXES = (".pt", ".pth")
"""Of published checkpoints."""
_FORMAT = "cwdm-model-1"
_PRIOR = TypeAdapter(ScalePrior)
_CALIBRATION = TypeAdapter(Calibration)


@dataclass(frozen=True, eq=False)
class Model:
    """A trained model, ready to make its targets."""

    config: Config
    denoiser: Denoiser
    priors: Mapping[Modality, ScalePrior]
    """For each target, what predicts its intensity scale."""
    path: Path
    sha256: str
    calibration: Mapping[Modality, Calibration] = field(default_factory=dict)
    """What the spread of its samples means, for those of its targets it was measured for."""


def build_denoiser(config: Config) -> Denoiser:
    """An untrained network of the configuration."""
    channels = config.transform.channels
    network: nn.Module
    if isinstance(config.network, WavUNetConfig):
        network = WavUNet(config.network, config.in_channels, channels)
    else:
        network = UNet(config.network, config.in_channels, channels)
    return Denoiser(
        network,
        config.process,
        config.prediction,
        channels,
        availability=config.conditioning == "any",
    )


def save_model(
    config: Config,
    weights: Mapping[str, Tensor],
    priors: Mapping[Modality, ScalePrior],
    path: Path,
    *,
    overwrite: bool,
) -> None:
    """Write a model atomically. Weights keep their dtype; half precision halves the file.

    Args:
        weights: state dict of the backbone.
    """
    metadata = {
        "format": _FORMAT,
        "config": json.dumps(config.as_dict()),
        "priors": json.dumps({target: asdict(prior) for target, prior in priors.items()}),
    }
    with atomic_write(path, overwrite) as temporary:
        temporary.write_bytes(to_bytes(weights, metadata))


def save_calibrated(
    source: Path, calibration: Mapping[Modality, Calibration], path: Path, *, overwrite: bool
) -> None:
    """Write a copy of a model file with this calibration; weights and all else stay as they are.

    Raises:
        InputError: ``source`` is not a cwdm model; or as ``atomic_write``.
    """
    weights, metadata = _read(source)
    records = {target: asdict(record) for target, record in calibration.items()}
    with atomic_write(path, overwrite) as temporary:
        metadata = metadata | {"calibration": json.dumps(records)}
        temporary.write_bytes(to_bytes(weights, metadata))


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file; tensors that share memory are written one by one."""
    return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, metadata)


def load_model(path: Path, target: Modality | None = None, *, preset: str | None = None) -> Model:
    """Read a model, ours (.safetensors) or a published checkpoint (.pt); weights become float32.

    Args:
        target: what the model is expected to make; some published checkpoints do not tell.
        preset: of a published checkpoint, see ``checkpoints.identify``.

    Raises:
        InputError: no such file, not safetensors, not a cwdm model, weights that do not fit; or a
            checkpoint that ``checkpoints`` refuses.
    """
    path = Path(path)
    if preset is not None and path.suffix not in CHECKPOINT_SUFFIXES:
        raise InputError(f"{path}: tells what it is, expected no --preset")
    if path.suffix in CHECKPOINT_SUFFIXES:
        weights = read_weights(path)
        config = identify(weights, path, preset=preset, target=target)
        return _assemble(config, weights, assumed_priors(config), path)
    stored, metadata = _read(path)
    weights = {name: tensor.float() for name, tensor in stored.items()}
    try:
        settings = json.loads(metadata["config"])
        priors = {
            Modality(target): _PRIOR.validate_python(prior)
            for target, prior in json.loads(metadata["priors"]).items()
        }
        calibration = {
            Modality(target): _CALIBRATION.validate_python(record)
            for target, record in json.loads(metadata.get("calibration", "{}")).items()
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its metadata are damaged: {error!r}") from error
    config = Config.parse(settings, str(path))
    if absent := [target for target in config.targets if target not in priors]:
        raise InputError(f"{path}: its metadata are damaged: no prior for {absent[0]}")
    return _assemble(config, weights, priors, path, calibration)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as they are stored and metadata of a model file; InputError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a model (.safetensors)") from None
    except (SafetensorError, OSError) as error:
        if path.is_dir():
            raise InputError(f"{path}: found a folder, expected a model (.safetensors)") from None
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{path}: not a cwdm model (format {metadata.get('format')!r}, expected {_FORMAT!r})"
        )
    return weights, metadata


def _assemble(
    config: Config,
    weights: Mapping[str, Tensor],
    priors: Mapping[Modality, ScalePrior],
    path: Path,
    calibration: Mapping[Modality, Calibration] | None = None,
) -> Model:
    """The network of a configuration with its weights, ready to use."""
    denoiser = build_denoiser(config)
    try:
        denoiser.backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: weights do not fit the configuration: {reason}") from error
    denoiser.eval().requires_grad_(False)
    return Model(config, denoiser, priors, path, sha256(path), calibration or {})


def default_model(target: Modality) -> Path:
    """The model for ``target`` that ships with cwdm.

    Raises:
        InputError: the installation lacks it.
    """
    path = Path(str(resources.files("cwdm") / "weights" / f"small-{target}.safetensors"))
    if not path.is_file():
        raise InputError(f"{path}: the model for {target} is missing from this installation")
    return path


def find_model(name_or_path: str | Path) -> Path:
    """A file, or the model of that name that ships with cwdm.

    Raises:
        InputError: neither, or the installation lacks it.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if path.suffix or path.is_file():
        return path
    known = {each.stem: each for each in shipped_models()}
    if name not in known:
        raise InputError(
            f"{name}: no such model, expected a file or one of {', '.join(known) or 'none'}"
        )
    return known[name]


def shipped_models() -> list[Path]:
    """The files of all models that ship with cwdm."""
    return sorted(Path(str(resources.files("cwdm") / "weights")).glob("small-*.safetensors"))
