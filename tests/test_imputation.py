"""A cohort with gaps comes out complete, as it was asked for; nothing acquired changes."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

import cwdm
from cwdm import imputation
from cwdm.case import find_cases, read_case
from cwdm.cli.main import cwdm as command
from cwdm.errors import InputError
from cwdm.executors import AMPLE, Local, Ray
from cwdm.files import sha256
from cwdm.imputation import Imputation, impute, plan
from cwdm.layouts import Layout, find
from cwdm.modality import SEQUENCES, Modality
from cwdm.synthesis import Synthesizer
from cwdm.volume import is_synthetic, new_volume, read_labels, read_volume, write_volume

GAPS = ((Modality.T1C,), (Modality.T2F,), (Modality.T1N, Modality.T2W), ())


@pytest.fixture
def cohort(simulated: Path, tmp_path: Path) -> Path:
    """The same with gaps."""
    root = tmp_path / "cohort"
    for case, gap in zip(find_cases(simulated), GAPS, strict=True):
        shutil.copytree(simulated / case.id, root / case.id)
        for modality in gap:
            (root / case.id / case.images[modality].name).unlink()
    return root


def run(*words: object) -> Result:
    # elsewhere bfloat16 may be chosen, whose kernels take seconds to be made
    return CliRunner().invoke(command, [str(word) for word in (*words, "--precision", "fp32")])


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(folder.rglob("*.nii*"))}


def test_a_cohort_comes_out_complete(cohort: Path, any_model: Path, tmp_path: Path) -> None:
    acquired, output = hashes(cohort), tmp_path / "out"
    result = run("impute", "--input", cohort, "--output", output, "--model", any_model, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "4 done" in result.stdout
    assert hashes(cohort) == acquired
    for case, gap in zip(find_cases(output), GAPS, strict=True):
        assert case.missing == ()
        assert case.segmentation is not None
        assert tuple(m for m in SEQUENCES if is_synthetic(case.images[m])) == gap
        source = read_case(cohort / case.id)
        for modality, path in case.images.items():
            record = path.parent / f"{case.id}-{modality}.json"
            assert record.exists() == (modality in gap)
            if modality in gap:
                made = Synthesizer.load(modality, any_model, precision="fp32")(source, seed=3)
                assert np.array_equal(
                    read_volume(path).voxels,
                    read_volume(made.write(tmp_path / "one")).voxels,
                )
                assert json.loads(record.read_text())["inputs"].keys() == source.images.keys()
            else:
                assert path.samefile(source.images[modality])
    again = run("impute", "--input", cohort, "--output", output, "--model", any_model, "--seed", 3)
    assert "4 unchanged" in again.stdout
    other = run("impute", "--input", cohort, "--output", output, "--model", any_model)
    assert "4 done" in other.stdout  # another seed


@pytest.mark.parametrize(("given", "each"), [([], AMPLE), (["--memory-limit", "3GB"], 3 * 10**9)])
def test_the_limit_of_memory_says_how_many_processes_there_may_be(
    cohort: Path,
    any_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    each: int,
) -> None:
    asked = []

    def spread(self: Local, devices: Sequence[str], tasks: int) -> int:
        asked.append(self.bytes_each)
        return 1

    monkeypatch.setattr(Local, "_spread", spread)
    words = ["impute", "--input", cohort, "--output", tmp_path / "out", "--model", any_model]
    result = run(*words, "--device", "cpu", *given)
    assert "4 done" in result.stdout
    assert asked == [each]


def test_the_same_from_python(cohort: Path, any_model: Path, tmp_path: Path) -> None:
    job = Imputation(precision="fp32", model=any_model, copy=True)
    table = cwdm.impute(cohort, tmp_path / "out", job=job)
    assert isinstance(table, pd.DataFrame)
    assert list(table) == ["case", "state", "synthetic", "given", "notes", "seconds", "message"]
    assert [row.split() for row in table["synthetic"]] == [list(gap) for gap in GAPS]
    assert "Enhancement in a synthetic T1c is a guess" in table["notes"][0]
    for case in find_cases(tmp_path / "out"):
        assert all(path.stat().st_nlink == 1 for path in case.images.values())


@pytest.mark.parametrize("layout", ["nnunet", "bids"])
def test_another_layout_reads_back_as_the_same_cases(
    layout: Layout, cohort: Path, simulated: Path, any_model: Path, tmp_path: Path
) -> None:
    impute(
        cohort, tmp_path / "out", job=Imputation(layout=layout, precision="fp32", model=any_model)
    )
    found = find(tmp_path / "out")
    assert not found.problems
    assert len(found.cases) == len(GAPS)
    for case, truth, gap in zip(found.cases, find_cases(simulated), GAPS, strict=True):
        assert not case.missing
        for modality in SEQUENCES:
            path = case.images[modality]
            assert is_synthetic(path) == (modality in gap)
            if modality not in gap:
                assert sha256(path) == sha256(truth.images[modality])
        assert case.segmentation is not None
        assert truth.segmentation is not None
        like = read_volume(case.images[Modality.T1N])
        labels = read_labels(case.segmentation, like)
        assert np.array_equal(labels, read_labels(truth.segmentation, like))


def test_nnunet_gets_one_ending_and_its_labels(
    make_case: Any, tmp_path: Path, any_model: Path
) -> None:
    folder = make_case(endings=("-t1n", "-t1c", "-t2w"))
    packed = folder / "x-t1n.nii.gz"
    (folder / "x-t1n.nii").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    like = read_volume(folder / "x-t1n.nii")
    labels = np.zeros(like.voxels.shape)
    labels[2, 3, 4] = 4
    write_volume(labels, new_volume(labels, like.affine), folder / "x-seg.nii.gz", "cwdm seg")
    impute(
        folder, tmp_path / "out", job=Imputation(layout="nnunet", precision="fp32", model=any_model)
    )
    images = sorted(path.name for path in (tmp_path / "out/imagesTr").glob("*.nii*"))
    assert images == [f"x_000{number}.nii.gz" for number in range(4)]
    made = tmp_path / "out/imagesTr/x_0000.nii.gz"
    assert gzip.decompress(made.read_bytes()) == (folder / "x-t1n.nii").read_bytes()
    stored = nib.Nifti1Image.from_filename(tmp_path / "out/labelsTr/x.nii.gz").get_fdata()
    assert np.array_equal(np.unique(stored), [0, 3])
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert description["numTraining"] == 1


def test_the_layout_of_the_challenge_holds_what_was_missing(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    impute(
        cohort, tmp_path / "out", job=Imputation(layout="brasyn", precision="fp32", model=any_model)
    )
    made = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    names = [case.id for case in find_cases(cohort)]
    assert made == sorted(
        f"{n}-{m}.nii.gz" for n, gap in zip(names, GAPS, strict=True) for m in gap
    )


def test_a_spoilt_image_is_replaced_in_the_output_alone(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    case = find_cases(cohort)[0]
    spoilt = case.images[Modality.T2F]
    spoilt.write_bytes(b"not even NIfTI")
    before = hashes(cohort)
    words = [
        "impute",
        "--input",
        cohort / case.id,
        "--output",
        tmp_path / "out",
        "--model",
        any_model,
    ]
    result = run(*words)
    assert result.exit_code == 1
    assert str(spoilt) in result.stderr
    result = run(*words, "--replace", "flair")
    assert result.exit_code == 0, result.output
    made = read_case(tmp_path / "out" / case.id)
    assert is_synthetic(made.images[Modality.T2F])
    record = json.loads((made.images[Modality.T2F].parent / f"{case.id}-t2f.json").read_text())
    assert record["replaces"] == {"name": spoilt.name, "sha256": sha256(spoilt)}
    assert any("that was not used" in warning for warning in record["warnings"])
    assert set(record["inputs"]) == {"t1n", "t2w"}
    assert hashes(cohort) == before


def test_synthetic_images_are_no_inputs(cohort: Path, any_model: Path, tmp_path: Path) -> None:
    impute(cohort, tmp_path / "one", job=Imputation(precision="fp32", model=any_model))
    table = impute(
        tmp_path / "one", tmp_path / "two", job=Imputation(precision="fp32", model=any_model)
    )
    assert [row.split() for row in table["synthetic"]] == [list(gap) for gap in GAPS]
    ids = [case.id for case in find_cases(cohort)]
    for name, modality in ((ids[0], "t1c"), (ids[2], "t1n")):
        one, two = (tmp_path / each / name / f"{name}-{modality}.nii.gz" for each in ("one", "two"))
        assert np.array_equal(read_volume(one).voxels, read_volume(two).voxels)


def test_the_plan_says_what_there_is_to_do(cohort: Path, any_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["impute", "--input", cohort, "--output", output, "--model", any_model, "--dry-run"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert not output.exists()
    assert "4 images to synthesize" in result.stdout
    job = Imputation(precision="fp32", model=any_model)
    planned = plan(job, find(cohort), output)
    assert list(planned.table["missing"]) == ["t1c", "t2f", "t1n t2w", ""]
    assert set(planned.table["state"]) == {"new"}
    assert planned.seconds > 0
    largest = max(path.stat().st_size for path in cohort.rglob("*-t*.nii.gz"))
    assert 0 < planned.size <= 4 * largest  # acquired images are linked to
    impute(cohort, output, job=job)
    again = plan(job, find(cohort), output)
    assert (again.images, again.seconds, again.size) == (0, 0, 0)
    assert set(again.table["state"]) == {"unchanged"}


def test_workers_on_a_processor_share_what_one_would_have(
    cohort: Path, any_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SimpleNamespace(seconds=lambda *_, **__: 1e6)
    monkeypatch.setattr(Imputation, "load", lambda *_: slow)
    job, found = Imputation(model=any_model), find(cohort)

    def seconds(workers: int) -> float:
        return plan(job, found, tmp_path / "out", device="cpu", workers=workers).seconds

    alone = seconds(1)
    assert seconds(3) == alone
    monkeypatch.setattr(imputation, "choose_device", lambda name: torch.device("cuda"))
    assert seconds(3) == pytest.approx(alone / 3)


def test_an_empty_case_and_a_corrupt_one_are_told(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    ids = [case.id for case in find_cases(cohort)]
    corrupt = cohort / ids[1] / f"{ids[1]}-t1n.nii.gz"
    corrupt.write_bytes(corrupt.read_bytes()[:-200])
    for path in (cohort / ids[3]).iterdir():
        path.unlink()
    result = run("impute", "--input", cohort, "--output", tmp_path / "out", "--model", any_model)
    assert result.exit_code == 1
    assert f"{ids[1]}: {corrupt}: truncated" in result.stderr
    assert ids[3] in result.stderr
    assert "2 done, 2 failed" in result.stdout
    assert [case.id for case in find_cases(tmp_path / "out")] == [ids[0], ids[2]]


@pytest.mark.parametrize("relative", ["cohort/out", "."])
def test_the_output_lies_apart(
    cohort: Path, any_model: Path, tmp_path: Path, relative: str
) -> None:
    result = run("impute", "--input", cohort, "--output", tmp_path / relative, "--model", any_model)
    assert result.exit_code == 2
    assert "expected another folder" in result.stderr


def test_images_of_a_table_are_not_in_the_output(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    case = find_cases(cohort)[0]
    table = tmp_path / "table.csv"
    table.write_text(f"id,t1n,t2w\nx,{case.images[Modality.T1N]},{case.images[Modality.T2W]}\n")
    result = run("impute", "--input", table, "--output", cohort, "--model", any_model)
    assert result.exit_code == 2
    assert "expected another folder" in result.stderr


def test_a_model_that_is_not_there_is_told_once(cohort: Path, tmp_path: Path) -> None:
    words = ["impute", "--input", cohort, "--output", tmp_path / "out", "--model", "no.safetensors"]
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.count("no.safetensors") == 1


def test_options_that_do_not_fit_are_refused(cohort: Path, tmp_path: Path) -> None:
    words = ["impute", "--input", cohort, "--output", tmp_path / "out"]
    assert "without --executor ray" in run(*words, "--address", "auto").stderr
    assert "without --executor slurm" in run(*words, "--slurm", "a=b").stderr
    assert "expected KEY=VALUE" in run(*words, "--executor", "slurm", "--slurm", "a").stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found no case"):
        impute(tmp_path / "empty", tmp_path / "out")


def test_an_image_whose_original_is_gone_is_never_lost(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    job = Imputation(model=any_model, precision="fp32")
    output = tmp_path / "out"
    impute(cohort, output, job=job)
    case = find_cases(cohort)[0]
    original = case.images[Modality.T1N]
    bytes_before = original.read_bytes()
    original.unlink()  # the link in the output is now the only one
    for _ in range(3):  # a failure forgets nothing
        table = impute(cohort, output, job=job)
        assert table["state"][0] == "failed"
        assert "cannot make again" in table["message"][0]
        assert (output / case.id / original.name).read_bytes() == bytes_before
    shutil.rmtree(cohort / case.id)
    (cohort / case.id).mkdir()  # and now it is no case at all
    impute(cohort, output, job=job)
    assert (output / case.id / original.name).read_bytes() == bytes_before


def test_ct_beside_the_sequences_is_no_obstacle(
    make_case: Any, any_model: Path, tmp_path: Path
) -> None:
    folder = make_case(endings=("-t1n", "-t1c", "-t2w", "-ct"))
    for layout in ("brats", "nnunet", "bids", "brasyn"):
        job = Imputation(layout=layout, model=any_model, precision="fp32")
        assert list(impute(folder, tmp_path / layout, job=job)["state"]) == ["done"]
    assert (tmp_path / "brats" / "x" / "x-ct.nii.gz").samefile(folder / "x-ct.nii.gz")


def test_a_case_without_tumor_keeps_its_empty_segmentation(
    make_case: Any, any_model: Path, tmp_path: Path
) -> None:
    folder = make_case(endings=("-t1n", "-t1c", "-t2w"))
    like = read_volume(folder / "x-t1n.nii.gz")
    empty = np.zeros(like.voxels.shape)
    write_volume(empty, new_volume(empty, like.affine, np.uint8), folder / "x-seg.nii.gz", "cwdm x")
    job = Imputation(layout="nnunet", model=any_model, precision="fp32")
    assert list(impute(folder, tmp_path / "out", job=job)["state"]) == ["done"]
    assert not read_labels(tmp_path / "out/labelsTr/x.nii.gz", like).any()


def test_names_that_become_one_are_refused(make_case: Any, any_model: Path, tmp_path: Path) -> None:
    for case_id in ("P_1", "P-1"):
        make_case(f"both/{case_id}", case_id, ("-t1n", "-t1c", "-t2w"))
    job = Imputation(layout="bids", model=any_model, precision="fp32")
    table = impute(tmp_path / "both", tmp_path / "out", job=job)
    assert sorted(table["state"]) == ["done", "failed"]
    assert "would be that of case P-1" in " ".join(table["message"])


def test_a_data_set_of_somebody_else_is_not_written_over(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "out" / "dataset.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    job = Imputation(layout="nnunet", model=any_model, precision="fp32")
    with pytest.raises(InputError, match=r"dataset.json: already exists"):
        impute(cohort, tmp_path / "out", job=job)
    assert mine.read_text() == "mine"


def test_an_output_keeps_its_layout(cohort: Path, any_model: Path, tmp_path: Path) -> None:
    job = Imputation(layout="bids", model=any_model, precision="fp32")
    impute(cohort, tmp_path / "out", job=job)
    with pytest.raises(InputError, match="found the layout bids"):
        impute(cohort, tmp_path / "out", job=Imputation(model=any_model))


def test_a_plan_survives_a_case_that_cannot_be_read(
    cohort: Path, any_model: Path, tmp_path: Path
) -> None:
    bad = find_cases(cohort)[0].images[Modality.T1N]
    bad.write_bytes(bad.read_bytes()[:-100])
    planned = plan(Imputation(model=any_model), find(cohort), tmp_path / "out")
    assert planned.images == 4
    assert planned.seconds > 0


def test_names_of_modalities_and_paths_may_be_text() -> None:
    job = Imputation(replace=("flair",), model="model.safetensors")  # type: ignore[arg-type]
    assert job.replace == (Modality.T2F,)
    assert job.model == Path.cwd() / "model.safetensors"


# --- forty cases, as people have them


def challenge_cohort(cases: list[Path], root: Path, count: int) -> dict[str, Modality]:
    """Cases with one modality left out by the rule of the BraSyn challenge, under new names."""
    names = [f"case-{number:02d}" for number in range(count)]
    drawn = np.random.RandomState(123456).randint(0, 4, count)
    order = (Modality.T1C, Modality.T1N, Modality.T2F, Modality.T2W)
    gaps = {name: order[number] for name, number in zip(names, drawn, strict=True)}
    for number, (name, gap) in enumerate(gaps.items()):
        (root / name).mkdir(parents=True)
        for modality, path in read_case(cases[number % len(cases)]).images.items():
            if modality is not gap:
                shutil.copyfile(path, root / name / f"{name}-{modality}.nii.gz")
    return gaps


@pytest.mark.slow
def test_forty_cases_survive_ten_kills(simulated: Path, any_model: Path, tmp_path: Path) -> None:
    cohort, output = tmp_path / "cohort", tmp_path / "out"
    gaps = challenge_cohort(
        [case.images[Modality.T1N].parent for case in find_cases(simulated)], cohort, 40
    )
    acquired = hashes(cohort)
    words = [sys.executable, "-m", "cwdm.cli", "impute", "--workers", "2", "--precision", "fp32"]
    words += ["--model", str(any_model), "--input", str(cohort), "--output", str(output)]
    rng = random.Random(1)
    done: dict[str, tuple[int, int]] = {}
    for _ in range(10):
        process = subprocess.Popen(
            words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(3, 9))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name in [path.stem for path in output.glob(".cwdm/impute/outcomes/[!.]*.json")]:
            status = (output / name / f"{name}-{gaps[name]}.nii.gz").stat()
            done.setdefault(name, (status.st_ino, status.st_mtime_ns))
    assert subprocess.run(words, capture_output=True).returncode == 0
    table = pd.read_csv(output / "impute.csv")
    assert Counter(table["state"]).keys() <= {"done", "unchanged"}
    assert len(table) == 40
    for case in find_cases(output):
        assert not case.missing
        gap = gaps[case.id]
        assert [m for m in SEQUENCES if is_synthetic(case.images[m])] == [gap]
        if case.id in done:  # not made again
            status = case.images[gap].stat()
            assert (status.st_ino, status.st_mtime_ns) == done[case.id]
    assert len(find_cases(output)) == 40
    assert hashes(cohort) == acquired
    assert not [path for path in output.rglob("*") if path.name.startswith(".cwdm-")]


@pytest.mark.slow
def test_ray_makes_the_same_images(cohort: Path, any_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    job = Imputation(precision="fp32", model=any_model)
    here = impute(cohort, tmp_path / "here", job=job)
    there = impute(cohort, tmp_path / "there", job=job, executor=Ray(2))
    assert list(here["state"]) == list(there["state"]) == ["done"] * 4
    for one, two in zip(find_cases(tmp_path / "here"), find_cases(tmp_path / "there"), strict=True):
        for modality in SEQUENCES:
            here_made, there_made = (read_volume(case.images[modality]) for case in (one, two))
            np.testing.assert_allclose(here_made.voxels, there_made.voxels, atol=1)
