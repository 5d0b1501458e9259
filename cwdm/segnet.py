"""A small network that segments gliomas from whichever of the four sequences there are.

SegResNet (Myronenko 2018, arXiv 1810.11654, without the autoencoder) on wavelet coefficients, as
WDM does for synthesis: a grid half as fine makes it quick on a CPU. It is trained with sequences
taken away at random (Neverova et al. 2015, arXiv 1501.00102), so a missing one is zeros.

The regions are those of BraTS, each inside the one before: WT whole tumor, TC its core, ET its
enhancing part.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceLoss
from monai.networks.nets.segresnet import SegResNet
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cwdm.coefficients import Transform
from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.machine import Precision, choose_bf16
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import Box
from cwdm.segmentation import ET, NCR, Region, from_regions

__all__ = [
    "REGIONS",
    "SegNet",
    "SegNetConfig",
    "labels_of",
    "load",
    "normalize",
    "region_loss",
    "regions_of",
    "save",
    "segment",
]

REGIONS = tuple(Region)
"""In channel order; each lies inside the one before."""

_OVERLAP = 0.25
"""Of neighboring windows."""
_FORMAT = "cwdm-segnet-1"
_dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SegNetConfig:
    """Size of the network."""

    filters: int = 16
    """Channels at the finest level; doubled at each coarser one."""
    down: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks per level on the way down."""
    up: tuple[int, ...] = (1, 1, 1)
    """Residual blocks per level on the way up, one level fewer."""
    groups: int = 8
    """Of the group normalization."""
    window: int = 80
    """Side of the blocks it learned from, voxels; of larger ones its group norms know nothing."""


class SegNet(nn.Module):
    """Images (B, 4, X, Y, Z), see ``normalize``, -> logits of the regions (B, 3, X, Y, Z)."""

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__()
        self.config = config
        self.transform = Transform()
        self.backbone = SegResNet(
            init_filters=config.filters,
            in_channels=len(SEQUENCES) * self.transform.channels,
            out_channels=len(REGIONS) * self.transform.channels,
            blocks_down=config.down,
            blocks_up=config.up,
            act="relu",
            norm=("group", {"num_groups": config.groups}),
        )

    @property
    def multiple(self) -> int:
        """Every axis of the images is a multiple of this."""
        return int(self.transform.factor * 2 ** (len(self.config.down) - 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.transform.decode(self.backbone(self.transform.encode(images)))


def save(net: SegNet, path: Path, *, overwrite: bool) -> None:
    """Write weights, in half precision, and configuration as one safetensors file."""
    metadata = {
        "format": _FORMAT,
        "config": TypeAdapter(SegNetConfig).dump_json(net.config).decode(),
    }
    weights = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    with atomic_write(path, overwrite) as temporary:
        temporary.write_bytes(to_bytes(weights, metadata))


def load(path: Path) -> SegNet:
    """Read what ``save`` wrote; weights become float32. Runs no code of the file.

    Raises:
        InputError: no such file, not safetensors, not such a network, weights that do not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a segmentation network") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    if (found := metadata.get("format")) != _FORMAT:
        raise InputError(
            f"{path}: not a segmentation network (format {found!r}, expected {_FORMAT!r})"
        )
    try:
        net = SegNet(TypeAdapter(SegNetConfig).validate_json(metadata["config"]))
        net.load_state_dict(weights)
    except (KeyError, ValidationError, ValueError) as error:
        raise InputError(f"{path}: its metadata are damaged: {error}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: weights do not fit the configuration: {reason}") from error
    return net.eval().requires_grad_(False)


def normalize(
    images: Mapping[Modality, NDArray[np.generic]],
    brain: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, Box]:
    """What the network sees of a case: its brain, each sequence with mean 0 and deviation 1 in it.

    Args:
        images: (X, Y, Z) in canonical orientation, scanner units, those that there are.
        brain: (X, Y, Z); left out, where any image is not 0.

    Returns:
        (4, X', Y', Z') float32, 0 outside the brain and for a missing sequence; and where on the
        grid of the images that is.

    Raises:
        InputError: none of the four sequences, or no brain.
    """
    given = {modality: images[modality] for modality in SEQUENCES if modality in images}
    if not given:
        raise InputError(f"no image to segment, expected any of {', '.join(SEQUENCES)}")
    if brain is None:
        brain = np.any([image != 0 for image in given.values()], axis=0)
    if not brain.any():
        raise InputError("the images are 0 everywhere, expected a brain")
    box = Box.around(brain)
    inside = box.crop(brain)
    normalized = np.zeros((len(SEQUENCES), *box.size), np.float32)
    for channel, modality in enumerate(SEQUENCES):
        if modality in given:
            values = box.crop(given[modality])[inside].astype(np.float64)
            normalized[channel, inside] = (values - values.mean()) / (values.std() or 1)
    return torch.from_numpy(normalized), box


@torch.inference_mode()
def segment(
    net: SegNet,
    images: Mapping[Modality, NDArray[np.generic]],
    *,
    brain: NDArray[np.bool_] | None = None,
    precision: Precision = "auto",
) -> NDArray[np.float32]:
    """Probabilities (3, X, Y, Z) of the regions, 0 outside the brain.

    Args:
        images, brain: as in ``normalize``.
    """
    normalized, box = normalize(images, brain)
    device = next(net.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=choose_bf16(precision, device)):
        logits = sliding_window_inference(
            normalized[None].to(device), net.config.window, 1, net, _OVERLAP, "gaussian"
        )
    probabilities = torch.sigmoid(logits[0].float()) * (normalized != 0).any(0).to(device)
    shape = next(iter(images.values())).shape
    return np.stack([box.uncrop(region, shape) for region in probabilities.cpu().numpy()])


def labels_of(probabilities: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Probabilities (3, X, Y, Z) -> labels (X, Y, Z): 1 other core, 2 edema, 3 enhancing tumor.

    A region is where its probability and those of the regions around it are above a half.
    """
    masks = np.logical_and.accumulate(probabilities > 0.5)
    return from_regions(dict(zip(REGIONS, masks, strict=True)))


def regions_of(labels: Tensor) -> Tensor:
    """Labels (B, X, Y, Z) -> the regions (B, 3, X, Y, Z), float32 0 or 1."""
    enhancing = labels == ET
    return torch.stack([labels > 0, enhancing | (labels == NCR), enhancing], 1).float()


def region_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice plus binary cross-entropy, the mean over the regions.

    Args:
        logits: (B, 3, X, Y, Z).
        labels: (B, X, Y, Z), see ``labels_of``.
    """
    truth, logits = regions_of(labels), logits.float()
    loss: Tensor = _dice(logits, truth) + F.binary_cross_entropy_with_logits(logits, truth)
    return loss
