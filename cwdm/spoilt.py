"""How noisy, blurred, ghosted, moved or shaded the image of a brain is; `checks` judges by it.

Everything is measured inside of the brain: around it a skull-stripped image has nothing to tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, stats

__all__ = ["Brain", "Echo", "cut_ml", "detail", "echo", "gaps", "noise", "outlier", "saturation"]
__all__ += ["shading", "texture"]

_VOXEL_MM = 1.0
"""Finer images are averaged to voxels of about this size, so that numbers can be compared."""
_RIM_MM = 4.0
"""Thickness by which masks of one brain may differ."""
_SHORTEST_ECHO = 15
"""Voxels; nearer to an edge there is anatomy. Ten ghosts are 15 to 24 mm apart."""
_BLUR_MM = 20.0
"""Deviation of the Gaussian that leaves of an image no more than its shading."""
_WINDOW = 5
"""Voxels along each side of a neighborhood."""
_POINTS = 60_000
"""About how many neighborhoods are compared."""


@dataclass(frozen=True, eq=False)
class Brain:
    """An image, cut to the brain."""

    values: NDArray[np.float32]
    """(X, Y, Z): 0 at the 1 % quantile in the brain, 1 at the 99 %; cut off there; 0 outside."""
    inside: NDArray[np.bool_]
    """(X, Y, Z): in the brain."""

    @classmethod
    def of(
        cls,
        voxels: NDArray[np.float32],
        mask: NDArray[np.bool_],
        spacing: NDArray[np.float64],
    ) -> "Brain":
        """Of an image (X, Y, Z) whose mask is not empty; spacing (3,) in mm."""
        a, b, c = (max(1, round(_VOXEL_MM / each)) for each in spacing)
        x, y, z = (n // factor for n, factor in zip(mask.shape, (a, b, c), strict=True))
        whole, blocks = np.s_[: x * a, : y * b, : z * c], (x, a, y, b, z, c)
        voxels = voxels[whole].reshape(blocks).mean(axis=(1, 3, 5))
        mask = np.all(mask[whole].reshape(blocks), axis=(1, 3, 5))
        low, high = np.quantile(voxels[mask], [0.01, 0.99])
        scaled = ((voxels - low) / max(high - low, np.finfo(np.float32).tiny)).clip(0, 1)
        return cls(np.where(mask, scaled, 0).astype(np.float32), mask)


def gaps(mask: NDArray[np.bool_]) -> int:
    """Slices without brain that have brain on both sides, along any axis."""
    empty = 0
    for axis in range(3):
        area = mask.sum(axis=tuple({0, 1, 2} - {axis}))
        first, last = np.flatnonzero(area > area.max() / 5)[[0, -1]]
        empty += int((area[first:last] < area.max() / 100).sum())
    return empty


def cut_ml(
    mask: NDArray[np.bool_], expected: NDArray[np.bool_], spacing: NDArray[np.float64]
) -> float:
    """Volume of the brain expected that is not in the mask, without what is but a thin rim."""
    size = [2 * round(_RIM_MM / each) + 1 for each in spacing]
    # at the border of the grid the brain goes on
    core = ndimage.minimum_filter(expected & ~mask, size, mode="nearest")
    return float(ndimage.maximum_filter(core, size).sum() * spacing.prod() / 1000)


def noise(brain: Brain) -> float:
    """Deviation of noise, in units of that of the tissues' intensities.

    From the median magnitude of Haar's HHH coefficients (Donoho and Johnstone 1994), over the
    interquartile range in the brain; both as deviations of a normal distribution. Noise that an
    image had before it was resampled counts less.
    """
    band, inside = brain.values, brain.inside
    for axis in range(3):
        (a, b), (both, other) = _pairs(band, axis), _pairs(inside, axis)
        band, inside = (a - b) / np.sqrt(2), both & other
    lower, upper = np.quantile(brain.values[brain.inside], [0.25, 0.75])
    deviation = np.median(np.abs(band[inside])) / 0.6745
    return float(deviation / max((upper - lower) / 1.349, 1e-6))


def detail(brain: Brain) -> tuple[float, float, float]:
    """Along each axis, the variance of second differences over that of first ones.

    3 of white noise, about 1.4 of a brain at 1 mm, 0.3 across thick slices, 0 of what is smooth.
    """
    ratios = []
    for axis in range(3):
        values = np.moveaxis(brain.values, axis, 0)
        inside = np.moveaxis(brain.inside, axis, 0)
        first, pair = np.diff(values, axis=0), inside[1:] & inside[:-1]
        second, triple = np.diff(first, axis=0), pair[1:] & pair[:-1]
        variance = first[pair].var()
        ratios.append(float(second[triple].var() / variance) if variance else 0.0)
    x, y, z = ratios
    return x, y, z


class Echo(NamedTuple):
    """A copy of the image in itself."""

    strength: float
    """0 without one."""
    lag: int
    """How far from the original, voxels."""
    axis: int


def echo(brain: Brain, axes: Sequence[int]) -> Echo:
    """The strongest one along these axes, from the power cepstrum (Bogert et al. 1963) of edges.

    An echo makes ripples in the power spectrum: the spectrum of its logarithm peaks at the lag.
    """
    found = Echo(0.0, 0, 0)
    for axis in axes:
        values = np.moveaxis(brain.values, axis, -1)[::2, ::2]  # a quarter of the lines tells
        inside = np.moveaxis(brain.inside, axis, -1)[::2, ::2]
        edges = np.diff(values) * (inside[..., 1:] & inside[..., :-1])
        length = fft.next_fast_len(2 * edges.shape[-1], real=True)
        power = (np.abs(fft.rfft(edges, length)) ** 2).sum(axis=(0, 1))
        # without what the shape of the brain makes, and what resampling has left empty
        power = power[length // 50 : length * 7 // 20]
        ripples = np.log(power + 1e-9 * power.max() + np.finfo(np.float32).tiny)
        ripples -= ndimage.gaussian_filter1d(ripples, length / 43, mode="nearest")
        window = np.hanning(len(ripples))
        cepstrum = np.abs(fft.rfft(ripples * window, length)) / len(ripples)
        cepstrum[:_SHORTEST_ECHO] = 0
        lag = int(cepstrum.argmax())
        found = max(found, Echo(float(cepstrum[lag]), lag, axis))
    return found


def texture(brains: Sequence[Brain]) -> list[float]:
    """For each of several images: how rough it is where the others are smooth, 1 being elsewhere.

    The median of local deviations in the fifth of the brain where all others are smoothest, over
    that in the half where one of them is not. What has moved leaves traces all over its image.
    """
    common = np.logical_and.reduce([brain.inside for brain in brains])
    points = np.flatnonzero(ndimage.minimum_filter(common, _WINDOW, mode="constant"))
    points = points[:: max(1, len(points) // _POINTS)]
    roughness = []
    for brain in brains:
        mean = ndimage.uniform_filter(brain.values, _WINDOW)
        square = ndimage.uniform_filter(brain.values**2, _WINDOW)
        roughness.append(np.sqrt((square - mean**2).clip(0)).ravel()[points])
    ranks = [stats.rankdata(each) for each in roughness]
    ratios = []
    for number, own in enumerate(roughness):
        order = np.argsort(np.max([*ranks[:number], *ranks[number + 1 :]], axis=0))
        smooth, rough = own[order[: len(own) // 5]], own[order[len(own) // 2 :]]
        ratios.append(float(np.median(smooth) / max(np.median(rough), 1e-6)))
    return ratios


def outlier(voxels: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """How far from the median a voxel is, in units of the range of 98 % of the brain."""
    low, median, high = np.quantile(voxels[mask], [0.01, 0.5, 0.99])
    furthest = max(voxels[mask].max() - median, median - voxels[mask].min())
    return float(furthest / max(high - low, np.finfo(np.float32).tiny))


def saturation(voxels: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Share of the brain that has the highest value."""
    values = voxels[mask]
    return float((values == values.max()).mean())


