"""The cache: what it holds is what is in the files, whatever happens while it is made."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cwdm.cache import CachedCase, Dtype, Report, fill, is_cache, open_cache
from cwdm.case import read_case
from cwdm.checks import Finding
from cwdm.config import Images
from cwdm.dicom import Series
from cwdm.errors import InputError
from cwdm.intensity import NORMALIZATIONS, NormalizationName
from cwdm.layouts import Found, Problem, find
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import Box, prepare
from cwdm.volume import (
    Volume,
    brain_mask,
    new_volume,
    read_labels,
    read_volume,
    read_volumes,
    write_volume,
)

MakeImage = Callable[..., Path]

T1N, T1C, T2W, T2F = SEQUENCES
SHAPE = (14, 12, 10)


def whole(case: CachedCase) -> Box:
    return Box((0, 0, 0), case.shape)


def tissue(seed: int, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.int16]:
    """A ball of noise in zeros, off the middle."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape) - np.reshape([n * 0.45 for n in shape], (3, 1, 1, 1))
    inside = ((grid / np.reshape([n * 0.4 for n in shape], (3, 1, 1, 1))) ** 2).sum(axis=0) < 1
    return np.where(inside, rng.integers(200, 1500, shape), 0).astype(np.int16)


@pytest.fixture
def write_cases(make_image: MakeImage, tmp_path: Path) -> Callable[..., Path]:
    """A folder of complete cases of noise, with segmentations."""

    def write(count: int, shape: tuple[int, int, int] = SHAPE) -> Path:
        for number in range(count):
            folder = f"data/case{number}"
            for index, modality in enumerate(SEQUENCES):
                voxels = tissue(10 * number + index, shape)
                make_image(f"{folder}/case{number}-{modality}.nii.gz", voxels=voxels)
            labels = (tissue(number, shape) > 1000).astype(np.uint8)
            make_image(f"{folder}/case{number}-seg.nii.gz", voxels=labels)
        return tmp_path / "data"

    return write


def statuses(reports: list[Report]) -> dict[str, str]:
    return {report.case: report.status for report in reports}


ORIENTATIONS = st.tuples(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1, 1])] * 3))


def save_oriented(
    path: Path,
    voxels: NDArray[Any],
    orientation: tuple[list[int], tuple[int, ...]],
    spacing: tuple[float, ...],
) -> None:
    """Write canonical voxels in another orientation, as nibabel turns them."""
    canonical = nib.Nifti1Image(voxels, np.diag([*spacing, 1.0]), dtype=voxels.dtype)
    turned = canonical.as_reoriented(np.stack(orientation, axis=1).astype(float))
    path.parent.mkdir(exist_ok=True)
    turned.to_filename(path)


