"""From volumes to images and back: boxes, resampling, masks."""

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from cwdm.case import read_case
from cwdm.config import Images
from cwdm.modality import Modality
from cwdm.preparation import FLIPS, Box, Frame, prepare
from cwdm.volume import Volume, read_volumes

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


@given(st.tuples(sides, sides, sides), st.data())
@settings(deadline=None, max_examples=60)
def test_a_box_holds_the_mask_and_its_crop_is_undone(shape, data):
    mask = np.zeros(shape, dtype=bool)
    points = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in shape)), min_size=1))
    for point in points:
        mask[point] = True
    voxels = np.where(mask, np.random.default_rng(0).random(shape) + 1, 0)
    box = Box.around(mask)
    cropped = box.crop(voxels)
    assert all(face.any() for axis in range(3) for face in np.moveaxis(cropped, axis, 0)[[0, -1]])
    assert cropped.shape == box.size
    np.testing.assert_array_equal(box.uncrop(cropped, shape), voxels)


@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(*[st.integers(-8, 8)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
)
@settings(deadline=None, max_examples=60)
def test_a_block_anywhere_keeps_what_it_covers(shape, start, size):
    voxels = np.random.default_rng(0).random(shape) + 1
    box = Box(start, size)
    cropped = box.crop(voxels, outside=-1)
    covered = np.zeros(shape, dtype=bool)
    for corner in np.ndindex(*size):
        there = tuple(s + c for s, c in zip(start, corner, strict=True))
        inside = all(0 <= i < n for i, n in zip(there, shape, strict=True))
        assert cropped[corner] == (voxels[there] if inside else -1)
        if inside:
            covered[there] = True
    np.testing.assert_array_equal(box.uncrop(cropped, shape), np.where(covered, voxels, 0))


def test_a_box_of_given_size_has_the_brain_in_its_middle():
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[3:9, 10:17, 0:20] = True  # 6, 7 and 20 voxels
    box = Box.centred(mask, (10, 11, 8))
    assert box == Box((1, 8, 6), (10, 11, 8))
    # the same margin on both sides, and what is too large loses the same on both
    cropped = box.crop(mask)
    assert cropped[:, 5, 4].tolist() == [False] * 2 + [True] * 6 + [False] * 2
    assert cropped[4, :, 4].tolist() == [False] * 2 + [True] * 7 + [False] * 2


def test_restoring_gives_back_the_voxels():
    voxels, mask = smooth_brain((21, 17, 13))
    prepared = prepare({Modality.T1N: volume(voxels)}, Images(), multiple=8)
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
    prepared = prepare(volumes, Images(), multiple=4)
    image = prepared.images[Modality.T1N]
    extent = np.array(spacing) * prepared.frame.box.size
    assert (abs(np.array(image.shape) - extent) <= 2).all()  # to the next multiple of 4 mm
    back = prepared.restore(image, prepared.scales[Modality.T1N])
    inner = np.zeros_like(mask)
    inner[4:-4, 4:-4, 4:-4] = True  # trilinear steps blur at the rim
    assert back.shape == voxels.shape
    assert abs(back - voxels)[inner].max() < 1.5
    assert (back[~mask] == 0).all()


@given(
    st.tuples(*[st.integers(1, 40)] * 3),
    st.tuples(*[st.sampled_from([0.4, 0.7, 1.0, 1.05, 2.0, 5.0])] * 3),
    st.integers(1, 16),
)
@settings(deadline=None, max_examples=200)
def test_a_brain_is_padded_and_never_stretched(tight, spacing, multiple):
    mask = np.zeros([n + 6 for n in tight], dtype=bool)
    mask[3:-3, 3:-3, 3:-3] = True
    frame = Frame.of(mask, np.diag([*spacing, 1.0]), Images(), multiple)
    for start, size, n, mm, made in zip(
        frame.box.start, frame.box.size, tight, spacing, frame.size, strict=True
    ):
        assert start <= 3 and start + size >= 3 + n  # noqa: PT018
        zoom = 1 if abs(mm - 1) < 0.1 else mm
        assert made % multiple == 0
        assert made < n * zoom + multiple + 1
        assert abs(made - size * zoom) <= zoom / 2 + 1e-6  # half a voxel of the case


def test_thick_slices_are_synthesized_too():
    """1 x 1 x 5 mm, as in the clinic: only one axis is resampled."""
    voxels, _ = smooth_brain((37, 29, 9))
    prepared = prepare({Modality.T1N: volume(voxels, (1.0, 1.0, 5.0))}, Images(), multiple=8)
    image = prepared.images[Modality.T1N]
    assert image.shape == (40, 32, 32)
    assert prepared.frame.box.size == (40, 32, 6)
    back = prepared.restore(image, prepared.scales[Modality.T1N])
    assert back.shape == voxels.shape


def test_a_case_of_about_the_right_voxel_size_is_left_alone():
    voxels, _ = smooth_brain((20, 20, 20))
    volumes = {Modality.T1N: volume(voxels, (1.05, 0.95, 1.0))}
    prepared = prepare(volumes, Images(), multiple=4)
    assert prepared.images[Modality.T1N].shape == prepared.frame.box.size


def test_the_brain_is_where_half_of_the_modalities_have_it():
    voxels, _ = smooth_brain((16, 16, 16))
    shifted = np.roll(voxels, 1, axis=0)
    both = {Modality.T1N: volume(voxels), Modality.T2W: volume(shifted)}
    prepared = prepare(both, Images(), multiple=2)
    np.testing.assert_array_equal(prepared.mask, (voxels != 0) | (shifted != 0))
    three = {**both, Modality.T2F: volume(voxels)}
    prepared = prepare(three, Images(), multiple=2)
    np.testing.assert_array_equal(prepared.mask, voxels != 0)


def test_brains_that_share_no_voxel_still_make_an_image():
    voxels, _ = smooth_brain((16, 16, 16), margin=6)
    parts = {
        m: volume(np.roll(voxels, i * 5, axis=0))
        for i, m in enumerate([Modality.T1N, Modality.T1C, Modality.T2W])
    }
    prepared = prepare(parts, Images(), multiple=2)
    assert prepared.mask.any()


def test_an_image_of_fixed_size_holds_the_brain_or_the_volume_in_its_middle():
    voxels, _ = smooth_brain((21, 17, 13), margin=3)
    voxels = np.pad(voxels, ((9, 0), (0, 0), (0, 4)))
    case = {Modality.T1N: volume(voxels)}
    brain = prepare(case, Images(size=(24, 16, 16)), multiple=8)
    assert brain.images[Modality.T1N].shape == (24, 16, 16)
    filled = np.nonzero((brain.images[Modality.T1N] != 0).any(dim=(1, 2)).numpy())[0]
    assert abs(filled[0] - (23 - filled[-1])) <= 1
    grid = prepare(case, Images(size=(40, 32, 32), centre="grid"), multiple=8)
    assert grid.frame.box == Box((-5, -7, -7), (40, 32, 32))
    for prepared in (brain, grid):
        back = prepared.restore(prepared.images[Modality.T1N], prepared.scales[Modality.T1N])
        np.testing.assert_allclose(back, voxels, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_lps_is_seen_the_other_way_round_and_comes_back(spacing):
    voxels, _ = smooth_brain((20, 24, 16), margin=4)
    case = {Modality.T1N: volume(voxels)}
    settings = {"normalization": "published", "spacing_mm": spacing}
    ras, lps = (
        prepare(case, Images(**settings, orientation=orientation), multiple=4)
        for orientation in ("RAS", "LPS")
    )
    image = ras.images[Modality.T1N]
    assert_close(lps.images[Modality.T1N], image.flip(0).flip(1), rtol=0, atol=0)
    assert not torch.equal(image, image.flip(0).flip(1))
    scale = ras.scales[Modality.T1N]
    one, other = ras.restore(image, scale), lps.restore(lps.images[Modality.T1N], scale)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    if spacing == 1:
        np.testing.assert_allclose(other, voxels.clip(0, np.quantile(voxels, 0.999)), atol=1e-3)


@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 20), st.sampled_from([(), (0, 1), (0,)]))
@settings(deadline=None, max_examples=30)
def test_a_frame_without_resampling_is_undone_exactly(size, seed, flips):
    frame = Frame(Box((1, -2, 3), size), size, flips)
    voxels = np.random.default_rng(seed).random(size, dtype=np.float32)
    np.testing.assert_array_equal(frame.from_network(frame.to_network(voxels)), voxels)


