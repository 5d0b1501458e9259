"""The configuration of a model: frozen records read from one TOML file.

A configuration is complete: it says how images are normalized, what the network looks like, which
diffusion it was (or will be) trained on, how it samples. It travels inside the model's file.
"""

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cwdm.coefficients import Transform
from cwdm.denoiser import Prediction
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.intensity import NormalizationName
from cwdm.modality import SEQUENCES, Modality
from cwdm.process import Spacing
from cwdm.sampling import SamplerName
from cwdm.unet import UNetConfig
from cwdm.wavunet import WavUNetConfig

__all__ = ["Augmentation", "Config", "Images", "Orientation", "Sampling", "Training", "in_words"]

_CLOSED = ConfigDict(extra="forbid")

Positive = Annotated[int, Field(ge=1)]
Orientation = Literal["RAS", "LPS", "LAS"]


def _kind(default: str) -> Discriminator:
    """Which record of a union a table stands for: what its key ``kind`` says."""
    return Discriminator(
        lambda value: (
            value.get("kind", default)
            if isinstance(value, dict)
            else getattr(value, "kind", default)
        )
    )


Network = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[WavUNetConfig, Tag("wavunet")], _kind("unet")
]
AnyProcess = Annotated[
    Annotated[Diffusion, Tag("diffusion")] | Annotated[Flow, Tag("flow")], _kind("diffusion")
]


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Images:
    """How a case becomes images."""

    normalization: NormalizationName = "robust"
    spacing_mm: Annotated[float, Field(gt=0)] = 1.0
    """Voxel size of the images."""
    orientation: Orientation = "RAS"
    """Which way the axes point. BraTS files and the models published for them are LPS, those for
    LIDC-IDRI are LAS."""
    size: tuple[int, int, int] | None = None
    """Voxels of every image; just the brain's own box if absent."""
    centre: Literal["brain", "grid"] = "brain"
    """What lies in the middle of an image of that size: the brain, or (published) the volume."""


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Sampling:
    """Defaults of ``cwdm synthesize`` and ``cwdm generate`` for this model."""

    sampler: SamplerName = "ddpm"
    steps: int | tuple[int, ...] = 1000
    """How many of the T steps, see ``Process.timesteps``."""
    spacing: Spacing = "even"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise of DDIM: 0 none, 1 as much as DDPM."""
    clamp: bool = True
    """Clamp every estimate to the range of the images, as published, and not only the last."""


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

    iterations: Positive = 1_200_000
    patch: tuple[int, int, int] | None = None
    """Voxels per training image; the whole brain if absent."""
    batch: Positive = 1
    """Images per step, on all processes together."""
    accumulation: Positive = 1
    """Parts a process computes its share of the batch in, one after the other."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    warmup: int = 0
    """Steps of linear rise of the learning rate."""
    decay: bool = False
    """Let the learning rate fall along a half cosine to zero at the last iteration."""
    clip: float | None = None
    """Largest norm of the gradient."""
    recompute: bool = False
    """Gradient checkpointing: recompute the features of each block when the gradient needs them,
    which takes a third longer and a fraction of the memory."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights that is saved; 0 saves the weights themselves."""
    timesteps: int | None = None
    """Train on this many evenly spread times instead of all."""
    noise_share: float = 0.0
    """Share of the steps spent at t = T, where the best estimate is the conditional mean."""
    band_weights: tuple[float, ...] = (1.0,)
    """Weight of each sub-band's error, or one for all. 9 for LLL (its scale squared) and 1 for the
    others make it the error of the image."""
    structure_weight: float = 0.0
    """Weight of 1 - SSIM of the image, added to the loss."""
    drop_conditions: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that one of the conditioning images is missing, two with its square."""
    patches_per_simulation: Positive = 16
    """Patches cut from one simulated case before another is simulated."""
    checkpoint_every: Positive = 10_000
    keep: Positive = 3
    """Checkpoints that are kept; older ones are removed."""
    validate_every: Positive = 10_000
    """Steps between validations."""
    validation_steps: Positive = 50
    """Sampling steps of a validation at most; a model that takes more is sampled by DDIM."""
    seed: Annotated[int, Field(ge=0)] = 0
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True, kw_only=True, config=_CLOSED)
class Config:
    """Everything about one model but its weights."""

    name: str
    target: Modality | Literal["any"]
    """What the model makes; ``any`` is one model for all four sequences, told which."""
    conditioning: Literal["others", "any", "none", "inpainting"] = "others"
    """What it is given: the three other sequences of the case; those of them there are, and which;
    nothing; or the image with a hole and the mask of the hole."""
    prediction: Prediction = "x_0"
    """What the network puts out."""
    images: Images = Images()
    transform: Transform = Transform()
    network: Network = UNetConfig()
    process: AnyProcess = Diffusion()
    sampling: Sampling = Sampling()
    training: Training = Training()

    def __post_init__(self) -> None:
        conditional = self.conditional
        if conditional and self.target == Modality.CT:
            raise ValueError("ct has no other sequences, expected conditioning = 'none'")
        classes = self.network.classes if isinstance(self.network, UNetConfig) else 0
        if classes != (expected := len(SEQUENCES) if self.target == "any" else 0):
            raise ValueError(
                f"target = '{self.target}' with {classes} network.classes, expected {expected}"
            )
        if not conditional and self.prediction == "residual":
            raise ValueError("a residual is taken from the conditions: there are none")
        if isinstance(self.process, Flow):
            if not conditional and self.process.source == "conditions":
                raise ValueError("a flow from the conditions needs conditions")
            if self.sampling.sampler == "ddpm" or self.sampling.eta:
                raise ValueError("ddpm and eta belong to a diffusion, expected euler or heun")
        elif self.prediction == "velocity":
            raise ValueError("a velocity belongs to a flow, expected prediction = 'x_0'")
        self.process.timesteps(self.sampling.steps, self.sampling.spacing)
        batch, parts = self.training.batch, self.training.accumulation
        if batch % parts:
            raise ValueError(f"training.batch = {batch} is no multiple of accumulation = {parts}")
        if batch > parts and not (self.training.patch or self.images.size):
            raise ValueError(
                "images that are computed together need training.patch or images.size: brains "
                "differ in size"
            )
        if self.conditioning == "any" and not self.training.drop_conditions:
            raise ValueError(
                "conditioning = 'any' is learnt from missing images, expected "
                "training.drop_conditions above 0"
            )
        self.process.timesteps(self.training.timesteps)
        sizes = {"images.size": self.images.size, "training.patch": self.training.patch}
        for key, size in sizes.items():
            if size is not None and any(n < 1 or n % self.multiple for n in size):
                raise ValueError(f"{key} = {size}, expected multiples of {self.multiple}")
        if len(self.training.band_weights) not in (1, self.transform.channels):
            raise ValueError(
                f"training.band_weights has {len(self.training.band_weights)} entries, expected "
                f"1 or {self.transform.channels}"
            )

    @property
    def conditional(self) -> bool:
        """Whether the model is given other sequences of the case."""
        return self.conditioning in ("others", "any")

    @property
    def targets(self) -> tuple[Modality, ...]:
        """The images the model can make."""
        return SEQUENCES if self.target == "any" else (self.target,)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The images training makes use of, in channel order."""
        return SEQUENCES if self.conditional else self.targets

    @property
    def in_channels(self) -> int:
        """Channels the network takes: those of the noisy image and of its conditions."""
        images = {"others": len(SEQUENCES) - 1, "any": len(SEQUENCES), "none": 0, "inpainting": 2}
        planes = len(SEQUENCES) if self.conditioning == "any" else 0
        return self.transform.channels * (1 + images[self.conditioning]) + planes

    @property
    def multiple(self) -> int:
        """Every axis of an image is a multiple of this many voxels."""
        return self.transform.factor * self.network.divisor

    @classmethod
    def parse(cls, values: object, source: str) -> "Config":
        """From nested dictionaries; every problem is one InputError that names ``source``."""
        try:
            return _CONFIG.validate_python(values)
        except ValidationError as error:
            raise InputError(f"{source}: {in_words(error)}") from None

    @classmethod
    def read(cls, name_or_path: str | Path) -> "Config":
        """From a TOML file, or a preset that ships with cwdm.

        Raises:
            InputError: no such file or preset, not TOML, an unknown key, or a wrong value.
        """
        path = Path(name_or_path)
        preset = resources.files("cwdm.configs") / f"{name_or_path}.toml"
        if path.suffix != ".toml" and preset.is_file():
            source: Path | Traversable = preset
        elif path.suffix == ".toml" or path.is_file():
            source = path
        else:
            raise InputError(
                f"{name_or_path}: no such file or preset, expected one of {', '.join(presets())}"
            )
        try:
            return cls.parse(tomllib.loads(source.read_text()), str(path))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path}: not a readable TOML file: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for JSON; ``parse`` reads them back."""
        return _CONFIG.dump_python(self, mode="json")  # type: ignore[no-any-return]


_CONFIG = TypeAdapter(Config)
_TAGS = {"unet", "wavunet", "diffusion", "flow", "int"}  # members of unions, not keys


def in_words(error: ValidationError) -> str:
    """The first problem of several, on one line, with the key as it stands in the file."""
    problem = error.errors()[0]
    parts = [str(part) for part in problem["loc"]]
    key = ".".join(
        part for i, part in enumerate(parts) if i == 0 or not (part in _TAGS or "[" in part)
    )
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {key}"
    if problem["type"] == "union_tag_invalid":
        found, expected = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        return f"{key}.kind: expected one of {expected}, got {found!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key or problem["type"] == "value_error":  # about several keys at once
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {problem['input']!r}"


def presets() -> list[str]:
    """Names of the configurations that ship with cwdm."""
    folder = resources.files("cwdm.configs")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )
