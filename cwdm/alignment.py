"""Whether an image is where the others of its case are, without an atlas and on any contrast.

Each image is predicted, voxel by voxel, from the others, and then moved rigidly to where that
prediction explains it best (Gauss-Newton on the share of its variance that is left). An image that
has to move far, and is explained much better there, is out of place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cwdm.spoilt import block_means

__all__ = ["COARSE_MM", "FINE_MM", "Fit", "Image", "align"]

FINE_MM, COARSE_MM = 2.0, 6.0
"""Images are averaged to voxels of about this size: fine ones tell, coarse ones reach further."""
_POINTS = 12_000
"""About how many voxels are compared."""
_FEWEST_POINTS = 200
"""In fewer the others explain everything by chance."""
_STEPS = 8
"""Of Gauss-Newton; most fits take three to six."""


@dataclass(frozen=True, eq=False)
class Image:
    """A coarse image of the brain, from 0 to 1."""

    values: NDArray[np.float32]
    """(X, Y, Z), of no meaning where not `inside`."""
    inside: NDArray[np.bool_]
    """(X, Y, Z): in the brain."""
    spacing: NDArray[np.float64]
    """(3,) mm."""

    @classmethod
    def of(
        cls,
        voxels: NDArray[np.float32],
        mask: NDArray[np.bool_],
        spacing: NDArray[np.float64],
        coarse_mm: float,
    ) -> "Image":
        """Means inside the mask over blocks of about that size, cut off at 1 and 99 %.

        They are blurred a little: else an image with noise would seem to gain by moving half a
        voxel, since interpolation averages the noise.
        """
        factors = [max(1, round(coarse_mm / each)) for each in spacing]
        share = ndimage.gaussian_filter(block_means(mask.astype(np.float32), factors), 0.5)
        values = ndimage.gaussian_filter(block_means(voxels * mask, factors), 0.5)
        values /= np.maximum(share, 1e-3)
        low, high = np.quantile(values[share > 0.5], [0.01, 0.99])
        values = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        return cls(values, share > 0.5, spacing * factors)

    def mirrored(self) -> "Image":
        """Left and right swapped."""
        return replace(self, values=self.values[::-1], inside=self.inside[::-1])


class Fit(NamedTuple):
    """How well an image is explained by the others, and where."""

    turn: NDArray[np.float64]
    """(3, 3) rotation about the corner of the grid."""
    shift: NDArray[np.float64]
    """(3,) mm."""
    moved: float
    """Mean displacement over the brain, mm."""
    outset: float
    """Share of the image's variance that the others do not explain, before it has moved."""
    unexplained: float
    """The same, after."""

    @property
    def score(self) -> float:
        """mm; a move counts as far as it gains."""
        return self.moved * math.sqrt(max(1 - self.unexplained / max(self.outset, 1e-9), 0))


def align(image: list[Image], others: list[list[Image]]) -> Fit:
    """Move an image rigidly to where the others explain it best; each fine and coarse.

    From where it is, and from where the coarse images lead if that is further than the fine ones
    can see. Where they end is compared.
    """
    fine, coarse = zip(*others, strict=True)
    best = _descend(image[0], fine, np.eye(3), np.zeros(3))
    guess = _descend(image[1], coarse, np.eye(3), np.zeros(3))
    if guess.moved > 2 * FINE_MM:
        again = _descend(image[0], fine, guess.turn, guess.shift)
        if again.unexplained < best.unexplained:
            return again._replace(outset=best.outset)
    return best


def _descend(
    image: Image,
    others: Sequence[Image],
    turn: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> Fit:
    """The nearest optimum, from a first guess."""
    inside = np.logical_and.reduce([each.inside for each in (image, *others)])
    voxels = np.argwhere(ndimage.binary_erosion(inside))
    if len(voxels) < _FEWEST_POINTS:
        return Fit(turn, shift, moved=0, outset=1, unexplained=1)
    voxels = voxels[:: max(1, len(voxels) // _POINTS)]
    points = (voxels + 0.5) * image.spacing  # (N, 3) mm from the corner of the grid
    middle = points.mean(0)
    radius = np.sqrt(((points - middle) ** 2).sum(1).mean())
    basis = _basis([each.values[tuple(voxels.T)] for each in others], (points - middle) / radius)
    slopes = np.gradient(image.values, *image.spacing)
    layers = [image.values, *slopes, image.inside.astype(np.float32)]
    course: list[float] = []
    for _ in range(_STEPS):
        moved = points @ turn.T + shift
        where = (moved / image.spacing - 0.5).T
        y, *gradient, share = (ndimage.map_coordinates(each, where, order=1) for each in layers)
        seen = share > 0.99
        if seen.mean() < 0.5:  # astray
            break
        slope = np.stack(gradient, 1)
        jacobian = np.concatenate([slope, np.cross(moved - middle, slope)], 1)  # shift, rotation
        centered = np.column_stack([y, jacobian])[seen].astype(np.float64)
        centered -= centered.mean(0)
        variance = centered[:, 0] @ centered[:, 0]
        if not variance:
            break
        known = basis[seen]
        residual = centered - known @ np.linalg.lstsq(known.T @ known, known.T @ centered)[0]
        left = float(residual[:, 0] @ residual[:, 0] / variance)
        course.append(1 - seen.mean() * (1 - left))  # what is out of sight is not explained
        # The step that makes the residual small, corrected for what it takes from the variance.
        downhill = left * centered[:, 1:].T @ centered[:, 0]
        downhill -= residual[:, 1:].T @ residual[:, 0]
        step = np.linalg.lstsq(residual[:, 1:].T @ residual[:, 1:], downhill)[0]
        length = np.hypot(np.linalg.norm(step[:3]), np.linalg.norm(step[3:]) * radius)
        step *= min(1, 2 * image.spacing.min() / max(length, 1e-9))
        rotation = Rotation.from_rotvec(step[3:]).as_matrix()
        turn, shift = rotation @ turn, rotation @ (shift - middle) + middle + step[:3]
        if length < 0.1:
            break
    moved = np.linalg.norm(points @ turn.T + shift - points, axis=1)
    return Fit(turn, shift, float(moved.mean()), *(course[0], course[-1]) if course else (1, 1))


def _basis(values: list[NDArray[np.float32]], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K): polynomials of the other images' values, and of the place for shading."""
    x, y, z = points.T
    columns = [np.ones(len(points)), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z]
    for value in values:
        columns += [value, value**2, value**3]
    columns += [a * b for a, b in combinations(values, 2)]
    return np.stack(columns, 1).astype(np.float64)
