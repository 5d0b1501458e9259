"""A model on a device: runs its chain from a start to an image.

What synthesis and generation share. It knows tensors, not cases.
"""

import math
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cwdm.config import Config, Sampling
from cwdm.denoiser import Denoiser
from cwdm.errors import InputError
from cwdm.fast import FastUNet, Replayed, accelerated
from cwdm.intensity import NORMALIZATIONS
from cwdm.machine import Precision, choose_bf16, choose_device, gigabytes, give_back, resident
from cwdm.memory import Footprint, footprint
from cwdm.model import Model, build_denoiser
from cwdm.passes import Passes, Way
from cwdm.sampling import SAMPLERS, Draw, ddim
from cwdm.streamed import StreamedUNet
from cwdm.unet import UNet

__all__ = [
    "LONG",
    "TURN",
    "Chain",
    "Engine",
    "Progress",
]

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

LONG = 20
"""Steps from which on compiling pays."""

_LIBRARIES = 48 * 2**20
"""Bytes on a processor that libraries take when they first compute, for kernels and threads, and
that the C library keeps of what was freed."""

TURN = threading.Lock()
"""One network at a time computes in a process; other threads read and write meanwhile."""


class Chain(NamedTuple):
    """One that was run."""

    image: Tensor
    """(B, 1, X, Y, Z) in network units, within the model's range."""
    way: Way
    """How what lies between convolutions was computed."""


class Engine:
    """A model, loaded once, that runs chains.

    Args:
        model: its network is used up; that of `self.model` is the one that runs.
        compiled: on a processor that computes in bfloat16, compile what lies between convolutions
            (see `passes`); by default for chains of `LONG` steps or more.
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
        self._ways = (False, True) if limited else (self.streamed,)
        self._spare = deepcopy(model.denoiser) if limited else None
        self._footprints: dict[tuple[object, ...], Footprint] = {}
        self.model = replace(model, denoiser=self._installed(model.denoiser))

    def _installed(self, denoiser: Denoiser) -> Denoiser:
        if not self.reference:
            denoiser = accelerated(denoiser, self.passes, bf16=self.bf16, streamed=self.streamed)
        self.denoiser = denoiser.to(self.device)
        if self.device.type == "cuda" and isinstance(self.denoiser.backbone, FastUNet):
            self.denoiser.backbone = Replayed(self.denoiser.backbone)
        return self.denoiser

    @property
    def arithmetic(self) -> torch.dtype:
        """In which convolutions are computed."""
        network = self.denoiser.backbone
        if isinstance(network, StreamedUNet):
            return network.arithmetic
        return torch.bfloat16 if self.bf16 else torch.float32

    def fit(self, size: Sequence[int]) -> None:
        """Keep to the limit of memory with images of so many voxels.

        On a GPU the network works a few planes at a time where whole features take more; on a
        processor it always does.

        Raises:
            InputError: even that takes more.
        """
        with TURN:
            self._fit(size)

    def _fit(self, size: Sequence[int]) -> None:
        limit = self.memory_limit
        if limit is None:
            return
        needed, half = [], [limit]
        for streamed in self._ways:
            needed.append(self.peak(size, streamed=streamed))
            if needed[-1] <= limit:
                self._install(streamed)
                return
        if not self.bf16 and not self.reference:
            half = [self.peak(size, bf16=True, streamed=streamed) for streamed in self._ways]
        least = min(needed)
        better = (
            "--precision bf16" if min(half) < limit else f"a limit of {gigabytes(least * 21 // 20)}"
        )
        raise InputError(
            f"{self.model.config.name}: {'x'.join(map(str, size))} voxels take about "
            f"{gigabytes(least)}, found a limit of {gigabytes(limit)}, expected {better}"
        )

    def _install(self, streamed: bool) -> None:
        """The network that works so, if it is another."""
        if streamed == self.streamed or self._spare is None:
            return
        self.streamed = streamed
        self.model = replace(self.model, denoiser=self._installed(deepcopy(self._spare)))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, settings: Sampling) -> list[int]:
        """The times of a chain, falling; what lies between convolutions is computed from now on as
        suits so many."""
        times = self.model.config.process.timesteps(settings.steps, settings.spacing)
        if settings.sampler == "one-step":
            times = [times[0], 0]
        wanted = len(times) > LONG if self.compiled is None else self.compiled
        self.passes.choose(compiled=wanted and self.arithmetic is torch.bfloat16)
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

    def footprint(
        self, size: Sequence[int], *, bf16: bool | None = None, streamed: bool | None = None
    ) -> Footprint:
        """What a chain takes for one image of so many voxels along X, Y, Z.

        Args:
            bf16: in that precision, instead of the one that it runs in.
            streamed: a few planes at a time or not, instead of as it runs now.
        """
        config = self.model.config
        transform = config.transform
        half = self.bf16 if bf16 is None else bf16
        by_planes = self.streamed if streamed is None else streamed

        def build() -> nn.Module:
            plain = build_denoiser(config)
            if self.reference:
                return plain.backbone
            outline = self.passes.outline()
            return accelerated(plain, outline, bf16=half, streamed=by_planes).backbone

        key = (*size, half, by_planes)
        if key not in self._footprints:
            shape = (1, config.in_channels, *(n // transform.factor for n in size))
            self._footprints[key] = footprint(
                build, shape, channels=transform.channels, device=self.device
            )
        return self._footprints[key]

    def peak(
        self, size: Sequence[int], *, bf16: bool | None = None, streamed: bool | None = None
    ) -> int:
        """About how many bytes this process, or the GPU, will hold at most during such a chain, if
        it holds what it does now besides; as `footprint`."""
        by_planes = self.streamed if streamed is None else streamed
        needed = self.footprint(size, bf16=bf16, streamed=by_planes)
        if self.device.type == "cuda":
            held = torch.cuda.memory_allocated(self.device)
            if self.streamable and not by_planes:
                held += self._recorded(size)
        else:
            give_back()
            held = resident("VmRSS") + _LIBRARIES
        network = self.denoiser.backbone  # whatever it keeps it uses again, or lets go
        again = network.kept if isinstance(network, StreamedUNet | Replayed) else 0
        return held - again + needed.network + needed.sampler

    def _recorded(self, size: Sequence[int]) -> int:
        """Bytes that `fast.Replayed` reads and writes."""
        config = self.model.config
        voxels = math.prod(n // config.transform.factor for n in size)
        return 4 * (config.in_channels + config.transform.channels) * voxels

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
    ) -> Chain:
        """One chain.

        Args:
            draw: N(0, 1) noise (B, channels, X', Y', Z') on this device, a new one at each call.
            cond: coefficients of the conditioning images, if the model takes them.
            label: number of the target, if the model has several.
            told: tell the network this time instead of the true one.

        Raises:
            InputError: as `fit`.
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
    ) -> Chain:
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

        noise = draw()
        self._fit([n * config.transform.factor for n in noise.shape[2:]])
        times = self.prepare(settings)
        chain = SAMPLERS[settings.sampler]
        if settings.sampler == "ddim":
            chain = partial(ddim, eta=settings.eta)
        x = self.denoiser.start(noise, cond)
        del noise
        for done, x_s in enumerate(chain(denoise, x, config.process, times, draw), start=1):
            x = x_s
            if progress:
                progress(done, len(times) - 1)
        by_torch = self.streamed and self.device.type != "cpu"  # kernels are for whole images
        way: Way = "torch" if by_torch else self.passes.way
        return Chain(config.transform.decode(x).clamp(low, high), way)
