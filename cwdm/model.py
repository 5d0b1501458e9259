"""A model on disk: one safetensors file with the weights and, in its metadata, the configuration.

Loading never runs code: safetensors holds tensors and strings only.
"""

import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cwdm.config import Config
from cwdm.diffusion import WaveletDenoiser
from cwdm.errors import InputError
from cwdm.files import atomic_write, sha256
from cwdm.intensity import ScalePrior
from cwdm.modality import Modality, others
from cwdm.unet import UNet

__all__ = ["Model", "build_denoiser", "default_model", "load_model", "save_model"]

_FORMAT = "cwdm-model-1"


@dataclass(frozen=True, eq=False)
class Model:
    """A trained model, ready to synthesize its target."""

    config: Config
    denoiser: WaveletDenoiser
    prior: ScalePrior
    """Predicts the intensity scale of the target."""
    path: Path
    sha256: str


def build_denoiser(config: Config) -> WaveletDenoiser:
    """An untrained network of the configuration: 8 channels in per image, 8 out."""
    unet = UNet(config.network, in_channels=8 * (1 + len(others(config.target))))
    return WaveletDenoiser(unet, config.diffusion.prediction)


def save_model(
    config: Config, weights: dict[str, Tensor], prior: ScalePrior, path: Path, *, overwrite: bool
) -> None:
    """Write a model atomically. Weights keep their dtype; half precision halves the file.

    Args:
        weights: state dict of the backbone.
    """
    metadata = {
        "format": _FORMAT,
        "config": json.dumps(config.as_dict()),
        "prior": json.dumps(asdict(prior)),
    }
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    with atomic_write(path, overwrite) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def load_model(path: Path) -> Model:
    """Read a model; weights become float32.

    Raises:
        InputError: no such file, not safetensors, not a cwdm model, or weights that do not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a model (.safetensors)") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{path}: not a cwdm model (format {metadata.get('format')!r}, expected {_FORMAT!r})"
        )
    try:
        settings, prior = json.loads(metadata["config"]), json.loads(metadata["prior"])
        ratios = {Modality(m): float(r) for m, r in prior["ratios"].items()}
        scale_prior = ScalePrior(ratios, float(prior["offset"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its metadata are damaged: {error!r}") from error
    config = Config.parse(settings, str(path))
    denoiser = build_denoiser(config)
    try:
        denoiser.backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: weights do not fit the configuration: {reason}") from error
    denoiser.eval().requires_grad_(False)
    return Model(
        config,
        denoiser,
        scale_prior,
        Path(path),
        sha256(path),
    )


def default_model(target: Modality) -> Path:
    """The model for ``target`` that ships with cwdm.

    Raises:
        InputError: the installation lacks it.
    """
    path = Path(str(resources.files("cwdm") / "weights" / f"small-{target}.safetensors"))
    if not path.is_file():
        raise InputError(f"{path}: the model for {target} is missing from this installation")
    return path
