"""Withholding, comparing with floors, tables, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from cwdm.case import Case, read_case
from cwdm.cli.main import cwdm
from cwdm.config import Config, Images
from cwdm.errors import InputError
from cwdm.evaluate import (
    Predict,
    Prediction,
    Predictions,
    Score,
    compare,
    complete_cases,
    draw_sample,
    evaluate,
    fit_regressions,
    picture,
    reliability,
    tabulate,
)
from cwdm.files import sha256
from cwdm.metrics import Aligned, mae, mse, ncc, psnr, ssim
from cwdm.modality import SEQUENCES, Modality
from cwdm.model import build_denoiser
from cwdm.protocols import FIGURES, PROTOCOLS, REGIONS
from cwdm.provenance import read_interval
from cwdm.summary import (
    FILES,
    contests,
    differences,
    markdown,
    summarize,
    trust,
    verdicts,
    write_tables,
)
from cwdm.uncertainty import Uncertainty
from cwdm.unet import UNetConfig
from cwdm.volume import brain_mask, read_volume

MakeImage = Callable[..., Path]
MakePatient = Callable[..., Case]
SHAPE = (24, 22, 20)
T1N, T1C, T2W, T2F = SEQUENCES


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boosting is quick on these few voxels."""
    monkeypatch.setattr("cwdm.floors.BOOSTING_ROUNDS", 60)


