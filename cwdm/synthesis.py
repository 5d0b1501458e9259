"""The main line, once: a case without a modality goes in, the synthesized image comes out.

read -> normalize, cut out the brain -> wavelet coefficients -> sample -> image -> scanner units.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from cwdm import __version__
from cwdm.case import Case, read_case
from cwdm.coefficients import decode
from cwdm.conditioning import condition
from cwdm.errors import InputError
from cwdm.files import check_target, sha256
from cwdm.intensity import NORMALIZATIONS
from cwdm.modality import Modality, others, parse_modality
from cwdm.model import Model, default_model, load_model
from cwdm.preparation import prepare
from cwdm.provenance import Provenance, Source, warnings_for
from cwdm.sampling import SAMPLERS, clamped, noise_stream, sample
from cwdm.volume import Volume, is_synthetic, read_volumes, write_volume

__all__ = [
    "Precision",
    "Synthesis",
    "Synthesizer",
    "choose_bf16",
    "choose_device",
    "output_paths",
    "synthesize",
]

Precision = Literal["auto", "fp32", "bf16"]
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True, eq=False)
class Synthesis:
    """A synthetic image and how it came to be."""

    volume: Volume
    """Voxels in canonical orientation, scanner units; the grid is that of the case."""
    provenance: Provenance
    case: Case

    def write(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write ``<id>-<modality>.nii.gz`` and ``.json`` into ``folder``; returns the image's path.

        Raises:
            InputError: one of the two is there already (with ``overwrite``: is an image of the
                case, or not made by cwdm), or the folder cannot be written.
        """
        image, sidecar = output_paths(
            self.case, self.provenance.target, folder, overwrite=overwrite
        )
        write_volume(self.volume.voxels, self.volume, image, self.provenance.description, overwrite)
        self.provenance.write(sidecar, overwrite=overwrite)
        return image


