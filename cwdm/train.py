"""Training: the published loss on patches, step by step, resumable at any checkpoint.

What step n does depends on (seed, n), the weights and the optimizer only, so that a resumed run
equals an uninterrupted one.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from cwdm.case import Case
from cwdm.checkpoints import read_weights
from cwdm.conditioning import condition
from cwdm.config import Config, Training
from cwdm.dataset import TrainingBlocks
from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.intensity import NORMALIZATIONS, ScalePrior
from cwdm.losses import band_loss, structure_loss
from cwdm.modality import Modality, others
from cwdm.model import CHECKPOINT_SUFFIXES, build_denoiser, load_model, save_model, to_bytes

__all__ = ["TrainStep", "train"]

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"


class TrainStep(NamedTuple):
    """What one step did."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    """What was minimized: the weighted mean over bands."""
    loss_per_band: Tensor
    """(8,) mean squared error of each band."""
    seconds: float


def train(
    config: Config,
    cases: Sequence[Case],
    run_dir: Path,
    *,
    device: torch.device,
    bf16: bool = False,
    resume: bool = False,
    compiled: bool = False,
    init: Path | None = None,
) -> Iterator[TrainStep]:
    """Train, yielding after every step; writes a checkpoint and the model into ``run_dir``.

    Args:
        bf16: compute the network in bfloat16 (weights, loss and optimizer stay float32).
        resume: continue from the checkpoint in ``run_dir`` if there is one.
        compiled: compile the network with torch.compile first.
        init: start from the weights of this model instead of random ones.

    Raises:
        InputError: ``run_dir`` holds a run and ``resume`` is off, or a run of another
            configuration; or the cases cannot be used.
    """
    if config.conditioning == "inpainting":
        raise InputError(
            f"{config.name}: cwdm cannot train an inpainting model, expected conditioning = "
            "'others' or 'none'"
        )
    settings = config.training
    checkpoint = run_dir / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise InputError(f"{run_dir}: already holds a run, expected a new folder or --resume")
    torch.manual_seed(settings.seed)
    denoiser = build_denoiser(config).to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if init is not None:
        _start_from(init, config, denoiser)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizer = torch.optim.AdamW(denoiser.parameters(), settings.learning_rate, weight_decay=0.0)
    done = _restore(checkpoint, config, denoiser, average, optimizer) if checkpoint.exists() else 0

    times = config.process.timesteps(settings.timesteps)[:-1]
    data = TrainingBlocks(cases, config)
    priors = {target: ScalePrior.learn(target, data.scales) for target in config.targets}
    low = NORMALIZATIONS[config.images.normalization].background
    weights = torch.tensor(settings.band_weights, device=device)
    network: Callable[..., Tensor] = torch.compile(denoiser) if compiled else denoiser
    for step, images in _batches(data, done, settings):
        start_of_step = time.perf_counter()
        generator = torch.Generator().manual_seed(settings.seed * 2**32 + step)
        rate = _learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        by_modality = dict(
            zip(config.modalities, images.to(device).unsqueeze(2).unbind(1), strict=True)
        )
        target, label = _draw_target(config, len(images), generator)
        target_image = by_modality.pop(target)
        x_0 = config.transform.encode(target_image)
        cond = None
        if config.conditioning == "others":
            _drop(by_modality, target, settings.drop_conditions, generator)
            cond = condition(by_modality, target, config.transform)
        t = _draw_times(len(images), times, settings, generator).to(device)
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        start = denoiser.start(noise, cond)
        x_t = config.process.mix(x_0, start, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = network(x_t, t, cond, None if label is None else label.to(device))
        losses = band_loss(output, denoiser.goal(x_0, start, cond))
        loss = (losses * weights).mean()
        if settings.structure_weight:
            image = config.transform.decode(denoiser.x_0(output.float(), x_t, t, cond))
            loss = loss + settings.structure_weight * structure_loss(image, target_image, low)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update_parameters(denoiser)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.iterations:
            averaged = average.module.get_submodule("backbone").state_dict()
            half = {name: tensor.half() for name, tensor in averaged.items()}
            save_model(config, half, priors, run_dir / MODEL, overwrite=True)
            _save(checkpoint, config, denoiser, average, optimizer, step + 1)  # last: it is done
        seconds = time.perf_counter() - start_of_step
        yield TrainStep(step + 1, loss.item(), losses.detach(), seconds)


def _start_from(path: Path, config: Config, denoiser: nn.Module) -> None:
    """Take over the weights of a model of the same network, whatever its target."""
    foreign = path.suffix in CHECKPOINT_SUFFIXES
    weights = read_weights(path) if foreign else load_model(path).denoiser.backbone.state_dict()
    try:
        denoiser.get_submodule("backbone").load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: has another network than {config.name}, expected the same"
        ) from error


def _batches(
    data: TrainingBlocks, first_step: int, settings: Training
) -> Iterator[tuple[int, Tensor]]:
    """(step, images (B, 4, X, Y, Z)) from ``first_step`` on, made ahead in another process."""
    per_block = data.patches_per_block // settings.batch
    if per_block == 0 or data.patches_per_block % settings.batch:
        raise InputError(
            f"training.batch = {settings.batch} does not divide the {data.patches_per_block} "
            "patches of a block (cases_per_block * patches_per_case)"
        )
    blocks = range(first_step // per_block, -(-settings.iterations // per_block))
    loader = DataLoader(
        data, sampler=blocks, batch_size=None, num_workers=1, prefetch_factor=1,
        multiprocessing_context="fork",
    )  # fmt: skip
    for block, patches in zip(blocks, loader, strict=True):
        for i, images in enumerate(patches.split(settings.batch)):
            step = block * per_block + i
            if first_step <= step < settings.iterations:
                yield step, images


def _learning_rate(step: int, settings: Training) -> float:
    """Linear warm-up, then constant or half a cosine down to zero."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.iterations))
    return rate


