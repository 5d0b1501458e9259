"""Whether the images of a case are fit: readable, skull-stripped, aligned, no copies, not spoilt.

What `alignment` and `spoilt` measure is judged by thresholds beyond
all that clean cases have: only gross damage is found.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cwdm import spoilt
from cwdm.alignment import COARSE_MM, FINE_MM, Image, align
from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.masks import extent
from cwdm.modality import SEQUENCES, Modality
from cwdm.volume import Volume, brain_mask, read_image, read_volumes

__all__ = ["Finding", "Kind", "examine", "findings", "read_fit"]

Kind = Literal[
    "file",
    "grid",
    "skull",
    "duplicate",
    "registration",
    "field-of-view",
    "noise",
    "blur",
    "motion",
    "intensity",
]

_LARGEST_BRAIN_ML = 2200
"""A head has 3500 and more, what is inside the largest skulls about 2000."""
_SMALLEST_BRAIN_ML, _FEWEST_VOXELS = 50, 24
"""Of a brain, and along each axis of its grid: in less there is too little to align."""
_COPY = 1 - 1e-6
"""Correlation of an image with a copy of it in another unit, rounded."""
_OUT_OF_PLACE_MM = {1: 1.8, 2: 1.4, 3: 1.15}
"""For the number of other images: the least score (see `alignment.Fit`) of one out of place.

Of 16 real and 21 simulated cases, which are aligned within a millimeter or two, none that the
others explain scores higher than 1.41, 1.24 and 1.01.
"""
_MIRRORED = 0.05
"""Share of an image's variance that its mirror image must let the others explain in addition."""
_UNEXPLAINED = 0.6
"""Where more is left of an image's variance, the others say too little about it."""
_LEAST_CUT_ML = 10
"""Of 64 real images none lacks more than a rim, although their masks differ by up to 46 ml."""
_SATURATED, _OUTLIER, _SHADED = 0.03, 30, 2.8
"""Clean images, also those cut off at the 99 % quantile, have at most 0.01; 3.2; and 2.3."""
_COARSEST_MM = 2.0
"""Of a voxel; in larger ones noise, blur and motion are not told from anatomy."""
_NOISY, _BLURRED, _ECHO = 0.35, 0.35, 0.02
"""See `spoilt`. Clean images have 0.01 to 0.26; 0.92 to 1.98; and at most 0.013."""
_THICK = 0.5
"""Detail across thick slices, which resampling has made of ripples, is 0.2 to 0.4."""
_TEXTURE = {Modality.T1N: 0.49, Modality.T1C: 0.49, Modality.T2W: 0.43, Modality.T2F: 0.6}
"""Clean images have at most 0.47, 0.46, 0.37 and 0.54."""
_STANDS_OUT = 1.25
"""Times the geometric mean of the others. The clean images next to `_TEXTURE` have 1.22."""


class Finding(NamedTuple):
    """Why a case is not fit."""

    kind: Kind
    modalities: tuple[Modality, ...]
    """Which images it is about."""
    message: str
    """One line: which file, what was found, what was expected."""


def examine(case: Case) -> list[Finding]:
    """What is wrong with the images of a case: those that cannot be read, and `findings`."""
    volumes, found = read_fit(case)
    return found + findings({m: volume for m, volume in volumes.items() if m in SEQUENCES})


def read_fit(case: Case) -> tuple[dict[Modality, Volume], list[Finding]]:
    """The images that can be read and lie on one grid, that of most, and why the others do not.

    "file": unreadable, damaged, not a 3D image, in another unit than mm, NaN, all voxels the same
    or so few values that it is a segmentation. "grid": another one.
    """
    try:
        return read_volumes(case, case.images), []
    except InputError:  # which are to blame?
        volumes, found = {}, []
    for modality, path in case.images.items():
        try:
            volumes[modality] = read_image(path)
        except InputError as error:
            found.append(Finding("file", (modality,), str(error)))
    grids = {m: (v.voxels.shape, *v.affine.round(1).flat) for m, v in volumes.items()}
    counts = Counter(grids.values()).most_common(2)
    tied = len({count for _, count in counts}) < len(counts)
    for modality in list(volumes):
        usual = next(m for m in grids if grids[m] == counts[0][0])
        try:
            read_volumes(case, (usual, modality))
        except InputError as error:
            blamed = (usual, modality) if tied else (modality,)
            found.append(Finding("grid", blamed, str(error)))
            del volumes[modality]
    return volumes, found


def findings(volumes: Mapping[Modality, Volume]) -> list[Finding]:
    """What is wrong with the images of a case, which lie on one grid; nothing if it is fit.

    "skull": an image shows more than a brain. "duplicate": two images are one, perhaps in another
    unit. "registration": an image is out of place by some millimeters or degrees, or mirrored; the
    one for which this is clearest. "field-of-view": a part of the brain is missing that the others
    show, or slices in between. "noise", "blur", "motion" (or ghosts): so much of it that hardly any
    detail is left. "intensity": single voxels far beyond all others, many at the highest value, or
    one side of the brain much brighter than the other.

    An image that lacks most of the brain says nothing about the others, which are judged without
    it. In grids below 24 voxels along an axis, and brains below 50 ml, only the first two can be
    told; noise, blur and motion only in voxels up to 2 mm, motion in three images or more. Masks
    that differ by a rim are no finding.
    """
    masks = {modality: brain_mask(volume) for modality, volume in volumes.items()}
    found = [*_skulls(volumes, masks), *_duplicates(volumes)]
    strays = _strays(volumes, masks)
    whole = {m: v for m, v in volumes.items() if all(m not in each.modalities for each in strays)}
    found += [*strays, *_registration(whole, {m: masks[m] for m in whole})]
    apart = {m for each in found if each.kind != "duplicate" for m in each.modalities}
    rest = {m: volume for m, volume in volumes.items() if m not in apart}
    if rest and _are_large([masks[m] for m in rest], next(iter(rest.values())).affine):
        box = extent(np.logical_or.reduce([masks[m] for m in rest]), margin=1)
        masks = {m: masks[m][box] for m in rest}
        rest = {m: replace(volume, voxels=volume.voxels[box]) for m, volume in rest.items()}
        found += [*_fields(rest, masks), *_intensities(rest, masks), *_qualities(rest, masks)]
    return found


def _are_large(masks: Sequence[NDArray[np.bool_]], affine: NDArray[np.float64]) -> bool:
    """Whether there is enough to judge in what the images have in common."""
    common = np.logical_and.reduce(masks)
    enough = _ml(common, affine) >= _SMALLEST_BRAIN_ML
    return bool(min(common.shape) >= _FEWEST_VOXELS and enough)


def _ml(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> float:
    """Its volume."""
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def _skulls(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    found = []
    for modality, volume in volumes.items():
        ml = _ml(masks[modality], volume.affine)
        if ml > _LARGEST_BRAIN_ML:
            message = (
                f"{volume.path}: found {ml / 1000:.1f} l that are not background, expected a "
                f"skull-stripped brain of at most {_LARGEST_BRAIN_ML / 1000:.1f} l"
            )
            found.append(Finding("skull", (modality,), message))
    return found


def _duplicates(volumes: Mapping[Modality, Volume]) -> list[Finding]:
    found = []
    for (one, a), (other, b) in combinations(volumes.items(), 2):
        step = max(1, a.voxels.size // 1_000_000)  # a million voxels tell
        x, y = (each.voxels.ravel()[::step].astype(np.float64) for each in (a, b))
        x, y = x - x.mean(), y - y.mean()
        if abs(x @ y) >= _COPY * np.linalg.norm(x) * np.linalg.norm(y):
            message = f"{a.path} and {b.path}: found the same image twice, expected two modalities"
            found.append(Finding("duplicate", (one, other), message))
    return found


def _strays(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    """The images that hold less than half of the brain that most others show.

    Of two brains that have nothing in common, neither is to blame.
    """
    large = {m for m, volume in volumes.items() if _are_large([masks[m]], volume.affine)}
    votes = np.sum([masks[m] for m in large], axis=0) if large else np.zeros(())
    found = []
    for modality, volume in volumes.items():
        mask, others = masks[modality], large - {modality}
        if not others or (modality in large and len(others) == 1):
            continue
        own = mask if modality in large else 0
        expected = np.greater(2 * (votes - own), len(others))
        if 2 * (mask & expected).sum() > expected.sum():
            continue
        spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
        if (ml := spoilt.cut_ml(mask, expected, spacing)) > _LEAST_CUT_ML:
            found.append(_cut_off(modality, volume, f"{ml:.0f} ml"))
    return found


def _cut_off(modality: Modality, volume: Volume, much: str) -> Finding:
    message = (
        f"{volume.path}: found {much} cut off of the brain that other images show, expected the "
        "whole brain"
    )
    return Finding("field-of-view", (modality,), message)


def _registration(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    if len(volumes) < 2:
        return []
    affine = next(iter(volumes.values())).affine
    if not _are_large(list(masks.values()), affine):
        return []
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    box = extent(np.logical_or.reduce(list(masks.values())))
    pyramids = {
        modality: [
            Image.of(volume.voxels[box], masks[modality][box], spacing, mm)
            for mm in (FINE_MM, COARSE_MM)
        ]
        for modality, volume in volumes.items()
    }
    fits, mirrored = {}, {}
    for modality, pyramid in pyramids.items():
        others = [other for key, other in pyramids.items() if key != modality]
        fits[modality] = align(pyramid, others)
        mirrored[modality] = align([image.mirrored() for image in pyramid], others)
    gains = {key: fits[key].unexplained - mirrored[key].unexplained for key in fits}
    swapped = max(gains, key=lambda key: gains[key])
    worst = max(fits, key=lambda key: fits[key].score)
    if gains[swapped] > _MIRRORED and mirrored[swapped].unexplained < _UNEXPLAINED:
        blamed = swapped
        message = (
            f"{volumes[swapped].path}: found left and right swapped with regard to the other "
            f"images, expected one orientation"
        )
    elif (
        fits[worst].score > _OUT_OF_PLACE_MM[min(len(fits) - 1, 3)]
        and fits[worst].unexplained < _UNEXPLAINED
    ):
        blamed = worst
        message = (
            f"{volumes[worst].path}: found it about {fits[worst].moved:.0f} mm out of place with "
            f"regard to the other images, expected co-registered images"
        )
    else:
        return []
    return [Finding("registration", (blamed,), message)]


def _fields(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    spacing = np.linalg.norm(next(iter(volumes.values())).affine[:3, :3], axis=0)
    votes = np.sum([masks[modality] for modality in volumes], axis=0)
    found = []
    for modality, volume in volumes.items():
        mask = masks[modality]
        expected = np.greater(2 * (votes - mask), len(volumes) - 1)  # by most of the others
        if slices := spoilt.gaps(mask):
            between = f"{slices} slices without brain between others"
            message = f"{volume.path}: found {between}, expected the whole brain"
            found.append(Finding("field-of-view", (modality,), message))
        elif (ml := spoilt.cut_ml(mask, expected, spacing)) > _LEAST_CUT_ML:
            found.append(_cut_off(modality, volume, f"{ml:.0f} ml"))
    return found


def _intensities(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    found = []
    for modality, volume in volumes.items():
        voxels, mask, path = volume.voxels, masks[modality], volume.path
        spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
        if (share := spoilt.saturation(voxels, mask)) > _SATURATED:
            message = f"{path}: found {share:.0%} of the brain at the highest value, expected few"
        elif (times := spoilt.outlier(voxels, mask)) > _OUTLIER:
            message = (
                f"{path}: found a voxel {times:.0f} times the range of the others from their "
                f"median, expected at most {_OUTLIER}"
            )
        elif (times := spoilt.shading(voxels, mask, spacing)) > _SHADED:
            message = (
                f"{path}: found one region {times:.1f} times as bright as another, expected at "
                f"most {_SHADED}: correct the bias field"
            )
        else:
            continue
        found.append(Finding("intensity", (modality,), message))
    return found


def _qualities(
    volumes: Mapping[Modality, Volume], masks: Mapping[Modality, NDArray[np.bool_]]
) -> list[Finding]:
    spacing = np.linalg.norm(next(iter(volumes.values())).affine[:3, :3], axis=0)
    if spacing.max() > _COARSEST_MM:
        return []
    found = []
    sound = {}
    for modality, volume in volumes.items():
        brain = spoilt.Brain.of(volume.voxels, masks[modality], spacing)
        if (share := spoilt.noise(brain)) > _NOISY:
            message = (
                f"{volume.path}: found noise of {share:.0%} of the contrast, expected at most "
                f"{_NOISY:.0%}"
            )
            found.append(Finding("noise", (modality,), message))
        elif max(detail := spoilt.detail(brain)) < _BLURRED:
            message = (
                f"{volume.path}: found it blurred along every axis (detail {max(detail):.2f}), "
                f"expected {_BLURRED} or more"
            )
            found.append(Finding("blur", (modality,), message))
        # ghosts are in-plane; across thick slices there are ripples of resampling
        elif (
            echo := spoilt.echo(brain, [axis for axis in range(3) if detail[axis] > _THICK])
        ).strength > _ECHO:
            message = (
                f"{volume.path}: found ghosts {echo.lag} voxels apart along {'xyz'[echo.axis]}, "
                f"expected none"
            )
            found.append(Finding("motion", (modality,), message))
        else:
            sound[modality] = brain
    if len(sound) > 2:
        found += _moved(sound, volumes)
    return found


def _moved(
    brains: Mapping[Modality, spoilt.Brain], volumes: Mapping[Modality, Volume]
) -> list[Finding]:
    """The image with the most texture where the others have none, if that is much.

    How much is usual depends on the modality, and on the case: so it has to be more than of any
    clean image, and stand out from the others.
    """
    values = dict(zip(brains, spoilt.texture(list(brains.values())), strict=True))
    shares = {modality: value / _TEXTURE[modality] for modality, value in values.items()}
    worst = max(shares, key=lambda modality: shares[modality])
    usual = math.exp(np.mean([math.log(max(s, 1e-6)) for m, s in shares.items() if m != worst]))
    if shares[worst] < 1 or shares[worst] < _STANDS_OUT * usual:
        return []
    message = (
        f"{volumes[worst].path}: found texture where the other images have none "
        f"({values[worst]:.2f}), perhaps motion, expected at most {_TEXTURE[worst]}"
    )
    return [Finding("motion", (worst,), message)]
