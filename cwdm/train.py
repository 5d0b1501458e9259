"""Training: the published loss on blocks of cases, step by step, on any number of processes.

What step n does depends on (seed, n), the weights and the optimizer only: a resumed run equals an
uninterrupted one, and several processes with one batch between them equal one.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import DataLoader

from cwdm.checkpoints import read_weights
from cwdm.config import Config, Training
from cwdm.dataset import Key, Lanes, Sample, Source, TrainingData, inputs
from cwdm.denoiser import Denoiser
from cwdm.errors import InputError
from cwdm.intensity import NORMALIZATIONS, ScalePrior
from cwdm.losses import band_loss, structure_loss
from cwdm.machine import choose_bf16, choose_device
from cwdm.memory import footprint
from cwdm.modality import Modality
from cwdm.model import CHECKPOINT_SUFFIXES, build_denoiser, load_model, save_model
from cwdm.run import BEST, CONFIG, DATA, MODEL, STEPS, VALIDATION, Checkpoint, RunFolder
from cwdm.unet import ResBlock
from cwdm.validation import HeldOut, Validation

__all__ = ["Precision", "TrainStep", "launched", "needed", "train"]

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_SIMULATED = 8
"""Simulated cases that the scale priors are learnt from where there are no others."""
_LARGE_BRAIN = (160, 192, 160)
"""Voxels of 1 mm, rounded up to what most networks can halve."""
_SKIPS = 20
"""Half precision overflows at times; so often in a row only what diverges does."""
_PATIENCE = timedelta(hours=6)
"""How long processes wait for one that validates or prepares data."""


class TrainStep(NamedTuple):
    """What one step did."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    """What was minimized: the weighted mean over bands."""
    loss_per_band: Tensor
    """(channels,) mean squared error of each band."""
    seconds: float
    validation: Mapping[str, Any] | None = None
    """Its record, after a step that was followed by a validation."""


def train(
    config: Config,
    sources: Sequence[Source],
    run_dir: Path,
    *,
    held_out: HeldOut | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    compiled: bool = False,
    init: Path | None = None,
    overfit: int = 0,
    workers: int = 1,
    tracker: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[TrainStep]:
    """Train, yielding after every step; goes on where ``run_dir`` holds an unfinished run.

    Started by ``accelerate launch`` or ``torchrun`` it is one of several processes, which share
    each batch out among them.

    Args:
        held_out: cases to validate on every ``training.validate_every`` steps.
        precision: of the network; weights, loss and optimizer stay float32.
        compiled: compile the network with torch.compile first.
        init: start from the weights of this model instead of random ones.
        overfit: learn one block of this many cases by heart, see ``TrainingData``.
        workers: processes that make samples ahead of time; 0 makes them here.
        tracker: "tensorboard", "wandb", "mlflow" or whatever else accelerate knows.
        stop: asked after every step; the run then saves itself and ends.

    Raises:
        InputError: ``run_dir`` is in use, or holds a run of another configuration or on other
            data; the cases cannot be used; the disk is full.
    """
    if config.conditioning == "inpainting":
        raise InputError(
            f"{config.name}: cwdm cannot train an inpainting model, expected conditioning = "
            "'others', 'any' or 'none'"
        )
    place = choose_device(device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    launched(device)  # first, as it knows how long to wait
    accelerator = Accelerator(
        cpu=place.type == "cpu",
        mixed_precision="no",  # ``precision`` says, not the configuration of accelerate
        dynamo_backend="no",
        log_with=tracker,
        project_dir=run_dir,
    )
    if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise InputError(f"accelerate is set up for {kind}, expected plain data parallelism")
    if tracker and not accelerator.log_with:
        raise InputError(f"{tracker} is not installed, expected it for --tracker {tracker}")
    settings = config.training
    data = TrainingData(sources, config, overfit=overfit)
    held_out = None if overfit else held_out
    _check_apart(sources, held_out)
    facts, identity = _facts(sources, data), _identity(data)
    lanes = partial(Lanes, config, rank=accelerator.process_index, world=accelerator.num_processes)
    lanes(0)  # complains at once
    state = _State.fresh(
        config,
        accelerator.device,
        _dtype(precision, accelerator.device),
        compiled=compiled,
        ema=0.0 if overfit else settings.ema,  # an average would lag behind
    )
    run = RunFolder(run_dir, main=accelerator.is_main_process)
    try:
        accelerator.wait_for_everyone()
        if (checkpoint := run.latest(config, identity)) is not None:
            state.restore(checkpoint)
        elif init is not None:
            _start_from(init, config, state)
        if _shared(accelerator, state.step) != state.step * accelerator.num_processes:
            raise InputError(f"{run_dir}: differs between processes, expected a shared folder")
        priors = _priors(config, data)
        validation = Validation(
            config,
            data,
            held_out,
            accelerator,
            run_dir / "validation",
            "fp32" if precision == "fp16" else precision,
        )
        if accelerator.is_main_process:
            run.write(CONFIG, config.as_dict())
            run.write(DATA, {**facts, **validation.statistics()})
            run.rewind(state.step)
            for earlier in run.validations():
                state.improved(earlier)
        if tracker:
            accelerator.init_trackers(
                "curves" if tracker == "tensorboard" else config.name,
                init_kwargs={"tensorboard": {"purge_step": state.step + 1}},
            )

        def save() -> None:
            _save_model(config, state, priors, run_dir / MODEL)
            run.save(config, identity, state.checkpoint(), settings.keep)  # last: it is done

        network: nn.Module = accelerator.prepare(state.denoiser)
        if settings.recompute:
            _recompute(state.denoiser)
        if compiled:
            network = torch.compile(network)  # type: ignore[assignment]
        for step, keys, parts in _batches(data, lanes(state.step), settings, workers, place):
            began = time.perf_counter()
            result = _step(config, state, network, accelerator, step, keys, parts)
            result["seconds"] = time.perf_counter() - began
            stopping = bool(_shared(accelerator, stop()))
            last = state.step == settings.iterations
            if accelerator.is_main_process:
                run.append(STEPS, {"step": state.step, **result})
                if state.step % settings.checkpoint_every == 0 or last or stopping:
                    save()
            record: Mapping[str, Any] | None = None
            due = state.step % validation.every == 0 or (last and validation.due_at_the_end)
            if due and not stopping:
                record = validation(state.step, state.denoiser, state.smooth, priors)
                if accelerator.is_main_process:
                    run.append(VALIDATION, record)
                    if state.improved(record):
                        _save_model(config, state, priors, run_dir / BEST)
                stopping = bool(_shared(accelerator, validation.knows_by_heart(record)))
                if stopping and accelerator.is_main_process:
                    save()
            if tracker:
                accelerator.log(_curves(result, record), step=state.step)
            bands = torch.tensor(result["bands"])
            yield TrainStep(state.step, result["loss"], bands, result["seconds"], record)
            if stopping:
                break
    finally:
        if tracker:
            accelerator.end_training()
        run.close()


def trainable(
    denoiser: Denoiser, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> Denoiser:
    """On a device, its weights in the order in memory that makes a step quickest there.

    Channels last suits convolutions in half precision, but not torch's own group normalization on
    a GPU, which compiling replaces.
    """
    last = dtype is not torch.float32 and (compiled or device.type == "cpu")
    order = torch.channels_last_3d if last else torch.contiguous_format
    return cast(Denoiser, denoiser.to(device, memory_format=order))  # type: ignore[call-overload]


def launched(device: str) -> PartialState:
    """This process among those that were started together; it is one where there are no others."""
    return PartialState(cpu=choose_device(device).type == "cpu", timeout=_PATIENCE)


def needed(
    config: Config, precision: Precision, device: str
) -> tuple[int, int, tuple[int, int, int]]:
    """(parameters, bytes that a step takes on one process, voxels of a training image).

    Where neither a patch nor a size is set, an image is that of a large brain.
    """
    place = choose_device(device)
    settings, factor = config.training, config.transform.factor
    size = settings.patch or config.images.size or _LARGE_BRAIN

    def build() -> nn.Module:
        network = build_denoiser(config).backbone
        if settings.recompute:
            _recompute(network)
        return network

    world = int(os.environ.get("WORLD_SIZE", "1"))
    parts = max(1, settings.batch // (settings.accumulation * world))
    shape = (parts, config.in_channels, *(n // factor for n in size))
    found = footprint(
        build,
        shape,
        channels=config.transform.channels,
        bf16=_dtype(precision, place) is not torch.float32,
        training=True,
        device=place,
    )
    parameters = sum(parameter.numel() for parameter in build().parameters())
    return parameters, found.total, size


@dataclass(eq=False)
class _State:
    """What a checkpoint holds."""

    denoiser: Denoiser
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    step: int = 0
    best: float = field(default=-math.inf)
    """Of the validations so far."""
    skipped: int = 0
    """Steps since the last one with a finite gradient."""

    @classmethod
    def fresh(
        cls,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compiled: bool,
        ema: float,
    ) -> "_State":
        torch.manual_seed(config.training.seed)
        denoiser = trainable(build_denoiser(config), device, dtype, compiled=compiled)
        average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(ema)).eval()
        rate = config.training.learning_rate
        optimizer = torch.optim.AdamW(denoiser.parameters(), rate, weight_decay=0.0, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        return cls(denoiser, average, optimizer, scaler, dtype)

    @property
    def smooth(self) -> Denoiser:
        """With the average weights."""
        return cast(Denoiser, self.average.module)

    def checkpoint(self) -> Checkpoint:
        tensors = {f"network.{k}": v for k, v in self.denoiser.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        notes = {"scaler": self.scaler.state_dict()}
        return Checkpoint(self.step, tensors, notes)

    def restore(self, checkpoint: Checkpoint) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in checkpoint.tensors.items()
                if name.startswith(prefix)
            }

        self.denoiser.load_state_dict(part("network."))
        self.average.load_state_dict(part("average."))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if self.scaler.is_enabled() and checkpoint.notes["scaler"]:
            self.scaler.load_state_dict(checkpoint.notes["scaler"])
        self.step = checkpoint.step

    def improved(self, record: Mapping[str, Any]) -> bool:
        """Whether a validation is the best so far: by PSNR, or by the error where there is none."""
        scores = [score["psnr"] for score in record["scores"]]
        errors = record["held_out"] or record["fitted"]
        value = float(np.mean(scores)) if scores else -float(np.mean(errors))
        better = value > self.best  # false for what is not a number
        if better:
            self.best = value
        return better


def _step(
    config: Config,
    state: _State,
    network: nn.Module,
    accelerator: Accelerator,
    step: int,
    keys: Sequence[Sequence[Key]],
    parts: Sequence[Sample],
) -> dict[str, Any]:
    """One step of the optimizer; returns its record, the same on every process."""
    settings, device = config.training, accelerator.device
    torch.manual_seed(_seed(settings.seed, step, accelerator.process_index, 2))  # for dropout
    weights = torch.tensor(settings.band_weights, device=device)
    rate = _learning_rate(step, settings)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    bands, times, losses = [], [], []
    for i, (part_keys, part) in enumerate(zip(keys, parts, strict=True)):
        draws = [
            torch.Generator(device).manual_seed(_seed(settings.seed, *key, 1)) for key in part_keys
        ]
        last = i == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(network):
            loss, errors, t = _losses(config, state, network, part, draws, weights)
            state.scaler.scale(loss / len(parts)).backward()
        bands.append(errors)
        times.append(t)
        losses.append(loss.detach())
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.denoiser.parameters(), settings.clip or math.inf)
    if torch.isfinite(norm):
        state.scaler.step(state.optimizer)
        state.skipped = 0
    else:
        state.skipped += 1
        if state.skipped == _SKIPS:
            raise InputError(
                f"the gradient is not finite in {_SKIPS} steps up to {step + 1}, expected a lower "
                "training.learning_rate or --precision fp32"
            )
    state.scaler.update()
    state.average.update_parameters(state.denoiser)
    state.step = step + 1
    every_band = accelerator.gather(torch.cat(bands))
    mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
    return {
        "loss": float(mean),
        "bands": every_band.mean(dim=0).tolist(),
        "times": accelerator.gather(torch.cat(times)).tolist(),
        "errors": every_band.mean(dim=1).tolist(),
        "rate": rate,
        "norm": float(norm) if torch.isfinite(norm) else None,
    }


def _losses(
    config: Config,
    state: _State,
    network: nn.Module,
    samples: Sample,
    draws: Sequence[torch.Generator],
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimized, the error of each band (B, channels), and the times (B,)."""
    settings, process, denoiser = config.training, config.process, state.denoiser
    device = weights.device
    target_image, cond, label = inputs(config, samples, device)
    x_0 = config.transform.encode(target_image)
    t = torch.tensor([_draw_time(config, draw) for draw in draws], device=device)
    shape = x_0.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=draw, device=device) for draw in draws])
    start = denoiser.start(noise, cond)
    x_t = process.mix(x_0, start, noise, t)
    with torch.autocast(device.type, state.dtype, enabled=state.dtype is not torch.float32):
        output = network(x_t, t, cond, label)
    errors = band_loss(output, denoiser.goal(x_0, start, cond))
    loss = (errors * weights).mean()
    if settings.structure_weight:
        low = NORMALIZATIONS[config.images.normalization].background
        image = config.transform.decode(denoiser.x_0(output.float(), x_t, t, cond))
        loss = loss + settings.structure_weight * structure_loss(image, target_image, low)
    return loss, errors.detach(), t