@pytest.fixture
def make_patient(make_image: MakeImage) -> MakePatient:
    """Write a small case in which FLAIR is a function of the other three, stored LPS."""

    def make(case_id: str = "p1", seed: int = 0, root: str = "cases") -> Case:
        generator = np.random.default_rng(seed)
        grid = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
        brain = ((grid / np.array([10, 9, 8]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) < 1
        a, b, c = generator.uniform(100, 200, (3, *SHAPE))
        images = {T1N: a, T1C: b, T2W: c, T2F: 3 * a - b + 0.02 * (c - 150) ** 2}
        for modality, voxels in images.items():
            stored = np.where(brain, voxels, 0).round().astype(np.int16)
            make_image(f"{root}/{case_id}/{case_id}-{modality}.nii.gz", voxels=stored)
        labels = np.zeros(SHAPE, dtype=np.uint8)
        labels[8:14, 8:13, 7:12], labels[9:11, 9:11, 8:10] = 2, 3
        path = make_image(f"{root}/{case_id}/{case_id}-seg.nii.gz", voxels=labels)
        return read_case(path.parent)

    return make


def found(case: Case, target: Modality) -> NDArray[np.floating]:
    """The truth, found in the folder of the case."""
    folder = next(iter(case.images.values())).parent
    return read_volume(folder / f"{case.id}-{target}.nii.gz").voxels


def perfect(case: Case, target: Modality) -> Prediction:
    """All but the truth, in other units."""
    truth = found(case, target)
    noise = np.random.default_rng(0).normal(0, 0.003 * np.ptp(truth), truth.shape)
    return Prediction(0.1 * (truth + noise) + 5)


def test_the_predictor_never_gets_the_target(make_patient: MakePatient) -> None:
    seen = []

    def predict(case: Case, target: Modality) -> Prediction:
        seen.append((target, case.missing))
        return perfect(case, target)

    evaluate([make_patient()], {"ours": predict})
    assert seen == [(target, (target,)) for target in SEQUENCES]


def test_one_row_per_modality_method_and_region(make_patient: MakePatient) -> None:
    table = evaluate([make_patient("p1"), make_patient("p2", 1)], {"ours": perfect})
    assert len(table) == 2 * 4 * (1 + 5 + 2) * 6
    assert not table.duplicated(["case", "modality", "method", "region"]).any()
    flair = table[(table["modality"] == "t2f") & (table["case"] == "p1")]
    kinds = flair[["method", "kind"]].drop_duplicates().set_index("method")["kind"]
    assert kinds.to_dict() == {
        "ours": "model",
        "zeros": "floor",
        "constant brain": "floor",
        "copy t1n": "floor",
        "copy t1c": "floor",
        "copy t2w": "floor",
        "tumor erased": "spoilt truth",
        "blurred": "spoilt truth",
    }
    assert set(table["region"]) == set(REGIONS) - {"non-tumor"}
    assert set(table["protocol"]) == {"aligned"}


def test_a_perfect_prediction_in_other_units_has_ssim_one(make_patient: MakePatient) -> None:
    table = evaluate([make_patient()], {"ours": perfect})
    ours = table[table["method"] == "ours"]
    assert (ours["ssim"] > 0.999).all()
    assert (ours["mae"] < 0.01).all()
    assert (ours["psnr"] > 40).all()


@pytest.mark.parametrize(("slope", "offset"), [(1, 0), (2, 0), (0.1, 5)])
def test_the_truth_in_other_units_is_no_prediction(
    make_patient: MakePatient, slope: float, offset: float
) -> None:
    copy = {"ours": lambda case, target: Prediction(slope * found(case, target) + offset)}
    with pytest.raises(InputError, match="ours: t1n of case p1: the prediction is the truth in"):
        evaluate([make_patient()], copy)


def test_an_inverted_image_counts_as_a_constant_one(make_patient: MakePatient) -> None:
    """Only floors may be turned round by the fit."""
    inverted = {"ours": lambda case, target: Prediction(-perfect(case, target).voxels)}
    table = evaluate([make_patient()], inverted, targets=[T2F])
    rows = table[table["region"] == "brain"].set_index("method")
    for figure in ("psnr", "ssim", "mae"):
        assert rows[figure]["ours"] == pytest.approx(rows[figure]["constant brain"], abs=1e-4)
    assert rows["ncc"]["ours"] == 0
    assert verdicts(summarize(table))[0].startswith("t2f: ours is not better than every floor")


def test_no_method_has_the_name_of_a_floor(make_patient: MakePatient) -> None:
    with pytest.raises(InputError, match="'copy t1n': that is the name of a floor"):
        evaluate([make_patient()], {"copy t1n": perfect})


def test_a_truth_without_contrast_is_named(make_patient: MakePatient) -> None:
    case = make_patient()
    volume = read_volume(case.images[T2F])
    flat = replace(volume, voxels=(volume.voxels > 0).astype(np.float32))
    flat.voxels[12, 11, 5:14] += np.arange(9)  # an image, no mask; in too few voxels to matter
    case.images[T2F].unlink()
    nib.Nifti1Image(flat.voxels[::-1, ::-1], np.diag([-1.0, -1, 1, 1])).to_filename(
        case.images[T2F]
    )
    with pytest.raises(InputError, match="ours: t2f of case p1: nothing to compare with"):
        evaluate([case], {"ours": lambda case, target: Prediction(volume.voxels)}, targets=[T2F])


def test_figures_are_those_of_the_metrics_in_brain_and_tumor(make_patient: MakePatient) -> None:
    case = make_patient()
    table = evaluate([case], {}, targets=[T2F])
    truth, copy = (read_volume(case.images[m]) for m in (T2F, T1N))
    assert case.segmentation is not None
    labels = read_volume(case.segmentation).voxels
    aligned = Aligned.of(copy.voxels, truth.voxels, brain_mask(truth))
    regions = {"brain": labels >= 0, "healthy": labels == 0, "WT": labels > 0, "ET": labels == 3}
    for region, mask in regions.items():
        rows = table[(table["method"] == "copy t1n") & (table["region"] == region)]
        where = mask[aligned.box] & aligned.brain
        triple = (aligned.prediction, aligned.truth, where)
        assert list(rows["psnr"]) == pytest.approx([psnr(*triple)])
        assert list(rows["ssim"]) == pytest.approx([ssim(*triple)], abs=1e-6)
        assert list(rows["mae"]) == pytest.approx([mae(*triple)])
        assert list(rows["mse"]) == pytest.approx([mse(*triple)])
        assert list(rows["ncc"]) == pytest.approx([ncc(*triple)])
        assert list(rows["voxels"]) == [where.sum()]


def test_without_a_segmentation_there_is_no_tumor_row(make_patient: MakePatient) -> None:
    case = make_patient()
    table = evaluate([Case(case.id, case.images)], {}, targets=[T2F])
    assert set(table["region"]) == {"brain", "cuboid"}
    assert "tumor erased" not in set(table["method"])


def test_the_challenge_does_not_see_the_tumor_and_the_verdict_says_so(
    make_patient: MakePatient,
) -> None:
    protocol = PROTOCOLS["brasyn"]
    table = evaluate([make_patient()], {"ours": perfect}, targets=[T2F], protocol=protocol)
    scores = table.set_index(["method", "region"])["ssim"]
    assert scores["tumor erased", "ET"] > 0.99  # of eight voxels
    assert scores["ours", "ET"] == pytest.approx(1, abs=1e-4)
    (line,) = verdicts(summarize(table))
    assert line.startswith("t2f: ours beats every floor, but no regression was fitted. ")
    erased = f"tumor erased {scores['tumor erased', 'ET']:.3f}."
    assert "ET SSIM says nothing: zeros 0." in line
    assert line.endswith(erased)


def test_labels_that_are_not_those_of_a_tumor_are_refused(
    make_patient: MakePatient, make_image: MakeImage
) -> None:
    case = make_patient()
    labels = np.full(SHAPE, 7, dtype=np.uint8)
    strange = Case(case.id, case.images, make_image("other/p1-seg.nii.gz", voxels=labels))
    with pytest.raises(InputError, match=r"p1-seg.nii.gz: found labels 7, expected 0, 1, 2"):
        evaluate([strange], {})


def test_fitted_regressions_stand_beside_the_copies_and_beat_them(
    make_patient: MakePatient,
) -> None:
    pytest.importorskip("sklearn")
    sample = draw_sample([make_patient("f1", 5), make_patient("f2", 6)])
    table = evaluate(
        [make_patient()], {}, targets=[T2F], regressions=fit_regressions(sample, [T2F, T1N])
    )
    floors = table[(table["region"] == "brain") & (table["kind"] == "floor")]
    brain = floors.set_index("method")["psnr"]
    copies = ["copy t1n", "copy t1c", "copy t2w"]
    assert list(brain.index) == ["zeros", "constant brain", *copies, "ridge", "boosting"]
    assert brain["boosting"] > brain["ridge"] > brain[["copy t1n", "copy t1c", "copy t2w"]].max()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda voxels: voxels[1:], r"shape \(23, 22, 20\), expected \(24, 22, 20\)"),
        (lambda voxels: voxels * np.nan, "NaN"),
    ],
)
def test_a_bad_prediction_is_refused_by_name(
    make_patient: MakePatient,
    spoil: Callable[[NDArray[np.floating]], NDArray[np.floating]],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message) as error:
        evaluate(
            [make_patient()],
            {"ours": lambda case, target: Prediction(spoil(found(case, target) + 1))},
        )
    assert "ours: t1n of case p1" in str(error.value)


