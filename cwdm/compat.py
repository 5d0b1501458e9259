"""What the published cWDM scripts do between file and network, for ``--compat published``.

They take 240 x 240 x 155 voxels as they lie in a BraTS file, cut off the outer 8 in two axes, pad
the third at its end, and put out values in [0, 1]. Results then equal theirs voxel by voxel;
``docs/published-models.md`` lists what we do otherwise by default, and why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cwdm.config import Config, Sampling
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.intensity import NORMALIZATIONS, Scale
from cwdm.modality import Modality
from cwdm.preparation import FLIPS, Box, Frame, Prepared
from cwdm.process import Process
from cwdm.sampling import Draw
from cwdm.volume import Volume, new_volume, stored_as

__all__ = ["check", "complete", "network_time", "noise_stream", "prepare", "sample"]

_GRID = (240, 240, 155)
_FRAME = Frame(Box((8, 8, 0), (224, 224, 160)), (224, 224, 160), FLIPS["LPS"])
_THRESHOLD = 0.04


def check(config: Config, path: Path) -> None:
    """InputError unless the model is one that their scripts could run."""
    if config.images.normalization != "published":
        raise InputError(
            f"{path}: {config.name} was trained on {config.images.normalization!r} images, "
            "--compat published takes models of cWDM and its descendants"
        )
    if any(n % config.multiple for n in _FRAME.size):
        raise InputError(
            f"{path}: {config.name} needs sides that are multiples of {config.multiple}, "
            "--compat published has 224x224x160"
        )


def prepare(volumes: Mapping[Modality, Volume]) -> Prepared:
    """Whole-volume normalization and the fixed crop of their loader; no brain mask.

    Raises:
        InputError: a grid other than 240 x 240 x 155.
    """
    normalization = NORMALIZATIONS["published"]
    images, scales = {}, {}
    everything = np.ones(_GRID, dtype=bool)
    for modality, volume in volumes.items():
        if volume.voxels.shape != _GRID:
            found = " x ".join(map(str, volume.voxels.shape))
            raise InputError(f"{volume.path}: {found} voxels, --compat published takes 240x240x155")
        voxels = volume.voxels.astype(np.float64)
        scales[modality] = normalization.measure(voxels, everything)
        image = normalization.normalize(voxels, everything, scales[modality])
        images[modality] = _FRAME.to_network(_FRAME.box.crop(image))
    return Prepared(images, scales, everything, _FRAME)


def noise_stream(shape: Sequence[int], seed: int, device: torch.device) -> Draw:
    """Their random numbers for the first case of a run: a data loader takes one before the rest."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return lambda: torch.randn(*shape, generator=generator).to(device)


def network_time(process: Process, settings: Sampling) -> int | None:
    """The time their network is told instead of the true one, if it is another.

    WFM with a single step evaluates its network at the start but tells it the time of the data,
    where it was not trained.
    """
    return 0 if isinstance(process, Flow) and settings.steps == 1 else None


def complete(prepared: Prepared, image: Tensor, like: Volume) -> Volume:
    """As ``sample_auto.py``, for a case without the target: values in [0, 1] on its own grid.

    What is at most 0.04 becomes 0; no mask.
    """
    voxels = prepared.restore(torch.where(image <= _THRESHOLD, 0, image), Scale(0.0, 1.0))
    return replace(like, voxels=voxels, header=stored_as(np.float32, like.header))


def sample(prepared: Prepared, image: Tensor) -> Volume:
    """As ``sample.py``, for a case that has the target: 224 x 224 x 155 without its geometry.

    Values in [0, 1], 0 where the first condition is 0.
    """
    first = next(iter(prepared.images.values()))
    visible = torch.where(first == 0, 0, image.cpu())[:, :, : _GRID[2]]
    return new_volume(visible.numpy(), np.eye(4), np.float32)