def _draw_time(config: Config, draw: torch.Generator) -> int:
    """In 1..T: T with probability ``noise_share``, else one of the times to train on."""
    times = config.process.timesteps(config.training.timesteps)[:-1]
    index = int(torch.randint(len(times), (1,), generator=draw, device=draw.device))
    pure = float(torch.rand((), generator=draw, device=draw.device)) < config.training.noise_share
    return times[0 if pure else index]


def _learning_rate(step: int, settings: Training) -> float:
    """Linear warm-up, then constant or half a cosine down to zero."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.iterations))
    return rate


def _seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of the network's arithmetic."""
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if choose_bf16(precision, device) else torch.float32


def _shared(accelerator: Accelerator, value: float) -> float:
    """The sum over all processes."""
    return float(accelerator.reduce(torch.tensor(float(value), device=accelerator.device), "sum"))


def _batches(
    data: TrainingData, lanes: Lanes, settings: Training, workers: int, device: torch.device
) -> Iterator[tuple[int, list[list[Key]], list[Sample]]]:
    """(step, keys of each part, its samples), made ahead in other processes."""
    # what simulates on a GPU needs processes of its own there, which cannot be forked
    method = "spawn" if data.endless and device.type == "cuda" else "fork"
    loader = DataLoader(
        data,
        batch_sampler=lanes,
        num_workers=workers,
        multiprocessing_context=method if workers else None,
        worker_init_fn=_deaf,
    )
    samples = iter(loader)
    keys = iter(lanes)
    for step in lanes.steps:
        yield (
            step,
            [next(keys) for _ in range(settings.accumulation)],
            [next(samples) for _ in range(settings.accumulation)],
        )


