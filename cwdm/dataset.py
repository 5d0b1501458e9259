"""Training samples: a block of a case, augmented, normalized; a target, and what is given for it.

A sample depends on (seed, step, lane) only, where a lane is a place in the batch. So a resumed run
sees what an uninterrupted one would have seen, and several processes see what one would.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torchio as tio
from monai.transforms.intensity.array import AdjustContrast
from monai.transforms.spatial.array import Affine
from monai.utils.type_conversion import convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cwdm.conditioning import condition
from cwdm.config import Augmentation, Config
from cwdm.errors import InputError
from cwdm.intensity import NORMALIZATIONS, NormalizationName, Scale
from cwdm.modality import Modality
from cwdm.preparation import FLIPS, Box, Frame, network_voxels

__all__ = ["Endless", "Key", "Lanes", "Sample", "Source", "TrainingCase", "TrainingData", "inputs"]

Key = tuple[int, int]
"""(step, lane)."""

_OF_SAMPLES = 3
"""Keeps these random numbers apart from those that training and validation draw."""
OVERFIT_PATCH = 32
"""Voxels along each axis, at most, that a run has to learn by heart."""


class TrainingCase(Protocol):
    """What training asks of a case: ``cache.CachedCase``, or one that was just simulated."""

    @property
    def id(self) -> str: ...
    @property
    def images(self) -> Sequence[Modality]:
        """Those there are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole grid, canonical orientation."""

    @property
    def affine(self) -> NDArray[np.float64]: ...
    @property
    def box(self) -> Box:
        """Around the brain."""

    @property
    def scales(self) -> Mapping[NormalizationName, Mapping[Modality, Scale]]:
        """As measured in the whole volume."""

    @property
    def centres(self) -> NDArray[np.integer]:
        """(N, 3) some voxels of the brain."""

    def read(self, modality: Modality, block: Box) -> NDArray[np.float32]:
        """A block of the grid, which may reach beyond it, in scanner units."""

    def mask(self, block: Box, modality: Modality | None = None) -> NDArray[np.bool_]:
        """The brain of one modality, or of most."""


class Endless(Protocol):
    """A source of cases without an end: the simulator."""

    def case(self, step: int, lane: int) -> TrainingCase:
        """The case that this step's sample is cut from."""


class Source(NamedTuple):
    """Where cases come from."""

    name: str
    cases: Sequence[TrainingCase] | Endless
    weight: float = 1.0
    """How often it is drawn from, compared with the other sources."""


class Sample(NamedTuple):
    """One training image and its conditions; a batch of them has a further axis in front."""

    images: Tensor
    """(M, X, Y, Z) of ``config.modalities``, network units; background where there is no image."""
    given: Tensor
    """(M,) bool: the conditions the network gets."""
    target: Tensor
    """() index of the target in ``config.modalities``."""


