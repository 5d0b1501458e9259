"""A cohort is handed on to a segmenter, and every result says which inputs were synthetic."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import cwdm
from cwdm.case import find_cases
from cwdm.cli.main import cwdm as command
from cwdm.executors import Local
from cwdm.handoff import Segmentation
from cwdm.imputation import Imputation
from cwdm.modality import SEQUENCES, Modality
from cwdm.provenance import segmentation_warnings
from cwdm.segmentation import regions
from cwdm.volume import is_synthetic, read_labels, read_volume, read_volumes

GAPS = ((Modality.T1C,), (Modality.T2F,), (), (Modality.T1N, Modality.T2W))


class Brightest(torch.nn.Module):
    """WT where the mean of all images is above 0.5, TC above 1, ET above 1.3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        return torch.cat([mean - 0.5, mean - 1, mean - 1.3], 1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same as a TorchScript file, with its description."""
    path = tmp_path_factory.mktemp("brightest") / "brightest.pt"
    torch.jit.script(Brightest()).save(str(path))
    description = {"channels": list(SEQUENCES), "regions": ["WT", "TC", "ET"]}
    path.with_suffix(".json").write_text(json.dumps(description))
    return f"torchscript:{path}"


@pytest.fixture
def cohort(simulated: Path, tmp_path: Path) -> Path:
    """Cases with gaps."""
    root = tmp_path / "cohort"
    for case, gap in zip(find_cases(simulated), GAPS, strict=True):
        shutil.copytree(simulated / case.id, root / case.id)
        for modality in gap:
            (root / case.id / case.images[modality].name).unlink()
    return root


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def stored(path: Path) -> nib.Nifti1Image:
    image: nib.Nifti1Image = nib.Nifti1Image.from_filename(path)
    return image


def test_every_case_gets_its_segmentation(simulated: Path, model: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("segment", "--input", simulated, "--model", model, "--output", output)
    assert result.exit_code == 0, result.output
    assert "4 done" in result.stdout
    for case in find_cases(simulated):
        volumes = read_volumes(case, SEQUENCES)
        stack = []
        for volume in volumes.values():
            inside = volume.voxels[volume.voxels != 0]
            stack.append(np.where(volume.voxels, (volume.voxels - inside.mean()) / inside.std(), 0))
        mean = np.mean(stack, axis=0)
        path = output / f"{case.id}-seg.nii.gz"
        labels = read_labels(path, volumes[Modality.T1N])
        expected = np.select([mean > 1.3, mean > 1, mean > 0.5], [3, 1, 2])
        assert (labels != expected).mean() < 1e-4  # on the edge, rounding decides
        assert labels.any()
        image = stored(path)
        assert image.get_data_dtype() == np.uint8
        assert np.allclose(image.affine, stored(case.images[Modality.T1N]).affine)
        assert "research use only" in str(image.header["descrip"])
        record = json.loads((output / f"{case.id}-seg.json").read_text())
        assert record["synthetic_inputs"] == record["absent"] == record["warnings"] == []
        assert set(record["inputs"]) == set(SEQUENCES)
        for region, mask in regions(labels).items():
            assert record["volumes_ml"][region] == pytest.approx(mask.sum() * 0.512, abs=1e-3)
    again = run("segment", "--input", simulated, "--model", model, "--output", output)
    assert "4 unchanged" in again.stdout


def test_enhancing_tumor_may_be_4(simulated: Path, model: str, tmp_path: Path) -> None:
    words = ["segment", "--input", simulated, "--model", model, "--output", tmp_path / "out"]
    found = []
    for enhancing in ("3", "4"):
        assert run(*words, "--enhancing", enhancing).exit_code == 0
        paths = sorted((tmp_path / "out").glob("*.nii.gz"))
        found.append(np.stack([stored(path).get_fdata() for path in paths]))
    assert set(np.unique(found[1])) == {0, 1, 2, 4}
    assert np.array_equal(found[0], np.where(found[1] == 4, 3, found[1]))


def test_a_case_with_a_gap_is_refused_by_a_model_that_needs_all(
    cohort: Path, model: str, tmp_path: Path
) -> None:
    result = run("segment", "--input", cohort, "--model", model, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 done, 3 failed" in result.stdout
    assert "has no t1c, which torchscript:" in result.stderr
    assert "--impute-missing" in result.stderr


def test_gaps_are_filled_first_and_the_result_says_so(
    cohort: Path, model: str, any_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = Imputation(model=any_model, precision="fp32")
    table = cwdm.segment(cohort, output, model=model, impute_missing=job)
    assert list(table["state"]) == ["done"] * 4
    assert [row.split() for row in table["synthetic"]] == [list(gap) for gap in GAPS]
    for case, gap in zip(find_cases(cohort), GAPS, strict=True):
        record = json.loads((output / f"{case.id}-seg.json").read_text())
        assert record["synthetic_inputs"] == list(gap)
        description = str(stored(output / f"{case.id}-seg.nii.gz").header["descrip"])
        assert ("from SYNTHETIC" in description) == bool(gap)
        told = " ".join(record["warnings"])
        assert ("nobody knows where the tumor enhances" in told) == (gap == (Modality.T1C,))
    complete = find_cases(output / "completed")
    assert [len([m for m in SEQUENCES if is_synthetic(c.images[m])]) for c in complete] == [
        1,
        1,
        0,
        2,
    ]
    again = cwdm.segment(cohort, output, model=model, impute_missing=job)
    assert list(again["state"]) == ["unchanged"] * 4


def test_a_synthetic_image_that_lies_there_is_used_and_named(
    cohort: Path, model: str, any_model: Path, tmp_path: Path
) -> None:
    cwdm.impute(cohort, tmp_path / "completed", job=Imputation(model=any_model, precision="fp32"))
    table = cwdm.segment(tmp_path / "completed", tmp_path / "out", model=model)
    assert [row.split() for row in table["synthetic"]] == [list(gap) for gap in GAPS]


def test_a_case_that_cannot_be_completed_is_told_and_the_rest_goes_on(
    cohort: Path, model: str, any_model: Path, tmp_path: Path
) -> None:
    bad = find_cases(cohort)[0].images[Modality.T1N]
    bad.write_bytes(bad.read_bytes()[:-100])
    table = cwdm.segment(
        cohort,
        tmp_path / "out",
        model=model,
        impute_missing=Imputation(model=any_model, precision="fp32"),
    )
    assert list(table["state"]) == ["failed", "done", "done", "done"]
    assert str(bad) in table["message"][0]


def test_a_single_case_and_a_program(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def spread(self: Local, devices: Sequence[str], tasks: int) -> int:
        asked.append(self.bytes_each)
        return 1

    monkeypatch.setattr(Local, "_spread", spread)
    program = tmp_path / "program.py"
    program.write_text(
        "import shutil, sys; from pathlib import Path\n"
        "assert len(list(Path(sys.argv[1]).glob('*.nii.gz'))) == 4\n"
        "seg = Path(sys.argv[4]) / (sys.argv[3] + '-seg.nii.gz')\n"
        "shutil.copyfile(seg, Path(sys.argv[2]) / 'result.nii.gz')\n"
    )
    case = find_cases(simulated)[1]
    folder = simulated / case.id
    spec = f"command:{sys.executable} {program} {{input}} {{output}} {{id}} {folder}"
    result = run("segment", "--input", folder, "--model", spec, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert set(asked) == {None}  # programs are not started side by side unless asked for
    assert case.segmentation is not None
    like = read_volume(case.images[Modality.T1N])
    found = read_labels(tmp_path / "out" / f"{case.id}-seg.nii.gz", like)
    assert np.array_equal(found, read_labels(case.segmentation, like))


def test_an_unknown_segmenter_is_refused_at_once(simulated: Path, tmp_path: Path) -> None:
    words = ["segment", "--input", simulated, "--output", tmp_path / "out", "--model"]
    result = run(*words, "onxx:model.onnx")
    assert result.exit_code == 2
    assert "did you mean onnx" in result.stderr
    assert not (tmp_path / "out").exists()
    assert "without --impute-missing" in run(*words, "default", "--replace", "t2f").stderr


def test_settings_change_with_what_changes_the_result(model: str, simulated: Path) -> None:
    case = find_cases(simulated)[0]
    job = Segmentation.of(model)
    assert job.settings(case) != Segmentation.of(model, enhancing=4).settings(case)
    assert job.settings(case) == Segmentation.of(model, timeout_s=5).settings(case)


def test_who_copes_without_is_told_that_synthetic_images_rarely_help() -> None:
    told = segmentation_warnings((Modality.T2W,), (), partial=True)
    assert any("mostly does better without" in warning for warning in told)
    assert not any("better without" in each for each in segmentation_warnings((Modality.T2W,), ()))
    assert segmentation_warnings((), (), partial=True) == ()
