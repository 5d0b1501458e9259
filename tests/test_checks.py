"""What is wrong with a case is found and named; what only differs between cases is not."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cwdm.anatomy import find_label_maps, from_labels
from cwdm.case import find_cases, read_case
from cwdm.checks import Finding, examine, findings, read_fit
from cwdm.modality import SEQUENCES, Modality
from cwdm.simulate import simulate
from cwdm.volume import Volume, brain_mask, new_volume, read_labels, read_volumes

Volumes = dict[Modality, Volume]
Voxels = NDArray[np.floating]

SHAPE, SPACING_MM = (36, 40, 32), 4.0


def ellipsoid(shape: tuple[int, ...], scale: float = 0.84) -> NDArray[np.bool_]:
    half = np.array(shape).reshape(3, 1, 1, 1) / 2
    inside: NDArray[np.bool_] = (((np.indices(shape) + 0.5 - half) / half) ** 2).sum(0) < scale**2
    return inside


def volume(voxels: NDArray[np.floating], name: str, spacing: float = SPACING_MM) -> Volume:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return replace(new_volume(voxels, affine), path=Path(f"x-{name}.nii.gz"))


@pytest.fixture(scope="module")
def case() -> Volumes:
    """Four contrasts of a nearly symmetric brain of 0.9 l, each with noise and shading."""
    rng = np.random.default_rng(0)
    fields = ndimage.gaussian_filter(rng.normal(size=(2, *SHAPE)), (0, 1.5, 1.5, 1.5))
    fields += 0.4 * fields[:, ::-1]
    a, b = fields / fields.std()
    signals = {
        Modality.T1N: 500 + 60 * a,
        Modality.T1C: 520 + 60 * a + 200 * (b > 1.5),
        Modality.T2W: 700 - 120 * a + 40 * b,
        Modality.T2F: 450 - 50 * a + 10 * a**2 + 40 * b,
    }
    inside, volumes = ellipsoid(SHAPE), {}
    for modality, signal in signals.items():
        shading = 1 + 0.2 * np.linspace(-1, 1, SHAPE[1])[:, None] * rng.normal()
        signal = (signal * shading + 10 * rng.normal(size=SHAPE)).clip(1)
        volumes[modality] = volume(np.where(inside, signal, 0), modality)
    return volumes


def moved(one: Volume, mm: float, degrees: float, seed: int = 0, *, strip: bool = False) -> Volume:
    """The image moved in a random direction and turned about a random axis through the middle.

    Args:
        strip: mask it where the brain was before, as if it was stripped after it moved.
    """
    rng = np.random.default_rng(seed)
    direction, axis = (each / np.linalg.norm(each) for each in rng.normal(size=(2, 3)))
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix()
    spacing = np.linalg.norm(one.affine[:3, :3], axis=0)
    matrix = turn * spacing / spacing[:, None]
    middle = (np.array(one.voxels.shape) - 1) / 2
    offset = middle - matrix @ middle + mm * direction / spacing
    mask = brain_mask(one)
    voxels = ndimage.affine_transform(one.voxels, matrix, offset, order=1)
    inside = ndimage.affine_transform(mask.astype(np.float32), matrix, offset, order=1) > 0.5
    return replace(one, voxels=np.where(inside & mask if strip else inside, voxels, 0))


def changed(case: Volumes, modality: Modality, change: Callable[[Voxels], Voxels]) -> Volumes:
    voxels = change(case[modality].voxels).astype(np.float32)
    return {**case, modality: replace(case[modality], voxels=voxels)}


def kinds(volumes: Mapping[Modality, Volume]) -> list[str]:
    return [each.kind for each in findings(volumes)]


def test_a_fit_case_has_no_finding(case: Volumes) -> None:
    assert findings(case) == []


def test_no_image_and_one_image_have_no_finding(case: Volumes) -> None:
    assert findings({}) == []
    assert findings({Modality.T1N: case[Modality.T1N]}) == []


# --- skull


@pytest.mark.parametrize(
    ("liters", "found"), [(1.0, False), (2.0, False), (2.4, True), (4.0, True)]
)
@pytest.mark.parametrize("spacing", [2.5, 4.0])
def test_more_than_the_largest_brain_is_a_head(liters: float, found: bool, spacing: float) -> None:
    edge = round((liters * 1e6) ** (1 / 3) / spacing)
    voxels = np.pad(np.random.default_rng(0).uniform(1, 2, (edge,) * 3), 3)
    exact = (edge * spacing) ** 3 / 1e6
    message = (
        f"x-t1n.nii.gz: found {exact:.1f} l that are not background, expected a skull-stripped "
        f"brain of at most 2.2 l"
    )
    expected = [Finding("skull", (Modality.T1N,), message)] if found else []
    assert findings({Modality.T1N: volume(voxels, "t1n", spacing)}) == expected


def test_noise_around_the_head_counts_as_more_than_a_brain(case: Volumes) -> None:
    rng = np.random.default_rng(1)
    wide = np.pad(case[Modality.T2W].voxels, 4)
    noisy = np.where(wide > 0, wide, rng.rayleigh(10, wide.shape))
    (finding,) = findings({Modality.T2W: volume(noisy, "t2w")})
    assert finding.kind == "skull"
    assert finding.message.startswith("x-t2w.nii.gz: found 5.")


def test_every_image_with_a_skull_is_named() -> None:
    rng = np.random.default_rng(0)
    head = {m: volume(rng.random((60, 60, 60)) + 1, m) for m in SEQUENCES[:2]}
    for each in head.values():
        each.voxels[:2] = 0
    messages = [each.message for each in findings(head) if each.kind == "skull"]
    assert [each.partition(":")[0] for each in messages] == ["x-t1n.nii.gz", "x-t1c.nii.gz"]


# --- duplicates


@pytest.mark.parametrize(
    "copy",
    [
        lambda voxels: voxels,
        lambda voxels: 0.25 * voxels,
        lambda voxels: 1000 - voxels,
        lambda voxels: np.rint(30 * voxels + 7),
    ],
    ids=["same", "scaled", "inverted", "rounded"],
)
def test_one_image_under_two_names_is_found(
    case: Volumes, copy: Callable[[Voxels], Voxels]
) -> None:
    copied = replace(case[Modality.T2F], voxels=copy(case[Modality.T2W].voxels))
    found = findings({**case, Modality.T2F: copied})
    message = "x-t2w.nii.gz and x-t2f.nii.gz: found the same image twice, expected two modalities"
    assert Finding("duplicate", (Modality.T2W, Modality.T2F), message) in found


def test_two_images_that_are_much_alike_are_two(case: Volumes) -> None:
    rng = np.random.default_rng(0)
    alike = changed(
        {**case, Modality.T1C: case[Modality.T1N]},
        Modality.T1C,
        lambda voxels: voxels + 3 * rng.normal(size=voxels.shape) * (voxels > 0),
    )
    assert kinds(alike) == []


# --- registration


@pytest.mark.parametrize("modality", SEQUENCES)
@pytest.mark.parametrize(("mm", "degrees"), [(6, 0), (0, 8), (12, 0), (0, 15), (5, 8)])
def test_an_image_that_moved_is_named(
    case: Volumes, modality: Modality, mm: float, degrees: float
) -> None:
    (finding,) = findings({**case, modality: moved(case[modality], mm, degrees)})
    assert finding.kind == "registration"
    assert finding.message.startswith(f"x-{modality}.nii.gz: found it about ")
    assert finding.message.endswith("expected co-registered images")


@pytest.mark.parametrize("mm", [5, 8])
def test_the_displacement_is_told_in_millimeters(case: Volumes, mm: int) -> None:
    (finding,) = findings({**case, Modality.T2W: moved(case[Modality.T2W], mm, 0, strip=True)})
    told = re.search(r"about (\d+) mm out of place", finding.message)
    assert told
    assert abs(int(told[1]) - mm) <= 1


@pytest.mark.parametrize("modality", SEQUENCES)
def test_a_mirrored_image_is_named(case: Volumes, modality: Modality) -> None:
    found = findings(changed(case, modality, lambda voxels: voxels[::-1].copy()))
    message = (
        f"x-{modality}.nii.gz: found left and right swapped with regard to the other images, "
        f"expected one orientation"
    )
    assert found == [Finding("registration", (modality,), message)]


def test_two_images_are_enough(case: Volumes) -> None:
    pair = {m: case[m] for m in (Modality.T1N, Modality.T2W)}
    assert kinds(pair) == []
    assert kinds({**pair, Modality.T2W: moved(pair[Modality.T2W], 6, 0)}) == ["registration"]


def test_images_that_moved_together_are_aligned(case: Volumes) -> None:
    assert kinds({m: moved(each, 6, 8) for m, each in case.items()}) == []


def test_masks_that_differ_are_no_finding(case: Volumes) -> None:
    smaller = ellipsoid(SHAPE, 0.75)
    assert kinds(changed(case, Modality.T2F, lambda voxels: voxels * smaller)) == []


def test_thick_slices_are_no_finding(case: Volumes) -> None:
    thick = changed(
        case, Modality.T2F, lambda voxels: ndimage.gaussian_filter(voxels, (0, 0, 1)) * (voxels > 0)
    )
    assert kinds(thick) == []


def test_a_lesion_is_no_finding(case: Volumes) -> None:
    bright = np.zeros(SHAPE, dtype=bool)
    bright[13:22, 21:30, 15:22] = True
    assert kinds(changed(case, Modality.T2F, lambda voxels: voxels + 400 * bright)) == []


def test_what_is_too_small_to_judge_is_no_finding(case: Volumes) -> None:
    shifted = {**case, Modality.T2F: moved(case[Modality.T2F], 8, 0)}
    assert kinds(shifted) == ["registration"]
    tiny = {m: volume(each.voxels, m, spacing=1.5) for m, each in shifted.items()}  # 47 ml
    assert kinds(tiny) == []
    slab = {m: volume(each.voxels[..., 6:26], m) for m, each in shifted.items()}
    assert kinds(slab) == []


def test_images_without_anything_in_common_are_not_compared() -> None:
    halves = np.zeros((2, 40, 40, 40))
    halves[0, 2:19, 2:38, 2:38] = 1 + np.random.default_rng(0).random((17, 36, 36))
    halves[1, 21:38, 2:38, 2:38] = 1 + np.random.default_rng(1).random((17, 36, 36))
    assert kinds({m: volume(v, m) for m, v in zip(SEQUENCES, halves, strict=False)}) == []


# --- field of view


def slab(axis: int, start: int, stop: int) -> Callable[[Voxels], Voxels]:
    """Set slices to 0."""

    def change(voxels: Voxels) -> Voxels:
        where = [slice(None)] * 3
        where[axis] = slice(start, stop)
        cut = voxels.copy()
        cut[tuple(where)] = 0
        return cut

    return change


def oblique(voxels: Voxels) -> Voxels:
    x, y, z = np.indices(voxels.shape)
    return np.where(z + 0.3 * x - 0.2 * y > 24, 0, voxels)


@pytest.mark.parametrize(
    ("modality", "cut"),
    [
        (Modality.T1N, slab(2, 0, 9)),
        (Modality.T1C, slab(2, 24, 32)),
        (Modality.T2W, slab(1, 0, 11)),
        (Modality.T2F, oblique),
    ],
)
def test_an_image_that_is_cut_off_is_named(
    case: Volumes, modality: Modality, cut: Callable[[Voxels], Voxels]
) -> None:
    spoilt = changed(case, modality, cut)
    lost = brain_mask(case[modality]).sum() - brain_mask(spoilt[modality]).sum()
    (finding,) = findings(spoilt)
    assert (finding.kind, finding.modalities) == ("field-of-view", (modality,))
    told = re.fullmatch(
        rf"x-{modality}.nii.gz: found (\d+) ml cut off of the brain that other images show, "
        rf"expected the whole brain",
        finding.message,
    )
    assert told
    assert 0.5 * lost * 0.064 < int(told[1]) <= lost * 0.064  # a rim does not count


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_missing_slices_inside_are_counted_even_without_other_images(
    case: Volumes, axis: int
) -> None:
    alone = {Modality.T1C: case[Modality.T1C]}
    (finding,) = findings(changed(alone, Modality.T1C, slab(axis, 14, 16)))
    assert finding.kind == "field-of-view"
    assert "found 2 slices without brain between others" in finding.message


def test_images_that_are_all_cut_off_are_alike(case: Volumes) -> None:
    cut = slab(2, 0, 9)
    assert kinds({m: replace(v, voxels=cut(v.voxels)) for m, v in case.items()}) == []


@pytest.mark.parametrize("modality", SEQUENCES)
@pytest.mark.parametrize("empty", [slab(2, 0, 27), slab(0, 0, 25)], ids=["nearly", "mostly"])
def test_an_image_that_lacks_most_of_the_brain_is_named_and_the_others_are_checked(
    case: Volumes, modality: Modality, empty: Callable[[Voxels], Voxels]
) -> None:
    lacking = changed(case, modality, empty)
    (finding,) = findings(lacking)
    assert (finding.kind, finding.modalities) == ("field-of-view", (modality,))
    assert finding.message.startswith(f"x-{modality}.nii.gz: found ")
    other = next(m for m in case if m != modality)
    both = findings(changed(lacking, other, spike))
    assert [(each.kind, each.modalities) for each in both] == [
        ("field-of-view", (modality,)),
        ("intensity", (other,)),
    ]
    away = moved(case[other], 8, 0)
    assert kinds({**lacking, other: away}) == ["field-of-view", "registration"]


def test_of_two_images_the_nearly_empty_one_is_named(case: Volumes) -> None:
    pair = {m: case[m] for m in (Modality.T1N, Modality.T2F)}
    (finding,) = findings(changed(pair, Modality.T2F, slab(2, 0, 27)))
    assert (finding.kind, finding.modalities) == ("field-of-view", (Modality.T2F,))


# --- intensities


def saturated(voxels: Voxels) -> Voxels:
    return voxels.clip(max=np.quantile(voxels[voxels > 0], 0.9))


def spike(voxels: Voxels) -> Voxels:
    spiked = voxels.copy()
    spiked[18, 20, 16] = 100 * voxels.max()
    return spiked


def shaded(voxels: Voxels) -> Voxels:
    return voxels * np.exp(1.5 * np.linspace(-1, 1, voxels.shape[0]))[:, None, None]


@pytest.mark.parametrize(
    ("modality", "spoil", "said"),
    [
        (Modality.T1N, saturated, "found 10% of the brain at the highest value"),
        (Modality.T2W, spike, "times the range of the others from their median"),
        (Modality.T2F, shaded, "times as bright as another"),
    ],
)
def test_intensities_that_cannot_be_are_named(
    case: Volumes, modality: Modality, spoil: Callable[[Voxels], Voxels], said: str
) -> None:
    (finding,) = findings(changed(case, modality, spoil))
    assert (finding.kind, finding.modalities) == ("intensity", (modality,))
    assert said in finding.message


def test_images_cut_off_at_a_quantile_or_with_another_unit_are_fit(case: Volumes) -> None:
    def clipped(voxels: Voxels) -> Voxels:
        return voxels.clip(max=np.quantile(voxels[voxels > 0], 0.99))

    def standardized(voxels: Voxels) -> Voxels:
        brain = voxels[voxels > 0]
        return np.where(voxels > 0, (voxels - brain.mean()) / brain.std(), 0)

    assert kinds({m: changed(case, m, clipped)[m] for m in case}) == []
    assert kinds({m: changed(case, m, standardized)[m] for m in case}) == []


# --- noise, blur, motion


@pytest.fixture(scope="module")
def fine() -> Volumes:
    """The same in 2 mm, with a smooth core as of white matter."""
    rng = np.random.default_rng(0)
    shape = (72, 80, 64)
    a, b = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, 1.2, 1.2, 1.2))
    depth = np.where(ellipsoid(shape, 0.5), 0.1, 1)
    a, b = depth * a / a.std(), depth * b / b.std()
    signals = {
        Modality.T1N: 500 + 60 * a,
        Modality.T1C: 520 + 60 * a + 100 * (b > 1.5),
        Modality.T2W: 700 - 120 * a + 40 * b,
        Modality.T2F: 450 - 50 * a + 40 * b,
    }
    inside = ellipsoid(shape)
    return {
        modality: volume(np.where(inside, signal + 2 * rng.normal(size=shape), 0), modality, 2.0)
        for modality, signal in signals.items()
    }


def noisy(voxels: Voxels) -> Voxels:
    noise = np.random.default_rng(1).normal(scale=voxels[voxels > 0].std(), size=voxels.shape)
    return np.where(voxels > 0, voxels + noise, 0)


def blurred(voxels: Voxels) -> Voxels:
    inside = voxels > 0
    share = ndimage.gaussian_filter(inside.astype(float), 2)
    return np.where(inside, ndimage.gaussian_filter(voxels, 2) / share.clip(0.01), 0)


def ghosted(voxels: Voxels) -> Voxels:
    return (voxels + 0.3 * np.roll(voxels, 20, axis=1)) * (voxels > 0)


def shaken(voxels: Voxels) -> Voxels:
    """A copy that has turned and moved lies over the image."""
    turned = ndimage.rotate(voxels, 30, axes=(0, 1), reshape=False, order=1)
    return (voxels + 1.5 * np.roll(turned, 24, axis=0)) * (voxels > 0)


def test_a_fine_case_has_no_finding(fine: Volumes) -> None:
    assert findings(fine) == []


@pytest.mark.parametrize(
    ("modality", "spoil", "kind", "said"),
    [
        (Modality.T1N, noisy, "noise", "of the contrast, expected at most 35%"),
        (Modality.T1C, blurred, "blur", "found it blurred along every axis"),
        (Modality.T2W, ghosted, "motion", "found ghosts 20 voxels apart along y"),
        *((modality, shaken, "motion", "found texture") for modality in SEQUENCES),
    ],
)
def test_an_image_of_poor_quality_is_named(
    fine: Volumes, modality: Modality, spoil: Callable[[Voxels], Voxels], kind: str, said: str
) -> None:
    (finding,) = findings(changed(fine, modality, spoil))
    assert (finding.kind, finding.modalities) == (kind, (modality,))
    assert finding.message.startswith(f"x-{modality}.nii.gz: ")
    assert said in finding.message


def test_one_image_that_is_smooth_along_one_axis_is_fit(fine: Volumes) -> None:
    def thick(voxels: Voxels) -> Voxels:
        return ndimage.gaussian_filter1d(voxels, 2, axis=2) * (voxels > 0)

    assert kinds(changed(fine, Modality.T2F, thick)) == []


# --- reading


def test_every_image_that_cannot_be_read_is_named_and_the_others_are_checked(
    case: Volumes, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    affine = np.diag([SPACING_MM] * 3 + [1])
    for modality in case:
        voxels = case[Modality.T2W if modality is Modality.T2F else modality].voxels
        make_image(f"x/x-{modality}.nii.gz", voxels=voxels, affine=affine)
    path = tmp_path / "x" / "x-t1n.nii.gz"
    path.write_bytes(path.read_bytes()[:-900])
    make_image("x/x-t1c.nii.gz", voxels=case[Modality.T1C].voxels * np.nan, affine=affine)
    found = examine(read_case(tmp_path / "x"))
    assert [(each.kind, each.modalities) for each in found] == [
        ("file", (Modality.T1N,)),
        ("file", (Modality.T1C,)),
        ("duplicate", (Modality.T2W, Modality.T2F)),
    ]
    assert "x-t1n.nii.gz: truncated or damaged" in found[0].message
    assert "x-t1c.nii.gz: found NaN" in found[1].message


@pytest.mark.parametrize("odd", SEQUENCES)
def test_the_image_that_lies_on_another_grid_than_most_is_to_blame(
    make_case: Callable[..., Path], make_image: Callable[..., Path], odd: Modality
) -> None:
    folder = make_case()
    make_image(f"case/x-{odd}.nii.gz", affine=np.diag([-1.0, -1.0, 1.5, 1.0]))
    volumes, found = read_fit(read_case(folder))
    assert [(each.kind, each.modalities) for each in found] == [("grid", (odd,))]
    assert set(volumes) == {*SEQUENCES} - {odd}


def test_of_two_grids_neither_is_to_blame(
    make_case: Callable[..., Path], make_image: Callable[..., Path]
) -> None:
    folder = make_case(endings=("-t1n", "-t2w"))
    make_image("case/x-t2w.nii.gz", affine=np.diag([-1.0, -1.0, 1.5, 1.0]))
    _, (finding,) = read_fit(read_case(folder))
    assert (finding.kind, finding.modalities) == ("grid", (Modality.T1N, Modality.T2W))


# --- real and simulated cases


def real_cases(shared: Path) -> Iterator[Volumes]:
    for case in find_cases(shared / "data"):
        yield read_volumes(case, case.images)


@pytest.mark.slow
def test_real_cases_have_no_finding(shared: Path) -> None:
    for volumes in real_cases(shared):
        assert findings(volumes) == []


@pytest.mark.slow
def test_an_expert_s_tumor_in_place_of_an_image_is_found(shared: Path) -> None:
    case = read_case(shared / "data" / "val" / "Brats18_CBICA_AQN_1")
    volumes = read_volumes(case, case.images)
    assert case.segmentation is not None
    tumor = read_labels(case.segmentation, volumes[Modality.T2F]) > 0  # 26 ml
    (finding,) = findings(changed(volumes, Modality.T2F, lambda voxels: voxels * tumor))
    assert (finding.kind, finding.modalities) == ("field-of-view", (Modality.T2F,))
    swapped = replace(case, images={**case.images, Modality.T2F: case.segmentation})
    (finding,) = examine(swapped)
    assert (finding.kind, finding.modalities) == ("file", (Modality.T2F,))
    assert "found 4 different values, expected an image" in finding.message


@pytest.mark.slow
def test_simulated_cases_have_no_finding(shared: Path) -> None:
    anatomies = find_label_maps(shared / "data" / "labelmaps")[:4]
    for index, path in enumerate(anatomies):
        simulated = simulate(5, index, from_labels(path))
        images = {m: image.numpy() for m, image in simulated.images.items()}
        assert kinds({m: volume(image, m, spacing=1.0) for m, image in images.items()}) == []


@pytest.mark.slow
@pytest.mark.parametrize(("mm", "degrees"), [(3, 0), (0, 4), (4, 4)])
def test_most_real_images_that_moved_are_found(shared: Path, mm: float, degrees: float) -> None:
    found = []
    for number, volumes in enumerate(real_cases(shared)):
        modality = SEQUENCES[number % 4]
        image = moved(volumes[modality], mm, degrees, seed=number, strip=number % 2 == 0)
        found.append(kinds({**volumes, modality: image}) == ["registration"])
    assert np.mean(found) > 0.8


@pytest.mark.slow
def test_real_images_that_are_mirrored_are_found(shared: Path) -> None:
    for number, volumes in enumerate(real_cases(shared)):
        modality = SEQUENCES[number % 4]
        found = findings(changed(volumes, modality, lambda voxels: voxels[::-1].copy()))
        assert [str(volumes[modality].path) in each.message for each in found] == [True]
        assert "left and right swapped" in found[0].message


@pytest.mark.slow
@pytest.mark.parametrize("modality", SEQUENCES)
def test_real_images_that_are_spoilt_are_found(shared: Path, modality: Modality) -> None:
    spoilers: list[tuple[str, Callable[..., Any]]] = [
        ("noise", torchio.RandomNoise(std=(0.5, 0.5))),
        ("blur", torchio.RandomBlur(std=(2, 2))),
        ("motion", torchio.RandomGhosting(num_ghosts=(4, 10), intensity=(1, 2))),
        ("field-of-view", lambda image: slab(2, 0, 60)(image[0].numpy())[None]),
    ]
    torch.manual_seed(0)
    for number, volumes in enumerate(islice(real_cases(shared), 4)):
        voxels, mask = volumes[modality].voxels, brain_mask(volumes[modality])
        kind, spoil = spoilers[number]
        spoilt = np.asarray(spoil(torch.from_numpy(voxels / voxels[mask].std())[None]))[0] * mask
        image = replace(volumes[modality], voxels=spoilt)
        found = findings({**volumes, modality: image})
        assert [(each.kind, each.modalities) for each in found] == [(kind, (modality,))]
