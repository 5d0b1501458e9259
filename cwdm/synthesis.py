"""The main line, once: a case without a modality goes in, the synthesized image comes out.

read -> normalize, cut out the brain -> wavelet coefficients -> sample -> image -> scanner units.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwdm import __version__
from cwdm import compat as published
from cwdm.case import Case, read_case
from cwdm.conditioning import condition
from cwdm.config import Sampling
from cwdm.engine import Engine, Progress
from cwdm.errors import InputError
from cwdm.files import check_target, move_new, sha256
from cwdm.flow import Flow
from cwdm.intensity import Scale
from cwdm.machine import Precision
from cwdm.modality import Modality, others, parse_modality
from cwdm.model import Model, default_model, load_model
from cwdm.noise import noise_stream
from cwdm.preparation import prepare
from cwdm.provenance import (
    Interval,
    Provenance,
    Region,
    Source,
    check_record,
    sidecar,
    warnings_for,
)
from cwdm.uncertainty import MAPS, Moments, Uncertainty, largest, normal_quantile
from cwdm.volume import (
    Volume,
    acquired,
    holding,
    is_ours,
    is_synthetic,
    read_volumes,
    stored_as,
    write_volume,
)

__all__ = ["Synthesis", "Synthesizer", "output_paths", "synthesize"]

_COVERAGE = 0.8
"""Of the interval of several samples, where the model has no calibration."""
_SAMPLING_STEPS = 10
"""Of samples of a model whose own sampling is one step, which hardly depends on the seed."""


@dataclass(frozen=True, eq=False)
class Synthesis:
    """A synthetic image and how it came to be."""

    volume: Volume
    """Voxels in canonical orientation, scanner units; the grid is that of the case."""
    provenance: Provenance
    case: Case
    uncertainty: Uncertainty | None = None
    """Of several samples, whose mean the volume is."""

    def write(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write ``<id>-<modality>.nii.gz`` and ``.json`` into ``folder``; returns the image's path.

        Of several samples also the maps ``-std``, ``-low`` and ``-high``.

        Raises:
            InputError: one of them is there already (with ``overwrite``: is an image of the
                case, or not made by cwdm), or the folder cannot be written.
        """
        target, maps = self.provenance.target, self.uncertainty is not None
        image, _ = output_paths(self.case, target, folder, overwrite=overwrite, maps=maps)
        self.write_as(image, overwrite=overwrite)
        return image

    def write_as(self, image: Path, *, overwrite: bool = False) -> None:
        """Write the image to a file, and its maps and its record beside it.

        They are moved into place when all of them are written, the record last: an image never lies
        beside the record of another.

        Raises:
            InputError: as ``atomic_write``; or what would be replaced was not written by cwdm.
        """
        check_target(image, overwrite)
        names = _map_names(self.case, self.provenance.target).values()
        maps = [image.with_name(name) for name in names]
        for path in (image, *(maps if self.uncertainty else ())):
            if path.exists() and not is_ours(path):
                raise InputError(
                    f"{path}: not written by cwdm, an acquired image is never overwritten"
                )
        with TemporaryDirectory(dir=image.parent, prefix=".cwdm-") as folder:
            try:
                made = self._write_new(Path(folder, image.name))
            except InputError as error:  # about the file that was wanted
                raise InputError(str(error).replace(folder, str(image.parent))) from error
            if overwrite:  # what belongs to the image that is there goes before it
                check_record(sidecar(image))
                sidecar(image).unlink(missing_ok=True)
                for path in filter(Path.exists, maps):
                    if is_ours(path):
                        path.unlink()
            for path in made:
                if overwrite:
                    path.replace(image.with_name(path.name))
                else:
                    move_new(path, image.with_name(path.name))

    def _write_new(self, image: Path) -> list[Path]:
        """The files, the record last."""
        paths = [image]
        write_volume(self.volume.voxels, self.volume, image, self.provenance.description)
        if self.uncertainty:
            like = replace(self.volume, header=stored_as(np.float32, self.volume.header))
            for kind, name in _map_names(self.case, self.provenance.target).items():
                what = self.provenance.description_of(f"{self.provenance.target} {kind}")
                paths.append(image.with_name(name))
                write_volume(self.uncertainty.maps[kind], like, paths[-1], what)
        self.provenance.write(sidecar(image))
        return [*paths, sidecar(image)]


