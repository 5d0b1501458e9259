"""Simulated cases: four contrasts, with a glioma, all from one anatomy.

Anatomy -> a brain deformed at random -> tumor and vessels -> the signal of each sequence -> what a
scanner makes of it. Everything is computed in torch, on any device; the host waits for the device
only while it deforms the brain. A case depends on its seed and its index, and on no other case.
"""

import math
from collections.abc import Callable, Sequence
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
from cwdm.preparation import Box
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

NODE_MM = 4
"""Distance between the nodes at which a deformation is computed; between them it is linear."""

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
    chance = Chance(seed, index, torch.device(device))
    head = _deformed(anatomy, shape, spacing, chance)
    brain = _individual(head)
    tumor, segmentation = _tumor(brain, head)
    fractions = _mix(brain, tumor, _vessels(brain, head))
    gain = chance.uniform(math.log(200), math.log(2000))
    images = {}
    for modality, signal in _signals(fractions, head).items():
        image = _acquire(signal, head)
        image *= math.exp(gain + chance.uniform(-0.7, 0.7)) / image.median()
        images[modality] = head.whole(image.round().clamp(1, 32767).to(torch.int16), shape)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[0, 3] = -(shape[0] - 1) * spacing  # the corner where BraTS images have it
    segmentation = head.whole(segmentation, shape)
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
        like = new_volume(array, case.affine, array.dtype, lps=True)
        write_volume(array, like, path, f"cwdm {__version__} simulated, no patient", overwrite)
    return folder


class Chance:
    """Everything random about one case.

    Single numbers are drawn on the host, so that it need not wait for the device.
    """

    def __init__(self, seed: int, index: int, device: torch.device) -> None:
        self.device = device
        self.numbers = np.random.default_rng([seed, index])
        state = int(self.numbers.integers(2**63))
        self._generator = torch.Generator(device).manual_seed(state)

    def uniform(self, low: float, high: float) -> float:
        return float(self.numbers.uniform(low, high))

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self.device)

    def field(self, scale: float, shape: Shape, spacing: float) -> Tensor:
        """A random field (X, Y, Z), Gaussian with mean 0 and variance 1, smooth over `scale` mm."""
        kernels = []
        for n in shape:
            x = torch.arange(n, device=self.device) * (spacing / scale)
            knots = torch.arange(-2, math.ceil(n * spacing / scale) + 3, device=self.device)
            kernel = torch.exp(-(((x[:, None] - knots) / 0.7) ** 2) / 2)
            kernels.append(kernel / kernel.square().sum(1, keepdim=True).sqrt())
        field = self.normal(*(kernel.shape[1] for kernel in kernels))
        for kernel in reversed(kernels):
            field = torch.tensordot(kernel, field, dims=([1], [2]))
        return field


@dataclass(frozen=True, eq=False)
class Head:
    """A brain, and the place of a tumor, in the block (X, Y, Z) of the images that they fill.

    All that needs no neighbors is computed for the brain's N voxels only, half of the block.
    """

    chance: Chance
    spacing: float
    box: Box
    inside: Tensor
    """(N,) the brain's voxels, as indices into the flattened block."""
    brain: Tensor
    """(4, N) tissue fractions."""
    midline: Tensor
    """(N,) mm from the plane between the hemispheres."""
    center: Sequence[float]
    """Of the tumor, in voxels of the block."""
    radius: float
    """Of the tumor, mm."""

    def field(self, scale: float) -> Tensor:
        """A random field (N,), see `Chance`."""
        return self.take(self.chance.field(scale, self.box.size, self.spacing))

    def take(self, volume: Tensor) -> Tensor:
        """(..., X, Y, Z) -> (..., N)."""
        return volume.flatten(-3).index_select(-1, self.inside)

    def put(self, values: Tensor) -> Tensor:
        """(N,) -> (X, Y, Z), 0 outside the brain."""
        block = values.new_zeros(math.prod(self.box.size))
        return block.index_copy_(0, self.inside, values).view(self.box.size)

    def whole(self, values: Tensor, shape: Shape) -> Tensor:
        """(N,) -> the whole image, 0 outside the brain."""
        image = values.new_zeros(shape)
        image[_slices(self.box)] = self.put(values)
        return image


