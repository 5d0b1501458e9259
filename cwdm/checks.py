"""Whether the images of a case are fit to learn from: skull-stripped, co-registered, no copies.

Co-registration is measured, without an atlas and on differing contrasts: each image is predicted,
voxel by voxel, from the others, and then moved rigidly to where that prediction explains it best
(Gauss-Newton on the share of its variance that is left). An image that has to move far, and is
explained much better there, is out of place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cwdm.modality import Modality
from cwdm.volume import Volume, brain_mask

__all__ = ["Finding", "findings"]

_LARGEST_BRAIN_ML = 2200
"""A head has 3500 and more, what is inside the largest skulls about 2000."""
_SMALLEST_BRAIN_ML, _FEWEST_VOXELS = 50, 24
"""Of a brain, and along each axis of its grid: in less there is too little to align."""
_SPACING_MM = 2.0
"""Images are averaged to voxels of about this size before they are aligned."""
_POINTS = 25_000
"""About how many voxels are compared."""
_COPY = 1 - 1e-6
"""Correlation of an image with a copy of it in another unit, rounded."""
_OUT_OF_PLACE_MM = 1.2
"""Least displacement, times the root of what it gains, of an image out of place.

Real cases, which are aligned within a millimeter or two, stay below.
"""
_MIRRORED = 0.05
"""Share of an image's variance that its mirror image must let the others explain in addition."""


class Finding(NamedTuple):
    """Why a case is not fit."""

    kind: Literal["skull", "registration", "duplicate"]
    message: str
    """One line: which file, what was found, what was expected."""


def findings(volumes: Mapping[Modality, Volume]) -> list[Finding]:
    """What is wrong with the images of a case, which lie on one grid; nothing if it is fit.

    "skull": an image shows more than a brain. "duplicate": two images are one, perhaps in another
    unit. "registration": an image is out of place by some millimeters or degrees, or mirrored; the
    one for which this is clearest. In grids below 24 voxels along an axis, and brains below 50 ml,
    this cannot be told. Masks that differ are no finding.
    """
    masks = {modality: brain_mask(volume) for modality, volume in volumes.items()}
    return [*_skulls(volumes, masks), *_duplicates(volumes), *_registration(volumes, masks)]


