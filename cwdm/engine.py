"""A model on a device: runs its chain from a start to an image.

What synthesis and generation share. It knows tensors, not cases.
"""

import resource
import sys
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cwdm.config import Config, Sampling
from cwdm.denoiser import Denoiser
from cwdm.errors import InputError
from cwdm.fast import FastUNet, Replayed, accelerated
from cwdm.intensity import NORMALIZATIONS
from cwdm.memory import Footprint, footprint
from cwdm.model import Model, build_denoiser
from cwdm.passes import Passes, Way
from cwdm.sampling import SAMPLERS, Draw, ddim
from cwdm.unet import UNet

__all__ = [
    "LONG",
    "TURN",
    "Engine",
    "Precision",
    "Progress",
    "choose_bf16",
    "choose_device",
    "gigabytes",
    "resident",
]

Precision = Literal["auto", "fp32", "bf16"]
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

LONG = 20
"""Steps from which on compiling pays."""

_LIBRARIES = 96 * 2**20
"""Bytes that libraries take on a processor when they first compute, for kernels and threads."""

TURN = threading.RLock()
"""One network at a time computes in a process; other threads read and write meanwhile."""


class Engine:
    """A model, loaded once, that runs chains.

    Args:
        model: its network is used up; that of `self.model` is the one that runs.
        compiled: on a processor, compile what lies between convolutions (see `passes`); by default
            for chains of `LONG` steps or more.
        reference: compute the network plainly, as published, in float32: to compare with.
        memory_limit: bytes that a chain may take, see `fit`.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        compiled: bool | None = None,
        reference: bool = False,
        memory_limit: int | None = None,
    ):
        self.reference, self.memory_limit = reference, memory_limit
        self.device = choose_device(device)
        self.bf16 = not reference and choose_bf16(precision, self.device)
        self.passes = Passes(self.device)
        self.compiled = compiled
        self.streamable = isinstance(model.denoiser.backbone, UNet) and not reference
        self.streamed = self.streamable and self.device.type == "cpu"
        limited = memory_limit is not None and self.streamable and not self.streamed
        self._spare = deepcopy(model.denoiser) if limited else None
        self.model = replace(model, denoiser=self._installed(model.denoiser))
        self._held = sys.maxsize

    def _installed(self, denoiser: Denoiser) -> Denoiser:
        if not self.reference:
            denoiser = accelerated(denoiser, self.passes, bf16=self.bf16, streamed=self.streamed)
        self.denoiser = denoiser.to(self.device)
        if self.device.type == "cuda" and isinstance(self.denoiser.backbone, FastUNet):
            self.denoiser.backbone = Replayed(self.denoiser.backbone)
        return self.denoiser

    @property
    def way(self) -> Way:
        """How what lies between convolutions is computed."""
        by_torch = self.streamed and self.device.type != "cpu"
        return "torch" if by_torch else self.passes.way

    def fit(self, size: Sequence[int]) -> None:
        """Keep to the limit of memory with images of so many voxels.

        On a GPU a network whose features would take more works a few planes at a time from now
        on; on a processor it always does.

        Raises:
            InputError: even that takes more.
        """
        limit = self.memory_limit
        if limit is None:
            return
        with TURN:
            if self.peak(size) > limit and self._spare is not None:
                spare, self._spare, self.streamed = self._spare, None, True
                self.model = replace(self.model, denoiser=self._installed(spare))
                self._held = sys.maxsize  # what it held with the other
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            if (needed := self.peak(size)) <= limit:
                return
        half = limit if self.bf16 or self.reference else self.peak(size, bf16=True)
        better = (
            "--precision bf16" if half < limit else f"a limit of {gigabytes(needed * 21 // 20)}"
        )
        raise InputError(
            f"{self.model.config.name}: {'x'.join(map(str, size))} voxels take about "
            f"{gigabytes(needed)}, found a limit of {gigabytes(limit)}, expected {better}"
        )

    def prepare(self, settings: Sampling) -> list[int]:
        """The times of a chain, falling; what lies between convolutions is computed from now on as
        suits so many."""
        times = self.model.config.process.timesteps(settings.steps, settings.spacing)
        if settings.sampler == "one-step":
            times = [times[0], 0]
        wanted = len(times) > LONG if self.compiled is None else self.compiled
        self.passes.choose(compiled=wanted and self.bf16)
        return times

    def settings(
        self, sampler: str | None = None, steps: int | tuple[int, ...] | None = None
    ) -> Sampling:
        """How the model samples, with what the user wants otherwise.

        Raises:
            InputError: an unknown sampler, one that the process does not allow, or not so many
                steps.
        """
        config = self.model.config
        wanted = {"sampler": sampler, "steps": steps}
        values = config.as_dict()
        values["sampling"] |= {key: value for key, value in wanted.items() if value is not None}
        return Config.parse(values, f"model {config.name}").sampling

    def footprint(self, size: Sequence[int], *, bf16: bool | None = None) -> Footprint:
        """What a chain takes for one image of so many voxels along X, Y, Z.

        Args:
            bf16: in that precision, instead of the one that it runs in.
        """
        config = self.model.config
        transform = config.transform

        def build() -> nn.Module:
            plain = build_denoiser(config)
            if self.reference:
                return plain.backbone
            half = self.bf16 if bf16 is None else bf16
            outline = self.passes.outline()
            return accelerated(plain, outline, bf16=half, streamed=self.streamed).backbone

        shape = (1, config.in_channels, *(n // transform.factor for n in size))
        return footprint(build, shape, channels=transform.channels, device=self.device)

    def peak(self, size: Sequence[int], *, bf16: bool | None = None) -> int:
        """About how many bytes this process, or the GPU, will hold at most during such a chain;
        as `footprint`.

        What it holds without one is the least that was seen: an earlier chain leaves memory that
        the next uses again.
        """
        on_gpu = self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) if on_gpu else resident("VmRSS")
        self._held = min(self._held, held)
        needed = self.footprint(size, bf16=bf16)
        return self._held + needed.network + needed.sampler + (0 if on_gpu else _LIBRARIES)

    @torch.inference_mode()
    def run(
        self,
        settings: Sampling,
        draw: Draw,
        *,
        cond: Tensor | None = None,
        label: int | None = None,
        told: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """One chain: an image (B, 1, X, Y, Z) in network units, within the model's range.

        Args:
            draw: N(0, 1) noise (B, channels, X', Y', Z') on this device, a new one at each call.
            cond: coefficients of the conditioning images, if the model takes them.
            label: number of the target, if the model has several.
            told: tell the network this time instead of the true one.
        """
        with TURN:
            return self._run(settings, draw, cond, label, told, progress)

    def _run(
        self,
        settings: Sampling,
        draw: Draw,
        cond: Tensor | None,
        label: int | None,
        told: int | None,
        progress: Progress | None,
    ) -> Tensor:
        config = self.model.config
        normalization = NORMALIZATIONS[config.images.normalization]
        low, high = normalization.low, normalization.high

        def denoise(x_t: Tensor, t: int) -> Tensor:
            times = torch.full((len(x_t),), t, device=x_t.device)
            shown = times if told is None else torch.full_like(times, told)
            labels = None if label is None else torch.full_like(times, label)
            output: Tensor = self.denoiser(x_t, shown, cond, labels)
            estimate = self.denoiser.x_0(output, x_t, times, cond)
            return config.transform.clamp(estimate, low, high) if settings.clamp else estimate

        times = self.prepare(settings)
        chain = SAMPLERS[settings.sampler]
        if settings.sampler == "ddim":
            chain = partial(ddim, eta=settings.eta)
        x = self.denoiser.start(draw(), cond)
        for done, x_s in enumerate(chain(denoise, x, config.process, times, draw), start=1):
            x = x_s
            if progress:
                progress(done, len(times) - 1)
        return config.transform.decode(x).clamp(low, high)


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU if there is one; InputError if the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: found {torch.cuda.device_count()} CUDA devices")
    return device


def choose_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` takes bfloat16 where the hardware multiplies in it faster than in float32.

    AVX512-BF16 does so on AMD's processors. On Intel's it has half the units of float32 and twice
    the numbers in each, and convolutions are slower: there it has to be AMX.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # since torch 2.9; before, bfloat16 has to be asked for
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if about.get("amx_bf16"):
        return True
    return bool(about.get("avx512_bf16")) and "Intel" not in about.get("cpu_name", "")


def gigabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.{2 if size < 1e9 else 1 if size < 1e10 else 0}f} GB"


def resident(figure: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM).

    On Linux, getrusage also counts what the process was started from. Elsewhere there is nothing
    but getrusage, and it only knows the most so far.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    values = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(values[figure].split()[0]) * 1024
