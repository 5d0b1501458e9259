"""Simulated cases: four contrasts, with a glioma, all from one anatomy.

Anatomy -> a brain deformed at random -> tumor and vessels -> the signal of each sequence -> what a
scanner makes of it. Everything is computed in torch, on any device, and drawn from one generator
per case: a case depends on its seed and its index, and on no other case.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cwdm import __version__
from cwdm.anatomy import Anatomy
from cwdm.errors import InputError
from cwdm.modality import Modality
from cwdm.relaxation import (
    RELAXATION,
    Tissue,
    enhanced,
    inversion_recovery,
    nulling_time,
    spin_echo,
)
from cwdm.volume import new_volume, write_volume

Shape = tuple[int, int, int]

SHAPE: Shape = (240, 240, 155)
"""BraTS; 1 mm voxels."""

HEAD_MM = (168, 208, 156)
"""The part of the grid in which the brain lies; only there anything is computed."""

BRAIN_MM3 = 1.5e6
"""Typical volume inside a BraTS brain mask; those at hand have 1.35 to 1.73 million."""

NCR, ED, ET = 1, 2, 3  # labels of BraTS 2023
TUMOR = (Tissue.NECROSIS, Tissue.ENHANCING, Tissue.EDEMA)


@dataclass(frozen=True, eq=False)
class SimulatedCase:
    """Four images and their segmentation, in canonical orientation (RAS+)."""

    id: str
    images: dict[Modality, Tensor]
    """(X, Y, Z) int16, scanner units; 0 outside the brain and at least 1 inside."""
    segmentation: Tensor
    """(X, Y, Z) uint8: 1 necrosis and other core, 2 edema, 3 enhancing tumor."""
    affine: NDArray[np.float64]
    """(4, 4), voxel index -> mm."""


def simulate(
    seed: int,
    index: int,
    anatomy: Anatomy,
    *,
    shape: Shape = SHAPE,
    spacing: float = 1.0,
    device: torch.device | str = "cpu",
) -> SimulatedCase:
    """Simulate case `index` of `seed`.

    Args:
        shape: of the images, voxels.
        spacing: mm between voxels, the same along each axis.
        device: where to compute. Another kind of device draws other cases.
    """
    inner = [min(n, round(mm / spacing)) for n, mm in zip(shape, HEAD_MM, strict=True)]
    chance = Chance(seed, index, (inner[0], inner[1], inner[2]), spacing, torch.device(device))
    brain, offset, radius, midline = _deformed(anatomy, chance)
    mask = brain.sum(0) > 0.5
    brain = _individual(brain, chance)
    tumor, segmentation = _tumor(brain, mask, offset, radius, chance)
    fractions = _mix(brain, tumor, _vessels(brain, mask, midline, chance))
    gain = chance.uniform(math.log(200), math.log(2000))
    images = {}
    for modality, signal in _signals(fractions, mask, chance).items():
        image = _acquire(signal, mask, chance)
        image *= math.exp(gain + chance.uniform(-0.7, 0.7)) / image[mask].median()
        images[modality] = _fit((image.round().clamp(1, 32767) * mask).to(torch.int16), shape)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[0, 3] = -(shape[0] - 1) * spacing  # the corner where BraTS images have it
    segmentation = _fit(segmentation * mask, shape)
    return SimulatedCase(case_id(seed, index), images, segmentation, affine)


def case_id(seed: int, index: int) -> str:
    """What case `index` of `seed` is called, in the manner of BraTS."""
    return f"SIM-{seed:05d}-{index:03d}"


def write_case(case: SimulatedCase, output: Path, *, overwrite: bool = False) -> Path:
    """Write `output/<id>/<id>-<modality>.nii.gz` and `-seg.nii.gz`; stored LPS, as BraTS.

    Returns:
        The case's folder.

    Raises:
        InputError: the folder is there already and not to be overwritten, or cannot be written.
    """
    folder = Path(output) / case.id
    if folder.exists() and not overwrite:
        raise InputError(f"{folder}: already exists, expected a new case or --overwrite")
    for name, voxels in [*case.images.items(), ("seg", case.segmentation)]:
        path = folder / f"{case.id}-{name}.nii.gz"
        array = voxels.cpu().numpy()
        like = new_volume(array, case.affine, array.dtype)
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
        to_lps[:2, 3] = np.array(array.shape[:2]) - 1
        like.header.set_qform(case.affine @ to_lps, code=1)
        like.header.set_sform(case.affine @ to_lps, code=1)
        write_volume(array, like, path, f"cwdm {__version__} simulated, no patient", overwrite)
    return folder


class Chance:
    """Everything random about one case, on its grid."""

    def __init__(
        self, seed: int, index: int, shape: Shape, spacing: float, device: torch.device
    ) -> None:
        state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
        self._generator = torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))
        self.shape, self.spacing, self.device = shape, spacing, device

    def uniform(self, low: float, high: float) -> float:
        draw = torch.rand((), generator=self._generator, device=self.device)
        return low + (high - low) * draw.item()

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self.device)

    def pick(self, weights: Tensor) -> Tensor:
        """Index () of one of the weights (N,), with that probability."""
        return torch.multinomial(weights, 1, generator=self._generator)[0]

    def field(self, scale: float) -> Tensor:
        """A random field (X, Y, Z), Gaussian with mean 0 and variance 1, smooth over `scale` mm."""
        kernels = []
        for n in self.shape:
            x = torch.arange(n, device=self.device) * (self.spacing / scale)
            knots = torch.arange(-2, math.ceil(n * self.spacing / scale) + 3, device=self.device)
            kernel = torch.exp(-(((x[:, None] - knots) / 0.7) ** 2) / 2)
            kernels.append(kernel / kernel.square().sum(1, keepdim=True).sqrt())
        field = self.normal(*(kernel.shape[1] for kernel in kernels))
        for kernel in kernels:
            field = torch.tensordot(field, kernel, dims=([0], [1]))
        return field


def _deformed(anatomy: Anatomy, chance: Chance) -> tuple[Tensor, Tensor, float, Tensor]:
    """A random pose, size and shape of the brain, and a tumor that pushes it aside.

    Returns:
        Tissue fractions (4, X, Y, Z); mm from the tumor's center (X, Y, Z, 3) and its radius in mm;
        mm from the brain's midline (X, Y, Z).
    """
    axes = [
        torch.arange(n, device=chance.device).sub((n - 1) / 2) * chance.spacing
        for n in chance.shape
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    matrix = torch.eye(3, device=chance.device) + 0.035 * chance.normal(3, 3).clamp(-2, 2)
    size = BRAIN_MM3 * math.exp(chance.uniform(-0.1, 0.1))
    matrix *= (anatomy.volume_mm3 / size / matrix.det()) ** (1 / 3)
    if chance.uniform(0, 1) < 0.5:
        matrix[0] *= -1
    middle = torch.tensor(anatomy.middle).to(points)
    source = points @ matrix.T + middle  # where in the anatomy each point comes from
    for scale, amplitude in ((45, 3.0), (18, 1.2)):
        source += amplitude * torch.stack([chance.field(scale) for _ in range(3)], -1)

    coarse = (slice(None, None, max(1, round(4 / chance.spacing))),) * 3
    weights = anatomy.sample(source[coarse])[Tissue.WHITE] ** 3
    weights *= points[coarse][..., 2] > -12  # above the cerebellum
    center = points[coarse].flatten(0, 2)[chance.pick(weights.flatten() + 1e-9)]
    radius = chance.uniform(8, 14) + chance.uniform(0, 1) ** 2 * 14
    offset = points - center
    reach = torch.exp(-offset.square().sum(-1, keepdim=True) / (2 * (1.5 * radius) ** 2))
    source -= chance.uniform(0.05, 0.3) * reach * (offset @ matrix.T)
    return anatomy.sample(source), offset, radius, source[..., 0] - middle[0]


def _individual(brain: Tensor, chance: Chance) -> Tensor:
    """Fractions (4, X, Y, Z) with folds and ventricles of one person: wider here, narrower there.

    Outside the brain, where all are 0, they become meaningless; they sum to 1 everywhere.
    """
    logits = torch.log(brain + 1e-3)
    logits[Tissue.CSF] += chance.uniform(-1.1, 0.6)  # young to old
    for tissue in (Tissue.CSF, Tissue.CORTEX):
        logits[tissue] += chance.field(4) + 0.5 * chance.field(10)
    return torch.softmax(logits, 0)


def _vessels(brain: Tensor, mask: Tensor, midline: Tensor, chance: Chance) -> Tensor:
    """Fraction (X, Y, Z) of blood: winding tubes in the fluid, more at the surface; the sinus.

    A tube is where two random fields are both near zero.
    """
    stride = max(1, round(4 / chance.spacing))
    outside = 1 - _fine(_coarse(mask.float(), stride), stride, chance.shape)
    tubes = torch.exp(
        -(chance.field(9).square() + chance.field(9).square()) / (0.08 + 0.3 * outside)
    )
    sinus = torch.exp(-midline.square() / (2 * 2.5**2)) * (2 * outside).clamp(max=1)
    return brain[Tissue.CSF] * torch.maximum(tubes, sinus)


def _tumor(
    brain: Tensor, mask: Tensor, offset: Tensor, radius: float, chance: Chance
) -> tuple[Tensor, Tensor]:
    """Fractions (3, X, Y, Z) in the order of TUMOR, and labels (X, Y, Z)."""
    edge = 0.5 * chance.spacing  # mm over which a boundary is shared between voxels
    distance = (offset * (0.2 * chance.normal(3)).exp()).square().sum(-1).sqrt()
    depth = radius * (1 + 0.25 * chance.field(radius) + 0.08 * chance.field(5)) - distance
    depth -= 4 * brain[Tissue.CSF]  # does not grow into ventricles and sulci
    core = torch.sigmoid(depth / edge)
    rim = chance.uniform(2, 5) + 1.5 * chance.field(9) + chance.field(4)
    if chance.uniform(0, 1) < 0.15:
        rim = rim - 100  # no enhancement: low grade
    necrosis = core * torch.sigmoid((depth - rim) / edge)

    # Edema seeps from the core through white matter: a front that cortex and fluid hold back.
    stride = max(1, round(2 / chance.spacing))
    loose = brain[Tissue.WHITE] + 0.4 * brain[Tissue.DEEP] + 0.3 * brain[Tissue.CORTEX]
    passes = 0.3 + 0.7 * _coarse(loose * mask, stride)
    source = level = _coarse(core, stride)
    for _ in range(20):
        level = torch.maximum(source, passes * functional.avg_pool3d(level, 3, 1, 1))
    level = _fine(level.clamp(min=1e-9).log(), stride, chance.shape)
    extent = chance.uniform(2, 10)
    edema = torch.sigmoid((level + extent + 0.8 * chance.field(6)) / 0.6) * loose * (1 - core)

    segmentation = torch.zeros(chance.shape, dtype=torch.uint8, device=chance.device)
    segmentation[edema > 0.35] = ED
    segmentation[core > 0.5] = ET
    segmentation[(core > 0.5) & (necrosis > core / 2)] = NCR
    return torch.stack([necrosis, core - necrosis, edema]), segmentation


def _mix(brain: Tensor, tumor: Tensor, blood: Tensor) -> Tensor:
    """Fractions of all tissues (8, X, Y, Z), sum 1: the tumor in place of the brain."""
    brain = brain.clone()
    brain[Tissue.CSF] -= blood
    healthy = torch.cat([brain, blood[None]]) * (1 - tumor.sum(0))
    return torch.cat([healthy, tumor])


def _signals(fractions: Tensor, mask: Tensor, chance: Chance) -> dict[Modality, Tensor]:
    """The signed signal (X, Y, Z) of each sequence, 0 outside the mask.

    Relaxation times and sequences vary from case to case, and tissue a little from place to place.
    """
    field = 1.5 if chance.uniform(0, 1) < 0.5 else 3.0
    csf_t1 = RELAXATION[Tissue.CSF].t1(field)
    tr = chance.uniform(8000, 10000)
    ti = nulling_time(csf_t1, tr) * chance.uniform(0.88, 1.02)
    spin: Callable[..., Tensor] = spin_echo
    sequences = {
        Modality.T1N: partial(spin, tr=chance.uniform(450, 750), te=chance.uniform(8, 16)),
        Modality.T1C: partial(spin, tr=chance.uniform(450, 750), te=chance.uniform(8, 16)),
        Modality.T2W: partial(spin, tr=chance.uniform(3500, 8000), te=chance.uniform(80, 130)),
        Modality.T2F: partial(inversion_recovery, tr=tr, te=chance.uniform(90, 140), ti=ti),
    }
    texture = torch.stack([0.04 * chance.field(25) + 0.025 * chance.field(4) for _ in range(3)])
    lumps = 0.12 * chance.field(7) + 0.08 * chance.field(3)
    uptake = {  # of contrast agent, mmol/l
        Tissue.ENHANCING: chance.uniform(0.08, 0.35) * torch.exp(0.5 * chance.field(5)),
        Tissue.BLOOD: chance.uniform(0.5, 2) * torch.ones_like(lumps),
    }
    signals = {modality: torch.zeros(chance.shape, device=chance.device) for modality in sequences}
    for tissue, relaxation in RELAXATION.items():
        sizes = relaxation.t1(field), relaxation.t2, relaxation.pd
        spread = 0.15 if tissue in TUMOR else 0.06
        where = mask & (fractions[tissue] > 1e-3)
        local = texture[:, where] + (lumps[where] if tissue in TUMOR else 0)
        local[2] /= 3  # water content varies less
        t1, t2, pd = (
            size * math.exp(chance.uniform(-spread, spread)) * change.exp()
            for size, change in zip(sizes, local, strict=True)
        )
        for modality, sequence in sequences.items():
            gadolinium = modality is Modality.T1C and tissue in uptake
            now = enhanced(t1, uptake[tissue][where]) if gadolinium else t1
            signals[modality][where] += fractions[tissue][where] * sequence(now, t2, pd)
    return signals


def _acquire(signal: Tensor, mask: Tensor, chance: Chance) -> Tensor:
    """Magnitude image (X, Y, Z): bias field, slices of some thickness, Rician noise.

    Half of the images have slices of 1 mm, or of one voxel where that is more.
    """
    bias = torch.exp(chance.uniform(0.03, 0.15) * chance.field(70))
    axis = 2 if chance.uniform(0, 1) < 0.8 else int(chance.uniform(0, 3))
    thick = chance.uniform(1, 6 if axis == 2 else 4) if chance.uniform(0, 1) < 0.5 else 1
    noise = chance.uniform(0.01, 0.05) * signal[mask].abs().median()
    step = max(thick, chance.spacing)
    place = torch.arange(signal.shape[axis], device=chance.device) * chance.spacing
    slices = torch.arange(0, float(place[-1]) + step, step, device=chance.device)
    apart = (place[:, None] - slices) / step
    profile = torch.exp(-((apart / 0.42) ** 2) / 2)  # full width at half maximum: one slice
    if step == chance.spacing:
        profile = (apart.abs() < 0.5).float()
    inside = torch.tensordot(mask.float(), profile, dims=([axis], [0]))
    acquired = torch.tensordot(signal * bias * mask, profile, dims=([axis], [0]))
    acquired /= inside.clamp(min=1e-3)  # the brain alone: what was around it is stripped later
    image = rician(acquired, chance.normal(2, *acquired.shape) * noise)
    between = (1 - apart.abs()).clamp(min=0)
    resampled: Tensor = torch.tensordot(image, between, dims=([2], [1]))
    return resampled.movedim(-1, axis)


def rician(signal: Tensor, noise: Tensor) -> Tensor:
    """The magnitude of a real signal (...) plus complex noise, its two parts (2, ...)."""
    return torch.hypot(signal + noise[0], noise[1])


def _coarse(volume: Tensor, stride: int) -> Tensor:
    """(X, Y, Z) -> (1, 1, X/stride, ...), block means."""
    return functional.avg_pool3d(volume[None, None], stride, ceil_mode=True)


def _fine(volume: Tensor, stride: int, shape: Shape) -> Tensor:
    """(1, 1, X/stride, ...) -> (X, Y, Z), linear; back from `_coarse`."""
    fine: Tensor = functional.interpolate(volume, scale_factor=stride, mode="trilinear")
    return fine[0, 0, : shape[0], : shape[1], : shape[2]]


def _fit(volume: Tensor, shape: Shape) -> Tensor:
    """Zeros around, to `shape`."""
    pads: list[int] = []
    for n, wanted in zip(reversed(volume.shape), reversed(shape), strict=True):
        pads += [(wanted - n) // 2, wanted - n - (wanted - n) // 2]
    return functional.pad(volume, pads)