def shading(
    voxels: NDArray[np.float32], mask: NDArray[np.bool_], spacing: NDArray[np.float64]
) -> float:
    """The brightest place of the brain over the darkest, after a blur by 20 mm; at 2 and 98 %.

    1 where intensities are not such that 0 is no signal.
    """
    low, high = np.quantile(voxels[mask], [0.01, 0.99])
    if low < -0.1 * high:
        return 1.0
    clipped = np.where(mask, voxels.clip(low, high), 0)
    factors = [max(1, round(_BLUR_MM / 4 / each)) for each in spacing]
    sigma = _BLUR_MM / (spacing * factors)
    total, share = (
        ndimage.gaussian_filter(block_means(each, factors), sigma)
        for each in (clipped, mask.astype(np.float32))
    )
    inside = block_means(mask.astype(np.float32), factors) > 0.5
    darkest, brightest = np.quantile(total[inside] / share[inside], [0.02, 0.98])
    return float(brightest / max(darkest, np.finfo(np.float32).tiny))


def block_means(voxels: NDArray[np.float32], factors: list[int]) -> NDArray[np.float32]:
    """(X, Y, Z) -> means over blocks; zeros fill the last ones up."""
    x, y, z = (-(-n // factor) for n, factor in zip(voxels.shape, factors, strict=True))
    a, b, c = factors
    ends = [(0, m * f - n) for m, f, n in zip((x, y, z), factors, voxels.shape, strict=True)]
    means: NDArray[np.float32] = np.pad(voxels, ends).reshape(x, a, y, b, z, c).mean(axis=(1, 3, 5))
    return means


def _pairs(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Neighbors along an axis, each in one pair."""
    end = array.shape[axis] // 2 * 2
    return array.take(range(0, end, 2), axis), array.take(range(1, end, 2), axis)
