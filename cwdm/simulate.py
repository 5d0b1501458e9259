"""Simulated cases: four contrasts and a glioma, all from one anatomy.

The line: anatomy -> deformed tissue fractions -> tumour -> signal of each sequence -> scanner
(slices, bias field, noise, gain). Everything random comes from one generator per case.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional

from cwdm.anatomy import Anatomy
from cwdm.modality import Modality
from cwdm.relaxation import (
    CONSTANTS,
    Tissue,
    enhanced_t1,
    inversion_recovery,
    nulling_time,
    spin_echo,
)

SHAPE = (240, 240, 155)
NCR, ED, ET = 1, 2, 3


@dataclass(frozen=True, eq=False)
class SimulatedCase:
    id: str
    images: dict[Modality, NDArray[np.int16]]
    segmentation: NDArray[np.uint8]
    affine: NDArray[np.float64]


class Dice:
    """Random numbers and random fields of one case on one grid."""

    def __init__(self, seed: int, index: int, shape, spacing: float, device) -> None:
        state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        self.generator = Generator(device).manual_seed(int(state >> np.uint64(1)))
        self.shape, self.spacing, self.device = shape, spacing, torch.device(device)

    def uniform(self, low: float, high: float) -> float:
        u = torch.rand((), generator=self.generator, device=self.device).item()
        return low + (high - low) * u

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def field(self, scale: float) -> Tensor:
        """Smooth Gaussian noise (X, Y, Z), mean 0, variance 1, correlated over `scale` mm."""
        weights = []
        for n in self.shape:
            x = torch.arange(n, device=self.device) * (self.spacing / scale)
            knots = torch.arange(-2, math.ceil(n * self.spacing / scale) + 3, device=self.device)
            w = torch.exp(-0.5 * ((x[:, None] - knots) / 0.7) ** 2)
            weights.append(w / w.square().sum(1, keepdim=True).sqrt())
        field = self.normal(*(w.shape[1] for w in weights))
        for w in weights:
            field = torch.tensordot(field, w, dims=([0], [1]))
        return field


def simulate(
    seed: int,
    index: int,
    anatomy: Anatomy,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing: float = 1.0,
    device: str | torch.device = "cpu",
) -> SimulatedCase:
    dice = Dice(seed, index, shape, spacing, device)
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing
    world = _grid(shape, spacing, dice.device)
    source = _deform(world, anatomy, dice)
    white = _sample(anatomy, source[::4, ::4, ::4])[Tissue.WHITE]
    centre = _tumour_centre(world[::4, ::4, ::4], white, dice)
    radius = 8 + 17 * dice.uniform(0, 1) ** 1.3
    offset = world - centre
    distance = offset.square().sum(-1).sqrt()
    push = dice.uniform(0.05, 0.3)
    source -= push * offset * torch.exp(-0.5 * (distance / (1.5 * radius)) ** 2)[..., None]
    brain = _sample(anatomy, source)
    mask = brain.sum(0) > 0.5
    brain = _individual(brain, dice)
    fractions, segmentation = _tumour(brain, mask, offset, radius, dice)
    images = {}
    gain = math.exp(dice.uniform(math.log(300), math.log(2500)))
    for modality, signal in _signals(fractions[:, mask], mask, dice).items():
        volume = torch.zeros(shape, device=dice.device)
        volume[mask] = signal
        volume = _acquire(volume, mask, dice)
        volume = volume / volume[mask].median() * gain * math.exp(dice.uniform(-0.7, 0.7))
        volume = volume.round().clamp(1, 32767) * mask
        images[modality] = volume.to(torch.int16).cpu().numpy()
    return SimulatedCase(
        f"SIM-{seed:05d}-{index:03d}", images, (segmentation * mask).cpu().numpy(), affine
    )


def _grid(shape, spacing: float, device) -> Tensor:
    """(X, Y, Z, 3): mm from the centre of the grid, RAS+."""
    axes = [
        torch.arange(n, device=device, dtype=torch.float32).sub((n - 1) / 2) * step
        for n, step in zip(shape, (-spacing, -spacing, spacing), strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _deform(world: Tensor, anatomy: Anatomy, dice: Dice) -> Tensor:
    """(X, Y, Z, 3): mm in the anatomy for each voxel; a random affine and a smooth deformation."""
    inside = anatomy.fractions.sum(0) > 0.5
    voxel = torch.from_numpy(np.linalg.norm(anatomy.affine[:3, :3], axis=0)).float()
    volume = inside.sum() * voxel.prod()
    index = inside.nonzero().float()
    middle = (index.min(0).values + index.max(0).values) / 2
    a = torch.from_numpy(anatomy.affine).float()
    middle = a[:3, :3] @ middle + a[:3, 3]
    wanted = 1.5e6 * math.exp(dice.uniform(-0.12, 0.12))
    scale = (volume / wanted) ** (1 / 3)
    matrix = torch.eye(3) + 0.05 * dice.normal(3, 3).cpu()
    matrix *= scale / matrix.det() ** (1 / 3)
    if dice.uniform(0, 1) < 0.5:
        matrix[:, 0] *= -1
    shift = torch.tensor([dice.uniform(-3, 3) for _ in range(3)])
    source = world @ matrix.T.to(world) + (middle + shift).to(world)
    for scale_mm, amplitude in ((45.0, 3.5), (18.0, 1.2)):
        source += amplitude * torch.stack([dice.field(scale_mm) for _ in range(3)], -1)
    return source


def _sample(anatomy: Anatomy, world: Tensor) -> Tensor:
    """(4, X, Y, Z) tissue fractions at world points (X, Y, Z, 3)."""
    to_index = torch.from_numpy(np.linalg.inv(anatomy.affine)).to(world)
    index = world @ to_index[:3, :3].T + to_index[:3, 3]
    size = torch.tensor(anatomy.fractions.shape[1:]).to(world)
    grid = (2 * index / (size - 1) - 1).flip(-1)
    return functional.grid_sample(
        anatomy.fractions.to(world)[None], grid[None], align_corners=True
    )[0]


def _tumour_centre(world: Tensor, white: Tensor, dice: Dice) -> Tensor:
    up = world[..., 2] > -15  # above the cerebellum
    candidates = world[(white > 0.6) & up]
    pick = torch.randint(len(candidates), (), generator=dice.generator, device=dice.device)
    return candidates[pick]


def _individual(brain: Tensor, dice: Dice) -> Tensor:
    """Sharpen the fractions and vary them, so that folds are one person's and not an average."""
    logits = torch.log(brain + 1e-3)
    for tissue, bias in ((Tissue.CSF, dice.uniform(-0.3, 1.2)), (Tissue.CORTEX, 0.0)):
        logits[tissue] += bias + 1.0 * dice.field(4.0) + 0.5 * dice.field(10.0)
    return torch.softmax(logits, 0)


