"""Labels, regions and descriptions of networks."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics.meandice import compute_dice
from torch import as_tensor

from cwdm.case import Case
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES
from cwdm.segmentation import (
    Descriptor,
    Region,
    brats_labels,
    check_complete,
    dice,
    digest,
    find_label,
    find_region,
    from_regions,
    regions,
)

T1N, T1C, T2W, T2F = SEQUENCES
SHAPE = (3, 4, 2)
LABELS = arrays(np.uint8, SHAPE, elements=st.integers(0, 3))
MASK = arrays(np.bool_, SHAPE)


@given(LABELS)
def test_labels_come_back_from_their_regions(labels) -> None:
    assert (from_regions(regions(labels)) == labels).all()


@given(LABELS)
def test_regions_are_nested_and_what_brats_scores(labels) -> None:
    masks = regions(labels)
    assert (masks[Region.WT] == np.isin(labels, [1, 2, 3])).all()
    assert (masks[Region.TC] == np.isin(labels, [1, 3])).all()
    assert (masks[Region.ET] == np.isin(labels, [3])).all()


@given(st.fixed_dictionaries({region: MASK for region in Region}))
def test_masks_that_are_not_nested_count_outwards(masks) -> None:
    found = regions(from_regions(masks))
    assert (found[Region.ET] == masks[Region.ET]).all()
    assert (found[Region.TC] == masks[Region.TC] | masks[Region.ET]).all()
    assert (found[Region.WT] == np.logical_or.reduce(list(masks.values()))).all()


@given(LABELS)
def test_both_conventions_become_one(labels) -> None:
    old = np.where(labels == 3, 4, labels)
    assert (brats_labels(labels, "x") == labels).all()
    assert (brats_labels(old, "x") == labels).all()
    assert brats_labels(old, "x").dtype == np.uint8


@pytest.mark.parametrize(
    ("values", "found"),
    [([0, 3, 4], "0, 3, 4"), ([0, 5], "0, 5"), ([-1, 0], "-1, 0"), (range(20), "6, 7, ...")],
)
def test_values_that_are_no_labels_are_refused(values, found: str) -> None:
    with pytest.raises(InputError, match=f"^x.nii: found labels .*{found}, expected 0, 1, 2 and"):
        brats_labels(np.array(values), "x.nii")


@given(MASK, MASK)
def test_dice_is_that_of_monai(one, other) -> None:
    a, b = (as_tensor(mask[None, None].astype(np.uint8)) for mask in (one, other))
    oracle = compute_dice(a, b, ignore_empty=False).item()
    assert dice(one, other) == pytest.approx(oracle, abs=1e-6)
    assert dice(one, other) == dice(other, one)
    assert dice(one, one) == 1


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("Tumor core", Region.TC),
        ("Whole tumor", Region.WT),
        ("Enhancing tumor", Region.ET),
        ("whole_tumour", Region.WT),
        ("TC", Region.TC),
        ("edema", None),
        ("tumor", None),
    ],
)
def test_regions_are_found_by_name(name: str, region: Region | None) -> None:
    assert find_region(name) is region


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("background", 0),
        ("NCR/NET", 1),
        ("non-enhancing tumor", 1),
        ("Peritumoral edema", 2),
        ("SNFH", 2),
        ("enhancing tumour", 3),
        ("resection cavity", None),
    ],
)
def test_labels_are_found_by_name(name: str, label: int | None) -> None:
    assert find_label(name) == label


def test_a_digest_is_that_of_the_file_or_of_all_whatever_their_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    assert digest([one]) == hashlib.sha256(b"1").hexdigest()
    both = digest([one, two])
    assert both == digest([two, one])
    two.write_bytes(b"3")
    assert digest([one, two]) != both


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.json: descriptor: Invalid JSON"),
        ('{"regions": ["WT", "TC", "ET"]}', "x.json: channels: Field required"),
        ('{"channels": ["t3"], "labels": [0, 3]}', "x.json: channels.0: Input should be 't1n'"),
        ('{"channels": ["t1n"]}', "expected either labels or regions"),
        ('{"channels": ["t1n"], "regions": ["WT", "TC"]}', "the regions WT, TC and ET in the"),
        ('{"channels": ["t1n"], "labels": [0, 5]}', "labels go from 0 to 4"),
        ('{"channels": ["t1n"], "labels": [0], "windows": 3}', "x.json: windows: Extra inputs"),
        ('{"channels": ["t1n"], "labels": [0], "overlap": 1}', "x.json: overlap: Input should be"),
    ],
)
def test_a_wrong_description_is_refused_with_its_key(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Descriptor.parse(text, "x.json")
    assert message in str(error.value)


class Stub:
    spec, sha256, channels = "onnx:x.onnx", "", (T1C, T2F)

    def __init__(self, partial: bool):
        self.partial = partial


@pytest.mark.parametrize(
    ("partial", "present", "absent"),
    [
        (False, (T1C, T2F), None),
        (False, (T1N, T2F), "t1c"),
        (True, (T1N, T2F), None),
        (True, (T1N,), "t1c, t2f"),
    ],
)
def test_what_a_segmenter_cannot_do_without_is_named(partial, present, absent) -> None:
    case = Case("x", {modality: Path(f"{modality}.nii") for modality in present})
    if absent is None:
        check_complete(Stub(partial), case)
    else:
        with pytest.raises(InputError, match=f"^case x: has no {absent}, which onnx:x.onnx needs"):
            check_complete(Stub(partial), case)