def test_a_segmentation_on_another_grid_is_refused(
    make_patient: MakePatient, make_image: MakeImage
) -> None:
    case = make_patient()
    labels = np.zeros((8, 8, 8), dtype=np.uint8)
    labels[2:5] = 1
    wrong = Case(case.id, case.images, make_image("other/p1-seg.nii.gz", voxels=labels))
    with pytest.raises(InputError, match="expected one grid"):
        evaluate([wrong], {})


def test_incomplete_cases_are_left_out_and_none_is_an_error(make_patient: MakePatient) -> None:
    case = make_patient()
    assert complete_cases([case, case.without(T1C)]) == [case]
    with pytest.raises(InputError, match="no case with all of t1n, t1c, t2w, t2f"):
        complete_cases([case.without(T1C)])


def test_predictions_are_found_anywhere_below_a_folder(
    make_patient: MakePatient, make_image: MakeImage, tmp_path: Path
) -> None:
    case = make_patient()
    voxels = np.random.default_rng(0).uniform(1, 9, SHAPE).astype(np.float32)
    make_image("pred/a/b/p1-t2f.nii.gz", voxels=voxels)
    make_image("pred/p1-t2f-mean.nii.gz", voxels=voxels)
    predictions = Predictions.find(tmp_path / "pred", [case])
    assert predictions.targets == (T2F,)
    read = predictions(case.without(T2F), T2F).voxels
    np.testing.assert_array_equal(read, voxels[::-1, ::-1])  # stored LPS, canonical is RAS


@pytest.mark.parametrize(
    "record",
    ["[1]", '{"model": "another program"}', '{"synthetic": true, "cwdm": "0.1.0"}'],
    ids=["a list", "of another program", "without an interval, as that of a generated sample"],
)
def test_a_record_without_an_interval_is_no_obstacle(tmp_path: Path, record: str) -> None:
    (tmp_path / "p1-t2f.json").write_text(record)
    assert read_interval(tmp_path / "p1-t2f.nii.gz") is None


