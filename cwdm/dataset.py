"""Training images: complete cases, augmented in scanner units, normalized, cut into patches.

The data is a sequence of blocks. A block depends on (seed, number of the block) only, so a resumed
run sees what an uninterrupted one would have seen.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torchio as tio
from torch import Tensor
from torch.utils.data import Dataset

from cwdm.case import Case
from cwdm.config import Augmentation, Config
from cwdm.errors import InputError
from cwdm.intensity import NORMALIZATIONS, Scale
from cwdm.modality import Modality
from cwdm.preparation import Frame, inside
from cwdm.volume import read_volumes

__all__ = ["TrainingBlocks", "augmentation"]

_log = logging.getLogger(__name__)
_MASK = "mask"


def augmentation(settings: Augmentation, conditions: Iterable[Modality]) -> tio.Transform:
    """TorchIO transforms of a subject with one image per modality and a brain mask.

    What changes the geometry moves everything; what changes intensities touches the conditions
    only: of a target the network could not know about it.
    """
    transforms: list[tio.Transform] = []
    if settings.flip:
        transforms.append(tio.RandomFlip(axes=(0,)))
    if settings.affine:
        transforms.append(
            tio.RandomAffine(scales=0.15, degrees=15, default_pad_value=0, p=settings.affine)
        )
    for modality in conditions:
        if settings.bias_field:
            transforms.append(
                tio.RandomBiasField(
                    coefficients=0.3, order=2, p=settings.bias_field, include=[modality.value]
                )
            )
        if settings.contrast:
            transforms.append(tio.RandomGamma(p=settings.contrast, include=[modality.value]))
    return tio.Compose(transforms)


class TrainingBlocks(Dataset[Tensor]):
    """Block n is a tensor (patches, M, X, Y, Z) of normalized images, ``config.modalities``.

    All cases are kept in memory, cut to the brain (about 35 MB each).

    Raises:
        InputError: no case with all the images the model needs, or one that cannot be read.
    """

    def __init__(self, cases: Sequence[Case], config: Config):
        self.config = config
        self.normalization = NORMALIZATIONS[config.images.normalization]
        usable = []
        for case in cases:
            if absent := [m for m in config.modalities if m not in case.images]:
                _log.warning("%s: not used, has no %s", case.id, ", ".join(absent))
            else:
                usable.append(case)
        if not usable:
            expected = ", ".join(config.modalities)
            raise InputError(f"training needs cases with {expected}, found none")
        self.subjects: list[tuple[tio.Subject, Frame]] = []
        self.scales: list[Mapping[Modality, Scale]] = []
        for case in usable:
            volumes = read_volumes(case, config.modalities)
            masks = [inside(volume, self.normalization) for volume in volumes.values()]
            mask = np.logical_and.reduce(masks)
            affine = next(iter(volumes.values())).affine
            frame = Frame.of(mask, affine, config.images, config.multiple)
            images: dict[str, tio.Image] = {
                modality.value: tio.ScalarImage(
                    tensor=torch.from_numpy(frame.box.crop(volume.voxels))[None]
                )
                for modality, volume in volumes.items()
            }
            images[_MASK] = tio.LabelMap(tensor=torch.from_numpy(frame.box.crop(mask))[None].byte())
            self.subjects.append((tio.Subject(**images), frame))
            self.scales.append(
                {m: self.normalization.measure(v.voxels, mask) for m, v in volumes.items()}
            )
        conditions = () if config.target == "any" else config.modalities
        self.conditions = {m for m in conditions if m != config.target}
        self.transform = augmentation(
            config.training.augmentation, [m for m in Modality if m in self.conditions]
        )

    @property
    def patches_per_block(self) -> int:
        """Patches in every block."""
        return self.config.training.cases_per_block * self.config.training.patches_per_case

    def __getitem__(self, block: int) -> Tensor:
        training = self.config.training
        rng = np.random.default_rng([training.seed, block])
        patches = []
        for _ in range(training.cases_per_block):
            images, mask = self._augmented(int(rng.integers(len(self.subjects))), rng)
            for _ in range(training.patches_per_case):
                patches.append(
                    _cut(images, mask, training.patch, rng, self.normalization.background)
                )
        order = rng.permutation(len(patches))
        return torch.stack([patches[i] for i in order])

    def _augmented(self, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Normalized images (M, X, Y, Z) and the brain mask (X, Y, Z) of a subject, changed.

        What keeps its units keeps the scale measured in its whole volume, as in synthesis.
        """
        (subject, frame), scales = self.subjects[number], self.scales[number]
        settings = self.config.training.augmentation
        with torch.random.fork_rng(devices=[]):  # TorchIO draws from torch's global generator
            torch.manual_seed(int(rng.integers(2**63)))
            changed = self.transform(subject)
        changed_images = changed.get_images_dict(intensity_only=False)
        mask = changed_images[_MASK].data[0].numpy() > 0
        images = []
        for modality in self.config.modalities:
            voxels = changed_images[modality.value].data[0].numpy()
            scale = scales[modality]
            if modality in self.conditions:
                if settings.bias_field or settings.contrast:
                    scale = self.normalization.measure(voxels, mask)
                error = rng.normal(size=2) * 0.3 * settings.contrast
                scale = Scale(
                    scale.offset + error[0] * scale.scale, scale.scale * float(np.exp(error[1]))
                )
            images.append(frame.to_network(self.normalization.normalize(voxels, mask, scale)))
        return torch.stack(images), frame.to_network(mask.astype(np.float32)) > 0.5


def _cut(
    images: Tensor,
    mask: Tensor,
    patch: tuple[int, int, int] | None,
    rng: np.random.Generator,
    background: float,
) -> Tensor:
    """A patch (M, *patch) whose centre lies in the brain where that is possible; or everything.

    A patch larger than the image is filled up with background.
    """
    if patch is None:
        return images
    brain = mask.nonzero()
    centre = brain[rng.integers(len(brain))].tolist()
    start = [
        int(np.clip(c - p // 2, 0, max(n - p, 0)))
        for c, p, n in zip(centre, patch, images.shape[1:], strict=True)
    ]
    cut = images[(slice(None), *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))]
    missing = [p - n for p, n in zip(patch, cut.shape[1:], strict=True)]
    ends = [end for m in reversed(missing) for end in (0, m)]
    return torch.nn.functional.pad(cut, ends, value=background)