def _deformed(anatomy: Anatomy, shape: Shape, spacing: float, chance: Chance) -> Head:
    """A random pose, size and shape of the brain, and a tumor that pushes it aside."""
    stride = max(1, round(NODE_MM / spacing))
    a, b, c = (math.ceil((n - 1) / stride) + 1 for n in shape)
    axes = [
        (torch.arange(count, device=chance.device) * stride - (n - 1) / 2) * spacing
        for count, n in zip((a, b, c), shape, strict=True)
    ]
    nodes = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # mm from the middle of the grid
    turn = np.eye(3) + 0.035 * chance.numbers.normal(size=(3, 3)).clip(-2, 2)
    size = BRAIN_MM3 * math.exp(chance.uniform(-0.1, 0.1))
    turn *= (anatomy.volume_mm3 / size / np.linalg.det(turn)) ** (1 / 3)
    if chance.uniform(0, 1) < 0.5:
        turn[0] *= -1
    matrix = torch.from_numpy(turn).to(nodes)
    middle = torch.tensor(anatomy.middle).to(nodes)[:, None, None, None]
    source = torch.tensordot(matrix, nodes, 1) + middle  # where in the anatomy a node comes from
    for scale, amplitude in ((45, 3.0), (18, 1.2)):
        for axis in source:
            axis += amplitude * chance.field(scale, (a, b, c), stride * spacing)

    tissues = anatomy.to(chance.device)
    weights = tissues.sample(source)[Tissue.WHITE] ** 3 * (nodes[2] > -12)  # above the cerebellum
    likely = weights.flatten().cpu().double().numpy() + 1e-9
    picked = chance.numbers.choice(likely.size, p=likely / likely.sum())
    i, j, k = np.unravel_index(picked, (a, b, c))
    radius = chance.uniform(8, 14) + chance.uniform(0, 1) ** 2 * 14
    offset = nodes - nodes[:, i, j, k].view(3, 1, 1, 1)
    reach = torch.exp(-offset.square().sum(0) / (2 * (1.5 * radius) ** 2))
    source -= chance.uniform(0.05, 0.3) * reach * torch.tensordot(matrix, offset, 1)

    near = functional.max_pool3d(tissues.sample(source).sum(0, keepdim=True), 3, 1, 1)[0] > 0
    block = Box.around(near.cpu().numpy())
    source = _between(source[:, *_slices(block)], stride)
    x, y, z = (stride * first for first in block.start)
    source = source[:, : shape[0] - x, : shape[1] - y, : shape[2] - z]
    brain = tissues.sample(source)
    inside = (brain.sum(0) > 0.5).flatten().nonzero()[:, 0]
    return Head(
        chance,
        spacing,
        Box((x, y, z), (brain.shape[1], brain.shape[2], brain.shape[3])),
        inside,
        brain.flatten(1).index_select(1, inside),
        source[0].flatten().index_select(0, inside) - anatomy.middle[0],
        [stride * int(n - first) for n, first in zip((i, j, k), block.start, strict=True)],
        radius,
    )


def _individual(head: Head) -> Tensor:
    """Fractions (4, N) with folds and ventricles of one person: wider here, narrower there."""
    logits = torch.log(head.brain + 1e-3)
    logits[Tissue.CSF] += head.chance.uniform(-1.1, 0.6)  # young to old
    for tissue in (Tissue.CSF, Tissue.CORTEX):
        logits[tissue] += head.field(4) + 0.5 * head.field(10)
    return torch.softmax(logits, 0)


