"""Generation: what a sample depends on, its geometry and values, resuming, refusals."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cwdm.cli.main import cwdm as command
from cwdm.config import Config, Images, Sampling
from cwdm.denoiser import Denoiser
from cwdm.diffusion import Diffusion
from cwdm.engine import Chain, Engine
from cwdm.errors import InputError
from cwdm.files import sha256
from cwdm.generation import Generator, Sample, foreground, is_done, sample_paths
from cwdm.intensity import NORMALIZATIONS, ScalePrior
from cwdm.modality import SEQUENCES, Modality
from cwdm.model import Model, build_denoiser, find_model, load_model, save_model
from cwdm.provenance import SampleProvenance
from cwdm.unet import UNet, UNetConfig
from cwdm.volume import is_synthetic, read_volume

ROOT = Path(__file__).parents[1]
SMALL = UNetConfig(channels=8, multipliers=(1, 2), res_blocks=1, groups=4, additive_skips=True)
TINY = Config(
    name="tiny",
    target=Modality.T1N,
    conditioning="none",
    images=Images(normalization="published-wdm", spacing_mm=2.0, size=(16, 16, 12)),
    network=SMALL,
    sampling=Sampling(sampler="ddpm", steps=3),
)
CT = replace(TINY, name="chest", target=Modality.CT, images=Images(normalization="hounsfield"))
WITH_CONDITIONS = replace(TINY, name="other", conditioning="others")
ANY = replace(TINY, name="any", target="any", network=replace(SMALL, classes=4))

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write an untrained model; its images are textured all over."""

    def write(config: Config = TINY, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        state = build_denoiser(config).backbone.state_dict()
        weights = {name: torch.randn_like(value) * 0.1 for name, value in state.items()}
        prior = ScalePrior({}, offset=1.0, scale=300.0)
        if config.target == Modality.CT:
            prior = ScalePrior({}, offset=0.0, scale=1000.0)
        path = tmp_path / f"{config.name}-{seed}.safetensors"
        save_model(config, weights, dict.fromkeys(config.targets, prior), path, overwrite=True)
        return path

    return write


@pytest.fixture
def tiny(save: Save) -> Generator:
    return Generator.load(save(), precision="fp32")


def run(*words: object) -> Result:
    words = ("generate", "--precision", "fp32", *words)
    return CliRunner().invoke(command, [str(word) for word in words])


def load(path: Path) -> Any:
    """A file as nibabel sees it."""
    return nib.load(path)


def voxels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: read_volume(path).voxels for path in sorted(folder.glob("*.nii.gz"))}


# What a sample depends on


def test_a_sample_depends_on_seed_and_number_alone(tiny: Generator, save: Save) -> None:
    first = [tiny(n, seed=5).volume.voxels for n in (0, 1)]
    assert not np.array_equal(first[0], first[1])
    torch.manual_seed(99)
    other = Generator.load(save(), precision="fp32")  # and in another order
    for n in (1, 0):
        np.testing.assert_array_equal(other(n, seed=5).volume.voxels, first[n])
    assert not np.array_equal(other(0, seed=6).volume.voxels, first[0])
    assert not np.array_equal(other(0, seed=4).volume.voxels, first[1])  # no sum of the two


def test_another_process_makes_the_same_sample(tiny: Generator, save: Save) -> None:
    code = f"""
import hashlib
from cwdm.generation import Generator
voxels = Generator.load({str(save())!r}, precision="fp32")(7, seed=3).volume.voxels
print(hashlib.sha256(voxels.tobytes()).hexdigest())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = tiny(7, seed=3).volume.voxels
    finally:
        torch.set_num_threads(threads)
    assert other.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_split_and_resumed_runs_equal_one_run(save: Save, tmp_path: Path) -> None:
    words = ("--model", save(), "--seed", 2)
    assert run(*words, "--count", 3, "--output", tmp_path / "one").exit_code == 0
    assert run(*words, "--start", 2, "--output", tmp_path / "split").exit_code == 0
    assert run(*words, "--count", 2, "--output", tmp_path / "split").exit_code == 0
    stamp = (tmp_path / "split" / "tiny-00000-t1n.nii.gz").stat().st_mtime_ns
    result = run(*words, "--count", 3, "--output", tmp_path / "split")
    assert "note: 3 of 3 samples are there already" in result.stderr
    assert (tmp_path / "split" / "tiny-00000-t1n.nii.gz").stat().st_mtime_ns == stamp
    one, split = voxels(tmp_path / "one"), voxels(tmp_path / "split")
    assert list(one) == list(split) == [f"tiny-{n:05d}-t1n.nii.gz" for n in range(3)]
    for name in one:
        np.testing.assert_array_equal(one[name], split[name])


def test_the_record_is_enough_to_make_the_sample_again(tiny: Generator, tmp_path: Path) -> None:
    made = tiny(4, seed=8, size=8, steps=2, sampler="ddim")
    image = made.write(tmp_path)
    record = json.loads(image.with_name("tiny-00004-t1n.json").read_text())
    assert record["model"] == {"name": "tiny", "sha256": sha256(tiny.model.path)}
    assert record["synthetic"] is True
    assert record["use"].startswith("Research use only")
    assert "resemble" in record["warnings"][0]
    assert record["target_scale"] == {"offset": 300.0, "scale": 300.0}
    settings = {key: record[key] for key in ("seed", "size", "steps", "sampler", "precision")}
    precision = settings.pop("precision")
    again = Generator(load_model(tiny.model.path), precision=precision, device=record["device"])
    np.testing.assert_array_equal(
        again(record["number"], **settings).volume.voxels, read_volume(image).voxels
    )


def test_the_example_in_the_guide_has_the_fields_of_a_record() -> None:
    text = (ROOT / "docs" / "generate.md").read_text()
    example = json.loads(text.split("```json\n")[1].split("```")[0])
    assert list(example) == [field.name for field in fields(SampleProvenance)]
    for field in fields(SampleProvenance):
        if isinstance(field.default, (str, bool)):
            assert example[field.name] == field.default


# Geometry and values


def test_the_image_lies_in_the_middle_of_the_world_and_says_what_it_is(
    tiny: Generator, tmp_path: Path
) -> None:
    path = tiny(0).write(tmp_path)
    image = load(path)
    assert image.shape == (16, 16, 12)
    np.testing.assert_array_equal(image.affine[:3, :3], 2 * np.eye(3))
    middle = image.affine @ [7.5, 7.5, 5.5, 1]
    np.testing.assert_allclose(middle[:3], 0)
    assert is_synthetic(path)
    assert b"of no patient" in image.header["descrip"].item()


class Ramp(torch.nn.Module):
    """A stand-in network: an image that is bright where x and y are low."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        n = 2 * x.shape[-1]
        grid = torch.stack(torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"))
        image = torch.where(grid[:2].amax(0) < n // 2, 0.5, -1.0)
        encoded: torch.Tensor = TINY.transform.encode(image[None, None])
        return encoded


@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
def test_scanner_units_background_and_orientation(tiny: Generator, orientation: Any) -> None:
    config = replace(TINY, images=replace(TINY.images, orientation=orientation))
    denoiser = Denoiser(Ramp(), Diffusion())
    made = Generator(replace(tiny.model, config=config, denoiser=denoiser), precision="fp32")(
        0, size=16
    )
    bright = made.volume.voxels > 0
    low = slice(0, 8) if orientation == "RAS" else slice(8, 16)
    expected = np.zeros((16, 16, 16), bool)
    expected[low, low] = True
    np.testing.assert_array_equal(bright, expected)
    np.testing.assert_allclose(made.volume.voxels[expected], 0.5 * 300 + 300, rtol=1e-5)
    assert (made.volume.voxels[~expected] == 0).all()


def test_foreground_is_the_largest_thing_without_holes() -> None:
    normalization = NORMALIZATIONS["published-wdm"]
    image = np.full((24, 24, 24), -0.95, np.float32)
    expected = np.zeros(image.shape, bool)
    expected[4:20, 5:19, 0:18] = True  # up to the border
    image[expected] = 0.3
    image[10:14, 10:14, 8:12] = -0.99  # a ventricle
    image[12, 5:12, 4] = -1.0  # a crack, of which only the mouth stays open
    expected[12, 5, 4] = False
    image[22:, 22:, 22:] = 1.0  # a speck
    image[0, 0, 0] = -0.91
    np.testing.assert_array_equal(foreground(image, normalization), expected)
    assert not foreground(np.full((8, 8, 8), -1.0, np.float32), normalization).any()


def test_an_empty_image_is_written_and_said(tiny: Generator, tmp_path: Path) -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -9 * torch.ones_like(x)

    denoiser = Denoiser(Nothing(), Diffusion())
    transform = replace(TINY.transform, wavelet="haar")
    config = replace(TINY, transform=transform)
    made = Generator(replace(tiny.model, config=config, denoiser=denoiser))(0)
    assert "empty" in made.provenance.warnings[-1]
    assert made.write(tmp_path).exists()


def test_ct_is_in_hounsfield_units_with_its_air(save: Save, tmp_path: Path) -> None:
    made = Generator.load(save(CT), precision="fp32")(0, size=(8, 16, 8))
    assert made.volume.voxels.min() < 0
    path = made.write(tmp_path)
    assert path.name == "chest-00000-ct.nii.gz"
    image = load(path)
    assert image.get_data_dtype() == np.int16
    stored = image.get_fdata()
    assert stored.shape == (8, 16, 8)
    assert -1000 <= stored.min() < 0 < stored.max() <= 1000
    np.testing.assert_array_equal(stored, made.volume.voxels)


def test_a_model_of_several_sequences_is_told_which(save: Save) -> None:
    generator = Generator.load(save(ANY), precision="fp32")
    t1n, t1c = (generator(0, target=target).volume.voxels for target in SEQUENCES[:2])
    assert not np.array_equal(t1n, t1c)
    with pytest.raises(InputError, match="any makes t1n, t1c, t2w, t2f, expected --target"):
        generator(0)


# The published script


@pytest.mark.parametrize("number", [0, 1])
def test_compat_writes_what_the_published_script_wrote(
    number: int,
    golden_unet: Callable[[str], UNet],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    name = f"e2e_wdm_sample_{number}_0.nii.gz"
    published = ROOT / "tests" / "data" / name
    if not published.exists():
        published = request.getfixturevalue("shared") / "golden" / name
    unet = golden_unet("u16_add_in8")
    config = replace(TINY, network=unet.config, images=replace(TINY.images, size=(32, 32, 32)))
    priors = {Modality.T1N: ScalePrior({}, 1.0, 300.0)}
    model = Model(config, Denoiser(unet, Diffusion()), priors, Path("golden.pt"), "0")
    sample = Generator(model, precision="fp32")(number, seed=42, steps=5, compat=True)
    path = sample.write(tmp_path)
    assert path.name == f"sample_{number}_0.nii.gz"
    ours, theirs = load(path), load(published)
    assert ours.get_data_dtype() == theirs.get_data_dtype() == np.float32
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), atol=1e-4)


def test_compat_is_only_for_images_from_minus_one_to_one(save: Save, tmp_path: Path) -> None:
    unit = replace(TINY, name="unit", images=Images(normalization="published", size=(8, 8, 8)))
    result = run("--model", save(unit), "--compat", "published", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "unit makes 0..1" in result.stderr


# Refusals


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("10", "size 10x10x10: {multiple}, nearest are 8 and 12"),
        ("8,10,13", "size 8x10x13: {multiple}, nearest are 8x8x12 and 8x12x16"),
        ("0", "size 0x0x0: {multiple}, nearest is 4"),
        (
            "8x8x8",
            "Invalid value for '--size': '8x8x8' is not a size, expected 128 or X,Y,Z "
            "(see cwdm generate --help)",
        ),
    ],
)
def test_a_size_that_does_not_work(save: Save, tmp_path: Path, size: str, message: str) -> None:
    result = run("--model", save(), "--size", size, "--output", tmp_path / "out")
    message = message.format(multiple="every axis must be a multiple of 4 for this network")
    assert (result.exit_code, result.stderr) == (2, f"cwdm: error: {message}\n")
    assert not (tmp_path / "out").exists()


def test_a_size_has_to_come_from_somewhere(save: Save, tmp_path: Path) -> None:
    path = save(CT)
    result = run("--model", path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == f"cwdm: error: {path}: chest has no size of its own, add --size\n"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WITH_CONDITIONS, "other is conditioned on other sequences, use cwdm synthesize"),
        (
            replace(TINY, images=Images(normalization="robust")),
            "normalization 'robust' does not tell the background from the brain, expected "
            "published, published-wdm or hounsfield",
        ),
    ],
)
def test_models_that_generate_nothing(
    save: Save, tmp_path: Path, config: Config, message: str
) -> None:
    path = save(config)
    result = run("--model", path, "--output", tmp_path / "out")
    assert result.stderr == f"cwdm: error: {path}: {message}\n"
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_names_of_models(tmp_path: Path) -> None:
    assert find_model("small-t1n").is_file()
    result = run("--model", "smal-brain", "--output", tmp_path)
    assert result.exit_code == 2
    assert "smal-brain: no such model, expected a file or one of " in result.stderr


# Files


def test_nothing_is_overwritten_unless_asked(save: Save, tmp_path: Path) -> None:
    words = ("--model", save(), "--output", tmp_path / "out")
    assert run(*words).exit_code == 0
    image = tmp_path / "out" / "tiny-00000-t1n.nii.gz"
    before = image.read_bytes()
    for more, message in [
        (("--seed", 1), "was made with seed 0, not 1, expected another folder or --overwrite"),
        (("--steps", 2), "was made with steps 3, not 2"),
        (("--model", save(seed=1)), "was made with another model"),
    ]:
        result = run(*words, *more)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert image.read_bytes() == before
    result = run(*words, "--seed", 1, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert json.loads(image.with_name("tiny-00000-t1n.json").read_text())["seed"] == 1
    assert image.read_bytes() != before


def test_what_cwdm_did_not_write_is_never_replaced(
    tiny: Generator, save: Save, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image("out/tiny-00000-t1n.nii.gz")
    before = image.read_bytes()
    for more in ((), ("--overwrite",)):
        result = run("--model", save(), "--output", image.parent, *more)
        assert result.exit_code == 2
        assert "tiny-00000-t1n.nii.gz: " in result.stderr
    assert image.read_bytes() == before
    image.unlink()
    picture = image.with_name("samples.png")
    picture.write_bytes(b"mine")
    result = run("--model", save(), "--output", image.parent)
    assert "samples.png: not written by cwdm, never overwritten" in result.stderr
    assert [path.name for path in image.parent.iterdir()] == ["samples.png"]


def test_an_error_in_the_middle_leaves_whole_samples(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", save(), "--count", 3, "--output", tmp_path / "out")
    real, calls = Engine.run, []

    def fail(*args: Any, **options: Any) -> Chain:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return real(*args, **options)

    monkeypatch.setattr(Engine, "run", fail)
    result = run(*words)
    assert result.exit_code == 2
    assert "cwdm: error: out of memory" in result.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tiny-00000-t1n.nii.gz", "tiny-00000-t1n.json"}
    result = run(*words)
    assert "note: 1 of 3 samples are there already" in result.stderr
    assert len(calls) == 4  # two more
    assert len(voxels(tmp_path / "out")) == 3


def test_a_sample_is_written_whole_or_not_at_all(
    tiny: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = tiny(0)

    def full(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cwdm.generation.write_volume", full)
        with pytest.raises(KeyboardInterrupt):
            sample.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())

    # A kill leaves at most a record without an image: it is completed.
    image, sidecar = sample_paths(sample.provenance, tmp_path / "out")
    sample.provenance.write(sidecar)
    assert not is_done(sample.provenance, tmp_path / "out")
    sample.write(tmp_path / "out")
    assert is_done(sample.provenance, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        sample.write(tmp_path / "out")
    other: Sample = replace(sample, provenance=replace(sample.provenance, seed=1))
    image.unlink()
    with pytest.raises(InputError, match="was made with seed 0, not 1"):
        other.write(tmp_path / "out")

    sample.write(tmp_path / "out")
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        is_done(sample.provenance, tmp_path / "out")


# The command


def test_the_command_says_what_it_does(save: Save, tmp_path: Path) -> None:
    result = run("--model", save(), "--count", 2, "--size", "16", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    said = [out / "tiny-00000-t1n.nii.gz", out / "tiny-00001-t1n.nii.gz", out / "samples.png"]
    assert result.stdout.split() == [str(path) for path in said]
    assert "memory: about " in result.stderr
    assert "for 16x16x16 voxels in " in result.stderr
    assert "this machine has " in result.stderr
    assert "6/6" in result.stderr  # samples times steps
    assert result.stderr.count("note: A sample can resemble") == 1


def test_the_picture_has_a_row_for_each_sample(save: Save, tmp_path: Path) -> None:
    words = ("--model", save(), "--output", tmp_path / "out", "--size", 16, "--steps", 1)
    heights = []
    for count in (2, 9, 10):
        assert run(*words, "--count", count).exit_code == 0
        picture = Image.open(tmp_path / "out" / "samples.png")
        assert "SYNTHETIC" in picture.info["Description"]
        heights.append(picture.height)
    assert heights[1] - heights[0] == 6 * (240 + 8)
    assert heights[2] == heights[1]  # no more than eight
    pixels = np.asarray(picture.convert("L"))
    for row in range(8):
        for column in range(3):
            top, left = 94 + row * 248, 56 + column * 248
            assert pixels[top + 20 : top + 200, left + 20 : left + 220].std() > 10