def _draw_target(
    config: Config, n: int, generator: torch.Generator
) -> tuple[Modality, Tensor | None]:
    """What this step makes and, for a model of several targets, its label (n,)."""
    if len(config.targets) == 1:
        return config.targets[0], None
    index = int(torch.randint(len(config.targets), (1,), generator=generator))
    return config.targets[index], torch.full((n,), index)


def _draw_times(
    n: int, times: Sequence[int], settings: Training, generator: torch.Generator
) -> Tensor:
    """(n,) times in 1..T: T with probability ``noise_share``, else one of ``times``."""
    t = torch.tensor(times)[torch.randint(len(times), (n,), generator=generator)]
    pure = torch.rand(n, generator=generator) < settings.noise_share
    return torch.where(pure, times[0], t)


def _drop(
    images: dict[Modality, Tensor],
    target: Modality,
    probability: float,
    generator: torch.Generator,
) -> None:
    """Take conditioning images away; one always stays."""
    order = torch.randperm(3, generator=generator).tolist()
    chances = torch.rand(2, generator=generator).tolist()
    for index, chance in zip(order, chances, strict=False):
        if chance >= probability:
            break
        del images[others(target)[index]]


def _save(
    path: Path,
    config: Config,
    network: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Everything a run needs to go on, atomically."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
    metadata = {"config": json.dumps(config.as_dict()), "step": str(step)}
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata))


def _restore(
    path: Path,
    config: Config,
    network: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load what ``_save`` wrote; returns the number of steps done."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable checkpoint: {error}") from error
    if not metadata or not {"config", "step"} <= metadata.keys():
        raise InputError(f"{path}: not a checkpoint of cwdm train")
    saved = Config.parse(json.loads(metadata["config"]), str(path)).as_dict()
    if saved != config.as_dict():
        differing = [key for key, value in config.as_dict().items() if saved.get(key) != value]
        raise InputError(f"{path}: of a run with other settings ({', '.join(differing)})")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    network.load_state_dict(part("network."))
    average.load_state_dict(part("average."))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict(
        {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return int(metadata["step"])