class Synthesizer:
    """A model, loaded once, applied to many cases."""

    def __init__(self, model: Model, *, device: str = "auto", precision: Precision = "auto"):
        self.model = model
        self.device = choose_device(device)
        self.bf16 = choose_bf16(precision, self.device)
        self.denoiser = model.denoiser.to(self.device)
        if self.bf16:
            self.denoiser.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @classmethod
    def load(
        cls,
        target: Modality,
        model: Path | None = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> Self:
        """With the model in a file, or the one that ships for ``target``.

        Raises:
            InputError: the file is not a model, or one for another target; no such device.
        """
        loaded = load_model(model or default_model(target))
        if loaded.config.target is not target:
            raise InputError(
                f"{loaded.path}: a model for {loaded.config.target}, expected one for {target}"
            )
        return cls(loaded, device=device, precision=precision)

    def __call__(
        self,
        case: Case,
        *,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        progress: Progress | None = None,
    ) -> Synthesis:
        """Synthesize the model's target for a case. An acquired image of it is not looked at.

        Args:
            seed: of this case's own generator; the result depends on nothing else that is random.
            steps: denoising steps, by default the model's own recommendation.
            sampler: a name in ``SAMPLERS``, by default the model's own.

        Raises:
            InputError: the case cannot be read, has nothing the model can use, or an unknown
                sampler or number of steps was asked for.
        """
        start = time.perf_counter()
        config = self.model.config
        target, settings = config.target, config.sampling
        sampler, steps = sampler or settings.sampler, steps or settings.steps
        schedule = config.diffusion.build()
        if sampler not in SAMPLERS:
            raise InputError(f"{sampler!r} is not a sampler, expected one of {', '.join(SAMPLERS)}")
        if not 1 <= steps <= schedule.steps:
            raise InputError(f"steps is {steps}, expected 1 to {schedule.steps}")
        absent = self._absent(case)
        sources = [m for m in others(target) if m in case.images]
        volumes = read_volumes(case, sources)
        normalization = NORMALIZATIONS[config.images.normalization]
        prepared = prepare(
            volumes,
            normalization,
            multiple=2 * config.network.divisor,
            spacing_mm=config.images.spacing_mm,
        )
        cond = condition(
            {m: image[None, None].to(self.device) for m, image in prepared.images.items()}, target
        )
        denoise = clamped(partial(self._denoise, cond=cond), normalization.low, normalization.high)
        draw = noise_stream((1, 8, *cond.shape[2:]), seed, self.device)
        chain = sample(
            denoise,
            draw(),
            schedule,
            draw=draw,
            step=SAMPLERS[sampler],
            times=schedule.timesteps(steps),
        )
        for done, x_s in enumerate(chain, start=1):
            x_0 = x_s
            if progress:
                progress(done, steps)
        scale = self.model.prior.predict(prepared.scales)
        voxels = prepared.restore(decode(x_0)[0, 0], scale)
        if all(volume.voxels.min() >= 0 for volume in volumes.values()):
            voxels = voxels.clip(min=0)
        provenance = Provenance(
            cwdm=__version__,
            torch=torch.__version__,
            case=case.id,
            target=target,
            inputs={m: Source(name=v.path.name, sha256=sha256(v.path)) for m, v in volumes.items()},
            absent=absent,
            model=Source(name=config.name, sha256=self.model.sha256),
            seed=seed,
            sampler=sampler,
            steps=steps,
            precision="bf16" if self.bf16 else "fp32",
            device=str(self.device),
            normalization=config.images.normalization,
            scales=prepared.scales,
            target_scale=scale,
            seconds=round(time.perf_counter() - start, 3),
            warnings=warnings_for(target, absent),
        )
        return Synthesis(replace(volumes[sources[0]], voxels=voxels), provenance, case)

    def _absent(self, case: Case) -> tuple[Modality, ...]:
        """Conditioning modalities the case lacks; InputError if the model cannot do without."""
        needed = others(self.model.config.target)
        absent = tuple(m for m in needed if m not in case.images)
        if len(absent) == len(needed):
            raise InputError(
                f"case {case.id}: nothing to synthesize {self.model.config.target} from, "
                f"expected at least one of {', '.join(needed)}"
            )
        if absent and self.model.config.training.drop_conditions == 0:
            raise InputError(
                f"case {case.id}: has no {', '.join(absent)}, which model "
                f"{self.model.config.name} needs"
            )
        return absent

    def _denoise(self, x_t: Tensor, t: int, *, cond: Tensor) -> Tensor:
        times = torch.full((len(x_t),), t, device=x_t.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            estimate: Tensor = self.denoiser(x_t, times, cond)
        return estimate.float()


def output_paths(
    case: Case, target: Modality, folder: Path | str, *, overwrite: bool = False
) -> tuple[Path, Path]:
    """Where the image and its sidecar go.

    Raises:
        InputError: as ``check_target``; or the image would replace an acquired one of the case.
    """
    stem = Path(folder) / f"{case.id}-{target}"
    image, sidecar = Path(f"{stem}.nii.gz"), Path(f"{stem}.json")
    for acquired in case.images.values():
        if image.exists() and image.samefile(acquired) and not is_synthetic(image):
            raise InputError(f"{image}: was acquired and is never overwritten")
    check_target(image, overwrite)
    check_target(sidecar, overwrite)
    return image, sidecar


def synthesize(
    case: Case | Path | str,
    missing: Modality | str,
    *,
    model: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    sampler: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Synthesis:
    """Synthesize one modality of one case.

    Args:
        case: a case or its folder.
        missing: the modality to synthesize, by any of its names.
        model: a model file, by default the one that ships for this modality.
        seed, steps, sampler, device, precision: see ``Synthesizer``.

    Raises:
        InputError: whatever is wrong with the case, the names or the model.

    Example:
        >>> cwdm.synthesize("BraTS-GLI-00000-000", "t2f").write(Path("out"))  # doctest: +SKIP
    """
    loaded = Synthesizer.load(parse_modality(missing), model, device=device, precision=precision)
    case = case if isinstance(case, Case) else read_case(Path(case))
    return loaded(case, seed=seed, steps=steps, sampler=sampler)


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU if there is one; InputError if the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: found {torch.cuda.device_count()} CUDA devices")
    return device


def choose_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` takes bfloat16 where the hardware multiplies matrices in it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # since torch 2.9; before, bfloat16 has to be asked for
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))