def _vessels(brain: Tensor, head: Head) -> Tensor:
    """Fraction (N,) of blood: winding tubes in the fluid, more at the surface; the sinus.

    A tube is where two random fields are both near zero.
    """
    stride = max(1, round(4 / head.spacing))
    mask = head.put(torch.ones_like(head.midline))
    outside = 1 - head.take(_fine(_coarse(mask, stride), stride, head.box.size))
    tubes = torch.exp(-(head.field(9).square() + head.field(9).square()) / (0.08 + 0.3 * outside))
    sinus = torch.exp(-head.midline.square() / (2 * 2.5**2)) * (2 * outside).clamp(max=1)
    return brain[Tissue.CSF] * torch.maximum(tubes, sinus)


def _tumor(brain: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Fractions (3, N) in the order of TUMOR, and labels (N,)."""
    chance, radius = head.chance, head.radius
    edge = 0.5 * head.spacing  # mm over which a boundary is shared between voxels
    stretch = head.spacing * np.exp(0.2 * chance.numbers.normal(size=3))
    x, y, z = (
        ((torch.arange(n, device=chance.device) - middle) * float(mm)).square()
        for n, middle, mm in zip(head.box.size, head.center, stretch, strict=True)
    )
    distance = head.take((x[:, None, None] + y[:, None] + z).sqrt())
    depth = radius * (1 + 0.25 * head.field(radius) + 0.08 * head.field(5)) - distance
    depth -= 4 * brain[Tissue.CSF]  # does not grow into ventricles and sulci
    core = torch.sigmoid(depth / edge)
    rim = chance.uniform(2, 5) + 1.5 * head.field(9) + head.field(4)
    if chance.uniform(0, 1) < 0.15:
        rim -= 100  # no enhancement: low grade
    necrosis = core * torch.sigmoid((depth - rim) / edge)

    # Edema seeps from the core through white matter: a front that cortex and fluid hold back.
    stride = max(1, round(2 / head.spacing))
    loose = brain[Tissue.WHITE] + 0.4 * brain[Tissue.DEEP] + 0.3 * brain[Tissue.CORTEX]
    passes = 0.3 + 0.7 * _coarse(head.put(loose), stride)
    source = level = _coarse(head.put(core), stride)
    for _ in range(20):
        level = torch.maximum(source, passes * _mean(level))
    level = head.take(_fine(level.clamp(min=1e-9).log(), stride, head.box.size))
    extent = chance.uniform(2, 10)
    edema = torch.sigmoid((level + extent + 0.8 * head.field(6)) / 0.6) * loose * (1 - core)

    labels = torch.zeros_like(core, dtype=torch.uint8)
    labels.masked_fill_(edema > 0.35, ED).masked_fill_(core > 0.5, ET)
    labels.masked_fill_((core > 0.5) & (necrosis > core / 2), NCR)
    return torch.stack([necrosis, core - necrosis, edema]), labels


def _mix(brain: Tensor, tumor: Tensor, blood: Tensor) -> Tensor:
    """Fractions of all tissues (8, N), sum 1: the tumor in place of the brain."""
    brain = brain.clone()
    brain[Tissue.CSF] -= blood
    healthy = torch.cat([brain, blood[None]]) * (1 - tumor.sum(0))
    return torch.cat([healthy, tumor])


def _signals(fractions: Tensor, head: Head) -> dict[Modality, Tensor]:
    """The signed signal (N,) of each sequence.

    Relaxation times and sequences vary from case to case, and tissue a little from place to place.
    """
    chance = head.chance
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
    texture = torch.stack([0.04 * head.field(25) + 0.025 * head.field(4) for _ in range(3)])
    lumpy = texture + 0.12 * head.field(7) + 0.08 * head.field(3)
    for local in (texture, lumpy):
        local[2] /= 3  # water content varies less
        local.exp_()
    uptake: dict[Tissue, Tensor | float] = {  # of contrast agent, mmol/l
        Tissue.ENHANCING: chance.uniform(0.08, 0.35) * torch.exp(0.5 * head.field(5)),
        Tissue.BLOOD: chance.uniform(0.5, 2),
    }
    signals = {modality: torch.zeros_like(head.midline) for modality in sequences}
    for tissue, relaxation in RELAXATION.items():
        sizes = relaxation.t1(field), relaxation.t2, relaxation.pd
        spread, local = (0.15, lumpy) if tissue in TUMOR else (0.06, texture)
        t1, t2, pd = (
            size * math.exp(chance.uniform(-spread, spread)) * change
            for size, change in zip(sizes, local, strict=True)
        )
        for modality, sequence in sequences.items():
            gadolinium = modality is Modality.T1C and tissue in uptake
            now = enhanced(t1, uptake[tissue]) if gadolinium else t1
            signals[modality].addcmul_(fractions[tissue], sequence(now, t2, pd))
    return signals


def _acquire(signal: Tensor, head: Head) -> Tensor:
    """Magnitude image (N,): bias field, slices of some thickness, Rician noise.

    Half of the images have slices of 1 mm, or of one voxel where that is more.
    """
    chance = head.chance
    noise = chance.uniform(0.01, 0.05) * signal.abs().median()
    signal = signal * torch.exp(chance.uniform(0.03, 0.15) * head.field(70))
    axis = 2 if chance.uniform(0, 1) < 0.8 else int(chance.uniform(0, 3))
    thick = chance.uniform(1, 6 if axis == 2 else 4) if chance.uniform(0, 1) < 0.5 else 1
    if thick <= head.spacing:
        return rician(signal, noise * chance.normal(2, *signal.shape))
    mm = head.box.size[axis] * head.spacing
    place = torch.arange(head.box.size[axis], device=chance.device) * head.spacing
    slices = torch.arange(math.ceil(mm / thick) + 1, device=chance.device) * thick
    apart = (place[:, None] - slices) / thick
    profile = torch.exp(-((apart / 0.42) ** 2) / 2)  # full width at half maximum: one slice
    inside = torch.tensordot(head.put(torch.ones_like(signal)), profile, dims=([axis], [0]))
    acquired = torch.tensordot(head.put(signal), profile, dims=([axis], [0]))
    acquired /= inside.clamp(min=1e-3)  # the brain alone: what was around it is stripped later
    image = rician(acquired, noise * chance.normal(2, *acquired.shape))
    between = (1 - apart.abs()).clamp(min=0)
    resampled: Tensor = torch.tensordot(image, between, dims=([2], [1]))
    return head.take(resampled.movedim(-1, axis))


def rician(signal: Tensor, noise: Tensor) -> Tensor:
    """The magnitude of a real signal (...) plus complex noise, its two parts (2, ...)."""
    return torch.hypot(signal + noise[0], noise[1])


def _between(nodes: Tensor, stride: int) -> Tensor:
    """(3, X, Y, Z) at every `stride`-th voxel -> at every voxel from the first to the last."""
    size = [(n - 1) * stride + 1 for n in nodes.shape[1:]]
    return functional.interpolate(nodes[None], size, mode="trilinear", align_corners=True)[0]


def _coarse(volume: Tensor, stride: int) -> Tensor:
    """(X, Y, Z) -> (X/stride, ...), block means."""
    return functional.avg_pool3d(volume[None, None], stride, ceil_mode=True)[0, 0]


def _fine(volume: Tensor, stride: int, shape: Shape) -> Tensor:
    """(X/stride, ...) -> (X, Y, Z), linear; back from `_coarse`."""
    fine: Tensor = functional.interpolate(volume[None, None], scale_factor=stride, mode="trilinear")
    return fine[0, 0, : shape[0], : shape[1], : shape[2]]


def _mean(volume: Tensor) -> Tensor:
    """(X, Y, Z) of 3 x 3 x 3 neighbors, zeros around. Several times as fast as `avg_pool3d`."""
    total = functional.pad(volume, [1] * 6)
    for axis, n in enumerate(volume.shape):
        total = total.narrow(axis, 0, n) + total.narrow(axis, 1, n) + total.narrow(axis, 2, n)
    return total / 27


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))
