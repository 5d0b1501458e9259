"""From volumes to images and back: boxes, resampling, masks."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdm.intensity import NORMALIZATIONS
from cwdm.modality import Modality
from cwdm.preparation import Box, prepare
from cwdm.volume import Volume

ROBUST = NORMALIZATIONS["robust"]
sides = st.integers(3, 12)


def volume(voxels, spacing=(1.0, 1.0, 1.0)):
    affine = np.diag([*spacing, 1.0])
    return Volume(voxels.astype(np.float32), affine, nib.Nifti1Header(), None)


def smooth_brain(shape, margin=2):
    grid = np.indices(shape).astype(float)
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(margin, -margin) for _ in shape)] = True
    wave = 100 + 10 * sum(np.sin(g / 5 + i) for i, g in enumerate(grid))
    return np.where(mask, wave, 0), mask


@given(st.tuples(sides, sides, sides), st.integers(1, 8), st.data())
@settings(deadline=None, max_examples=60)
def test_a_box_holds_the_mask_and_its_crop_is_undone(shape, multiple, data):
    mask = np.zeros(shape, dtype=bool)
    points = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in shape)), min_size=1))
    for point in points:
        mask[point] = True
    voxels = np.where(mask, np.random.default_rng(0).random(shape) + 1, 0)
    box = Box.around(mask, multiple)
    assert all(n % multiple == 0 for n in box.size)
    cropped = box.crop(voxels)
    assert cropped.shape == box.size
    np.testing.assert_array_equal(box.uncrop(cropped, shape), voxels)


def test_restoring_gives_back_the_voxels():
    voxels, mask = smooth_brain((21, 17, 13))
    prepared = prepare({Modality.T1N: volume(voxels)}, ROBUST, multiple=8, spacing_mm=1.0)
    image = prepared.images[Modality.T1N]
    assert all(n % 8 == 0 for n in image.shape)
    back = prepared.restore(image, prepared.scales[Modality.T1N])
    assert back.shape == voxels.shape
    np.testing.assert_allclose(back, voxels, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(prepared.mask, mask)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.5, 0.5, 3.0), (1.0, 1.0, 1.3)])
def test_other_voxel_sizes_are_resampled_and_come_back(spacing):
    voxels, mask = smooth_brain((30, 32, 24))
    volumes = {Modality.T1N: volume(voxels, spacing)}
    prepared = prepare(volumes, ROBUST, multiple=4, spacing_mm=1.0)
    image = prepared.images[Modality.T1N]
    extent = np.array(spacing) * prepared.box.size
    assert (abs(np.array(image.shape) - extent) <= 2).all()  # to the next multiple of 4 mm
    back = prepared.restore(image, prepared.scales[Modality.T1N])
    inner = np.zeros_like(mask)
    inner[4:-4, 4:-4, 4:-4] = True  # trilinear steps blur at the rim
    assert back.shape == voxels.shape
    assert abs(back - voxels)[inner].max() < 1.5
    assert (back[~mask] == 0).all()


def test_a_case_of_about_the_right_voxel_size_is_left_alone():
    voxels, _ = smooth_brain((20, 20, 20))
    volumes = {Modality.T1N: volume(voxels, (1.05, 0.95, 1.0))}
    prepared = prepare(volumes, ROBUST, multiple=4, spacing_mm=1.0)
    assert prepared.images[Modality.T1N].shape == prepared.box.size


def test_the_brain_is_where_half_of_the_modalities_have_it():
    voxels, _ = smooth_brain((16, 16, 16))
    shifted = np.roll(voxels, 1, axis=0)
    both = {Modality.T1N: volume(voxels), Modality.T2W: volume(shifted)}
    prepared = prepare(both, ROBUST, multiple=2, spacing_mm=1.0)
    np.testing.assert_array_equal(prepared.mask, (voxels != 0) | (shifted != 0))
    three = {**both, Modality.T2F: volume(voxels)}
    prepared = prepare(three, ROBUST, multiple=2, spacing_mm=1.0)
    np.testing.assert_array_equal(prepared.mask, voxels != 0)


def test_brains_that_share_no_voxel_still_make_an_image():
    voxels, _ = smooth_brain((16, 16, 16), margin=6)
    parts = {
        m: volume(np.roll(voxels, i * 5, axis=0))
        for i, m in enumerate([Modality.T1N, Modality.T1C, Modality.T2W])
    }
    prepared = prepare(parts, ROBUST, multiple=2, spacing_mm=1.0)
    assert prepared.mask.any()