@pytest.mark.parametrize(
    "interval",
    [
        '{"coverage": 0.8}',
        '{"files": {"std": "../x.nii.gz"}, "regions": []}',
    ],
    ids=["half of it", "a map in another folder"],
)
def test_a_damaged_interval_is_named(tmp_path: Path, interval: str) -> None:
    path = tmp_path / "p1-t2f.json"
    path.write_text(f'{{"synthetic": true, "cwdm": "0.1.0", "interval": {interval}}}')
    with pytest.raises(InputError, match=r"p1-t2f.json: not a record of cwdm"):
        read_interval(tmp_path / "p1-t2f.nii.gz")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "found no prediction, expected names like p1-t1n.nii.gz"),
        (("pred/p1-t2f.nii.gz", "pred/x/p1-t2f.nii"), "two predictions of one image"),
    ],
)
def test_a_folder_without_or_with_doubtful_predictions_is_refused(
    make_patient: MakePatient,
    make_image: MakeImage,
    tmp_path: Path,
    files: tuple[str, ...],
    message: str,
) -> None:
    case = make_patient()
    (tmp_path / "pred").mkdir()
    for file in files:
        make_image(file)
    with pytest.raises(InputError, match=message):
        Predictions.find(tmp_path / "pred", [case])


def test_the_truth_is_not_accepted_as_its_own_prediction(
    make_patient: MakePatient, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is the truth itself"):
        Predictions.find(tmp_path, [make_patient()])


def test_leaving_out_a_difficult_case_is_refused(
    make_patient: MakePatient, make_image: MakeImage, tmp_path: Path
) -> None:
    cases = [make_patient("p1"), make_patient("p2", 1)]
    make_image("pred/p1-t2f.nii.gz")
    predictions = Predictions.find(tmp_path / "pred", cases)
    with pytest.raises(InputError, match=r"1 of 2 predictions are missing, such as p2-t2f"):
        predictions.require(cases, [T2F])


def test_a_prediction_on_another_grid_is_refused_with_both_files(
    make_patient: MakePatient, make_image: MakeImage, tmp_path: Path
) -> None:
    case = make_patient()
    make_image("pred/p1-t2f.nii.gz", affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    predictions = Predictions.find(tmp_path / "pred", [case])
    with pytest.raises(InputError, match=r"p1-t1n.nii.gz and .*pred/p1-t2f.nii.gz"):
        predictions(case.without(T2F), T2F)


def score(
    method: str,
    psnr: float,
    ssim: float,
    *,
    case: str = "a",
    modality: str = "t2f",
    region: str = "brain",
    mae: float = 0.1,
) -> Score:
    kinds = {"ridge": "floor", "copy t1n": "floor", "tumor erased": "spoilt truth"}
    kind = kinds.get(method, "model")
    figures = {"psnr": float(psnr), "ssim": ssim, "mae": mae, "ms_ssim": 0.5, "mse": 1, "ncc": 0.5}
    return Score(case, modality, method, kind, "aligned", region, 9, **figures)


@pytest.fixture
def table() -> pd.DataFrame:
    return tabulate(
        [
            score("copy t1n", 10, 0.5),
            score("ridge", 20, 0.6),
            score("ours", 24, 0.55),
            score("ridge", 22, 0.8, case="b"),
            score("copy t1n", 10, 0.3, case="b"),
            score("ours", 26, 0.65, case="b", mae=0.05),
            score("ours", 15, 0.4, region="WT"),
            score("tumor erased", 14, 0.96, region="WT"),
            score("tumor erased", 40, 0.99, mae=0.01),
            score("copy t1n", 31, 0.9, modality="t1c"),
            score("ours", 32, 0.95, modality="t1c"),
        ]
    )


def test_the_summary_averages_over_cases_and_puts_the_model_first(table: pd.DataFrame) -> None:
    summary = summarize(table)
    assert list(summary["modality"].unique()) == ["t1c", "t2f"]
    flair = summary[(summary["modality"] == "t2f") & (summary["region"] == "brain")]
    assert list(flair["method"]) == ["ours", "ridge", "copy t1n", "tumor erased"]
    assert list(flair["cases"]) == [2, 2, 2, 1]
    assert list(flair["psnr"]) == pytest.approx([25, 21, 10, 40])
    assert list(flair["ssim"]) == pytest.approx([0.6, 0.7, 0.4, 0.99])


def test_the_verdict_names_the_floor_that_is_ahead(table: pd.DataFrame) -> None:
    assert verdicts(summarize(table)) == [
        "t1c: ours is not better than every floor (brain MAE: copy t1n); no tumor was compared.",
        "t2f: ours is not better than every floor (brain SSIM: ridge regression; "
        "WT SSIM: tumor erased; WT MAE: tumor erased). WT SSIM says nothing: tumor erased 0.960.",
    ]


def test_the_markdown_table_marks_the_best_of_each_column(table: pd.DataFrame) -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in markdown(summarize(table)).splitlines()
    ]
    assert lines[0][:5] == ["modality", "method", "PSNR brain", "SSIM brain", "MAE brain"]
    assert len({len(line) for line in lines}) == 1
    rows = {(line[0], line[1]): line[2:] for line in lines[2:]}
    assert rows["t2f", "ours"] == [
        "**25.00**",
        "0.600",
        "**0.075**",
        "**15.00**",
        "**0.400**",
        "**0.100**",
    ]
    assert rows["t2f", "spoilt truth: tumor erased"][:2] == ["40.00", "0.990"]
    assert rows["t2f", "ridge regression"] == ["21.00", "**0.700**", "0.100", "", "", ""]


def test_intervals_stand_beside_the_means(table: pd.DataFrame) -> None:
    summary = summarize(table).set_index(["modality", "region", "method"]).to_dict("index")
    row = summary["t2f", "brain", "ours"]
    assert (row["psnr_low"], row["psnr_high"]) == pytest.approx((24, 26))  # of two cases
    assert np.isnan(summary["t2f", "WT", "ours"]["psnr_low"])


def test_methods_are_tested_against_the_first_and_spoilt_truths_are_not(
    table: pd.DataFrame,
) -> None:
    found = differences(table)
    assert set(found["against"]) == {"ours"}
    assert set(found["method"]) == {"copy t1n", "ridge"}
    key = (found["modality"] == "t2f") & (found["method"] == "ridge") & (found["figure"] == "psnr")
    assert found.loc[key, "difference"].tolist() == pytest.approx([-4])
    assert found.loc[key, "cases"].tolist() == [2]
    assert contests(table) == []
    rival = [score("theirs", 22, 0.7), score("theirs", 25, 0.7, case="b")]
    (line,) = contests(pd.concat([table, tabulate(rival)]))
    assert line == (
        "t2f: theirs against ours: brain PSNR -1.500, p = 0.5 (2 cases); "
        "brain SSIM +0.100, p = 0.5 (2 cases)."
    )


def test_an_interval_is_judged_in_every_region(make_patient: MakePatient) -> None:
    """Samples that err by 3 where the interval is 2 wide in one half, and 4 in the other."""
    case = make_patient()
    truth = read_volume(case.images[T2F])
    brain = brain_mask(truth)
    assert case.segmentation is not None
    labels = read_volume(case.segmentation).voxels.astype(np.uint8)
    sign = np.random.default_rng(0).choice([-1, 1], truth.voxels.shape)
    error = np.where(sign > 0, 3.0, 1.0) * np.random.default_rng(1).choice([-1, 1], sign.shape)
    mean = np.where(brain, truth.voxels + error, 0)
    half = np.where(labels > 0, 4.0, 2.0) * brain
    maps = Uncertainty.within(mean, half / 2, mean - half, mean + half, brain, coverage=0.8)
    prediction = Prediction(2 * mean, calibrated=True)
    doubled = Uncertainty.within(
        2 * mean, half, 2 * (mean - half), 2 * (mean + half), brain, coverage=0.8
    )
    for given in (
        Prediction(mean, maps, calibrated=True),
        replace(prediction, uncertainty=doubled),
    ):
        rows = {r.region: r for r in reliability(given, truth.voxels, brain, labels, "p1", T2F)}
        assert set(rows) == {"brain", "healthy", "WT", "TC", "ET"}
        assert rows["WT"].covered == 1
        small = np.mean(np.abs(error[brain & (labels == 0)]) < 2)
        assert rows["healthy"].covered == pytest.approx(small, abs=0.01)
        assert rows["brain"].promised == 0.8
        assert rows["brain"].wide == 0
        assert np.isnan(rows["WT"].agreement)  # the deviation is the same everywhere
    assert reliability(prediction, truth.voxels, brain) == []
    falling = Prediction(-mean, maps)
    assert {r.covered for r in reliability(falling, truth.voxels, brain)} == {0}
    (line,) = trust(tabulate(reliability(given, truth.voxels, brain, labels, "p1", T2F, "ours")))
    assert line.startswith("t2f: ours, calibrated interval for 80%: brain ")
    assert "WT 100% held" in line


def test_a_perceptual_distance_is_a_figure_more_for_all_but_floors(
    make_patient: MakePatient, tmp_path: Path
) -> None:
    def distances(
        prediction: NDArray[np.floating],
        truth: NDArray[np.floating],
        masks: Mapping[str, NDArray[np.bool_]],
    ) -> dict[str, float]:
        return {name: abs(float((prediction - truth)[mask].mean())) for name, mask in masks.items()}

    both: dict[str, Predict] = {"ours": perfect, "same": perfect}
    cases = [make_patient("p1"), make_patient("p2", 1)]
    compared = [
        c for case in cases for c in compare(case, both, targets=[T2F], distances=distances)
    ]
    table = tabulate(score for comparison in compared for score in comparison.scores)
    assert table.loc[table["kind"] == "floor", "perceptual"].isna().all()
    assert table.loc[table["kind"] != "floor", "perceptual"].notna().all()
    summary = summarize(table)
    assert {"perceptual", "perceptual_low"} <= set(summary.columns)
    found = differences(table).query("figure == 'perceptual'")
    assert set(found["method"]) == {"same"}
    paths = write_tables(table, tmp_path, notes={})
    record = json.loads(paths[FILES.index("summary.json")].read_text())
    assert "LPIPS" in record["figures"]["perceptual"]


def test_files_hold_the_tables_and_the_json_has_no_infinity(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    table.loc[table["method"] == "ours", "psnr"] = math.inf
    paths = write_tables(table, tmp_path / "out", notes={"seed": 3})
    assert [path.name for path in paths] == list(FILES)
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), table, check_dtype=False)
    record = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert record["protocol"]["name"] == "aligned"
    assert "99.5 %" in record["protocol"]["range"]
    assert "over the voxels of its region" in record["protocol"]["mask"]
    assert set(record["figures"]) == set(FIGURES)
    assert list(record["regions"]) == ["brain", "WT"]
    assert record["seed"] == 3
    assert record["cases"] == ["a", "b"]
    assert record["summary"][0]["psnr"] is None
    assert "SSIM" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(InputError, match="already exists"):
        write_tables(table, tmp_path / "out", notes={})