@given(
    shape=st.tuples(*[st.integers(6, 16)] * 3),
    turned=ORIENTATIONS,
    spacing=st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 3),
    factor=st.sampled_from([1e-3, 1.0, 37.3, 1e6]),
    shift=st.sampled_from([0.0, -0.02]),
    dtype=st.sampled_from(["float16", "uint8"]),
    start=st.tuples(*[st.integers(-9, 18)] * 3),
    size=st.tuples(*[st.integers(1, 20)] * 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_cached_case_is_the_case(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    turned: tuple[list[int], tuple[int, ...]],
    spacing: tuple[float, ...],
    factor: float,
    shift: float,
    dtype: Dtype,
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    seed: int,
) -> None:
    """On any grid, in any orientation and unit: values, masks, scales, and blocks anywhere."""
    folder = tmp_path_factory.mktemp("random")
    for index, modality in enumerate((T1N, T2W, T2F)):
        voxels = tissue(seed + index, shape).astype(np.float32)
        voxels[voxels > 0] += shift * 1000
        path = folder / "x" / f"x-{modality}.nii.gz"
        save_oriented(path, voxels * np.float32(factor), turned, spacing)
    (report,) = fill(find(folder / "x"), folder / "cache", dtype=dtype)
    assert report == Report("x", "written", (T1N, T2W, T2F), ("found no image of t1c",))
    (case,) = open_cache(folder / "cache")
    volumes = read_volumes(read_case(folder / "x"), (T1N, T2W, T2F))
    assert (case.id, case.shape, case.images) == ("x", shape, (T1N, T2W, T2F))
    np.testing.assert_allclose(case.affine, volumes[T1N].affine, rtol=0, atol=0)
    prepared = {
        name: prepare(volumes, Images(normalization=name), multiple=1)
        for name in NORMALIZATIONS
        if name != "hounsfield"
    }
    assert {k: v for k, v in case.scales.items() if v} == {
        name: each.scales for name, each in prepared.items()
    }
    np.testing.assert_array_equal(case.mask(whole(case)), prepared["robust"].mask)
    block = Box(start, size)
    np.testing.assert_array_equal(case.mask(block), block.crop(prepared["robust"].mask))
    for modality, volume in volumes.items():
        mask = brain_mask(volume)
        np.testing.assert_array_equal(case.mask(whole(case), modality), mask)
        scale = case.scales["robust"][modality]
        low, high = volume.voxels.min(), scale.offset + 10 * scale.scale
        read = case.read(modality, whole(case))
        if dtype == "float16":
            np.testing.assert_allclose(read, volume.voxels, rtol=2**-11, atol=2e-5 * factor)
        else:
            half = (min(volume.voxels.max(), high) - low) / 255 * 0.501
            np.testing.assert_allclose(read, volume.voxels.clip(max=high), rtol=0, atol=half)
        np.testing.assert_array_equal(case.read(modality, block), block.crop(read))
    centres = case.centres
    assert centres.dtype == np.int16
    assert case.mask(whole(case))[tuple(centres.T)].all()
    count = int(case.mask(whole(case)).sum())
    assert len(np.unique(centres, axis=0)) == len(centres) == min(count, 4096)


def test_whole_numbers_are_exact_in_float16(write_cases: Callable[..., Path]) -> None:
    root = write_cases(1)
    list(fill(find(root), root.parent / "cache"))
    (case,) = open_cache(root.parent / "cache")
    volumes = read_volumes(find(root).cases[0], SEQUENCES)
    for modality, volume in volumes.items():
        np.testing.assert_array_equal(case.read(modality, whole(case)), volume.voxels)


def test_the_file_holds_no_more_than_the_block_around_the_brain(
    make_image: MakeImage, tmp_path: Path
) -> None:
    voxels = np.zeros((40, 40, 40), np.int16)
    voxels[5:15, 20:32, 30:36] = tissue(0, (10, 12, 6)) + 7
    make_image("x/x-t1n.nii.gz", voxels=voxels, affine=np.eye(4))
    list(fill(find(tmp_path / "x"), tmp_path / "cache"))
    (case,) = open_cache(tmp_path / "cache")
    assert case.box == Box((5, 20, 30), (10, 12, 6))
    assert case.size == (tmp_path / "cache" / "x.safetensors").stat().st_size
    assert case.size < 10 * 12 * 6 * (2 + 1) + 720 * 6 + 2000  # image, masks, centres, metadata


def test_around_the_brain_stands_the_background(make_image: MakeImage, tmp_path: Path) -> None:
    voxels = tissue(0) - 50
    make_image("x/x-t1n.nii.gz", voxels=voxels, affine=np.eye(4))
    list(fill(find(tmp_path / "x"), tmp_path / "cache"))
    (case,) = open_cache(tmp_path / "cache")
    np.testing.assert_array_equal(case.read(T1N, whole(case)), voxels)
    assert (case.read(T1N, Box((-30, 0, 0), (5, 5, 5))) == -50).all()


def test_the_segmentation_is_kept_and_read(write_cases: Callable[..., Path]) -> None:
    root = write_cases(1)
    list(fill(find(root), root.parent / "cache"))
    (case,) = open_cache(root.parent / "cache")
    source = find(root).cases[0]
    assert source.segmentation is not None
    like = read_volumes(source, [T1N])[T1N]
    assert case.segmented
    np.testing.assert_array_equal(case.labels(whole(case)), read_labels(source.segmentation, like))


def test_brains_are_where_most_modalities_have_them(make_image: MakeImage, tmp_path: Path) -> None:
    for seed, (modality, shift) in enumerate(zip(SEQUENCES, (0, 0, 2, 3), strict=True)):
        voxels = np.roll(tissue(seed), shift, axis=0)
        make_image(f"x/x-{modality}.nii.gz", voxels=voxels, affine=np.eye(4))
    list(fill(find(tmp_path / "x"), tmp_path / "cache"))
    (case,) = open_cache(tmp_path / "cache")
    volumes = read_volumes(find(tmp_path / "x").cases[0], SEQUENCES)
    masks = np.stack([brain_mask(volume) for volume in volumes.values()])
    np.testing.assert_array_equal(case.mask(whole(case)), masks.sum(axis=0) >= 2)
    for modality, mask in zip(SEQUENCES, masks, strict=True):
        np.testing.assert_array_equal(case.mask(whole(case), modality), mask)
    assert case.box == Box.around(np.logical_or.reduce(list(masks)))


def test_ct_is_kept_whole_and_surrounded_by_air(make_image: MakeImage, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(-1024, 2000, SHAPE).astype(np.int16)
    make_image("x/x-ct.nii.gz", voxels=voxels, affine=np.eye(4))
    (report,) = fill(find(tmp_path / "x"), tmp_path / "cache")
    assert report == Report("x", "written", (Modality.CT,), ())
    (case,) = open_cache(tmp_path / "cache")
    assert case.box == whole(case)
    assert case.mask(whole(case)).all()
    np.testing.assert_array_equal(case.read(Modality.CT, whole(case)), voxels)
    assert (case.read(Modality.CT, Box((-2, 0, 0), (2, 2, 2))) == -1000).all()
    volumes = read_volumes(find(tmp_path / "x").cases[0], [Modality.CT])
    prepared = prepare(volumes, Images(normalization="hounsfield"), multiple=1)
    assert {k: v for k, v in case.scales.items() if v} == {"hounsfield": prepared.scales}


def test_dicom_series_are_cases_of_ct(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(-1024, 2000, SHAPE)
    slices = [tmp_path / "1.dcm", tmp_path / "2.dcm"]
    for path in slices:
        path.touch()
    series = [
        Series(name, tmp_path, tuple(map(str, slices))) for name in ("good", "bad", "constant")
    ]

    def read(series: Series) -> Volume:
        if series.id == "bad":
            raise InputError("a slice is missing")
        return new_volume(voxels if series.id == "good" else 0 * voxels, np.eye(4))

    monkeypatch.setattr("cwdm.cache.read_series", read)
    found = Found([], [], tuple(series))
    reports = {report.case: report for report in fill(found, tmp_path / "cache")}
    assert reports["good"] == Report("good", "written", (Modality.CT,), ())
    assert reports["bad"] == Report("bad", "left out", (), ("a slice is missing",))
    assert "every voxel is 0" in reports["constant"].problems[0]
    (case,) = open_cache(tmp_path / "cache")
    np.testing.assert_array_equal(case.read(Modality.CT, whole(case)), voxels)
    assert statuses(list(fill(found, tmp_path / "cache")))["good"] == "unchanged"


BLOCK = Box((3, 2, -1), (8, 8, 8))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_cases_are_read_in_other_processes(write_cases: Callable[..., Path], method: str) -> None:
    root = write_cases(3)
    list(fill(find(root), root.parent / "cache"))
    cases = open_cache(root.parent / "cache")
    expected = [case.read(T2F, BLOCK) for case in cases]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        read = pool.map(CachedCase.read, cases, [T2F] * 3, [BLOCK] * 3)
        for one, other in zip(expected, read, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_pickled_case_is_small_and_whole(write_cases: Callable[..., Path]) -> None:
    root = write_cases(1)
    list(fill(find(root), root.parent / "cache"))
    (case,) = open_cache(root.parent / "cache")
    case.read(T1N, whole(case))
    pickled = pickle.dumps(case)
    assert len(pickled) < 5000
    np.testing.assert_array_equal(pickle.loads(pickled).read(T1N, BLOCK), case.read(T1N, BLOCK))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_run_does_nothing_and_says_the_same(
    write_cases: Callable[..., Path], workers: int
) -> None:
    root = write_cases(4)
    (root / "case1" / "case1-t2w.nii.gz").unlink()
    (root / "case2" / "case2-t2w.nii.gz").write_bytes(b"no image")
    cache = root.parent / "cache"
    first = sorted(fill(find(root), cache, workers=workers))
    assert statuses(first) == {
        "case0": "written",
        "case1": "written",
        "case2": "left out",
        "case3": "written",
    }
    assert first[1].images == (T1N, T1C, T2F)
    assert first[1].problems == ("found no image of t2w",)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    second = sorted(fill(find(root), cache, workers=workers))
    assert second == [
        each._replace(status="unchanged") if each.status == "written" else each for each in first
    ]
    assert before == {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}


def test_workers_write_what_one_process_writes(write_cases: Callable[..., Path]) -> None:
    root = write_cases(3)
    for workers in (1, 2):
        list(fill(find(root), root.parent / f"cache{workers}", workers=workers))
    for path in (root.parent / "cache1").glob("*.safetensors"):
        (one, notes), (other, same) = (
            (load_file(each), safe_open(each, "numpy").metadata())
            for each in (path, root.parent / "cache2" / path.name)
        )
        assert notes == same
        for name in {*one, *other}:
            np.testing.assert_array_equal(one[name], other[name])


def test_only_what_changed_is_written_again(write_cases: Callable[..., Path]) -> None:
    root = write_cases(3)
    cache = root.parent / "cache"
    list(fill(find(root), cache))
    touched = root / "case1" / "case1-t1c.nii.gz"
    os.utime(touched, ns=(0, 0))
    (root / "case2" / "case2-seg.nii.gz").unlink()
    assert statuses(list(fill(find(root), cache))) == {
        "case0": "unchanged",
        "case1": "written",
        "case2": "written",
    }
    assert [case.segmented for case in open_cache(cache)] == [True, True, False]
    swapped = {T1N: T1C, T1C: T1N, T2W: T2W, T2F: T2F}
    case0 = find(root).cases[0]
    case0 = replace(case0, images={swapped[m]: path for m, path in case0.images.items()})
    assert statuses(list(fill(Found([case0], []), cache))) == {"case0": "written"}
    assert set(statuses(list(fill(find(root), cache, dtype="uint8"))).values()) == {"written"}
    assert set(statuses(list(fill(find(root), cache, dtype="uint8"))).values()) == {"unchanged"}
    damaged = cache / "case0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert statuses(list(fill(find(root), cache, dtype="uint8")))["case0"] == "written"


def test_a_case_elsewhere_is_another_case(make_image: MakeImage, tmp_path: Path) -> None:
    """Two archives with one fixed time, whose files have one name and one size."""
    for site in ("one", "two"):
        for index, modality in enumerate(SEQUENCES):
            voxels = tissue(index + (10 if site == "two" else 0))
            path = make_image(f"{site}/x/x-{modality}.nii", voxels=voxels)
            os.utime(path, ns=(0, 0))
    (tmp_path / "now").symlink_to(tmp_path / "one")
    cache = tmp_path / "cache"
    assert statuses(list(fill(find(tmp_path / "now"), cache))) == {"x": "written"}
    assert statuses(list(fill(find(tmp_path / "one"), cache))) == {"x": "unchanged"}
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to(tmp_path / "two")
    assert statuses(list(fill(find(tmp_path / "now"), cache))) == {"x": "written"}
    (case,) = open_cache(cache)
    image = read_volume(tmp_path / "two" / "x" / "x-t1n.nii")
    np.testing.assert_array_equal(case.read(T1N, whole(case)), image.voxels)


def test_a_case_cached_without_its_paths_is_read_and_written_again(
    write_cases: Callable[..., Path],
) -> None:
    root = write_cases(1)
    cache = root.parent / "cache"
    list(fill(find(root), cache))
    path = cache / "case0.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    record = json.loads(metadata["case"])
    record["files"] = [[kind, Path(name).name, *rest] for kind, name, *rest in record["files"]]
    save_file(load_file(path), path, {**metadata, "case": json.dumps(record)})
    assert [case.id for case in open_cache(cache)] == ["case0"]
    for status in ("written", "unchanged"):
        assert statuses(list(fill(find(root), cache))) == {"case0": status}


def test_a_folder_that_bears_the_name_of_a_good_case_does_it_no_harm(
    write_cases: Callable[..., Path], tmp_path: Path
) -> None:
    root = write_cases(2)
    empty = root / "old" / "case1"
    empty.mkdir(parents=True)
    for status in ("written", "unchanged"):
        assert statuses(list(fill(find(root), tmp_path / "cache"))) == {
            str(empty): "left out",
            "case0": status,
            "case1": status,
        }
    assert [case.id for case in open_cache(tmp_path / "cache")] == ["case0", "case1"]


def test_a_case_that_went_bad_leaves_the_cache_and_a_case_that_is_gone_stays(
    write_cases: Callable[..., Path],
) -> None:
    root = write_cases(3)
    cache = root.parent / "cache"
    list(fill(find(root), cache))
    (root / "case1" / "case1-t1c.nii.gz").write_bytes(b"no image")
    (root / "case2").rename(root.parent / "elsewhere")
    reports = list(fill(find(root), cache))
    assert statuses(reports) == {"case0": "unchanged", "case1": "left out"}
    assert [case.id for case in open_cache(cache)] == ["case0", "case2"]


def test_all_problems_of_a_case_are_named(
    write_cases: Callable[..., Path], make_image: MakeImage
) -> None:
    root = write_cases(1)
    folder = root / "case0"
    nan = tissue(0).astype(np.float32)
    nan[5, 5, 5] = np.nan
    make_image("data/case0/case0-t1n.nii.gz", voxels=nan)
    (folder / "case0-t1c.nii.gz").unlink()
    make_image("data/case0/case0-t2f.nii.gz", voxels=np.full(SHAPE, 7, np.int16))
    make_image("data/case0/case0-seg.nii.gz", voxels=np.full((3, 3, 3), 1, np.uint8))
    (report,) = fill(find(root), root.parent / "cache")
    assert (report.status, report.images) == ("left out", ())
    first, second, third, fourth = report.problems
    assert first.startswith(f"{folder / 'case0-t1n.nii.gz'}: found NaN")
    assert second.startswith(f"{folder / 'case0-t2f.nii.gz'}: every voxel is 7")
    assert str(folder / "case0-seg.nii.gz") in third
    assert fourth == "found no image of t1c"
    assert open_cache(root.parent / "cache") == []


def test_labels_that_do_not_fit_a_byte_are_a_problem(
    write_cases: Callable[..., Path], make_image: MakeImage
) -> None:
    root = write_cases(1)
    make_image("data/case0/case0-seg.nii.gz", voxels=np.full(SHAPE, 1035, np.int16))
    (report,) = fill(find(root), root.parent / "cache")
    assert report.problems[0].endswith("found labels 1035 to 1035, expected 0 to 255")


def test_findings_leave_a_case_out_unless_they_are_accepted(
    write_cases: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_cases(2)
    cache = root.parent / "cache"

    def findings(volumes: dict[Modality, Volume]) -> list[Finding]:
        if "case0" in volumes[T1N].path.name:
            return [
                Finding("skull", (Modality.T1N,), "has a skull"),
                Finding("registration", (Modality.T2W,), "moved"),
            ]
        return []

    monkeypatch.setattr("cwdm.cache.findings", findings)
    for accept, problems in (
        (frozenset(), ("has a skull", "moved")),
        (frozenset({"skull"}), ("moved",)),
        (frozenset({"skull", "registration"}), ()),
        (frozenset({"skull", "registration", "duplicate"}), ()),
        (frozenset({"registration"}), ("has a skull",)),
    ):
        report, other = sorted(fill(find(root), cache, accept=accept))
        assert report.problems == problems
        assert (report.status == "left out") == bool(problems)
        assert not other.problems
    assert [case.id for case in open_cache(cache)] == ["case1"]
    assert other.status == "unchanged"  # what nothing was found in needs no permission


def test_problems_of_finding_are_reported_by_case(tmp_path: Path) -> None:
    problems = [Problem("a", "one"), Problem("b", "two"), Problem("a", "three")]
    assert list(fill(Found([], problems), tmp_path / "cache")) == [
        Report("a", "left out", (), ("one", "three")),
        Report("b", "left out", (), ("two",)),
    ]


@pytest.mark.parametrize("case_id", ["a/b", "..", ".hidden", "50%", "a b", "Grüße", 'x:y*"z"'])
def test_any_id_finds_its_file(make_image: MakeImage, tmp_path: Path, case_id: str) -> None:
    image = make_image("image.nii.gz", voxels=tissue(0))
    table = tmp_path / "cases.csv"
    quoted = case_id.replace('"', '""')
    table.write_text(f'id,t1\n"{quoted}",{image.name}\n')
    for status in ("written", "unchanged"):
        assert statuses(list(fill(find(table), tmp_path / "cache"))) == {case_id: status}
    (case,) = open_cache(tmp_path / "cache")
    assert case.id == case_id
    assert case.path.parent == tmp_path / "cache"


def test_a_cache_is_known_by_its_marker(write_cases: Callable[..., Path], tmp_path: Path) -> None:
    root = write_cases(1)
    cache = tmp_path / "deep" / "cache"
    list(fill(find(root), cache, dtype="uint8"))
    assert is_cache(cache)
    marker = cache / "cwdm-cache.json"
    assert json.loads(marker.read_text()) == {"format": "cwdm-cache-1", "dtype": "uint8"}
    for folder in (tmp_path, root, tmp_path / "absent"):
        assert not is_cache(folder)
        with pytest.raises(InputError, match=r"found no cwdm-cache\.json"):
            open_cache(folder)
    for text in ("", "[]", "{}", '{"format": "other"}'):
        marker.write_text(text)
        assert not is_cache(cache)


def test_a_folder_of_other_things_is_not_made_a_cache(write_cases: Callable[..., Path]) -> None:
    root = write_cases(1)
    with pytest.raises(InputError, match=r"data: found case0, expected a new folder or a cache"):
        list(fill(find(root), root))
    assert [path.name for path in root.iterdir()] == ["case0"]


def test_a_damaged_file_is_refused_by_name(write_cases: Callable[..., Path]) -> None:
    root = write_cases(2)
    cache = root.parent / "cache"
    list(fill(find(root), cache))
    path = cache / "case1.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-100], b"", b"no tensors at all", whole.replace(b"case-1", b"case-9")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"case1\.safetensors: damaged \(") as refusal:
            open_cache(cache)
        assert "\n" not in str(refusal.value)
    path.write_bytes(whole)
    assert [case.id for case in open_cache(cache)] == ["case0", "case1"]


def test_old_temporary_files_are_removed_and_new_ones_are_not(
    write_cases: Callable[..., Path],
) -> None:
    root = write_cases(1)
    cache = root.parent / "cache"
    list(fill(find(root), cache))
    old, new = cache / ".cwdm-00.safetensors", cache / ".cwdm-01.safetensors"
    for path in (old, new):
        path.write_bytes(b"half a ca")
    os.utime(old, (time.time() - 7200,) * 2)
    list(fill(find(root), cache))
    assert not old.exists()
    assert new.exists()
    assert [case.id for case in open_cache(cache)] == ["case0"]


FILL = """
import sys
from pathlib import Path
from cwdm.cache import fill
from cwdm.layouts import find

if __name__ == "__main__":
    for report in fill(find(Path(sys.argv[1])), Path(sys.argv[2]), workers=int(sys.argv[3])):
        print(report.case, flush=True)
"""


def start(tmp_path: Path, root: Path, workers: int) -> subprocess.Popen[str]:
    """Another process that fills `cache`."""
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    command = [sys.executable, str(script), str(root), str(tmp_path / "cache"), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_nothing_half_and_the_next_completes_it(
    write_cases: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    root = write_cases(40, (40, 40, 40))
    process = start(tmp_path, root, workers)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    children = multiprocess_children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):  # the workers notice
        if not any(Path(f"/proc/{child}").exists() for child in children):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{children} outlive their parent")
    done = [case.id for case in open_cache(tmp_path / "cache")]  # all of them whole
    assert 3 <= len(done) < 40
    reports = statuses(list(fill(find(root), tmp_path / "cache")))
    assert {case for case, status in reports.items() if status == "unchanged"} == set(done)
    assert len(open_cache(tmp_path / "cache")) == 40


def multiprocess_children(pid: int) -> list[int]:
    """The processes that a process has started; none where there is no /proc."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
def test_two_runs_at_once_do_no_harm(write_cases: Callable[..., Path], tmp_path: Path) -> None:
    root = write_cases(12)
    processes = [start(tmp_path, root, 1) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert len(output.splitlines()) == 12
    assert len(open_cache(tmp_path / "cache")) == 12
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_the_real_cases_pass_and_are_kept(shared: Path, tmp_path: Path, dtype: Dtype) -> None:
    found = find(shared / "data" / "val")
    for report in fill(found, tmp_path / "cache", dtype=dtype):
        assert (report.status, report.problems) == ("written", ())
    names: tuple[NormalizationName, ...] = ("published", "robust")
    for case, cached in zip(found.cases, open_cache(tmp_path / "cache"), strict=True):
        volumes = read_volumes(case, SEQUENCES)
        np.testing.assert_array_equal(cached.affine, volumes[T1N].affine)
        for name in names:
            prepared = prepare(volumes, Images(normalization=name), multiple=1)
            assert cached.scales[name] == prepared.scales
        for modality, volume in volumes.items():
            inside = cached.mask(whole(cached), modality)
            np.testing.assert_array_equal(inside, brain_mask(volume))
            scale = cached.scales["robust"][modality]
            read = cached.read(modality, whole(cached))
            error = abs(read - volume.voxels.clip(max=scale.offset + 10 * scale.scale))
            if dtype == "float16":
                error = abs(read - volume.voxels)
            tolerance = {"float16": 0.003, "uint8": 0.02}[dtype]  # of a standard deviation
            assert error[inside].mean() < tolerance * scale.scale


def test_nothing_is_learnt_from_synthetic_images(
    write_cases: Callable[..., Path], tmp_path: Path
) -> None:
    root = write_cases(2)
    path = root / "case1" / "case1-t2w.nii.gz"
    like = read_volume(path)
    path.unlink()
    write_volume(like.voxels, like, path, "cwdm 1 SYNTHETIC t2w")
    good, bad = sorted(fill(find(root), tmp_path / "cache"))
    assert not good.problems
    assert bad.problems == (
        f"{path}: is marked as synthetic, expected an acquired image to learn from",
    )