@pytest.mark.parametrize("normalization", ["published", "published-wdm", "robust"])
def test_twice_the_voxel_size_is_the_mean_of_eight(normalization):
    voxels, _ = smooth_brain((32, 24, 16), margin=4)  # a box of 24, 16 and 8
    case = {Modality.T1N: volume(voxels)}
    fine = prepare(case, Images(normalization=normalization), multiple=4)
    coarse = prepare(case, Images(normalization=normalization, spacing_mm=2.0), multiple=4)
    assert fine.images[Modality.T1N].shape == (24, 16, 8)
    assert coarse.frame.box == fine.frame.box
    pooled = F.avg_pool3d(fine.images[Modality.T1N][None], 2)[0]
    assert_close(coarse.images[Modality.T1N], pooled, rtol=0, atol=1e-5)


def test_ct_is_taken_with_all_that_is_around_the_body():
    rng = np.random.default_rng(0)
    voxels = rng.uniform(-1100, 1500, (12, 10, 8))
    voxels[0] = 0  # what would be outside of a brain
    prepared = prepare(
        {Modality.CT: volume(voxels)}, Images(normalization="hounsfield"), multiple=4
    )
    assert prepared.mask.all()
    image, scale = prepared.images[Modality.CT], prepared.scales[Modality.CT]
    assert image.shape == (12, 12, 8)
    assert (image[:, [0, 11]] == -1).all()  # air around the volume
    expected = ((voxels - scale.offset) / scale.scale).clip(-1, 1)
    np.testing.assert_allclose(image[:, 1:11], expected, rtol=0, atol=1e-5)
    back = prepared.restore(image, scale)
    kept = (voxels > -1000) & (expected < 1)
    np.testing.assert_allclose(back[kept], voxels[kept], rtol=0, atol=1e-3)
    np.testing.assert_allclose(back[voxels <= -1000], -1000, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [128, 256])