def _tumour(brain, mask, offset, radius, dice):
    """Fractions (8, X, Y, Z) with vessels and tumour, and the labels (X, Y, Z)."""
    stretch = torch.tensor([math.exp(dice.uniform(-0.25, 0.25)) for _ in range(3)]).to(offset)
    distance = (offset * stretch).square().sum(-1).sqrt()
    inner = (
        radius * (1 + 0.22 * dice.field(radius)) + 0.09 * radius * dice.field(5.0) - distance
    )  # mm inside the core
    inner -= 4 * brain[Tissue.CSF]
    core = torch.sigmoid(inner / 0.5)
    kind = dice.uniform(0, 1)
    rim = dice.uniform(2.5, 6.0) * (1 + 0.5 * dice.field(9.0)) + 1.0 * dice.field(4.0)
    if kind < 0.15:
        rim = torch.zeros_like(rim) - 3  # no enhancement
    necrosis = torch.sigmoid((inner - rim) / 0.5) * core
    enhancing = core - necrosis
    # oedema creeps through white matter
    pool = functional.avg_pool3d
    flow = (brain[Tissue.WHITE] + 0.12 * brain[Tissue.CORTEX] + 0.25 * brain[Tissue.DEEP]) * mask
    coarse = pool(flow[None, None], 2, ceil_mode=True)
    seed = pool(core[None, None], 2, ceil_mode=True)
    level = seed
    for _ in range(round(dice.uniform(5, 20))):
        level = torch.maximum(seed, pool(level, 3, 1, 1) * (0.3 + 0.7 * coarse))
    level = functional.interpolate(
        torch.log(level + 1e-6), size=mask.shape, mode="trilinear", align_corners=False
    )[0, 0]
    threshold = dice.uniform(-7, -2.5)
    oedema = torch.sigmoid((level - threshold + 0.6 * dice.field(6.0)) / 0.3)
    oedema = oedema * (brain[Tissue.WHITE] + 0.35 * brain[Tissue.CORTEX] + 0.5 * brain[Tissue.DEEP])
    oedema = oedema * (1 - core)
    tube = dice.field(9.0).square() + dice.field(9.0).square()
    blood = torch.exp(-tube / 0.06) * brain[Tissue.CSF] * (1 - core)
    csf = brain[Tissue.CSF] - blood * 1.0
    solid = torch.stack([csf, *brain[1:]]) * (1 - core - oedema).clamp(0, 1)
    # oedema replaced solid tissue only
    out = torch.cat([solid, torch.stack([blood, necrosis, enhancing, oedema])])
    out = out / out.sum(0).clamp(min=1e-6)
    labels = torch.zeros(mask.shape, dtype=torch.uint8, device=mask.device)
    labels[out[Tissue.OEDEMA] > 0.35] = ED
    labels[necrosis > 0.5] = NCR
    labels[enhancing > 0.5] = ET
    return out, labels


