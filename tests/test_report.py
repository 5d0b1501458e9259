"""Reports: what they say of tables whose verdict is known, and how they behave in a browser."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from scipy import ndimage, stats

from cwdm.answers import Run, Subject, answers
from cwdm.case import Case, find_cases
from cwdm.cli.main import cwdm
from cwdm.errors import InputError
from cwdm.imputation import Imputation, impute
from cwdm.layouts import Layout
from cwdm.metrics import RANGE_QUANTILES
from cwdm.modality import Modality
from cwdm.montage import WINDOW
from cwdm.report import FOLDER, LABEL_STEP, Picture, Row, picture, write_report
from cwdm.summary import ERASED, summarize, write_tables
from cwdm.volume import Volume, brain_mask, read_labels, read_volume, write_volume

MARK = "cwdm 0 SYNTHETIC t2f, not acquired; research use only"


def invoke(*words: object) -> Any:
    return CliRunner().invoke(cwdm, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two modalities of four cases: the truth, with noise that grows from case to case.

    FLAIR has an interval whose record names one region: voxels (3, 4, 5) to (6, 7, 8) of the file.
    """
    root = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    for number, case in enumerate(find_cases(simulated)):
        for modality in (Modality.T1C, Modality.T2F):
            truth = read_volume(case.images[modality])
            noise = ndimage.gaussian_filter(rng.normal(size=truth.voxels.shape), 1.5)
            noise *= (number + 1) * 0.08 * truth.voxels.max() / noise.std()
            voxels = np.where(brain_mask(truth), truth.voxels + noise, 0).astype(np.float32)
            path = root / "predictions" / f"{case.id}-{modality}.nii.gz"
            write_volume(voxels, truth, path, description=MARK)
            if modality is Modality.T2F:
                sampled(voxels, truth, path)
    result = invoke("evaluate", "--truth", simulated, "--pred", root / "predictions",
                    "--output", root / "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    return root / "run"


def sampled(voxels: NDArray[np.float32], truth: Any, path: Path) -> None:
    """Maps and a record beside a prediction."""
    stem = path.name.removesuffix(".nii.gz")
    spread = np.where(voxels, 10, 0).astype(np.float32)
    files = {kind: f"{stem}-{kind}.nii.gz" for kind in ("std", "low", "high")}
    for kind, sign in (("std", None), ("low", -1), ("high", 1)):
        image = spread if sign is None else voxels + sign * spread
        write_volume(image, truth, path.with_name(files[kind]), description=MARK)
    interval = {
        "coverage": 0.8, "calibrated": False, "q": 1.28, "floor": 0.0, "files": files, "wide": 0.25,
        "regions": [{"voxels": 64, "first": [3, 4, 5], "last": [6, 7, 8]}],
    }  # fmt: skip
    record = {
        "synthetic": True, "cwdm": "0", "interval": interval,
        "warnings": ["Something <b>to know</b>."],
        "model": {"name": "m.safetensors"}, "inputs": {"t1n": {}, "t2w": {}},
        "samples": 3, "seed": 7,
    }  # fmt: skip
    path.with_name(f"{stem}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    """The report of the run, volumes of three of its four cases."""
    result = invoke("report", run, "--volumes", 3, "--title", "Four <cases>")
    assert result.exit_code == 0, result.output
    assert f"Written to {run / 'report.html'}" in result.output
    return run / "report.html"


def scores(
    ours: float,
    floor: float,
    *,
    cases: int,
    erased: float | None = None,
    modality: str = "t2f",
    best: str = "boosting",
) -> pd.DataFrame:
    """Of these PSNR; ours is 0.3 dB higher or lower from case to case. The last has no tumor."""
    rows = []
    methods = {"ours": ("model", ours), best: ("floor", floor)}
    if erased is not None:
        methods[ERASED] = ("spoilt truth", erased)
    for number in range(cases):
        tumor = ("WT", "ET") if erased is not None and number < cases - 1 else ()
        for region in ("brain", "healthy", *tumor):
            for method, (kind, psnr) in methods.items():
                value = psnr + 0.3 * (-1) ** number * (method == "ours")
                rows.append(
                    {
                        "case": str(number), "modality": modality, "method": method, "kind": kind,
                        "protocol": "aligned", "region": region, "voxels": 100, "psnr": value,
                        "ssim": value / 40, "mae": 1 / value, "ms_ssim": 0.5, "mse": 1 / value**2,
                        "ncc": 0.5,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame, held: pd.DataFrame | None = None) -> Run:
    """A run of these scores, without images."""
    record = {"methods": ["ours"], "summary": summarize(frame).to_dict("records")}
    subjects = [Subject(Case(case, {}), {}) for case in frame["case"].unique()]
    return Run(Path("run"), record, frame, pd.DataFrame() if held is None else held, subjects)


def coverage(share: float, calibrated: bool) -> pd.DataFrame:
    """What an interval for 80 % held of the tumor of eight cases; of the enhancing one all."""
    return pd.DataFrame(
        {
            "case": str(number), "modality": "t2f", "method": "ours", "region": region,
            "promised": 0.8, "covered": covered, "agreement": 0.1, "wide": 0.0,
            "calibrated": calibrated,
        }
        for number in range(8) for region, covered in (("WT", share), ("ET", 1.0))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "floor", "cases", "best", "expected"),
    [
        (20, 18, 8, "boosting", "Better than simple"),
        (18, 20, 8, "boosting", "Not better"),
        (20, 18, 4, "boosting", "Not proven"),  # Wilcoxon's smallest p of four cases is 1/8
        (20.1, 20, 8, "boosting", "Not proven"),  # ahead in the mean, not in every case
        (20, 18, 8, "copy t2w", "Not proven"),
        (18, 20, 8, "copy t2w", "Not better"),
    ],
)
def test_quality_is_claimed_only_where_a_test_shows_it(
    ours: float, floor: float, cases: int, best: str, expected: str
) -> None:
    found = table(scores(ours, floor, cases=cases, best=best))
    (finding,) = answers(found)[0].findings
    assert finding.answer == expected
    assert finding.figure == f"{ours:.1f} dB"
    assert ("No regression was fitted" in finding.text) == (best == "copy t2w")
    wide = found.scores.query("region == 'brain'").pivot(
        index="case", columns="method", values="psnr"
    )
    p = stats.wilcoxon(wide["ours"], wide[best]).pvalue
    assert f"p = {p:.2g}" in finding.text.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("erased", "modality", "expected"),
    [
        (None, "t2f", "Not measured"),
        (15, "t2f", "With care"),
        (25, "t2f", "No"),  # an image without the tumor scores higher in it
        (15, "t1c", "Not enhancement"),
        (25, "t1c", "No"),
        (None, "t1c", "Not measured"),
    ],
)
def test_the_tumor_is_never_simply_trusted(
    erased: float | None, modality: str, expected: str
) -> None:
    frame = scores(20, 18, cases=9, erased=erased, modality=modality)
    (finding,) = answers(table(frame))[2].findings
    assert finding.answer == expected
    assert ("Enhancement" in " ".join(finding.warnings)) == (modality == "t1c")
    assert ("8 of 9 cases have a segmented tumor" in finding.text) == (erased is not None)
    if erased == 25:
        assert "the truth with its tumor erased has 25.0" in finding.text


@pytest.mark.parametrize(
    ("share", "calibrated", "answer", "said"),
    [
        (0.23, False, "Interval fails", "Uncalibrated intervals: promised 80 %, held 23 % of"),
        (0.59, True, "Interval fails", "Calibrated intervals: promised 80 %, held 59 % of"),
        (0.61, True, "With care", "Calibrated intervals: promised 80 %, held 61 % of"),
    ],
)
def test_an_interval_that_fails_in_the_tumor_is_a_warning(
    share: float, calibrated: bool, answer: str, said: str
) -> None:
    run = table(scores(20, 18, cases=9, erased=15), coverage(share, calibrated))
    (finding,) = answers(run)[2].findings
    assert finding.answer == answer
    place = finding.text if answer == "With care" else finding.warnings[0]
    assert f"{said} the whole tumor and 100 % of the enhancing tumor." in place


def test_regions_are_named_first_then_the_worst_cases(run: Path) -> None:
    found = Run.read(run)
    findings = answers(found)[1].findings
    means = found.scores.query("method == 'cwdm' and modality == 't2f'")
    tumor = means.groupby("region")["mae"].mean()[["healthy", "WT", "TC", "ET"]]
    assert f"{100 * tumor.max():.1f} %" in [finding.figure for finding in findings[:2]]
    worst, *_ = cases = findings[2:]
    ours = found.scores.query("method == 'cwdm' and region == 'brain'")
    lowest = min(ours.to_dict("records"), key=lambda row: row["psnr"])
    assert len({finding.subject for finding in cases}) == len(cases) == 3
    assert worst.subject == found.subjects[0].case.id == lowest["case"]
    assert unquote(worst.link) == f"#case/{lowest['case']}/{lowest['modality']}"
    for psnr in ours.loc[ours["case"] == lowest["case"], "psnr"]:
        assert f" {psnr:.1f} dB (mean" in worst.text


def test_without_a_tumor_no_region_is_the_worst() -> None:
    findings = answers(table(scores(20, 18, cases=8)))[1].findings
    assert [finding.subject for finding in findings] == ["0", "1", "2"]


def test_a_tumor_is_good_only_if_it_beats_the_truth_without_it() -> None:
    def ahead(region: str, erased: float | None) -> bool:
        return Row(region, 20, 0.5, 0.1, "zeros", 15, erased, None, None).ahead

    assert ahead("WT", 18)
    assert not ahead("WT", 22)
    assert ahead("brain", 22)  # right everywhere but in the tumor
    assert ahead("WT", None)


def test_tables_without_images_are_figures(tmp_path: Path) -> None:
    """As written in Python; of cases with names that pandas takes for nothing."""
    names = dict(zip("012", ("NA", "null", "1e5"), strict=True))
    frame = scores(20, 18, cases=3)
    frame["case"] = frame["case"].map(names)
    frame["protocol"] = "brasyn"
    write_tables(frame, tmp_path, notes={})
    run = Run.read(tmp_path)
    assert {subject.case.id for subject in run.subjects} == {*names.values()}
    write_report(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "does not name the images of 3 cases" in text
    assert '<td class="number" data-sort="20.3">20.3</td>' in text
    assert 'class="page"' not in text
    assert "in % of the data range of protocol brasyn" in text
    assert "not those of the tables" in text


def test_only_what_was_judged_is_shown(run: Path, tmp_path: Path) -> None:
    """A prediction without scores; a table of an earlier run that the record does not name."""
    copy = shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "summary.json").read_text())
    assert record["uncertainty"] == "uncertainty.csv"
    assert len(Run.read(run).reliabilities) > 0
    record["uncertainty"] = None
    for entry in record["images"]:
        entry["predictions"]["cwdm"]["t1n"] = "x-t1n.nii.gz"
    (copy / "summary.json").write_text(json.dumps(record))
    found = Run.read(copy)
    assert len(found.reliabilities) == 0
    assert found.modalities == [Modality.T1C, Modality.T2F]
    assert {m for each in found.subjects for m in each.predictions} == {*found.modalities}


@pytest.mark.parametrize("kind", ["prediction", "acquired", "segmentation"])
def test_an_image_that_changed_is_not_shown_as_the_one_measured(
    run: Path, tmp_path: Path, kind: str
) -> None:
    subject = Run.read(run).subjects[0]
    path = {
        "prediction": subject.predictions[Modality.T2F],
        "acquired": subject.case.images[Modality.T1N],
        "segmentation": subject.case.segmentation,
    }[kind]
    assert path is not None
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes() + b"\0")
    record = (run / "summary.json").read_text()
    (tmp_path / "run").mkdir()
    for name in ("metrics.csv", "uncertainty.csv"):
        shutil.copy(run / name, tmp_path / "run")
    names = {name for entry in json.loads(record)["images"] for name in entry["sha256"]}
    (place,) = (name for name in names if run / name == path)
    (tmp_path / "run" / "summary.json").write_text(record.replace(place, str(changed)))
    found = Run.read(tmp_path / "run")
    message = re.escape(f"{changed}: changed since it was measured, expected the same image; run")
    with pytest.raises(InputError, match=message):
        write_report(found, tmp_path / "report.html")


def test_an_inverted_image_is_not_shown_the_right_way_round(run: Path, tmp_path: Path) -> None:
    found = Run.read(run)
    case = found.subjects[0].case
    truth = read_volume(case.images[Modality.T2F])
    path = tmp_path / "x-t2f.nii.gz"
    write_volume(-truth.voxels, truth, path, description=MARK)
    (page,) = picture(found, Subject(case, {Modality.T2F: path}), volumes=False).pages
    assert any("does not rise with the truth" in warning for warning in page.warnings)


def unpack(made: Picture, key: str) -> NDArray[np.uint8]:
    """The browser's part: (x, y, z) from a mosaic of axial slices."""
    file = io.BytesIO(base64.b64decode(made.volumes[key]))
    mosaic = np.asarray(Image.open(file).convert("L"))
    x, y, z = made.box["shape"]
    columns = made.box["columns"]
    tiles = [mosaic[i // columns * y :, i % columns * x :][:y, :x].T for i in range(z)]
    return np.stack(tiles, axis=2)


def expected(subject: Subject, made: Picture) -> tuple[list[NDArray[Any]], float]:
    """FLAIR, acquired and predicted, in shares of the window, and the window's share of the range.

    Both (x, y, z) in the box of the picture, by another least squares than the report's.
    """
    truth = read_volume(subject.case.images[Modality.T2F])
    predicted = read_volume(subject.predictions[Modality.T2F]).voxels
    brain = brain_mask(truth)
    low, high = np.quantile(truth.voxels[brain], WINDOW)
    bottom, top = np.quantile(truth.voxels[brain], RANGE_QUANTILES)
    slope, offset = np.polyfit(predicted[brain], truth.voxels[brain], 1)
    images = [
        np.where(brain, ((voxels - low) / (high - low)).clip(0, 1), 0)[box_of(truth, made)]
        for voxels in (truth.voxels, slope * predicted + offset)
    ]
    return images, (high - low) / (top - bottom)


def box_of(truth: Volume, made: Picture) -> tuple[slice, ...]:
    """Where the volumes of a picture lie in the image."""
    start = np.linalg.inv(truth.affine) @ np.array(made.box["affine"])[:, 3]
    return tuple(
        slice(round(a), round(a) + n) for a, n in zip(start, made.box["shape"], strict=False)
    )


def test_the_volumes_are_the_images_in_the_window_of_the_truth(run: Path) -> None:
    found = Run.read(run)
    subject = found.subjects[0]
    made = picture(found, subject)
    images, width = expected(subject, made)
    stored = [unpack(made, key) / 255 for key in ("t2f", "t2f-synthetic")]
    for image, there in zip(images, stored, strict=True):
        assert np.sqrt(np.mean((image - there) ** 2)) < 0.03
    (page,) = [page for page in made.pages if page.modality is Modality.T2F]
    assert page.view["width"] == pytest.approx(width, rel=1e-4)
    shown = np.abs(stored[1] - stored[0]).mean()
    assert shown == pytest.approx(np.abs(images[1] - images[0]).mean(), rel=0.1)


def test_the_labels_survive_and_no_brain_is_cut_off(run: Path) -> None:
    found = Run.read(run)
    subject = found.subjects[0]
    made = picture(found, subject)
    truth = read_volume(subject.case.images[Modality.T2F])
    assert subject.case.segmentation is not None
    labels = read_labels(subject.case.segmentation, truth)
    box = box_of(truth, made)
    assert (np.rint(unpack(made, "labels") / LABEL_STEP) == labels[box]).all()
    assert brain_mask(truth).sum() == brain_mask(truth)[box].sum()


@pytest.mark.slow
def test_a_real_case_takes_little_room_and_keeps_its_error(shared: Path, run: Path) -> None:
    """T2 in place of FLAIR: a prediction with errors of every kind."""
    case = find_cases(shared / "data" / "val")[0]
    subject = Subject(case, {Modality.T2F: case.images[Modality.T2W]})
    made = picture(Run.read(run), subject)
    assert sum(map(len, made.volumes.values())) < 4e6
    images, _ = expected(subject, made)
    error = np.abs(images[1] - images[0]).mean()
    stored = [unpack(made, key) / 255 for key in ("t2f", "t2f-synthetic")]
    assert np.abs(stored[1] - stored[0]).mean() == pytest.approx(error, rel=0.03)


def test_a_region_not_to_be_trusted_is_where_the_file_has_it(run: Path) -> None:
    found = Run.read(run)
    subject = found.subjects[0]
    made = picture(found, subject, volumes=False)
    assert made.volumes == {}
    (page,) = [page for page in made.pages if page.modality is Modality.T2F]
    (region,) = page.view["regions"]
    volume = read_volume(subject.predictions[Modality.T2F])
    stored = volume.header.get_best_affine()
    shown = np.array(made.box["affine"])
    there = np.array([stored @ [*corner, 1] for corner in ((3, 4, 5), (6, 7, 8))])  # mm
    here = np.array([shown @ [*region[end], 1] for end in ("first", "last")])
    np.testing.assert_allclose(np.sort(here, axis=0), np.sort(there, axis=0), atol=1e-3)


def test_the_row_of_a_page_holds_what_was_measured(run: Path) -> None:
    found = Run.read(run)
    made = picture(found, found.subjects[0], volumes=False)
    page = next(page for page in made.pages if page.modality is Modality.T2F)
    scores = found.scores.query(f"case == '{made.case}' and modality == 't2f'")
    for row in page.rows:
        there = scores.query(f"region == '{row.region}'").set_index("method")
        assert row.psnr == there.loc["cwdm", "psnr"]
        assert row.rival_psnr == there.query("kind == 'floor'")["psnr"].max()
        assert row.erased_psnr == there.loc[ERASED, "psnr"]
    held = found.reliabilities.query(f"case == '{made.case}'").set_index("region")["covered"]
    assert (held[["WT", "TC", "ET"]] < 0.6).all()
    assert f"promised 80 % and held {100 * held['WT']:.0f} % of the whole tumor" in page.distrust
    assert "not calibrated" in page.wide
    assert "In 25.0 % of the brain" in page.wide
    assert page.warnings == ["Something <b>to know</b>."]
    assert page.made == "Made from t1n, t2w by m.safetensors, mean of 3 samples, seed 7."
    titles = [(panel.title, panel.kind) for panel in page.panels]
    assert titles == [
        ("T1", "acquired"), ("T1 contrast", "acquired"), ("T2", "acquired"),
        ("FLAIR", "synthetic"), ("FLAIR", "truth"), ("Error", "error"), ("Deviation", "deviation"),
    ]  # fmt: skip


def test_it_needs_nothing_but_itself(report: Path) -> None:
    text = report.read_text("utf-8")
    niivue = re.search(r'id="niivue">([^<]+)<', text)
    assert niivue is not None
    assert gzip.decompress(base64.b64decode(niivue[1])) == (FOLDER / "niivue.umd.js").read_bytes()
    loaded = re.findall(
        r"""<(?:script|img|link|iframe|source)[^>]*?(?:src|href)=["'](.{5})""", text
    )
    assert set(loaded) == {"data:"}
    assert "default-src 'none'" in text
    assert "Four &lt;cases&gt;" in text
    assert "Something &lt;b&gt;to know" in text
    assert "Copyright (c) 2021, Niivue" in text


def test_the_viewer_is_the_one_that_is_pinned() -> None:
    pin = json.loads((FOLDER / "niivue.json").read_text())
    script = (FOLDER / Path(pin["file"]).name).read_bytes()
    assert hashlib.sha256(script).hexdigest() == pin["sha256"]
    assert pin["version"] in pin["tarball"]
    assert pin["version"] in (FOLDER / "niivue.LICENSE.txt").read_text()


def test_one_case_at_a_time_is_in_memory(run: Path, tmp_path: Path) -> None:
    """The file grows while cases are read: what was read before is written already."""
    sizes = []

    def look() -> None:
        (unfinished,) = tmp_path.glob(".cwdm-*")
        sizes.append(unfinished.stat().st_size)

    write_report(Run.read(run), tmp_path / "report.html", progress=look)
    assert len(sizes) == 4
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] < (tmp_path / "report.html").stat().st_size


def completed(run: Path, root: Path) -> Path:
    """The worst case, its FLAIR synthetic, in a folder of its own."""
    subject = Run.read(run).subjects[0]
    folder = root / subject.case.id
    folder.mkdir(parents=True)
    for modality in (Modality.T1N, Modality.T1C, Modality.T2W):
        shutil.copy(subject.case.images[modality], folder)
    made = subject.predictions[Modality.T2F]
    for path in made.parent.glob(made.name.removesuffix(".nii.gz") + "*"):
        shutil.copy(path, folder)
    return folder


def test_completed_cases_have_a_report_that_measures_nothing(
    run: Path, tmp_path: Path, make_case: Callable[..., Path]
) -> None:
    root = tmp_path / "completed"
    folder = completed(run, root)
    shutil.copytree(make_case(), root / "complete before")
    result = invoke("report", root)
    assert result.exit_code == 0, result.output
    found = Run.read(root)
    assert [answer.findings[0].answer for answer in answers(found)] == ["Not measured"] * 3
    assert "FLAIR (t2f) is not calibrated" in answers(found)[1].findings[0].text
    page = picture(found, found.subjects[0]).pages[0]
    assert [panel.kind for panel in page.panels] == [*["acquired"] * 3, "synthetic", "deviation"]
    text = (root / "report.html").read_text("utf-8")
    assert "nothing was measured" in text
    assert "1 without a synthetic image, not shown" in text
    (record,) = folder.glob("*.json")
    record.write_text(record.read_text().replace('"calibrated": false', '"calibrated": true'))
    (finding,) = answers(Run.read(root))[1].findings
    assert (finding.answer, finding.figure) == ("", "25 %")


@pytest.mark.parametrize("layout", ["bids", "nnunet"])
def test_a_cohort_that_was_completed_in_another_layout_has_a_report(
    simulated: Path, any_model: Path, tmp_path: Path, layout: Layout
) -> None:
    cohort = tmp_path / "cohort"
    (case, *_) = find_cases(simulated)
    shutil.copytree(simulated / case.id, cohort / case.id)
    output = tmp_path / "out"
    job = Imputation(layout=layout, replace=(Modality.T2F,), model=any_model, precision="fp32")
    assert list(impute(cohort, output, job=job)["state"]) == ["done"]
    result = invoke("report", output)
    assert result.exit_code == 0, result.output
    (subject,) = Run.read(output).subjects
    assert {*subject.case.images} == {Modality.T1N, Modality.T1C, Modality.T2W}
    assert {*subject.predictions} == {Modality.T2F}
    assert "Made from t1n, t1c, t2w by tiny" in (output / "report.html").read_text("utf-8")


def test_a_ct_of_the_case_is_left_out(
    run: Path, tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    """It took no part, lies on a grid of its own, and is of a head, not a brain."""
    folder = completed(run, tmp_path / "completed")
    found = Run.read(folder)
    (page,) = picture(found, found.subjects[0], volumes=False).pages
    make_image(f"completed/{folder.name}/{folder.name}-ct.nii.gz")
    with_ct = Run.read(folder)
    assert Modality.CT in with_ct.subjects[0].case.images
    assert picture(with_ct, with_ct.subjects[0], volumes=False).pages == [page]
    result = invoke("report", folder)
    assert result.exit_code == 0, result.output
    for path in folder.glob("*-t[12][ncw].nii.gz"):
        path.unlink()
    result = invoke("report", folder, "--overwrite")
    assert result.exit_code == 2
    said = f"case {folder.name}: found no acquired image of t1n, t1c, t2w, t2f, expected at least"
    assert said in result.stderr


def test_a_synthetic_ct_has_its_name(run: Path, tmp_path: Path) -> None:
    folder = completed(run, tmp_path)
    for path in folder.glob("*-t2f*"):
        path.rename(path.with_name(path.name.replace("-t2f", "-ct")))
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "CT (ct)" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("foreign", ["[1, 2]", '"text"', "null", '{"model": "x", "warnings": 3}'])
def test_the_record_of_another_program_is_none(run: Path, tmp_path: Path, foreign: str) -> None:
    folder = completed(run, tmp_path)
    (record,) = folder.glob("*.json")
    record.write_text(foreign)
    found = Run.read(tmp_path)
    (page,) = picture(found, found.subjects[0], volumes=False).pages
    assert (page.warnings, page.made) == ([], "No record of how it was made.")
    record.write_text('{"synthetic": true, "cwdm": "0", "model": 3, "interval": null}')
    with pytest.raises(InputError, match=r"json: not a record of cwdm, expected the one of the"):
        picture(found, found.subjects[0], volumes=False)


def test_synthetic_images_alone_are_not_a_case(run: Path, tmp_path: Path) -> None:
    folder = completed(run, tmp_path)
    for path in folder.glob("*-t[12][ncw].nii.gz"):
        path.unlink()
    with pytest.raises(InputError, match=rf"{folder}: case .* has only synthetic images, expected"):
        Run.read(tmp_path)


def test_what_cannot_be_shown_is_one_line(
    run: Path, report: Path, tmp_path: Path, make_case: Callable[..., Path]
) -> None:
    result = invoke("report", run)
    assert result.exit_code == 2
    assert f"{report}: already exists" in result.stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"empty: no summary.json of cwdm evaluate; .*no case in it"
    ):
        Run.read(tmp_path / "empty")
    with pytest.raises(InputError, match=r"case: no case has a synthetic image"):
        Run.read(make_case())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"metrics.csv: not there, expected a run of"):
        Run.read(broken)
    for name in ("metrics.csv", "uncertainty.csv"):
        shutil.copy(run / name, broken)
    with pytest.raises(InputError, match=r"summary.json: not a run that can be shown"):
        Run.read(broken)
    record = json.loads((run / "summary.json").read_text())
    gone = record["images"][0]["predictions"]["cwdm"]
    gone["t2f"] = "elsewhere/x-t2f.nii.gz"
    (broken / "summary.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"x-t2f.nii.gz: cannot be read, No such file"):
        write_report(Run.read(broken), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme: str) -> None:
    """At least 4.5 to 1, level AA of WCAG 2.1, section 1.4.3."""
    css = (FOLDER / "report.css").read_text()
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    colors = {name: light if theme == "light" else dark for name, light, dark in found}

    def luminance(color: str) -> float:
        shares = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    pairs = [(ink, paper) for ink in ("text", "quiet", "accent", "synthetic", "good", "bad")
             for paper in ("card", "ground")]  # fmt: skip
    pairs += [(level, f"{level}-soft") for level in ("good", "unsure", "bad")]
    pairs += [("text", "synthetic-soft"), ("quiet", "synthetic-soft")]
    for ink, paper in pairs:
        bright, dim = sorted((luminance(colors[ink]), luminance(colors[paper])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (theme, ink, paper)


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, with WebGL in software."""
    here = Path(sys.executable).parent / "chromium"
    found = os.environ.get("CWDM_CHROMIUM") or (here if here.exists() else None)
    found = found or shutil.which("chromium") or shutil.which("google-chrome")
    flags = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        found = found or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium")
        chromium = playwright.chromium.launch(executable_path=found, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Page]:
    """The report, opened from disk; nothing may be complained of, nor anything else asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    assert said == []
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {report.as_uri()}
    context.close()


def open_worst(page: Page) -> Any:
    """The page of the worst image, its panels drawn."""
    page.locator("#images tbody a").first.click()
    section = page.locator(".page:target")
    section.locator("canvas").first.wait_for()
    return section


def pixels(canvas: Any) -> str:
    return str(canvas.evaluate("canvas => canvas.toDataURL()"))


def test_the_answers_are_on_the_first_screen(page: Page) -> None:
    for question in ("Is it good?", "Where is it bad?", "Can I trust the tumor?"):
        box = page.get_by_role("heading", name=question).bounding_box()
        assert box is not None
        assert box["y"] < 200
    cards = page.locator("#answers").bounding_box()
    assert cards is not None
    assert cards["y"] + cards["height"] < 800
    assert "Enhancement in a synthetic T1c is a guess" in page.locator("#answers").inner_text()


def test_slices_change_by_wheel_keys_and_slider(page: Page) -> None:
    section = open_worst(page)
    canvases = section.locator("canvas")
    before = [pixels(canvas) for canvas in canvases.all()]
    assert len(set(before)) == len(before)
    canvases.first.hover()
    page.mouse.wheel(0, 120)
    expect(section.locator(".where")).not_to_have_text(re.compile(r"^$"))
    page.wait_for_timeout(100)
    wheeled = [pixels(canvas) for canvas in canvases.all()]
    assert all(a != b for a, b in zip(before, wheeled, strict=True))  # all together
    place = section.locator(".where").inner_text()
    section.locator(".panels").focus()
    page.keyboard.press("ArrowUp")
    assert section.locator(".where").inner_text() != place
    assert [pixels(canvas) for canvas in canvases.all()] == before
    section.locator(".slice").focus()
    page.keyboard.press("ArrowRight")
    assert pixels(canvases.first) != before[0]
    label = canvases.first.get_attribute("aria-label")
    page.keyboard.press("c")
    assert "coronal slice" in str(canvases.first.get_attribute("aria-label"))
    assert canvases.first.get_attribute("aria-label") != label


def test_outlines_come_and_go(page: Page) -> None:
    section = open_worst(page)
    canvas = section.locator(".truth canvas")
    before = pixels(canvas)
    page.keyboard.press("o")
    without = pixels(canvas)
    assert without != before
    page.keyboard.press("o")
    assert pixels(canvas) == before


def test_a_region_not_to_be_trusted_can_be_gone_to(page: Page, run: Path) -> None:
    case = Run.read(run).subjects[0].case.id
    page.locator(f'#images a[href$="{case}/t2f"]').click()
    section = page.locator(".page:target")
    section.locator("canvas").first.wait_for()
    section.locator(".slice").focus()
    page.keyboard.press("Home")
    before = section.locator(".here").inner_text()
    section.get_by_role("button", name="Region 1").click()
    assert section.locator(".here").inner_text() != before


def test_tables_sort_by_their_heads(page: Page) -> None:
    def column() -> list[float]:
        cells = page.locator("#images tbody tr td:nth-child(3)").all_inner_texts()
        return [float(cell) for cell in cells]

    head = page.locator("#images thead th", has_text="PSNR")
    assert column() == sorted(column())  # worst first
    expect(head).to_have_attribute("aria-sort", "ascending")
    head.get_by_role("button").click()
    assert column() == sorted(column(), reverse=True)
    expect(head).to_have_attribute("aria-sort", "descending")
    page.get_by_role("button", name="Case", exact=False).first.focus()
    other = page.locator("#images thead th", has_text="Case")
    other.get_by_role("button").press("Enter")
    expect(other).to_have_attribute("aria-sort", "ascending")
    expect(head).to_have_attribute("aria-sort", "none")


def test_the_plot_follows_the_choice_and_leads_to_cases(page: Page) -> None:
    dots = page.locator("#plot .model circle")
    expect(dots).to_have_count(4)
    before = page.locator("#plot").get_attribute("aria-label")
    page.locator("#figure").select_option("ssim")
    assert page.locator("#plot").get_attribute("aria-label") != before
    page.locator("#modality").select_option("t2f")
    label = str(dots.nth(2).get_attribute("aria-label"))
    dots.nth(2).click(force=True)
    assert unquote(page.url).endswith(f"#case/{label.split(',')[0]}/t2f")


def test_light_and_dark(page: Page) -> None:
    def ground() -> str:
        return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))

    light = ground()
    page.locator("#theme").click()
    assert ground() != light
    page.reload()
    assert ground() != light  # remembered
    page.locator("#theme").click()
    assert ground() == light


def test_every_picture_has_words(page: Page) -> None:
    def without() -> list[str]:
        script = """() => [...document.querySelectorAll("img, canvas, svg, [role=img]")].filter(
            (e) => !e.alt && !e.getAttribute("aria-label") && !e.closest("[aria-hidden=true]")
        ).map((e) => e.outerHTML.slice(0, 80))"""
        return list(page.evaluate(script))

    assert without() == []
    open_worst(page)
    assert without() == []


def test_by_keyboard_alone_from_the_top_to_a_case_and_back(page: Page) -> None:
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.matches('#images a')"):
            break
    page.keyboard.press("Enter")
    section = page.locator(".page:target")
    section.locator("canvas").first.wait_for()
    assert page.evaluate("() => document.activeElement.matches('.page:target h2')")
    first = page.url
    page.keyboard.press("j")
    expect(page.locator(".page:target")).to_have_count(1)
    expect(page).not_to_have_url(first)
    page.keyboard.press("k")
    expect(page).to_have_url(first)
    second = page.locator("#images tbody a").nth(1).get_attribute("href")
    page.evaluate("location.hash = location.hash.replaceAll('-', '%2D')")  # as others encode it
    page.keyboard.press("j")
    page.wait_for_function("hash => location.hash === hash", arg=second)
    page.keyboard.press("k")
    expect(page).to_have_url(first)
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#overview")).to_be_visible()
    link = "#" + first.partition("#")[2]  # the one by which one came
    expect(page.locator("#images a:focus")).to_have_attribute("href", link)


def test_keys_may_come_faster_than_the_browser_tells_of_a_change(page: Page) -> None:
    open_worst(page)
    links = page.locator("#images tbody a")
    third = links.nth(2).get_attribute("href")
    shown = page.evaluate("""() => ["j", "k", "j", "j", "Escape"].map((key) => {
        document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        return document.activeElement.closest(".page")?.id ?? document.activeElement.hash;
    })""")
    pages = [str(links.nth(at).get_attribute("href")).lstrip("#") for at in (1, 0, 1, 2)]
    assert shown == [*pages, third]
    expect(page).to_have_url(re.compile("#top$"))
    expect(page.locator("#images a:focus")).to_have_attribute("href", str(third))


def test_a_case_without_volumes_has_still_pictures(page: Page, run: Path) -> None:
    best = Run.read(run).subjects[-1].case.id
    page.locator(f'#images a[href*="{best}"]').first.click()
    section = page.locator(".page:target")
    expect(section.locator("img")).not_to_have_count(0)
    expect(section.locator("canvas")).to_have_count(0)
    assert "Still pictures" in section.inner_text()


@pytest.mark.slow  # draws in software
def test_the_viewer_draws(page: Page) -> None:
    open_worst(page)
    page.get_by_role("button", name="Open in 3D viewer").locator("visible=true").click()
    page.locator("#viewer-note", has_text="Drag").wait_for()
    canvas = page.locator("#stage canvas")
    shots = []
    for layer in ("labels", "error", ""):
        page.locator("#over").select_option(layer)
        page.wait_for_timeout(300)
        shots.append(np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"), float))
    assert all(shot.std() > 10 for shot in shots)  # of 255: not blank
    assert np.abs(shots[0] - shots[1]).mean() > 1
    assert np.abs(shots[1] - shots[2]).mean() > 1
    assert "synthetic" in str(canvas.get_attribute("aria-label"))
    page.keyboard.press("Escape")
    expect(canvas).to_have_count(0)


def test_it_prints_the_summary_and_a_page_for_each_image(page: Page) -> None:
    page.emulate_media(media="print")
    expect(page.locator(".paper .model circle").locator("visible=true")).to_have_count(2 * 4)
    expect(page.locator("select").locator("visible=true")).to_have_count(0)
    pdf = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2 + 8
