"""Train `cwdm.segnet`, the network that segments gliomas from whichever sequences there are.

    python examples/train_segmenter.py --data TRAIN --simulated 20 --val VAL --hours 1 \
        --output segment-any.safetensors

All cases are kept in memory, about 30 MB each. The output is written every few minutes, so that
training can be stopped at any time.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle
from math import cos, inf, pi
from pathlib import Path
from typing import cast, get_args

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from cwdm.anatomy import find_label_maps, from_labels, mni152
from cwdm.errors import InputError
from cwdm.files import check_target
from cwdm.layouts import find
from cwdm.machine import Precision, choose_bf16, choose_device
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import Box, majority
from cwdm.segmentation import Labels, case_labels
from cwdm.segnet import (
    REGIONS,
    SegNet,
    SegNetConfig,
    labels_of,
    normalize,
    region_loss,
    regions_of,
    save,
    segment,
)
from cwdm.simulate import SHAPE, simulate
from cwdm.volume import brain_mask, read_volumes

TUMOR = 0.6
"""Share of the patches that are centered in the tumor; the others anywhere in the brain."""
SIMULATED = 0.25
"""Share of the patches that come from simulated cases."""
COMPLETE = 0.3
"""Share of the patches that keep all sequences; the others a subset, each as likely."""
DISTORTED = 0.5
"""Probability of each distortion of each sequence."""
RATE, WARM_UP, DECAY = 1e-3, 100, 1e-4
EMA = 0.998
"""Of the average that is written, about the last 500 steps."""
CENTERS = 4096
CHECKPOINT_S = 300


@dataclass(frozen=True, eq=False)
class Example:
    """A case to learn from, cut to its brain."""

    images: Tensor
    """(4, X, Y, Z) float16, see `segnet.normalize`."""
    labels: Tensor
    """(X, Y, Z) uint8."""
    tumor: NDArray[np.integer]
    brain: NDArray[np.integer]
    """(N, 3) some voxels of each."""

    @classmethod
    def of(
        cls,
        images: Mapping[Modality, NDArray[np.generic]],
        labels: NDArray[np.integer],
        brain: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> "Example":
        normalized, box = normalize(images, brain)
        labels, brain = box.crop(labels), box.crop(brain)
        inside = some(brain, rng)
        return cls(
            normalized.half(),
            torch.from_numpy(labels.astype(np.uint8)),
            some(labels > 0, rng) if labels.any() else inside,
            inside,
        )


def some(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.integer]:
    """(N, 3) indices of voxels of the mask (X, Y, Z)."""
    voxels = np.argwhere(mask)
    return rng.choice(voxels, min(CENTERS, len(voxels)), replace=False).astype(np.int16)


@dataclass(frozen=True, eq=False)
class Labeled:
    """A case with its segmentation, as on disk."""

    id: str
    images: Mapping[Modality, NDArray[np.float32]]
    labels: Labels
    brain: NDArray[np.bool_]


def read(folder: Path) -> list[Labeled]:
    """The cases of a data set that have a segmentation; 4, until 2020 enhancing tumor, becomes 3.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    found = find(folder)
    for problem in found.problems:
        click.echo(f"left out: {problem.message}", err=True)
    read = []
    for case in found.cases:
        kept = [modality for modality in SEQUENCES if modality in case.images]
        if case.segmentation is None or not kept:
            continue
        volumes = read_volumes(case, kept)
        labels = case_labels(case, volumes[kept[0]])
        brain = majority([brain_mask(volume) for volume in volumes.values()])
        images = {modality: volume.voxels for modality, volume in volumes.items()}
        read.append(Labeled(case.id, images, labels, brain))
    if not read:
        raise InputError(f"{folder}: no case has a segmentation, expected <id>-seg.nii.gz")
    return read


def simulated(
    count: int, labels: Path | None, seed: int, spacing: float, rng: np.random.Generator
) -> list[Example]:
    """Cases from label maps in turn, or without from the MNI152 average brain."""
    if not count:
        return []
    maps = find_label_maps(labels)[:count] if labels else []
    anatomies = [from_labels(path) for path in tqdm(maps, "reading label maps")] or [mni152()]
    x, y, z = (round(n / spacing) for n in SHAPE)
    examples = []
    for index, anatomy in zip(tqdm(range(count), "simulating"), cycle(anatomies), strict=False):
        case = simulate(seed, index, anatomy, shape=(x, y, z), spacing=spacing)
        images = {modality: image.numpy() for modality, image in case.images.items()}
        brain = images[Modality.T1N] > 0
        examples.append(Example.of(images, case.segmentation.numpy(), brain, rng))
    return examples