class TrainingData(Dataset[Sample]):
    """Samples by (step, lane).

    Args:
        overfit: take so many cases only, one fixed block of each, and as ``plain``; 0 for a real
            run.
        plain: all conditions there are, without augmentation.

    Raises:
        InputError: a source without any case that has the images the model needs.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: Config,
        *,
        overfit: int = 0,
        plain: bool = False,
    ):
        self.config = config
        self.overfit = overfit
        plain = plain or bool(overfit)
        self.name = config.images.normalization
        self.normalization = NORMALIZATIONS[self.name]
        self.sources = [self._usable(source) for source in sources]
        weights = np.array([source.weight for source in sources])
        self.shares = weights / weights.sum()
        self.augmentation = Augmentation() if plain else config.training.augmentation
        self.drop = 0.0 if plain else config.training.drop_conditions
        patch = config.training.patch
        if overfit:
            x, y, z = (min(n, OVERFIT_PATCH) for n in patch or (OVERFIT_PATCH,) * 3)
            patch = (x, y, z) if config.images.size is None else None
        self.patch = patch

    @property
    def cases(self) -> list[TrainingCase]:
        """Those of all finite sources."""
        finite = [cases for _, cases, _ in self.sources if isinstance(cases, Sequence)]
        return [case for cases in finite for case in cases]

    @property
    def endless(self) -> bool:
        """Whether some source has no end."""
        return any(not isinstance(source.cases, Sequence) for source in self.sources)

    def simulated(self, n: int) -> list[TrainingCase]:
        """Some cases of the endless sources."""
        endless = [cases for _, cases, _ in self.sources if not isinstance(cases, Sequence)]
        return [source.case(step, 0) for source in endless for step in range(n)]

    def __getitem__(self, key: Key) -> Sample:
        step, lane = key
        rng = np.random.default_rng([self.config.training.seed, step, lane, _OF_SAMPLES])
        source = self.sources[rng.choice(len(self.sources), p=self.shares)]
        if isinstance(source.cases, Sequence):
            case = source.cases[int(rng.integers(len(source.cases)))]
        else:
            case = source.cases.case(step, lane)
        return self.sample(case, rng)

    def sample(self, case: TrainingCase, rng: np.random.Generator) -> Sample:
        """Draw from one case."""
        there = [m for m in self.config.modalities if m in case.images]
        targets = [m for m in there if m in self.config.targets]
        target = targets[rng.integers(len(targets))]
        others = [m for m in there if m is not target and self.config.conditional]
        given = [others[i] for i in rng.permutation(len(others))]
        while len(given) > 1 and rng.random() < self.drop:
            given.pop()
        images = self._images(case, self._frame(case, rng), [target, *given], rng)
        modalities = self.config.modalities
        background = torch.full_like(images[target], self.normalization.background)
        return Sample(
            torch.stack([images.get(m, background) for m in modalities]),
            torch.tensor([m in given for m in modalities]),
            torch.tensor(modalities.index(target)),
        )

    def _usable(self, source: Source) -> Source:
        """The same without the cases that lack what the model needs."""
        if not isinstance(source.cases, Sequence):
            return source
        config = self.config
        usable = []
        for case in source.cases:
            there = [m for m in config.modalities if m in case.images]
            if config.training.drop_conditions and config.conditional:
                # a gap in a case is one more for the network to learn from
                enough = any(m in config.targets for m in there) and len(there) > 1
            else:
                enough = len(there) == len(config.modalities)
            if enough:
                usable.append(case)
        if not usable:
            expected = ", ".join(config.modalities)
            raise InputError(f"{source.name}: training needs cases with {expected}, found none")
        return source._replace(cases=usable[: self.overfit or None])

    def _frame(self, case: TrainingCase, rng: np.random.Generator) -> Frame:
        """The block the network sees: around some voxel of the brain, or everything."""
        settings = self.config.images
        if self.patch is None:
            whole = case.mask(Box((0, 0, 0), case.shape))
            return Frame.of(whole, case.affine, settings, self.config.multiple)
        zoom = network_voxels(case.affine, settings)
        size = [round(n / z) for n, z in zip(self.patch, zoom, strict=True)]
        centre = case.centres[0 if self.overfit else rng.integers(len(case.centres))]
        if self.overfit:
            centre = np.add(case.box.start, np.array(case.box.size) // 2)
        start = [
            first - (n - length) // 2 if n > length else min(max(c - n // 2, first), end - n)
            for c, n, first, length in zip(
                centre.tolist(), size, case.box.start, case.box.size, strict=True
            )
            for end in [first + length]
        ]
        box = Box((start[0], start[1], start[2]), (size[0], size[1], size[2]))
        return Frame(box, self.patch, FLIPS[settings.orientation])

    def _images(
        self,
        case: TrainingCase,
        frame: Frame,
        modalities: Sequence[Modality],
        rng: np.random.Generator,
    ) -> dict[Modality, Tensor]:
        """Normalized images (X', Y', Z'), the first of them the target.

        What moves anything moves everything; what changes intensities changes the conditions only:
        of a target the network could not know about it.
        """
        changes, background = self.augmentation, self.normalization.background
        turned = rng.random() < changes.affine
        seen = _grown(frame) if turned and self.patch else frame
        layers = []
        for number, modality in enumerate(modalities):
            inside = case.mask(seen.box, modality)
            voxels = case.read(modality, seen.box)
            if number and rng.random() < changes.bias_field:
                voxels = _biased(voxels, inside, rng)
            scale = case.scales[self.name][modality]
            layers.append(
                seen.to_network(self.normalization.normalize(voxels, inside, scale)) - background
            )
        mask = seen.to_network(case.mask(seen.box).astype(np.float32))
        images = torch.stack([*layers, mask])
        if turned:
            images = _turned(images, frame.size, rng)
        if changes.flip and rng.random() < 0.5:
            images = images.flip(1)
        brain = images[-1] > 0.5
        images = images[:-1] + background
        for image in images[1:]:
            if changes.contrast and brain.any():
                image[brain] = self._contrast(image[brain], changes.contrast, rng)
        return dict(zip(modalities, images, strict=True))

    def _contrast(self, values: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
        """Another gamma at times, and always some error in offset and scale."""
        if rng.random() < amount and values.max() > values.min():
            gamma = float(np.exp(rng.uniform(-0.3, 0.3)))
            changed = AdjustContrast(gamma, retain_stats=True)(values[None])
            values = convert_to_tensor(changed, track_meta=False)[0]
        offset, scale = rng.normal(size=2) * 0.3 * amount
        changed = values * float(np.exp(scale)) + float(offset)
        return changed.clamp(self.normalization.low, self.normalization.high)


def inputs(
    config: Config, samples: Sample, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of a batch: the target images (B, 1, X, Y, Z), what ``condition`` makes of the others (None
    without conditions), and the labels (B,) of the targets (None where there is but one)."""
    images = samples.images.to(device).unsqueeze(2)
    targets = samples.target.tolist()
    target_images = torch.stack([image[i] for image, i in zip(images, targets, strict=True)])
    cond = None
    if config.conditional:
        conds = []
        for image, given, target in zip(images, samples.given.tolist(), targets, strict=True):
            there = {m: image[i][None] for i, m in enumerate(config.modalities) if given[i]}
            availability = config.conditioning == "any"
            conds.append(
                condition(
                    there, config.modalities[target], config.transform, availability=availability
                )
            )
        cond = torch.cat(conds)
    label = samples.target.to(device) if len(config.targets) > 1 else None
    return target_images, cond, label


class Lanes(Sampler[list[Key]]):
    """The keys of one process, a list for each part of the batch that it computes at once.

    Args:
        rank: which of ``world`` processes; they share the lanes out in order.

    Raises:
        InputError: the batch cannot be shared out evenly.
    """

    def __init__(self, config: Config, first_step: int, *, rank: int = 0, world: int = 1):
        training = config.training
        if training.batch % (world * training.accumulation):
            raise InputError(
                f"training.batch = {training.batch} is no multiple of {world} processes with "
                f"accumulation = {training.accumulation}"
            )
        share = training.batch // world
        self.steps = range(first_step, training.iterations)
        self.lanes = range(rank * share, (rank + 1) * share)
        self.part = share // training.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            for first in range(0, len(self.lanes), self.part):
                yield [(step, lane) for lane in self.lanes[first : first + self.part]]

    def __len__(self) -> int:
        return len(self.steps) * len(self.lanes) // self.part


def _grown(frame: Frame) -> Frame:
    """Half as large again along each axis: what a turned block may reach into."""
    ratio = [n / m for n, m in zip(frame.size, frame.box.size, strict=True)]
    margin = [-(-n // 4) for n in frame.box.size]
    x, y, z = (first - m for first, m in zip(frame.box.start, margin, strict=True))
    a, b, c = (n + 2 * m for n, m in zip(frame.box.size, margin, strict=True))
    size = tuple(n + 2 * round(m * r) for n, m, r in zip(frame.size, margin, ratio, strict=True))
    return Frame(Box((x, y, z), (a, b, c)), size, frame.flips)


def _turned(images: Tensor, size: Sequence[int], rng: np.random.Generator) -> Tensor:
    """Layers (C, X, Y, Z) turned by up to 15 degrees and scaled by up to 15 %, cut to ``size``."""
    affine = Affine(
        rotate_params=rng.uniform(-np.pi / 12, np.pi / 12, 3).tolist(),
        scale_params=rng.uniform(0.85, 1.15, 3).tolist(),
        spatial_size=list(size),
        padding_mode="zeros",
        image_only=True,
    )
    moved: Tensor = convert_to_tensor(affine(images), track_meta=False)
    return moved


def _biased(
    voxels: NDArray[np.float32], inside: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Times a smooth field (Van Leemput et al. 1999) that keeps the brain's median."""
    if not inside.any():
        return voxels
    with torch.random.fork_rng(devices=[]):  # TorchIO draws from torch's global generator
        torch.manual_seed(int(rng.integers(2**63)))
        field = tio.RandomBiasField(coefficients=0.3, order=2)
        changed = field(torch.from_numpy(voxels)[None])[0].numpy()
    before, after = float(np.median(voxels[inside])), float(np.median(changed[inside]))
    return changed * np.float32(before / after) if after > 0 else changed