def _skulls(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    found = []
    for modality, volume in volumes.items():
        ml = masks[modality].sum() * abs(np.linalg.det(volume.affine[:3, :3])) / 1000
        if ml > _LARGEST_BRAIN_ML:
            message = (
                f"{volume.path}: found {ml / 1000:.1f} l that are not background, expected a "
                f"skull-stripped brain of at most {_LARGEST_BRAIN_ML / 1000:.1f} l"
            )
            found.append(Finding("skull", message))
    return found


def _duplicates(volumes: Mapping[Modality, Volume]) -> list[Finding]:
    found = []
    for a, b in combinations(volumes.values(), 2):
        step = max(1, a.voxels.size // 1_000_000)  # a million voxels tell
        x, y = (each.voxels.ravel()[::step].astype(np.float64) for each in (a, b))
        x, y = x - x.mean(), y - y.mean()
        if abs(x @ y) >= _COPY * np.linalg.norm(x) * np.linalg.norm(y):
            message = f"{a.path} and {b.path}: found the same image twice, expected two modalities"
            found.append(Finding("duplicate", message))
    return found


def _registration(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    if len(volumes) < 2:
        return []
    affine = next(iter(volumes.values())).affine
    common = np.logical_and.reduce(list(masks.values()))
    ml = common.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    if min(common.shape) < _FEWEST_VOXELS or ml < _SMALLEST_BRAIN_ML:
        return []
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    factors = [max(1, round(_SPACING_MM / each)) for each in spacing]
    (box,) = ndimage.find_objects(np.logical_or.reduce(list(masks.values())).astype(np.uint8))
    images = {
        modality: _Image.of(volume.voxels[box], masks[modality][box], factors)
        for modality, volume in volumes.items()
    }
    return _misplaced(volumes, images, spacing * factors)


@dataclass(frozen=True, eq=False)
class _Image:
    """A coarse image of the brain, from 0 to 1."""

    values: NDArray[np.float32]
    """(X, Y, Z), of no meaning where not `inside`."""
    inside: NDArray[np.bool_]
    """(X, Y, Z): in the brain."""

    @classmethod
    def of(
        cls, voxels: NDArray[np.float32], mask: NDArray[np.bool_], factors: list[int]
    ) -> "_Image":
        """Mean inside the mask over blocks of so many voxels, cut off at 1 and 99 %."""
        share = _block_means(mask.astype(np.float32), factors)
        values = _block_means(voxels * mask, factors) / np.maximum(share, 1e-3)
        low, high = np.quantile(values[share > 0.5], [0.01, 0.99])
        values = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        return cls(values, share > 0.5)

    def mirrored(self) -> "_Image":
        """Left and right swapped."""
        return _Image(self.values[::-1], self.inside[::-1])


def _block_means(voxels: NDArray[np.float32], factors: list[int]) -> NDArray[np.float32]:
    """(X, Y, Z) -> means over blocks; what fills no block is left out."""
    x, y, z = (n // factor for n, factor in zip(voxels.shape, factors, strict=True))
    a, b, c = factors
    blocks = voxels[: x * a, : y * b, : z * c].reshape(x, a, y, b, z, c)
    means: NDArray[np.float32] = blocks.mean(axis=(1, 3, 5))
    return means


def _misplaced(
    volumes: Mapping[Modality, Volume],
    images: Mapping[Modality, _Image],
    spacing: NDArray[np.float64],
) -> list[Finding]:
    fits, mirrored = {}, {}
    for modality, image in images.items():
        others = [other for key, other in images.items() if key != modality]
        fits[modality] = _align(image, others, spacing)
        mirrored[modality] = _align(image.mirrored(), others, spacing)
    swapped = max(images, key=lambda each: fits[each].unexplained - mirrored[each].unexplained)
    if fits[swapped].unexplained - mirrored[swapped].unexplained > _MIRRORED:
        message = (
            f"{volumes[swapped].path}: found left and right swapped with regard to the other "
            f"images, expected one orientation"
        )
        return [Finding("registration", message)]
    worst = max(images, key=lambda each: fits[each].score)
    if fits[worst].score > _OUT_OF_PLACE_MM:
        message = (
            f"{volumes[worst].path}: found it about {fits[worst].moved:.0f} mm out of place with "
            f"regard to the other images, expected co-registered images"
        )
        return [Finding("registration", message)]
    return []


class _Fit(NamedTuple):
    """How well an image is explained by the others, and where."""

    moved: float
    """Mean displacement over the brain, mm."""
    unexplained: float
    """Share of its variance that the others do not explain, there."""
    gain: float
    """By what share of itself that is less than at the outset."""

    @property
    def score(self) -> float:
        return self.moved * math.sqrt(max(self.gain, 0))


def _align(image: _Image, others: list[_Image], spacing: NDArray[np.float64]) -> _Fit:
    """Move `image` rigidly to where the others explain it best."""
    inside = np.logical_and.reduce([each.inside for each in (image, *others)])
    voxels = np.argwhere(ndimage.binary_erosion(inside))
    voxels = voxels[:: max(1, len(voxels) // _POINTS)]
    middle = (voxels * spacing).mean(0)
    points = voxels * spacing - middle  # (N, 3) mm
    radius = np.sqrt((points**2).sum(1).mean())
    basis = _basis([each.values[tuple(voxels.T)] for each in others], points / radius)
    layers = [image.values, *np.gradient(image.values, *spacing), image.inside.astype(np.float32)]
    rotation, shift = np.eye(3), np.zeros(3)
    first = last = math.inf
    for _ in range(8):
        moved = points @ rotation.T + shift
        where = ((moved + middle) / spacing).T
        y, *gradient, share = (ndimage.map_coordinates(each, where, order=1) for each in layers)
        seen = share > 0.99
        if seen.sum() < len(seen) / 2:  # astray
            break
        slope = np.stack(gradient, 1)
        jacobian = np.concatenate([slope, np.cross(moved, slope)], 1)  # by shift and rotation
        centered = np.column_stack([y, jacobian])[seen].astype(np.float64)
        centered -= centered.mean(0)
        known = basis[seen]
        residual = centered - known @ np.linalg.lstsq(known.T @ known, known.T @ centered)[0]
        last = float(residual[:, 0] @ residual[:, 0] / (centered[:, 0] @ centered[:, 0]))
        first = last if math.isinf(first) else first
        # The step that makes the residual small, corrected for what it takes from the variance.
        downhill = last * centered[:, 1:].T @ centered[:, 0] - residual[:, 1:].T @ residual[:, 0]
        step = np.linalg.lstsq(residual[:, 1:].T @ residual[:, 1:], downhill)[0]
        length = np.hypot(np.linalg.norm(step[:3]), np.linalg.norm(step[3:]) * radius)
        step *= min(1, 2 * _SPACING_MM / max(length, 1e-9))
        turn = Rotation.from_rotvec(step[3:]).as_matrix()
        rotation, shift = turn @ rotation, turn @ shift + step[:3]
        if length < 0.1:
            break
    moved = points @ rotation.T + shift
    return _Fit(float(np.linalg.norm(moved - points, axis=1).mean()), last, 1 - last / first)


def _basis(values: list[NDArray[np.float32]], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K): polynomials of the other images' values, and of the place for shading."""
    x, y, z = points.T
    columns = [np.ones(len(points)), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z]
    for value in values:
        columns += [value, value**2, value**3]
    columns += [a * b for a, b in combinations(values, 2)]
    return np.stack(columns, 1).astype(np.float64)
