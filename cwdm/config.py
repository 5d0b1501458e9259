"""The configuration of a model: frozen records read from one TOML file.

A configuration is complete: it says how images are normalized, what the network looks like, which
diffusion it was (or will be) trained on, how it samples. It travels inside the model's file.
"""

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cwdm.diffusion import Prediction, Schedule
from cwdm.errors import InputError
from cwdm.intensity import NormalizationName
from cwdm.modality import Modality
from cwdm.unet import UNetConfig

__all__ = ["Augmentation", "Config", "Diffusion", "Images", "Sampling", "Training"]

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Images:
    """How a case becomes images."""

    normalization: NormalizationName = "robust"
    spacing_mm: float = 1.0


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Diffusion:
    """The process (see ``diffusion``)."""

    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = 1000
    prediction: Prediction = "x_0"

    def build(self) -> Schedule:
        """The schedule these settings describe."""
        return getattr(Schedule, self.schedule)(self.steps)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Sampling:
    """Defaults of ``cwdm synthesize`` for this model."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 1000


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Augmentation:
    """Random changes to a training case; the spatial ones move all its images together."""

    flip: bool = False
    """Mirror left and right."""
    affine: float = 0.0
    """Probability of a rotation up to 15 degrees and a scaling up to 15 % per axis."""
    bias_field: float = 0.0
    """Probability of a smooth multiplicative field on a conditioning image."""
    contrast: float = 0.0
    """Probability of another gamma, and spread of an error in offset and scale, of a condition."""


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Training:
    """How a model is trained."""

    iterations: int = 1_200_000
    patch: tuple[int, int, int] | None = None
    """Voxels per training image; the whole brain if absent."""
    patches_per_case: int = 1
    """Patches cut from one augmented case."""
    cases_per_block: int = 1
    """Augmented cases whose patches are mixed before the next ones are made."""
    batch: int = 1
    learning_rate: float = 1e-5
    warmup: int = 0
    """Steps of linear rise of the learning rate."""
    decay: bool = False
    """Let the learning rate fall along a half cosine to zero at the last iteration."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is saved; 0 saves the weights themselves."""
    timesteps: int | None = None
    """Train on this many evenly spread times instead of all."""
    noise_share: float = 0.0
    """Share of the steps spent at t = T, where the best estimate is the conditional mean."""
    band_weights: tuple[float, ...] = (1.0,) * 8
    """Weight of each sub-band's error. With 9 for LLL (its scale squared) they make the image's."""
    structure_weight: float = 0.0
    """Weight of 1 - SSIM of the image, added to the loss."""
    drop_conditions: float = 0.0
    """Probability that one of the conditioning images is missing, two with its square."""
    checkpoint_every: int = 10_000
    seed: int = 0
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Config:
    """Everything about one model but its weights."""

    name: str
    target: Modality
    images: Images = Images()
    network: UNetConfig = UNetConfig()
    diffusion: Diffusion = Diffusion()
    sampling: Sampling = Sampling()
    training: Training = Training()

    @classmethod
    def parse(cls, values: object, source: str) -> "Config":
        """From nested dictionaries; every problem is one InputError that names ``source``."""
        try:
            return _CONFIG.validate_python(values)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "unexpected_keyword_argument":
                raise InputError(f"{source}: unknown key {key}") from None
            raise InputError(
                f"{source}: {key}: {problem['msg']}, got {problem['input']!r}"
            ) from None

    @classmethod
    def read(cls, name_or_path: str | Path) -> "Config":
        """From a TOML file, or a preset that ships with cwdm.

        Raises:
            InputError: no such file or preset, not TOML, an unknown key, or a wrong value.
        """
        path = Path(name_or_path)
        preset = resources.files("cwdm.configs") / f"{name_or_path}.toml"
        if path.suffix == ".toml" or path.exists():
            source: Path | Traversable = path
        elif preset.is_file():
            source = preset
        else:
            raise InputError(
                f"{name_or_path}: no such file or preset, expected one of {', '.join(presets())}"
            )
        try:
            return cls.parse(tomllib.loads(source.read_text()), str(path))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path}: not a readable TOML file: {error}") from error

    def as_dict(self) -> dict[str, object]:
        """Nested dictionaries of plain values, for JSON; ``parse`` reads them back."""
        return _CONFIG.dump_python(self, mode="json")  # type: ignore[no-any-return]


_CONFIG = TypeAdapter(Config)


def presets() -> list[str]:
    """Names of the configurations that ship with cwdm."""
    folder = resources.files("cwdm.configs")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )
