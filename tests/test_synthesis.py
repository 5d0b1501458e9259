"""The main line: geometry, determinism, provenance and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cwdm
from cwdm.case import read_case
from cwdm.cli.main import cwdm as command
from cwdm.config import Config, Sampling, Training
from cwdm.denoiser import Denoiser
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.files import sha256
from cwdm.intensity import ScalePrior
from cwdm.modality import Modality, others
from cwdm.model import Model, build_denoiser, load_model, save_model
from cwdm.provenance import Provenance, sidecar
from cwdm.sampling import SAMPLERS
from cwdm.synthesis import Synthesizer, output_paths
from cwdm.unet import UNetConfig
from cwdm.volume import is_synthetic

TARGET = Modality.T2F
TINY = Config(
    name="tiny",
    target=TARGET,
    network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4),
    sampling=Sampling(sampler="ddpm", steps=3),
    training=Training(drop_conditions=0.1),
)
SAME = {TARGET: ScalePrior({m: 0.0 for m in others(TARGET)}, 4.0)}


@pytest.fixture
def model_file(tmp_path):
    torch.manual_seed(0)
    state = build_denoiser(TINY).backbone.state_dict()
    weights = {k: torch.randn_like(v) * 0.05 for k, v in state.items()}
    path = tmp_path / "tiny.safetensors"
    save_model(TINY, weights, SAME, path, overwrite=False)
    return path


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


class FirstCondition(torch.nn.Module):
    """A stand-in network: the first conditioning image is the estimate of x_0."""

    def forward(self, x, t):
        return x[:, 8:16]


def test_with_a_copying_network_the_first_input_comes_back(make_case):
    folder = make_case(endings=("-t1n", "-t1c", "-t2w"))
    case = read_case(folder)
    t1n = nib.load(case.images[Modality.T1N])
    model = Model(TINY, Denoiser(FirstCondition(), Diffusion()), SAME, Path("none"), "0")
    probe = Synthesizer(model, device="cpu", precision="fp32")(case)
    measured = probe.provenance.scales[Modality.T1N]  # the one to predict for t2f
    exact = ScalePrior({m: 0.0 for m in others(TARGET)}, measured.offset / measured.scale)
    model = replace(model, priors={TARGET: exact})
    for sampler in ("ddpm", "ddim"):
        result = Synthesizer(model, device="cpu", precision="fp32")(case, sampler=sampler, steps=2)
        path = result.write(folder.parent / sampler)
        image = nib.load(path)
        assert image.shape == t1n.shape
        np.testing.assert_array_equal(image.affine, t1n.affine)
        assert image.get_data_dtype() == t1n.get_data_dtype()
        np.testing.assert_allclose(image.get_fdata(), t1n.get_fdata(), atol=1)
        assert (image.get_fdata()[t1n.get_fdata() == 0] == 0).all()


def test_a_result_depends_on_its_seed_and_on_nothing_else(make_case, model_file):
    first = make_case(folder="a", case_id="a", endings=("-t1n", "-t1c", "-t2w"))
    second = make_case(folder="b", case_id="b", endings=("-t1n", "-t1c", "-t2w"))
    load = lambda: Synthesizer.load(TARGET, model_file, device="cpu", precision="fp32")  # noqa: E731
    alone = load()(read_case(first), seed=5).volume.voxels
    synthesizer = load()
    synthesizer(read_case(second), seed=9)
    torch.manual_seed(123)
    after = synthesizer(read_case(first), seed=5).volume.voxels
    np.testing.assert_array_equal(alone, after)
    assert (synthesizer(read_case(first), seed=6).volume.voxels != alone).any()


def test_an_acquired_target_is_not_looked_at(make_case, model_file, ball, make_image):
    folder = make_case()
    case = read_case(folder)
    with_it = cwdm.synthesize(case, "FLAIR", model=model_file)
    without = cwdm.synthesize(case.without(TARGET), TARGET, model=model_file)
    np.testing.assert_array_equal(with_it.volume.voxels, without.volume.voxels)
    assert TARGET not in with_it.provenance.inputs


def test_the_sidecar_reproduces_the_image(make_case, model_file, tmp_path):
    folder = make_case(endings=("-t1n", "-t1c", "-t2w"))
    words = ["--input", folder, "--model", model_file, "--device", "cpu", "--seed", 7]
    result = run("synthesize", *words, "--output", tmp_path / "one", "--steps", 2)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "one" / "x-t2f.json").read_text())
    assert record["synthetic"] is True
    assert record["model"] == {"name": "tiny", "sha256": sha256(model_file)}
    assert {m: s["sha256"] for m, s in record["inputs"].items()} == {
        m: sha256(folder / f"x-{m}.nii.gz") for m in ("t1n", "t1c", "t2w")
    }
    again = cwdm.synthesize(
        folder,
        record["target"],
        model=model_file,
        seed=record["seed"],
        steps=record["steps"],
        sampler=record["sampler"],
        device=record["device"],
        precision=record["precision"],
    )
    path = again.write(tmp_path / "two")
    a, b = (nib.load(p) for p in (tmp_path / "one" / "x-t2f.nii.gz", path))
    np.testing.assert_array_equal(a.get_fdata(), b.get_fdata())
    header = bytes(a.header["descrip"]).decode()
    assert "SYNTHETIC t2f" in header
    assert "research use only" in header
    assert is_synthetic(path)


def test_nothing_that_is_there_is_touched(make_case, model_file, tmp_path):
    folder, out = make_case(), tmp_path / "out"
    words = ["synthesize", "--input", folder, "--missing", "t2f", "--model", model_file]
    assert run(*words, "--output", out).exit_code == 0
    digest = sha256(out / "x-t2f.nii.gz")
    result = run(*words, "--output", out)
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert sha256(out / "x-t2f.nii.gz") == digest
    assert run(*words, "--output", out, "--overwrite", "--seed", 1).exit_code == 0
    assert sha256(out / "x-t2f.nii.gz") != digest
    # an acquired image never, whatever is asked for
    acquired = sha256(folder / "x-t2f.nii.gz")
    result = run(*words, "--output", folder, "--overwrite")
    assert result.exit_code == 2
    assert "never overwritten" in result.stderr
    assert sha256(folder / "x-t2f.nii.gz") == acquired
    with pytest.raises(InputError, match="never overwritten"):
        output_paths(read_case(folder), TARGET, folder, overwrite=True)


def test_what_is_replaced_goes_with_its_record_and_maps(make_case, model_file, tmp_path):
    folder, out = make_case(), tmp_path / "out"
    words = ["synthesize", "--input", folder, "--missing", "t2f", "--model", model_file]
    words += ["--output", out, "--overwrite"]
    assert run(*words, "--samples", 2).exit_code == 0
    assert len(list(out.iterdir())) == 5
    assert run(*words).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["x-t2f.json", "x-t2f.nii.gz"]


def test_an_image_never_lies_beside_the_record_of_another(
    make_case, model_file, tmp_path, monkeypatch
):
    synthesis = cwdm.synthesize(make_case(), "t2f", model=model_file)
    image = synthesis.write(tmp_path / "out")
    before = {path.name: sha256(path) for path in image.parent.iterdir()}
    other = cwdm.synthesize(tmp_path / "case", "t2f", model=model_file, seed=1)

    def full(self, path, *, overwrite=False):
        raise InputError(f"{path}: cannot be written, No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Provenance, "write", full)
        with pytest.raises(InputError, match=f"^{sidecar(image)}: cannot be written"):
            other.write(image.parent, overwrite=True)
    assert {path.name: sha256(path) for path in image.parent.iterdir()} == before

    replace, moves = Path.replace, []

    def interrupted(self, target):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.write(image.parent, overwrite=True)
    assert [path.name for path in image.parent.iterdir()] == [image.name]  # without the old record


def test_a_map_of_somebody_else_is_never_replaced(make_case, model_file, tmp_path, make_image):
    foreign = make_image("out/x-t2f-std.nii.gz")
    digest = sha256(foreign)
    words = ["--missing", "t2f", "--model", model_file, "--samples", 2, "--overwrite"]
    result = run("synthesize", "--input", make_case(), "--output", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert f"{foreign}: not written by cwdm" in result.stderr
    assert [path.name for path in foreign.parent.iterdir()] == [foreign.name]
    assert sha256(foreign) == digest


@pytest.mark.parametrize(("name", "text"), [("x-t2f.json", '{"EchoTime": 1}'), ("x-t2f.png", "?")])
def test_files_of_others_beside_the_image_are_never_replaced(
    make_case, model_file, tmp_path, name, text
):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    words = ["--missing", "t2f", "--model", model_file, "--output", out, "--overwrite", "--preview"]
    result = run("synthesize", "--input", make_case(), *words)
    assert result.exit_code == 2
    assert f"{name}: not written by cwdm, never overwritten" in result.stderr
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == text


@pytest.mark.parametrize(("dtype", "kept"), [("uint8", "int16"), ("int16", "int16")])
def test_a_synthetic_image_is_not_cut_off_by_narrow_integers(
    make_case, ball, model_file, tmp_path, dtype, kept
):
    """An 8-bit file cannot hold what another sequence's scale asks for."""
    voxels = ball((12, 10, 8)).astype(dtype)
    folder = make_case(endings=("-t1n", "-t1c", "-t2w"), voxels=voxels)
    model = load_model(model_file)
    priors = {TARGET: replace(SAME[TARGET], offset=400.0)}
    synthesis = Synthesizer(replace(model, priors=priors), TARGET)(read_case(folder))
    assert synthesis.volume.voxels.max() > 255
    stored = nib.load(synthesis.write(tmp_path / "out"))
    assert stored.get_data_dtype() == kept
    assert abs(stored.get_fdata().max() - synthesis.volume.voxels.max()) <= 0.5


def test_several_missing_modalities_are_made_from_what_was_acquired(make_case, tmp_path):
    folder, out = make_case(endings=("-t1n", "-t2w")), tmp_path / "out"
    result = run("synthesize", "--input", folder, "--output", out)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == [
        *("x-t1c.json", "x-t1c.nii.gz", "x-t2f.json", "x-t2f.nii.gz")
    ]
    record = json.loads((out / "x-t2f.json").read_text())
    assert list(record["inputs"]) == ["t1n", "t2w"]
    assert record["absent"] == ["t1c"]
    assert "Made without t1c" in record["warnings"][0]
    assert "guess" in result.stderr  # a synthetic T1c is never made silently


def test_steps_can_be_given_section_by_section(make_case, model_file, tmp_path):
    folder, out = make_case(endings=("-t1n", "-t1c", "-t2w")), tmp_path / "out"
    words = ["--input", folder, "--model", model_file, "--steps", "1,2,3", "--output", out]
    result = run("synthesize", *words)
    assert result.exit_code == 0, result.output
    assert "6/6" in result.stderr
    record = json.loads((out / "x-t2f.json").read_text())
    assert record["steps"] == [1, 2, 3]
    again = cwdm.synthesize(folder, "t2f", model=model_file, steps=tuple(record["steps"]))
    written = nib.load(out / "x-t2f.nii.gz").get_fdata()
    np.testing.assert_allclose(written, again.volume.voxels[::-1, ::-1], atol=0.5)


def test_the_help_names_every_sampler():
    result = run("synthesize", "--help")
    for name in SAMPLERS:
        assert f" {name}" in result.stdout


def test_a_published_checkpoint_is_a_model_too(make_case, tmp_path):
    folder, out = make_case(endings=("-t1n", "-t1c", "-t2w")), tmp_path / "out"
    torch.manual_seed(0)
    weights = build_denoiser(TINY).backbone.state_dict()
    path, nameless = tmp_path / "brats_t2f_1200000.pt", tmp_path / "brats.pt"
    for file in (path, nameless):
        torch.save(weights, file)
    words = ["--input", folder, "--steps", 2, "--output", out, "--model"]
    result = run("synthesize", *words, path)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "x-t2f.json").read_text())
    assert record["model"] == {"name": "brats_t2f_1200000", "sha256": sha256(path)}
    assert (record["normalization"], record["compat"]) == ("published", False)
    loaded = Synthesizer.load(TARGET, nameless)  # what is asked for tells what it makes
    assert loaded.model.config.target == TARGET
    result = run("synthesize", *words, nameless, "--preset", "cwdm-t2f", "--overwrite")
    assert result.exit_code == 2
    assert "not the network of preset cwdm-t2f: channels = 8, expected 64" in result.stderr


def test_mistakes_are_one_line_and_exit_code_2(make_case, make_image, model_file, tmp_path):
    complete, lone = make_case(), make_case(folder="lone", endings=("-t2f",))
    other_target = tmp_path / "other.safetensors"
    config = replace(TINY, target=Modality.T1N, training=Training())
    state = build_denoiser(config).backbone.state_dict()
    priors = {Modality.T1N: ScalePrior({m: 0.0 for m in others(Modality.T1N)}, 4.0)}
    save_model(config, state, priors, other_target, overwrite=False)
    two = make_case(folder="two", endings=("-t1c", "-t2w"))
    broken = make_case(folder="broken", endings=("-t1n", "-t1c", "-t2w"))
    data = (broken / "x-t1c.nii.gz").read_bytes()
    (broken / "x-t1c.nii.gz").write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    table = {
        "did you mean t2f": ["--input", complete, "--missing", "t2ff"],
        "no modality is missing": ["--input", complete],
        "nothing to synthesize t2f from": ["--input", lone, "--missing", "t2f"],
        "a model for t1n, expected one for t2f": [
            *("--input", complete, "--missing", "t2f", "--model", other_target)
        ],
        "has no t2f, which model tiny needs": [
            *("--input", two, "--missing", "t1n", "--model", other_target)
        ],
        "x-t1c.nii.gz": ["--input", broken, "--missing", "t2f", "--model", model_file],
        "no such file": ["--input", complete, "--missing", "t2f", "--model", tmp_path / "gone"],
        "not a readable": ["--input", complete, "--missing", "t2f", "--model", __file__],
        "sampling.sampler: Input should be": [
            "--input",
            complete,
            "--missing",
            "t2f",
            "--sampler",
            "magic",
        ],
        "within 1..1000, got 1001": ["--input", complete, "--missing", "t2f", "--steps", 1001],
        "is not a number of steps": ["--input", complete, "--missing", "t2f", "--steps", "ten"],
        "'0' is not a number of steps": ["--input", complete, "--missing", "t2f", "--steps", 0],
        "got 900": ["--input", complete, "--missing", "t2f", "--steps", "900,900"],
        "gone": ["--input", tmp_path / "gone", "--missing", "t2f"],
        "CUDA": ["--input", complete, "--missing", "t2f", "--device", "cuda:97"],
    }
    for message, words in table.items():
        result = run("synthesize", *words, "--output", out)
        assert result.exit_code == 2, (message, result.output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("cwdm: error:")]
        assert len(lines) == 1, (message, result.stderr)
        assert message in lines[0]
        assert "Traceback" not in result.output
        assert not out.exists() or not list(out.iterdir()), message


@pytest.mark.parametrize("odd", ["patient19", "aurora_case", "TCGA-FG-6692"])
def test_geometry_of_odd_real_cases_comes_back_exactly(odd, shared, model_file, tmp_path):
    case = read_case(shared / "data" / "odd" / odd)
    result = cwdm.synthesize(case, TARGET, model=model_file, steps=1)
    image, like = nib.load(result.write(tmp_path)), nib.load(case.images[Modality.T1N])
    assert image.shape == like.shape
    np.testing.assert_array_equal(image.affine, like.affine)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(like.affine)
    for form in ("sform", "qform"):
        theirs, code = getattr(like, f"get_{form}")(coded=True)
        ours, our_code = getattr(image, f"get_{form}")(coded=True)
        assert our_code == code
        if code:
            np.testing.assert_array_equal(ours, theirs)
    assert image.header.get_zooms() == like.header.get_zooms()
    assert image.get_data_dtype() == like.get_data_dtype()


def test_a_synthetic_image_in_the_case_counts_as_missing(make_case, model_file, tmp_path):
    folder = make_case(endings=("-t1n", "-t1c", "-t2w"))
    words = ["synthesize", "--input", folder, "--model", model_file, "--output"]
    assert run(*words, folder).exit_code == 0
    first = folder / "x-t2f.nii.gz"
    assert is_synthetic(first)
    result = run(*words, tmp_path / "again")  # without --missing: what the case lacks
    assert result.exit_code == 0, result.output
    again = tmp_path / "again" / "x-t2f.nii.gz"
    assert again.read_bytes() == first.read_bytes()
    made = Synthesizer.load(TARGET, model_file)(read_case(folder))
    assert made.provenance.replaces is None  # it was not acquired
    assert set(made.provenance.inputs) == set(others(TARGET))


def test_the_record_names_the_acquired_image_that_was_not_used(make_case, model_file):
    case = read_case(make_case())
    record = Synthesizer.load(TARGET, model_file)(case).provenance
    assert record.replaces.name == "x-t2f.nii.gz"
    assert record.replaces.sha256 == sha256(case.images[TARGET])
    assert any("x-t2f.nii.gz, that was not used" in warning for warning in record.warnings)
    assert Synthesizer.load(TARGET, model_file)(case.without(TARGET)).provenance.replaces is None