def test_wdm_sees_a_case_as_published(size, golden, shared):
    numbers = {k: v for k, v in golden("loader_wdm").items() if f"t1n_{size}_renorm" in k}
    case = read_case(shared / "golden" / "nifti_in").without(
        Modality.T1C, Modality.T2W, Modality.T2F
    )
    settings = Images(
        normalization="published-wdm",
        spacing_mm=256 / size,
        orientation="LPS",
        size=(size, size, size),
        centre="grid",
    )
    prepared = prepare(read_volumes(case, [Modality.T1N]), settings, multiple=64)
    image = prepared.images[Modality.T1N].numpy()
    middle = image[:, :, size // 2 - 2]
    step = size // 128
    expected = numbers[f"t1n_{size}_renorm_slice"]
    np.testing.assert_allclose(middle[::step, ::step], expected, rtol=0, atol=1e-6)
    sums = [image.min(), image.max(), image.sum(dtype=float), (image.astype(float) ** 2).sum()]
    np.testing.assert_allclose(sums, numbers[f"t1n_{size}_renorm_stats"][:4], rtol=1e-6)
    sub = numbers[f"t1n_{size}_renorm_sub"]
    np.testing.assert_allclose(image[::6, ::6, ::5][: len(sub)], sub, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", sorted(FLIPS))
def test_axes_are_turned_as_nibabel_turns_them(orientation):
    axes, signs = nib.orientations.axcodes2ornt(orientation).astype(int).T
    assert axes.tolist() == [0, 1, 2]
    assert FLIPS[orientation] == tuple(np.flatnonzero(signs < 0))


def test_brain_outside_of_the_frame_is_unknown_and_stays_zero():
    voxels, mask = smooth_brain((24, 24, 24))
    settings = Images(normalization="published-wdm", size=(8, 8, 8))
    prepared = prepare({Modality.T1N: volume(voxels)}, settings, multiple=4)
    restored = prepared.restore(prepared.images[Modality.T1N], prepared.scales[Modality.T1N])
    inside = np.zeros_like(mask)
    inside[8:16, 8:16, 8:16] = True
    assert (restored[inside] > 0).all()
    assert (restored[~inside] == 0).all()
