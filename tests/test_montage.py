"""The picture: geometry, orientation and words. Whether it looks good, people have to see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cwdm.case import read_case
from cwdm.errors import InputError
from cwdm.intensity import Scale
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.montage import inferno, montage, preview, write_png
from cwdm.provenance import Provenance, Source
from cwdm.volume import read_volume

Voxels = NDArray[np.float32]
SHAPE = (40, 48, 36)
BLACK_ON_DARK = 20


@pytest.fixture
def brain() -> NDArray[np.bool_]:
    grid = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    mask: NDArray[np.bool_] = ((grid / np.array([16, 20, 14]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 1
    return mask


@pytest.fixture
def images(brain: NDArray[np.bool_]) -> dict[Modality, Voxels]:
    """A ramp along X in the first, Y in the second, Z in the third; the fourth is a mixture."""
    x, y, z = np.indices(SHAPE, dtype=np.float32) + 20
    values = (x, y, z, x + y + z)
    return {m: np.where(brain, v, 0) for m, v in zip(SEQUENCES, values, strict=True)}


def panels(picture: Image.Image) -> list[list[NDArray[np.uint8]]]:
    """[row][column] of panels, found as the black tiles on the grey ground."""
    pixels = np.asarray(picture)
    ground = (pixels == pixels[-1, -1]).all(axis=2)
    rows = _runs(~(ground.mean(axis=1) > 0.9), 60)
    columns = _runs(~ground[slice(*rows[-2])].all(axis=0), 60)
    return [[pixels[slice(*row), slice(*column)] for column in columns] for row in rows]


def _runs(busy: NDArray[np.bool_], shortest: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], busy.astype(int), [0]])))
    pairs = edges.reshape(-1, 2)
    return [(int(a), int(b)) for a, b in pairs if b - a >= shortest]


def draw(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_], **options: object
) -> Image.Image:
    target = Modality.T2F
    given = {m: images[m] for m in others(target)}
    options = {"truth": images[target], **options}
    return montage(given, images[target] * 0.5 + 3, target, brain=brain, **options)  # type: ignore[arg-type]


def test_three_planes_by_inputs_synthetic_truth_and_error(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    grid = panels(draw(images, brain))
    assert [len(row) for row in grid] == [6, 6, 6]


def test_a_preview_has_no_truth_and_no_error(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    grid = panels(draw(images, brain, truth=None))
    assert [len(row) for row in grid] == [4, 4, 4]


def test_orientation_is_radiological(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    """X grows to the patient's right, Y to the front, Z upwards."""

    def halves(panel: NDArray[np.uint8]) -> tuple[float, float, float, float]:
        height, width = panel.shape[:2]
        grey = panel[..., 0].astype(float)
        middle = slice(height // 3, 2 * height // 3), slice(width // 3, 2 * width // 3)
        grey = grey[middle]
        height, width = grey.shape
        left, right = grey[:, : width // 2].mean(), grey[:, width // 2 :].mean()
        top, bottom = grey[: height // 2].mean(), grey[height // 2 :].mean()
        return left, right, top, bottom

    (axial_x, axial_y, *_), (_, _, coronal_z, *_), (_, sagittal_y, sagittal_z, *_) = panels(
        draw(images, brain)
    )
    left, right, *_ = halves(axial_x)
    assert left > right + 10
    *_, top, bottom = halves(axial_y)
    assert top > bottom + 10
    *_, top, bottom = halves(coronal_z)
    assert top > bottom + 10
    left, right, *_ = halves(sagittal_y)
    assert left > right + 10
    *_, top, bottom = halves(sagittal_z)
    assert top > bottom + 10


def test_panels_keep_the_shape_of_the_brain_in_millimetres(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    """An ellipsoid of 32 x 40 x 28 voxels, of 1 x 1 x 3 mm."""
    row = panels(draw(images, brain, spacing_mm=(1.0, 1.0, 3.0)))[1]
    coronal = row[1][..., 0] > BLACK_ON_DARK
    heights, widths = np.flatnonzero(coronal.any(axis=1)), np.flatnonzero(coronal.any(axis=0))
    ratio = (heights[-1] - heights[0]) / (widths[-1] - widths[0])
    assert ratio == pytest.approx(28 * 3 / 32, rel=0.1)


def test_the_error_of_an_affine_copy_is_black_and_of_a_wrong_patch_is_bright(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    same = panels(draw(images, brain))[0][-1]
    assert same.max() < BLACK_ON_DARK
    wrong = images[Modality.T2F].copy()
    wrong[18:24, 20:28, 16:22] += 60
    target = Modality.T2F
    picture = montage(
        {m: images[m] for m in others(target)}, wrong, target, brain=brain, truth=images[target]
    )
    assert panels(picture)[0][-1].max() > 150


def test_an_inverted_prediction_is_not_turned_round(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    """As by the rule of the tables: what falls where the truth rises counts as constant."""
    target = Modality.T2F
    given, truth = {m: images[m] for m in others(target)}, images[target]
    inverted = np.where(brain, 200 - truth, 0)
    *_, synthetic, _, error = panels(montage(given, inverted, target, brain=brain, truth=truth))[0]
    assert error.max() > 150
    height, width = (side // 2 for side in synthetic.shape[:2])
    assert np.ptp(synthetic[height - 20 : height + 20, width - 20 : width + 20]) <= 1


def test_slices_go_through_the_tumor_and_its_outline_is_white(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    tumor = np.zeros(SHAPE, dtype=bool)
    tumor[12:18, 30:36, 20:26] = True
    grid = panels(draw(images, brain, tumor=tumor))
    for row in grid:
        assert (row[-1] == 255).all(axis=2).sum() > 20
    without = panels(draw(images, brain, tumor=np.zeros(SHAPE, dtype=bool)))
    assert not (without[0][-1] == 255).all(axis=2).any()


def test_a_constant_synthesis_can_be_drawn(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_]
) -> None:
    images[Modality.T2F] = np.zeros(SHAPE, dtype=np.float32)
    assert panels(draw(images, brain, truth=None))


def test_colors_run_from_black_to_bright_without_going_back() -> None:
    colors = inferno(np.linspace(-0.5, 1.5, 500)).astype(float)
    brightness = colors @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) >= -1).all()
    assert colors[0].tolist() == [0, 0, 4]
    assert colors[-1].tolist() == [252, 255, 164]


def test_the_file_says_that_it_is_synthetic_and_is_not_overwritten(
    images: dict[Modality, Voxels], brain: NDArray[np.bool_], tmp_path: Path
) -> None:
    path = tmp_path / "out" / "picture.png"
    picture = draw(images, brain)
    write_png(picture, path)
    with Image.open(path) as stored:
        assert stored.size == picture.size
        assert "SYNTHETIC" in stored.info["Description"]
        assert "RESEARCH USE ONLY" in stored.info["Description"]
    with pytest.raises(InputError, match="already exists"):
        write_png(picture, path)
    write_png(picture, path, overwrite=True)


def test_a_synthesis_is_drawn_beside_the_inputs_it_was_made_from(
    make_case: Callable[..., Path],
) -> None:
    from cwdm.synthesis import Synthesis

    case = read_case(make_case(endings=("-t1n", "-t1c", "-t2f"))).without(Modality.T2F)
    provenance = Provenance(
        cwdm="0.1.0",
        torch="2",
        case="x",
        target=Modality.T2F,
        inputs={m: Source(name=f"x-{m}.nii.gz", sha256="") for m in case.images},
        absent=(Modality.T2W,),
        replaces=None,
        model=Source(name="small-t2f", sha256=""),
        seed=0,
        sampler="ddim",
        steps=4,
        precision="fp32",
        device="cpu",
        compat=False,
        normalization="robust",
        scales={},
        target_scale=Scale(0, 1),
        seconds=1,
        warnings=(),
    )
    volume = read_volume(case.images[Modality.T1N])
    picture = preview(Synthesis(volume, provenance, case))
    assert [len(row) for row in panels(picture)] == [3, 3, 3]