class Synthesizer:
    """A model, loaded once, applied to many cases."""

    def __init__(
        self,
        model: Model,
        target: Modality | None = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        memory_limit: int | None = None,
        engine: Engine | None = None,
    ):
        """Of the options only `target` counts if the engine that runs the model is given."""
        config = model.config
        self.target = target or config.targets[0]
        if self.target not in config.targets:
            raise InputError(
                f"{model.path}: a model for {', '.join(config.targets)}, "
                f"expected one for {self.target}"
            )
        if not config.conditional:
            raise InputError(
                f"{model.path}: {config.name} is given no other sequences of a case (conditioning "
                f"= '{config.conditioning}'), expected a model for cwdm synthesize"
            )
        self.engine = engine or Engine(
            model, device=device, precision=precision, memory_limit=memory_limit
        )

    @property
    def model(self) -> Model:
        """As it runs."""
        return self.engine.model

    @classmethod
    def load(
        cls,
        target: Modality,
        model: Path | None = None,
        *,
        preset: str | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        memory_limit: int | None = None,
    ) -> Self:
        """With the model in a file, or the one that ships for ``target``.

        Args:
            preset: of a published checkpoint, where its file does not tell.
            memory_limit: bytes that a chain may take, see ``Engine.fit``.

        Raises:
            InputError: the file is not a model, or one for another target; no such device.
        """
        loaded = load_model(model or default_model(target), target, preset=preset)
        return cls(loaded, target, device=device, precision=precision, memory_limit=memory_limit)

    def __call__(
        self,
        case: Case,
        *,
        seed: int = 0,
        samples: int = 1,
        steps: int | tuple[int, ...] | None = None,
        sampler: str | None = None,
        compat: bool = False,
        announce: Callable[[Sequence[int]], object] | None = None,
        progress: Progress | None = None,
    ) -> Synthesis:
        """Synthesize the target for a case from its acquired images.

        An image of the target is not looked at, nor is any that is marked as synthetic.

        Args:
            seed: of this case's own generator; the result depends on nothing else that is random.
            samples: how many chains, with the seeds ``seed``, ``seed + 1``, ...; of several the
                volume is the mean, and ``Synthesis.uncertainty`` says how far they lie apart.
            steps: denoising steps, by default the model's own recommendation; of several samples
                those of the calibration, or 10 where the model's own is a single one.
            sampler: a name in ``SAMPLERS``, by default the model's own, or as for ``steps``.
            compat: put out what the published scripts write (see ``compat``): their crop, their
                stream of random numbers, their threshold, values in [0, 1].
            announce: told the size in voxels of what is synthesized, before the work begins; then
                ``engine.peak`` says what memory it takes.

        Raises:
            InputError: the case cannot be read, has nothing the model can use, an unknown sampler
                or number of steps was asked for, or it takes more than the limit of memory.
        """
        began = time.perf_counter()
        config, target, engine = self.model.config, self.target, self.engine
        settings = self._settings(samples, sampler, steps)
        if compat:
            if samples > 1:
                raise InputError(f"{samples} samples: the published scripts write one, expected 1")
            published.check(config, self.model.path)
        given = acquired(case.without(target))
        absent = self._absent(given)
        sources = [m for m in others(target) if m in given.images]
        volumes = read_volumes(given, sources)
        prepared = (
            published.prepare(volumes)
            if compat
            else prepare(volumes, config.images, multiple=config.multiple)
        )
        cond = self._condition(
            {m: image[None, None].to(engine.device) for m, image in prepared.images.items()}
        )
        size = [n * config.transform.factor for n in cond.shape[2:]]
        engine.fit(size)
        if announce:
            engine.prepare(settings)
            announce(size)
        stream = published.noise_stream if compat else noise_stream
        like = volumes[sources[0]]
        scale = Scale(0.0, 1.0) if compat else self.model.priors[target].predict(prepared.scales)
        moments = Moments()
        for number in range(samples):
            shape = (1, config.transform.channels, *cond.shape[2:])
            chain = engine.run(
                settings,
                stream(shape, seed + number, engine.device),
                cond=cond,
                label=self._label,
                told=published.network_time(config.process, settings) if compat else None,
                progress=progress and _part(progress, number, samples),
            )
            image = chain.image[0, 0]
            if compat:
                volume = (
                    published.sample(prepared, image)
                    if target in case.images
                    else published.complete(prepared, image, like)
                )
            else:
                voxels = prepared.restore(image, scale)
                if all(source.voxels.min() >= 0 for source in volumes.values()):
                    voxels = voxels.clip(min=0)
                volume = replace(like, voxels=voxels)
            if samples > 1:
                moments.add(volume.voxels)
        replaces = None if compat else _replaced(case, target)
        warnings = warnings_for(target, absent, replaces)
        uncertainty, interval = None, None
        if samples > 1:
            volume = replace(volume, voxels=moments.mean)
            uncertainty, interval, doubts = self._uncertainty(
                moments, prepared.mask, volume, case, settings, complete=not absent
            )
            if settings != self.engine.settings(sampler, steps):
                doubts = (
                    f"The samples were made by {settings.sampler} in {settings.steps} steps, not "
                    "by the model's own sampling; the image is their mean.",
                    *doubts,
                )
            warnings += doubts
        if not compat:
            volume = holding(volume)
        provenance = Provenance(
            cwdm=__version__,
            torch=torch.__version__,
            case=case.id,
            target=target,
            inputs={m: Source(name=v.path.name, sha256=sha256(v.path)) for m, v in volumes.items()},
            absent=absent,
            replaces=replaces,
            model=Source(name=config.name, sha256=self.model.sha256),
            seed=seed,
            samples=samples,
            sampler=settings.sampler,
            steps=settings.steps,
            precision="bf16" if engine.bf16 else "fp32",
            passes=chain.way,
            device=str(engine.device),
            compat=compat,
            normalization="published" if compat else config.images.normalization,
            scales=prepared.scales,
            target_scale=scale,
            seconds=round(time.perf_counter() - began, 3),
            interval=interval,
            warnings=warnings,
        )
        return Synthesis(volume, provenance, case, uncertainty)

    def seconds(
        self, size: int, *, sampler: str | None = None, steps: int | tuple[int, ...] | None = None
    ) -> float:
        """About how long a chain takes on a block of `size` voxels a side; one step is timed."""
        config, engine = self.model.config, self.engine
        settings = engine.settings(sampler, steps)
        count = len(config.process.timesteps(settings.steps, settings.spacing)) - 1
        zeros = torch.zeros(1, 1, size, size, size, device=engine.device)
        cond = self._condition(dict.fromkeys(others(self.target), zeros))
        draw = noise_stream((1, config.transform.channels, *cond.shape[2:]), 0, engine.device)
        if settings.sampler == "heun":  # two estimates a step, but for the last
            count = 2 * count - 1
        once = replace(settings, steps=1)
        for _ in range(2):  # the first time, libraries choose their kernels
            began = time.perf_counter()
            engine.run(once, draw, cond=cond, label=self._label)
        took = time.perf_counter() - began
        return took if settings.sampler == "one-step" else took * count

    def _settings(
        self, samples: int, sampler: str | None, steps: int | tuple[int, ...] | None
    ) -> Sampling:
        """What the user wants; else, of several samples, what makes them differ as measured."""
        if samples < 1:
            raise InputError(f"{samples} samples, expected at least 1")
        settings = self.engine.settings(sampler, steps)
        if samples == 1 or sampler or steps:
            return settings
        if calibration := self.model.calibration.get(self.target):
            return self.engine.settings(calibration.sampler, calibration.steps)
        process = self.model.config.process
        times = process.timesteps(settings.steps, settings.spacing)
        if settings.sampler != "one-step" and len(times) > 2:
            return settings
        several = "euler" if isinstance(process, Flow) else "ddpm"
        return self.engine.settings(several, _SAMPLING_STEPS)

    def _uncertainty(
        self,
        moments: Moments,
        brain: NDArray[np.bool_],
        volume: Volume,
        case: Case,
        settings: Sampling,
        *,
        complete: bool,
    ) -> tuple[Uncertainty, Interval, tuple[str, ...]]:
        """The maps of several samples, their record, and what to know of them.

        Args:
            complete: the model got all it would use, as when it was calibrated.
        """
        warnings = []
        fitted = self.model.calibration.get(self.target)
        used = fitted
        if not (
            fitted
            and complete
            and fitted.holds_for(moments.count, settings.sampler, settings.steps)
        ):
            used = None
        share = used.coverage if used else _COVERAGE
        q, floor = (used.q, used.floor) if used else (normal_quantile(share), 0.0)
        if not used:
            why = "The interval is not calibrated"
            if fitted:
                why = (
                    f"The model's calibration is for {fitted.samples} samples by {fitted.sampler} "
                    f"in {fitted.steps} steps from all inputs: the interval is not calibrated"
                )
            warnings.append(
                f"{why}. It is {q:.4f} standard deviations of the samples either side, as if they "
                "were normal and the truth one of them, and likely too narrow: what it does not "
                "name as wide is not therefore to be trusted; see cwdm calibrate."
            )
        uncertainty = Uncertainty.of(
            volume.voxels, moments.std, brain, q=q, floor=floor, coverage=share
        )
        if uncertainty.alike:
            warnings.append(
                "The samples hardly differ, so their spread says nothing: expected a sampler that "
                "draws noise, such as ddpm, in more steps."
            )
        to_file = np.linalg.inv(volume.header.get_best_affine()) @ volume.affine
        regions = []
        for voxels, box in largest(uncertainty.wide):
            corners = np.array([[s.start, s.stop - 1] for s in box])
            ends = np.rint(to_file[:3, :3] @ corners + to_file[:3, 3:]).astype(int)
            first, last = (tuple(end.tolist()) for end in (ends.min(axis=1), ends.max(axis=1)))
            regions.append(Region(voxels=voxels, first=first, last=last))
        interval = Interval(
            coverage=share,
            calibrated=used is not None,
            q=q,
            floor=floor,
            files=_map_names(case, self.target),
            wide=round(float(uncertainty.wide.sum() / brain.sum()), 4),
            regions=tuple(regions),
        )
        return uncertainty, interval, tuple(warnings)

    @property
    def _label(self) -> int | None:
        """The number of the target, if the model has several."""
        targets = self.model.config.targets
        return targets.index(self.target) if len(targets) > 1 else None

    def _condition(self, images: Mapping[Modality, Tensor]) -> Tensor:
        config = self.model.config
        return condition(
            images, self.target, config.transform, availability=config.conditioning == "any"
        )

    def _absent(self, case: Case) -> tuple[Modality, ...]:
        """Conditioning modalities the case lacks; InputError if the model cannot do without."""
        needed = others(self.target)
        absent = tuple(m for m in needed if m not in case.images)
        if len(absent) == len(needed):
            raise InputError(
                f"case {case.id}: nothing to synthesize {self.target} from, "
                f"expected at least one of {', '.join(needed)}"
            )
        if absent and self.model.config.training.drop_conditions == 0:
            raise InputError(
                f"case {case.id}: has no {', '.join(absent)}, which model "
                f"{self.model.config.name} needs"
            )
        return absent