def patch(example: Example, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A block of a case, augmented: images (4, size, size, size) float32, labels of that size."""
    centers = example.tumor if rng.random() < TUMOR else example.brain
    middle = rng.choice(centers) + rng.integers(-size // 8, size // 8 + 1, 3)
    x, y, z = (int(n) - size // 2 for n in middle)
    block = Box((x, y, z), (size, size, size))
    images = np.stack([block.crop(image) for image in example.images.numpy()])
    flips = [axis for axis in (-3, -2, -1) if rng.random() < 0.5]
    labels = torch.from_numpy(block.crop(example.labels.numpy())).flip(flips)
    seen = torch.from_numpy(images.astype(np.float32)).flip(flips)
    brain = (seen != 0).any(0)
    kept = drop([i for i, image in enumerate(example.images) if image.any()], rng)
    for i, image in enumerate(seen):
        seen[i] = distort(image, rng) * brain if i in kept else 0
    return seen, labels


def drop(present: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """The sequences that are kept, at least one."""
    if rng.random() < COMPLETE:
        return tuple(present)
    subsets = [s for n in range(1, len(present) + 1) for s in combinations(present, n)]
    return subsets[rng.integers(len(subsets))]


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """What differs between scanners: contrast, bias field, blur, noise, gain and offset."""
    low, high = image.amin(), image.amax()
    if rng.random() < DISTORTED and high > low:
        image = low + (high - low) * ((image - low) / (high - low)) ** float(rng.uniform(0.7, 1.4))
    if rng.random() < DISTORTED:
        nodes = torch.from_numpy(rng.normal(0, 0.15, (1, 1, 3, 3, 3))).float()
        bias = F.interpolate(nodes, image.shape, mode="trilinear", align_corners=True)[0, 0]
        image = low + (image - low) * bias.exp()
    if rng.random() < DISTORTED / 2:
        image = F.avg_pool3d(image[None, None], 3, stride=1, padding=1)[0, 0]
    if rng.random() < DISTORTED:
        noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 0.2))
        image = image + torch.from_numpy(noise)
    return image * float(np.exp(rng.normal(0, 0.1))) + float(rng.normal(0, 0.1))


def dice(
    net: SegNet,
    case: Labeled,
    precision: Precision = "auto",
    kept: Collection[Modality] = SEQUENCES,
) -> list[float]:
    """Dice of each region, from these sequences alone; 1 where a region is rightly empty."""
    given = {modality: image for modality, image in case.images.items() if modality in kept}
    labels = labels_of(segment(net, given, brain=case.brain, precision=precision))
    found, truth = (regions_of(torch.from_numpy(each)[None]) for each in (labels, case.labels))
    overlap, sizes = (found * truth).sum((0, 2, 3, 4)), (found + truth).sum((0, 2, 3, 4))
    return torch.where(sizes > 0, 2 * overlap / sizes, 1.0).tolist()


def table(net: SegNet, cases: Sequence[Labeled], precision: Precision) -> str:
    """Mean Dice over the cases for each subset of the sequences, in Markdown."""
    lines = [f"| given | {' | '.join(REGIONS)} |", "|---|" + "---:|" * len(REGIONS)]
    scores = []
    for n in range(len(SEQUENCES), 0, -1):
        for kept in combinations(SEQUENCES, n):
            complete = [case for case in cases if set(kept) <= set(case.images)]
            if complete:
                each = [dice(net, case, precision, kept) for case in complete]
                scores.append(np.mean(each, 0))
                figures = " | ".join(f"{score:.3f}" for score in scores[-1])
                lines.append(f"| {' + '.join(kept)} | {figures} |")
    figures = " | ".join(f"**{score:.3f}**" for score in np.mean(scores, 0))
    return "\n".join([*lines, f"| **mean** | {figures} |"])


def train(
    net: SegNet,
    average: AveragedModel,
    draw: Callable[[], tuple[Tensor, Tensor]],
    *,
    steps: int,
    ends: float,
    bf16: bool,
) -> Iterator[float]:
    """Yield the loss of each step; the rate falls to 0 as the steps or the time run out.

    Args:
        average: of the weights, moving along.
        draw: makes images (4, X, Y, Z) and labels (X, Y, Z), a batch of each.
        ends: when to stop, as `time.monotonic` tells it.
    """
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    began = time.monotonic()
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - began) / max(ends - began, 1e-9))
        if done >= 1:
            break
        rate = RATE * min(1, (step + 1) / WARM_UP) * (1 + cos(pi * done)) / 2
        optimizer.param_groups[0]["lr"] = rate
        images, labels = draw()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = net(images.to(device))
        loss = region_loss(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        yield loss.item()


@click.command()
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help="Real cases.")
@click.option("--simulated", "extra", default=0, help="How many cases to simulate in addition.")
@click.option("--labels", type=click.Path(path_type=Path), help="Label maps to simulate from.")
@click.option("--spacing", default=1.0, help="Of simulated cases, mm.")
@click.option("--val", type=click.Path(path_type=Path), help="Cases to measure on, never learned.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help=".safetensors")
@click.option("--steps", default=10_000, show_default=True)
@click.option("--hours", default=inf, help="End after this time, if not all steps are done.")
@click.option("--batch", default=2, show_default=True)
@click.option(
    "--patch",
    "size",
    default=SegNetConfig.window,
    show_default=True,
    help="Voxels along each axis.",
)
@click.option("--filters", default=SegNetConfig.filters, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", type=click.Choice(get_args(Precision)), default="auto")
@click.option("--overwrite", is_flag=True)
def main(
    data: Sequence[Path],
    extra: int,
    labels: Path | None,
    spacing: float,
    val: Path | None,
    output: Path,
    steps: int,
    hours: float,
    batch: int,
    size: int,
    filters: int,
    seed: int,
    device: str,
    precision: Precision,
    overwrite: bool,
) -> None:
    """Train a segmentation network for incomplete cases."""
    ends = time.monotonic() + hours * 3600
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    try:
        check_target(output, overwrite)
        where = choose_device(device)
        net = SegNet(SegNetConfig(filters=filters, window=size)).to(where)
        if size % net.multiple:
            raise InputError(f"--patch {size}: expected a multiple of {net.multiple}")
        held_out = read(val) if val else []
        cases = [case for folder in data for case in read(folder)]
        if known := {case.id for case in cases} & {case.id for case in held_out}:
            raise InputError(f"{val}: holds {min(known)}, which is also in --data")
        real = [Example.of(case.images, case.labels, case.brain, rng) for case in cases]
        del cases
        unreal = simulated(extra, labels, seed, spacing, rng)
        if not (real or unreal):
            raise InputError("no cases, expected --data or --simulated")
    except InputError as error:
        raise click.ClickException(str(error)) from error

    def draw() -> tuple[Tensor, Tensor]:
        patches = []
        for _ in range(batch):
            pool = unreal if not real or (unreal and rng.random() < SIMULATED) else real
            patches.append(patch(pool[rng.integers(len(pool))], size, rng))
        images, labels = zip(*patches, strict=True)
        return torch.stack(images), torch.stack(labels)

    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    smoothed = cast(SegNet, average.module)
    bf16 = choose_bf16(precision, where)
    losses = train(net, average, draw, steps=steps, ends=ends, bf16=bf16)
    recent = deque[float](maxlen=100)
    saved = time.monotonic()
    with tqdm(losses, "training", total=steps) as bar:
        for loss in bar:
            recent.append(loss)
            bar.set_postfix(loss=f"{np.mean(recent):.3f}", refresh=False)
            if time.monotonic() - saved > CHECKPOINT_S:
                save(smoothed, output, overwrite=True)
                scores = [np.round(dice(smoothed, each, precision), 3) for each in held_out]
                bar.write(f"step {bar.n}: loss {np.mean(recent):.3f}, Dice {scores}")
                saved = time.monotonic()
    save(smoothed, output, overwrite=True)
    if held_out:
        print(table(smoothed, held_out, precision))


if __name__ == "__main__":
    main()