def test_a_comparison_can_be_drawn_if_something_was_predicted(make_patient: MakePatient) -> None:
    case = make_patient()
    (drawn,) = compare(case, {"ours": perfect}, targets=[T2F])
    assert picture(drawn).size[0] > 800
    (floors,) = compare(case, {}, targets=[T2F])
    with pytest.raises(ValueError, match="no picture"):
        picture(floors)


@pytest.fixture
def judged(make_patient: MakePatient, make_image: MakeImage, tmp_path: Path) -> list[str]:
    """Arguments for a run with one case under truth/, its FLAIR predicted and one to fit on."""
    case = make_patient("p1", root="truth")
    make_patient("p2", 1, root="fit")
    truth = read_volume(case.images[T2F]).voxels[::-1, ::-1]
    noise = np.random.default_rng(0).normal(0, 1, SHAPE)
    predicted = np.where(truth > 0, truth + noise, 0).astype(np.float32)
    make_image("pred/p1-t2f.nii.gz", voxels=predicted)
    folders = ("truth", "pred", "fit", "output")
    return ["evaluate", *(f"--{each}={tmp_path / each}" for each in folders), "--name", "ours"]


def test_the_command_judges_a_folder_of_predictions(judged: list[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = CliRunner().invoke(cwdm, [*judged, "--pictures"], standalone_mode=True)
    assert result.exit_code == 0, result.output
    assert "t2f: ours beats every floor." in result.output
    assert {path.name for path in (tmp_path / "output").iterdir()} == {*FILES, "p1-t2f.png"}
    summary = pd.read_csv(tmp_path / "output" / "summary.csv")
    assert summary["method"].iloc[0] == "ours"
    assert {"ridge", "boosting", "copy t1n"} <= set(summary["method"])
    record = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert record["floors fitted on"] == ["p2"]


def test_the_command_compares_two_folders_and_says_where_images_are(
    judged: list[str], make_image: MakeImage, tmp_path: Path
) -> None:
    noise = np.random.default_rng(1).normal(0, 9, SHAPE)
    truth = read_volume(tmp_path / "truth" / "p1" / "p1-t2f.nii.gz").voxels[::-1, ::-1]
    worse = np.where(truth > 0, truth + noise, 0).astype(np.float32)
    make_image("output/worse/p1-t2f.nii.gz", voxels=worse)
    arguments = [a for a in judged if not a.startswith("--fit")]
    more = [f"--pred={tmp_path / 'output' / 'worse'}", "--name", "worse"]
    result = CliRunner().invoke(cwdm, [*arguments, *more])
    assert result.exit_code == 0, result.output
    assert "t2f: worse against ours: brain PSNR -" in result.output
    record = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert record["methods"] == ["ours", "worse"]
    (images,) = record["images"]
    assert images["acquired"]["t1n"] == str(tmp_path / "truth" / "p1" / "p1-t1n.nii.gz")
    assert images["predictions"] == {
        "ours": {"t2f": str(tmp_path / "pred" / "p1-t2f.nii.gz")},
        "worse": {"t2f": "worse/p1-t2f.nii.gz"},
    }
    digest = sha256(tmp_path / "output" / "worse" / "p1-t2f.nii.gz")
    assert images["sha256"]["worse/p1-t2f.nii.gz"] == digest
    assert record["uncertainty"] is None
    tests = pd.read_csv(tmp_path / "output" / "tests.csv")
    assert set(tests["against"]) == {"ours"}
    result = CliRunner().invoke(cwdm, [*arguments, more[0], "--output", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "found 1 times --name, expected it 2 times, or not" in result.stderr


def test_the_command_keeps_what_it_synthesizes_and_judges_its_interval(
    any_model: Path, simulated: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "--truth", simulated, "--model", any_model, "--modality", "t1n"]
    words += ["--samples", 2, "--precision", "fp32", "--output", tmp_path / "run"]
    result = CliRunner().invoke(cwdm, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "uncalibrated interval for 80%: brain " in result.stdout
    maps = pd.read_csv(tmp_path / "run" / "uncertainty.csv")
    assert set(maps["region"]) == {"brain", "healthy", "WT", "TC", "ET"}
    kept = tmp_path / "run" / "predictions"
    assert len(list(kept.glob("*-t1n.nii.gz"))) == 4
    again = ["evaluate", "--truth", simulated, "--pred", kept, "--output", tmp_path / "again"]
    result = CliRunner().invoke(cwdm, [str(word) for word in again])
    assert result.exit_code == 0, result.output
    for file in ("uncertainty.csv", "metrics.csv"):
        one, other = (pd.read_csv(tmp_path / run / file) for run in ("run", "again"))
        pd.testing.assert_frame_equal(one, other, atol=0.02, rtol=0.02)
    words = [word for word in words if word != "--samples" and word != 2]
    result = CliRunner().invoke(cwdm, [str(word) for word in [*words, "--overwrite"]])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run" / "uncertainty.csv").exists()  # of the run before
    result = CliRunner().invoke(cwdm, [str(word) for word in words])
    assert "already exists" in result.stderr
    words[words.index("--output") + 1] = simulated / "run"
    result = CliRunner().invoke(cwdm, [str(word) for word in words])
    assert "found it in or around the input" in result.stderr


def test_the_command_judges_a_published_checkpoint(simulated: Path, tmp_path: Path) -> None:
    """Neither its name nor its tensors tell what this one makes."""
    network = UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4)
    config = Config(name="x", target=T2F, images=Images(normalization="published"), network=network)
    checkpoint = tmp_path / "brats.pt"
    torch.save(build_denoiser(config).backbone.state_dict(), checkpoint)
    words = ["evaluate", "--truth", simulated, "--output", tmp_path / "run", "--steps", 1]
    words += ["--model", checkpoint]

    def run(*more: str) -> Result:
        return CliRunner().invoke(cwdm, [str(word) for word in [*words, *more]])

    result = run()
    assert result.exit_code == 2
    assert "--preset" in result.stderr
    assert "not the network of preset cwdm-t2f" in run("--preset", "cwdm-t2f").stderr
    result = run("--modality", "t2f")
    assert result.exit_code == 0, result.output
    assert "t2f: cwdm is not better than every floor" in result.stdout
    words[words.index("--model") :] = ["--preset", "cwdm-t2f", "--overwrite"]
    assert "tells what it is, expected no --preset" in run().stderr


def test_the_command_refuses_to_overwrite_before_it_works(
    judged: list[str], tmp_path: Path
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "summary.md").write_text("mine")
    result = CliRunner().invoke(cwdm, judged)
    assert result.exit_code == 2
    assert "summary.md: already exists" in result.stderr
    assert (tmp_path / "output" / "summary.md").read_text() == "mine"


def test_floors_may_not_be_fitted_on_the_truth(judged: list[str], tmp_path: Path) -> None:
    arguments = [a if not a.startswith("--fit") else f"--fit={tmp_path / 'truth'}" for a in judged]
    result = CliRunner().invoke(cwdm, arguments)
    assert result.exit_code == 2
    assert "case p1 is also among --truth" in result.stderr


@pytest.mark.parametrize("asked", ["brasyn", "published", "cwdm"])
def test_the_command_uses_the_protocol_and_segmentations_asked_for(
    judged: list[str], make_image: MakeImage, tmp_path: Path, asked: str
) -> None:
    protocol = asked.replace("cwdm", "published")
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[10:14, 9:13, 8:12] = 4
    make_image("seg/p1-seg.nii.gz", voxels=labels)
    arguments = [a for a in judged if not a.startswith("--fit")]
    words = [f"--protocol={asked}", f"--seg={tmp_path / 'seg'}"]
    result = CliRunner().invoke(cwdm, [*arguments, *words])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Protocol {protocol}. ")
    assert "PSNR ET" in result.stdout
    table = pd.read_csv(tmp_path / "output" / "metrics.csv")
    assert set(table["protocol"]) == {protocol}
    assert set(table.loc[table["region"] == "ET", "voxels"]) == {64}
    record = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert record["protocol"]["name"] == protocol
    assert result.stdout.splitlines()[0] in (tmp_path / "output" / "summary.md").read_text()


def test_the_command_takes_the_segmentations_of_a_cohort_that_was_completed(
    judged: list[str], make_image: MakeImage, tmp_path: Path
) -> None:
    """`cwdm segment --impute-missing` hands those of the cases on, in a folder below its own."""
    output = tmp_path / "output"
    words = [a for a in judged if not a.startswith("--fit")] + [f"--seg={tmp_path / 'seg'}"]
    (tmp_path / "seg").mkdir()
    result = CliRunner().invoke(cwdm, words)
    assert result.exit_code == 2
    assert "1 of 1 segmentations are missing, such as p1-seg.nii.gz, expected all" in result.stderr
    own = tmp_path / "truth" / "p1" / "p1-seg.nii.gz"
    below = tmp_path / "seg" / "completed" / "p1" / own.name
    below.parent.mkdir(parents=True)
    below.write_bytes(own.read_bytes())
    result = CliRunner().invoke(cwdm, words)  # the same labels, from elsewhere
    assert result.exit_code == 0, result.output
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[10:14, 9:13, 8:12] = 3
    made = make_image("seg/p1-seg.nii.gz", voxels=labels)
    result = CliRunner().invoke(cwdm, [*words, "--overwrite"])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(output / "metrics.csv")
    assert set(table.loc[table["region"] == "ET", "voxels"]) == {64}
    (images,) = json.loads((output / "summary.json").read_text())["images"]
    assert images["segmentation"] == str(made)


def test_a_modality_that_is_asked_for_twice_is_judged_once(
    judged: list[str], tmp_path: Path
) -> None:
    words = [a for a in judged if not a.startswith("--fit")]
    result = CliRunner().invoke(cwdm, [*words, "--modality", "t2f", "--modality", "FLAIR"])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "output" / "metrics.csv")
    assert not table.duplicated(["case", "modality", "method", "region"]).any()


def test_weights_that_are_none_leave_nothing_behind(
    any_model: Path, simulated: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").write_text("none")
    words = ["evaluate", "--truth", simulated, "--model", any_model, "--modality", "t1n"]
    words += ["--perceptual", tmp_path / "weights.pth", "--output", tmp_path / "run"]
    result = CliRunner().invoke(cwdm, [str(word) for word in words])
    assert result.exit_code == 2
    assert "not the weights of Med3D's ResNet-50" in result.stderr
    assert not (tmp_path / "run").exists()


def test_without_cases_to_fit_on_the_command_says_what_is_missing(
    judged: list[str], tmp_path: Path
) -> None:
    result = CliRunner().invoke(cwdm, [a for a in judged if not a.startswith("--fit")])
    assert result.exit_code == 0, result.output
    assert "the only floors are blank images and copies" in result.stderr
    assert "ridge" not in result.stdout