def _map_names(case: Case, target: Modality) -> dict[str, str]:
    """Files of the maps of several samples, by kind."""
    return {kind: f"{case.id}-{target}-{kind}.nii.gz" for kind in MAPS}


def _part(progress: Progress, number: int, samples: int) -> Progress:
    """The progress of one chain of several."""
    return lambda done, total: progress(number * total + done, samples * total)


def _replaced(case: Case, target: Modality) -> Source | None:
    """The acquired image of the target, which may be damaged."""
    path = case.images.get(target)
    with suppress(InputError):
        if path is None or is_synthetic(path):
            return None
    return Source(name=path.name, sha256=sha256(path)) if path else None


def output_paths(
    case: Case,
    target: Modality,
    folder: Path | str,
    *,
    overwrite: bool = False,
    maps: bool = False,
) -> tuple[Path, Path]:
    """Where the image and its sidecar go.

    Args:
        maps: those of several samples will be written, too.

    Raises:
        InputError: as ``check_target``; or it would replace an acquired image of the case, or a
            record that is not ours.
    """
    image = Path(folder) / f"{case.id}-{target}.nii.gz"
    record = sidecar(image)
    for path in case.images.values():
        if image.exists() and image.samefile(path) and not is_synthetic(image):
            raise InputError(f"{image}: was acquired and is never overwritten")
    check_target(image, overwrite)
    check_target(record, overwrite)
    check_record(record)
    for name in _map_names(case, target).values() if maps else ():
        check_target(image.with_name(name), overwrite)
    return image, record


def synthesize(
    case: Case | Path | str,
    missing: Modality | str,
    *,
    model: Path | None = None,
    preset: str | None = None,
    seed: int = 0,
    samples: int = 1,
    steps: int | tuple[int, ...] | None = None,
    sampler: str | None = None,
    compat: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    memory_limit: int | None = None,
) -> Synthesis:
    """Synthesize one modality of one case.

    Args:
        case: a case or its folder.
        missing: the modality to synthesize, by any of its names.
        model: a model file, by default the one that ships for this modality.
        preset: of a published checkpoint, where its file does not tell.
        seed, samples, steps, sampler, compat, device, precision, memory_limit: see
            ``Synthesizer``.

    Raises:
        InputError: whatever is wrong with the case, the names or the model.

    Example:
        >>> cwdm.synthesize("BraTS-GLI-00000-000", "t2f").write(Path("out"))  # doctest: +SKIP
    """
    loaded = Synthesizer.load(
        parse_modality(missing),
        model,
        preset=preset,
        device=device,
        precision=precision,
        memory_limit=memory_limit,
    )
    case = case if isinstance(case, Case) else read_case(Path(case))
    return loaded(case, seed=seed, samples=samples, steps=steps, sampler=sampler, compat=compat)