def _signals(fractions: Tensor, mask: Tensor, dice: Dice) -> dict[Modality, Tensor]:
    """Signed signal (N,) of each sequence for N voxels with fractions (8, N)."""
    field = 1.5 if dice.uniform(0, 1) < 0.5 else 3.0
    texture = [
        (0.04 * dice.field(25.0) + 0.025 * dice.field(4.0))[mask] for _ in range(3)
    ]

    def vary(value: float) -> float:
        return value * math.exp(dice.uniform(-0.08, 0.08))

    def sequence(t1_of, signal) -> Tensor:
        total = torch.zeros_like(texture[0])
        for tissue in Tissue:
            t1 = t1_of(tissue)
            t2 = times[tissue][1] * (1 + texture[1])
            pd = times[tissue][2] * (1 + 0.3 * texture[2])
            total += fractions[tissue] * signal(t1, t2, pd)
        return total

    times = {
        tissue: (vary(c.t1_at(field)), vary(c.t2), vary(c.pd)) for tissue, c in CONSTANTS.items()
    }
    uptake = {
        Tissue.ENHANCING: dice.uniform(0.1, 0.5) * torch.exp(0.4 * dice.field(6.0))[mask],
        Tissue.BLOOD: dice.uniform(0.8, 2.5),
        Tissue.NECROSIS: dice.uniform(0.0, 0.06),
    }

    def native(tissue: Tissue) -> Tensor:
        return times[tissue][0] * (1 + texture[0])

    def contrast(tissue: Tissue) -> Tensor:
        return enhanced_t1(native(tissue), uptake.get(tissue, 0.0))

    t1w = [{"tr": dice.uniform(450, 750), "te": dice.uniform(8, 16)} for _ in range(2)]
    t2w = {"tr": dice.uniform(3500, 8000), "te": dice.uniform(85, 140)}
    tr = dice.uniform(8000, 10000)
    ti = nulling_time(times[Tissue.CSF][0], tr) * dice.uniform(0.93, 1.0)
    flair = {"tr": tr, "te": dice.uniform(90, 140), "ti": ti}
    return {
        Modality.T1N: sequence(native, lambda *x: spin_echo(*x, **t1w[0])),
        Modality.T1C: sequence(contrast, lambda *x: spin_echo(*x, **t1w[1])),
        Modality.T2W: sequence(native, lambda *x: spin_echo(*x, **t2w)),
        Modality.T2F: sequence(native, lambda *x: inversion_recovery(*x, **flair)),
    }


def _acquire(image: Tensor, mask: Tensor, dice: Dice) -> Tensor:
    """Slices of some thickness, bias field and Rician noise; back on the grid."""
    level = image[mask].median()
    image = image * torch.exp(dice.uniform(0.03, 0.15) * dice.field(70.0))
    thickness = dice.uniform(1, 5) if dice.uniform(0, 1) < 0.5 else 1.0
    axis = int(dice.uniform(0, 3)) if dice.uniform(0, 1) < 0.3 else 2
    sigma = level * dice.uniform(0.01, 0.04)
    n = image.shape[axis]
    x = torch.arange(n, device=image.device, dtype=torch.float32) * dice.spacing
    step = max(thickness, dice.spacing)
    c = torch.arange(0, math.ceil(n * dice.spacing / step) + 1, device=image.device) * step
    away = (x[:, None] - c) / step
    down = torch.exp(-0.5 * (away / 0.42) ** 2) if step > dice.spacing else (away.abs() < 0.5).float()
    up = (1 - away.abs()).clamp(min=0)
    weight = torch.tensordot(mask.float(), down, dims=([axis], [0]))
    slices = torch.tensordot(image * mask, down, dims=([axis], [0])) / weight.clamp(min=1e-3)
    noise = sigma * dice.normal(2, *slices.shape)
    slices = ((slices + noise[0]).square() + noise[1].square()).sqrt()
    up = up / up.sum(1, keepdim=True)
    return torch.tensordot(slices, up, dims=([2], [1])).movedim(-1, axis)
