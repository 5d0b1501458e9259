"""Images from noise alone, with a model that is given no other sequences of a case.

Sample n of a seed depends on the two numbers and nothing else, so that a run can be split over
machines, interrupted and resumed.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from cwdm import __version__
from cwdm.engine import Engine, Progress
from cwdm.errors import InputError
from cwdm.files import check_target
from cwdm.intensity import NORMALIZATIONS, Normalization, Scale
from cwdm.machine import Precision
from cwdm.modality import Modality
from cwdm.model import Model, find_model, load_model
from cwdm.noise import noise_stream
from cwdm.preparation import FLIPS
from cwdm.provenance import SampleProvenance, Source
from cwdm.volume import Volume, is_synthetic, new_volume, read_volume, write_volume

__all__ = ["DEFAULT_MODEL", "Generator", "Sample", "foreground", "is_done", "sample_paths"]

DEFAULT_MODEL = "small-brain"

_THRESHOLD = 0.04
"""Share of the range up to which a voxel is background, as published (cWDM, sample_auto.py)."""
_CLOSING = 1
"""Voxels by which the foreground grows and shrinks again, so that cracks close. With more, specks
around the brain become part of it."""
_MAY_DIFFER = {"cwdm", "torch", "device", "passes", "seconds", "warnings", "use"}
"""What two records of one sample need not share."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A generated image and how it came to be."""

    volume: Volume
    """Voxels in canonical orientation, scanner units; the middle of the grid is the origin."""
    provenance: SampleProvenance

    def write(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write ``<model>-<number>-<modality>.nii.gz`` and ``.json``; returns the image's path.

        The image appears last: where there is one, the sample is complete.

        Raises:
            InputError: the sample is there already (with ``overwrite``: an image that was not made
                by cwdm), or the folder cannot be written.
        """
        image, sidecar = sample_paths(self.provenance, folder)
        if not overwrite:
            is_done(self.provenance, folder)  # refuses what is not ours to complete
            check_target(image)
        elif image.exists():
            if not is_synthetic(image):
                raise InputError(f"{image}: not written by cwdm, never overwritten")
            image.unlink()  # or it could be left beside a record that is not its own
        try:
            self.provenance.write(sidecar, overwrite=overwrite or sidecar.exists())
            write_volume(self.volume.voxels, self.volume, image, self.provenance.description)
        except BaseException:
            if not image.exists():
                sidecar.unlink(missing_ok=True)
            raise
        return image


class Generator:
    """A model without conditions, loaded once, that makes any number of samples."""

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        memory_limit: int | None = None,
    ):
        config = model.config
        if config.conditioning != "none":
            what = "other sequences" if config.conditional else config.conditioning
            raise InputError(
                f"{model.path}: {config.name} is conditioned on {what}, use cwdm synthesize"
            )
        self.normalization = NORMALIZATIONS[config.images.normalization]
        if self.normalization.background != self.normalization.low:
            raise InputError(
                f"{model.path}: normalization {config.images.normalization!r} does not tell the "
                "background from the brain, expected published, published-wdm or hounsfield"
            )
        self.engine = Engine(model, device=device, precision=precision, memory_limit=memory_limit)

    @property
    def model(self) -> Model:
        """As it runs."""
        return self.engine.model

    @classmethod
    def load(
        cls,
        model: Path | str | None = None,
        *,
        preset: str | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        memory_limit: int | None = None,
    ) -> Self:
        """With the model in a file, or one that ships with cwdm, by its name.

        Args:
            preset: of a published checkpoint, where its file does not tell.
            memory_limit: bytes that a chain may take, see ``Engine.fit``.

        Raises:
            InputError: no such model, or one with conditions; no such device.
        """
        path = find_model(model or DEFAULT_MODEL)
        return cls(
            load_model(path, preset=preset),
            device=device,
            precision=precision,
            memory_limit=memory_limit,
        )

    def plan(
        self,
        number: int,
        *,
        seed: int = 0,
        size: int | Sequence[int] | None = None,
        steps: int | tuple[int, ...] | None = None,
        sampler: str | None = None,
        target: Modality | None = None,
        compat: bool = False,
    ) -> SampleProvenance:
        """What a call with the same arguments will do; nothing is computed.

        Raises:
            InputError: whatever is wrong with the arguments.
        """
        config, engine = self.model.config, self.engine
        settings = engine.settings(sampler, steps)
        chosen = target or config.targets[0]
        if chosen not in config.targets or (target is None and len(config.targets) > 1):
            found = f", not {target}" if target else ", expected --target and one of them"
            raise InputError(
                f"{self.model.path}: {config.name} makes {', '.join(config.targets)}{found}"
            )
        low, high = self.normalization.low, self.normalization.high
        if compat and (low, high) != (-1, 1):
            raise InputError(
                f"{self.model.path}: the published script is for images in -1..1, "
                f"{config.name} makes {low:g}..{high:g}"
            )
        return SampleProvenance(
            cwdm=__version__,
            torch=torch.__version__,
            model=Source(name=config.name, sha256=self.model.sha256),
            target=chosen,
            seed=seed,
            number=number,
            size=self._size(size),
            sampler=settings.sampler,
            steps=settings.steps,
            precision="bf16" if engine.bf16 else "fp32",
            device=str(engine.device),
            compat=compat,
            normalization=config.images.normalization,
            target_scale=Scale(0.0, 1.0) if compat else self.model.priors[chosen].predict({}),
        )

    def __call__(
        self,
        number: int,
        *,
        seed: int = 0,
        size: int | Sequence[int] | None = None,
        steps: int | tuple[int, ...] | None = None,
        sampler: str | None = None,
        target: Modality | None = None,
        compat: bool = False,
        progress: Progress | None = None,
    ) -> Sample:
        """Make sample ``number`` (0, 1, ...) of a seed.

        Args:
            size: voxels along X, Y, Z, or one number for all three; by default the model's own.
            steps: denoising steps, by default the model's own recommendation.
            sampler: a name in ``SAMPLERS``, by default the model's own.
            target: which of its sequences, for a model that makes several.
            compat: put out what the published script (generation_sample.py of wdm-3d) writes: its
                stream of random numbers, seeded with seed + number, and values in [0, 1] as the
                network made them, without geometry.

        Raises:
            InputError: whatever is wrong with the arguments, or it takes more than the limit of
                memory.
        """
        began = time.perf_counter()
        config, engine = self.model.config, self.engine
        planned = self.plan(
            number,
            seed=seed,
            size=size,
            steps=steps,
            sampler=sampler,
            target=target,
            compat=compat,
        )
        engine.fit(planned.size)
        stream = seed + number if compat else _seed(seed, number)
        chain = engine.run(
            engine.settings(sampler, steps),
            noise_stream(self._shape(planned.size), stream, engine.device),
            label=config.targets.index(planned.target) if len(config.targets) > 1 else None,
            progress=progress,
        )
        voxels = chain.image[0, 0].float().cpu().numpy()
        volume = _published(voxels) if compat else self._volume(voxels, planned.target_scale)
        warnings = planned.warnings
        if volume.voxels.min() == volume.voxels.max():
            warnings += ("The image is empty: all of it is background.",)
        seconds = round(time.perf_counter() - began, 3)
        done = replace(planned, seconds=seconds, warnings=warnings, passes=chain.way)
        return Sample(volume, done)

    def _shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of the noise: (1, channels, X', Y', Z')."""
        transform = self.model.config.transform
        return (1, transform.channels, *(n // transform.factor for n in size))

    def _size(self, wanted: int | Sequence[int] | None) -> tuple[int, int, int]:
        config = self.model.config
        wanted = config.images.size if wanted is None else wanted
        if wanted is None:
            raise InputError(f"{self.model.path}: {config.name} has no size of its own, add --size")
        x, y, z = (wanted, wanted, wanted) if isinstance(wanted, int) else wanted
        multiple = config.multiple
        if any(n < 1 or n % multiple for n in (x, y, z)):
            below = [max(n // multiple, 1) * multiple for n in (x, y, z)]
            above = [max(-(-n // multiple), 1) * multiple for n in (x, y, z)]
            nearest = dict.fromkeys(
                f"{n[0]}" if len({*n}) == 1 else "x".join(map(str, n)) for n in (below, above)
            )
            raise InputError(
                f"size {x}x{y}x{z}: every axis must be a multiple of {multiple} for this network, "
                f"nearest {'are' if len(nearest) > 1 else 'is'} {' and '.join(nearest)}"
            )
        return x, y, z

    def _volume(self, image: NDArray[np.float32], scale: Scale) -> Volume:
        """A network image (X, Y, Z) in scanner units, on a grid in the middle of the world."""
        images, normalization = self.model.config.images, self.normalization
        image = np.flip(image, FLIPS[images.orientation])
        affine = np.diag([*(images.spacing_mm,) * 3, 1.0])
        affine[:3, 3] = -images.spacing_mm * (np.array(image.shape) - 1) / 2
        if not normalization.masked:  # CT: air has its value, like all else; HU are whole numbers
            everything = np.ones(image.shape, dtype=bool)
            voxels = Normalization.denormalize(image, everything, scale)
            return new_volume(np.rint(voxels), affine, np.int16)
        mask = foreground(image, normalization)
        voxels = Normalization.denormalize(image, mask, scale).clip(min=0)
        return new_volume(voxels, affine, np.float32)


def foreground(image: NDArray[np.float32], normalization: Normalization) -> NDArray[np.bool_]:
    """(X, Y, Z): the largest thing in an image in network units, with its holes filled.

    More than a few percent of the range above black; cracks belong to it.
    """
    low, high = normalization.low, normalization.high
    bright = np.pad(image > low + _THRESHOLD * (high - low), _CLOSING + 1)
    parts, n = ndimage.label(ndimage.binary_closing(bright, iterations=_CLOSING))
    if n == 0:
        return np.zeros(image.shape, dtype=bool)
    thing = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    around, _ = ndimage.label(~thing)
    inner = (slice(_CLOSING + 1, -_CLOSING - 1),) * 3
    filled: NDArray[np.bool_] = (around != around[0, 0, 0])[inner]
    return filled


def sample_paths(planned: SampleProvenance, folder: Path | str) -> tuple[Path, Path]:
    """Where the image of a sample and its record go."""
    return Path(folder) / f"{planned.name}.nii.gz", Path(folder) / f"{planned.name}.json"


def is_done(planned: SampleProvenance, folder: Path | str) -> bool:
    """Whether the sample is in the folder already, whole and made in the same way.

    A record without its image is what an interruption leaves: not done.

    Raises:
        InputError: a file of its name is there that is damaged or was made in another way.
    """
    image, sidecar = sample_paths(planned, folder)
    if not image.exists() and not sidecar.exists():
        return False
    try:
        found: dict[str, Any] = dict(json.loads(sidecar.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{image}: is there without its record, expected another folder or --overwrite"
        ) from None
    for key, wanted in json.loads(planned.as_json()).items():
        if key not in _MAY_DIFFER and (was := found.get(key)) != wanted:
            how = "another model" if key == "model" else f"{key} {was}, not {wanted}"
            raise InputError(
                f"{sidecar}: was made with {how}, expected another folder or --overwrite"
            )
    if not image.exists():
        return False
    read_volume(image)  # all of it is there
    return is_synthetic(image)


def _seed(seed: int, number: int) -> int:
    """One number from two, far from those of neighbours."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def _published(image: NDArray[np.float32]) -> Volume:
    """(v + 1) / 2 without geometry."""
    return new_volume((image + 1) / 2, np.eye(4), np.float32)