def _deaf(worker: int) -> None:
    """A signal to all processes of a job is for the one that can save; the others end with it."""
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _recompute(network: nn.Module) -> None:
    """Keep only what enters each residual block (Chen et al. 2016, arXiv 1604.06174)."""
    for module in network.modules():
        if isinstance(module, ResBlock):
            module.forward = partial(recomputed, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def _priors(config: Config, data: TrainingData) -> dict[Modality, ScalePrior]:
    """What predicts the scale of each target; learnt from acquired images if there are any."""
    cases = data.cases or data.simulated(_SIMULATED)
    scales = [case.scales[config.images.normalization] for case in cases]
    priors = {}
    for target in config.targets:
        known = [each for each in scales if target in each]
        if not known:
            raise InputError(f"training needs cases with {target}, found none")
        priors[target] = ScalePrior.learn(target, known)
    return priors


def _facts(sources: Sequence[Source], data: TrainingData) -> dict[str, Any]:
    """What the run is trained on, for people."""
    return {
        "sources": [
            {
                "name": given.name,
                "cases": len(used.cases) if isinstance(used.cases, Sequence) else None,
                "weight": given.weight,
            }
            for given, used in zip(sources, data.sources, strict=True)
        ],
        "cases": len(data.cases),
        "ids": sorted(case.id for case in data.cases),
        "overfit": bool(data.overfit),
    }


def _identity(data: TrainingData) -> dict[str, Any]:
    """What has to be the same when the run goes on, wherever the files are then."""
    ids = [
        sorted(case.id for case in cases) if isinstance(cases, Sequence) else "simulated"
        for _, cases, _ in data.sources
    ]
    return {"ids": ids, "shares": list(data.shares), "overfit": data.overfit}


def _check_apart(sources: Sequence[Source], held_out: HeldOut | None) -> None:
    """InputError if a case is trained on and held out."""
    if held_out is None:
        return
    finite = [cases for _, cases, _ in sources if isinstance(cases, Sequence)]
    seen = {case.id for cases in finite for case in cases}
    seen &= {case.id for case in held_out.cases} | {case.id for case in held_out.prepared}
    if seen:
        raise InputError(
            f"case {min(seen)} is among the training and the held-out cases, expected other ones"
        )


def _start_from(path: Path, config: Config, state: _State) -> None:
    """Take over the weights of a model of the same network, whatever its target."""
    foreign = path.suffix in CHECKPOINT_SUFFIXES
    weights = read_weights(path) if foreign else load_model(path).denoiser.backbone.state_dict()
    try:
        state.denoiser.backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: has another network than {config.name}, expected the same"
        ) from error


def _save_model(
    config: Config, state: _State, priors: Mapping[Modality, ScalePrior], path: Path
) -> None:
    """The average weights, in half precision."""
    weights = state.smooth.backbone.state_dict()
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_model(config, half, priors, path, overwrite=True)


def _curves(result: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, float]:
    """What a tracker plots."""
    names = ("loss", "rate", "norm", "seconds")
    curves = {f"train/{name}": result[name] for name in names if result[name] is not None}
    curves |= {f"train/band {i}": value for i, value in enumerate(result["bands"])}
    if record is None:
        return curves
    for name in ("held_out", "fitted", "raw", "trivial"):
        for t, value in zip(record["times"], record[name] or (), strict=False):
            curves[f"{name}/t={t}"] = value
    for score in record["scores"]:
        for figure in ("psnr", "ssim", "mae"):
            curves[f"{figure}/{score['case']} {score['modality']}"] = score[figure]
    return curves
