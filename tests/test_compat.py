"""`--compat published`: voxel by voxel what the scripts of cWDM write; and their loaders."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cwdm
from cwdm import compat
from cwdm.case import read_case
from cwdm.cli.main import cwdm as command
from cwdm.config import Config, Sampling
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.intensity import NORMALIZATIONS, Scale, ScalePrior
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.model import Model, build_denoiser
from cwdm.preparation import prepare
from cwdm.synthesis import Synthesizer
from cwdm.unet import UNetConfig
from cwdm.volume import read_volumes

GRID = (240, 240, 155)


@pytest.fixture
def published_case(shared):
    """The case that the published scripts were run on: 240 x 240 x 155 voxels of four sequences."""
    return read_case(shared / "golden" / "nifti_in")


@pytest.fixture
def checkpoint(golden_unet, tmp_path):
    """Save the weights the published scripts were run with as their training does."""

    def save(target):
        path = tmp_path / f"brats_{target}_000000.pt"
        torch.save(golden_unet("u16_cat_in32_e2e").state_dict(), path)
        return path

    return save


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def as_published(out, numbers, record):
    """Within 1e-4 at more than 99.99 % of the voxels kept, and in its sums."""
    assert list(out.shape) == record["shape"]
    for kept, ours in (("sub", out[::5, ::5, ::4]), ("axial", out[:, :, 70])):
        assert (np.abs(ours - numbers[kept]) < 1e-4).mean() > 0.9999
    np.testing.assert_allclose(out.sum(), record["sum"], rtol=1e-5)
    np.testing.assert_allclose((out**2).sum(), record["sumsq"], rtol=1e-5)


@pytest.mark.slow
def test_a_case_without_t1n_comes_out_as_from_sample_auto(
    published_case, checkpoint, shared, golden, tmp_path
):
    """From files to a file, through the command line."""
    folder = tmp_path / "case"
    folder.mkdir()
    for modality in others(Modality.T1N):
        (folder / published_case.images[modality].name).symlink_to(published_case.images[modality])
    result = run(
        *("synthesize", "--input", folder, "--model", checkpoint("t1n"), "--compat", "published"),
        *("--steps", 4, "--seed", 42, "--precision", "fp32", "--device", "cpu"),
        *("--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    record = json.loads((shared / "golden" / "e2e_sample_auto_t1n.json").read_text())
    image = nib.load(tmp_path / "out" / f"{published_case.id}-t1n.nii.gz")
    as_published(image.get_fdata(), golden("e2e_sample_auto_t1n"), record)
    count = np.count_nonzero(image.get_fdata())
    np.testing.assert_allclose(count, record["nonzero"], rtol=1e-4)
    np.testing.assert_array_equal(image.affine, record["affine"])
    for form in ("sform", "qform"):
        assert int(image.header[f"{form}_code"]) == record[f"{form}_code"]
    written = json.loads((tmp_path / "out" / f"{published_case.id}-t1n.json").read_text())
    assert written["compat"] is True
    assert written["target_scale"] == {"offset": 0.0, "scale": 1.0}


@pytest.mark.slow
def test_a_case_with_t1c_comes_out_as_from_sample(
    published_case, checkpoint, shared, golden, tmp_path
):
    synthesis = cwdm.synthesize(
        published_case,
        "t1c",
        model=checkpoint("t1c"),
        compat=True,
        steps=4,
        seed=42,
        device="cpu",
        precision="fp32",
    )
    image = nib.load(synthesis.write(tmp_path / "out"))
    out = image.get_fdata()
    record = json.loads((shared / "golden" / "e2e_sample_t1c.json").read_text())
    as_published(out, golden("e2e_sample_t1c"), record)
    np.testing.assert_array_equal(image.affine, record["affine"])
    theirs = nib.load(shared / "golden" / "e2e_sample_t1c_out.nii.gz").get_fdata()
    apart = np.abs(out - theirs)
    assert (apart < 1e-4).mean() > 0.9999
    assert apart.max() < 1e-3


def test_the_noise_is_that_of_the_first_case_of_a_published_run(shared):
    record = json.loads((shared / "golden" / "e2e_sample_auto_t1n.json").read_text())
    draw = compat.noise_stream((1, 8, 112, 112, 80), 42, torch.device("cpu"))
    for drawn in record["noise"][:2]:
        noise = draw()
        np.testing.assert_array_equal(noise.flatten()[:8], np.float32(drawn["first8"]))
        np.testing.assert_allclose(noise.double().sum(), drawn["sum"], rtol=1e-6)


def test_a_case_is_prepared_as_by_the_loader_of_cwdm(published_case, golden):
    theirs = golden("loader_cwdm")
    prepared = compat.prepare(read_volumes(published_case, SEQUENCES))
    for modality, image in prepared.images.items():
        ours = image.numpy()
        assert ours.shape == tuple(theirs[f"{modality}_shape"][1:])
        np.testing.assert_allclose(ours[::6, ::6, ::5], theirs[f"{modality}_sub"], atol=1e-7)
        step = 1 if modality == Modality.T1N else 2
        middle = ours[::step, ::step, ours.shape[2] // 2 - 2]
        np.testing.assert_allclose(middle, theirs[f"{modality}_slice"], atol=1e-7)
        np.testing.assert_allclose(statistics(ours), theirs[f"{modality}_stats"], rtol=1e-6)
        scale = prepared.scales[modality]
        quantiles = [scale.offset, scale.offset + scale.scale]
        np.testing.assert_allclose(quantiles, theirs[f"{modality}_quantiles"], rtol=1e-12)


@pytest.mark.parametrize("size", [128, 256])
def test_a_preset_of_wdm_prepares_a_case_as_the_loader_of_wdm(size, published_case, golden):
    config, theirs = Config.read(f"wdm-brats-{size}"), golden("loader_wdm")
    volumes = read_volumes(published_case, [Modality.T1N])
    prepared = prepare(volumes, config.images, multiple=config.multiple)
    ours = prepared.images[Modality.T1N].numpy()
    assert ours.shape == (size,) * 3
    tag, step = f"t1n_{size}_renorm", size // 128
    np.testing.assert_allclose(ours[::6, ::6, ::5], theirs[f"{tag}_sub"], atol=1e-6)
    middle = ours[::step, ::step, size // 2 - 2]
    np.testing.assert_allclose(middle, theirs[f"{tag}_slice"], atol=1e-6)
    np.testing.assert_allclose(statistics(ours), theirs[f"{tag}_stats"], rtol=1e-6)


def statistics(image):
    image = image.astype(np.float64)
    sums = [image.min(), image.max(), image.sum(), (image**2).sum()]
    return [*sums, np.count_nonzero(image)]


@pytest.mark.parametrize("kind", ["normal_f64", "positive_int16", "sparse_f64"])
def test_intensities_are_normalized_as_published(kind, golden):
    numbers, normalization = golden("normalise"), NORMALIZATIONS["published"]
    voxels = numbers[f"in_{kind}"].astype(np.float64)
    everything = np.ones(voxels.shape, dtype=bool)
    scale = normalization.measure(voxels, everything)
    image = normalization.normalize(voxels, everything, scale)
    np.testing.assert_allclose(image, numbers[f"out_{kind}"], atol=1e-12)
    low, high = numbers[f"q_{kind}"]
    np.testing.assert_allclose([scale.offset, scale.scale], [low, high - low], rtol=1e-12)


class FirstCondition(torch.nn.Module):
    """A stand-in network: the first conditioning image is the estimate of x_0."""

    def forward(self, x, t):
        return x[:, 8:16]


@pytest.fixture
def copying(tmp_path):
    """A synthesizer whose network gives back the first conditioning image."""

    def make(target):
        config = Config(
            name="copy",
            target=target,
            images=Config.read("cwdm-t1n").images,
            network=UNetConfig(channels=8, groups=4, multipliers=(1, 1)),
            sampling=Sampling(steps=1),
        )
        denoiser = build_denoiser(config)
        denoiser.backbone = FirstCondition()
        model = Model(config, denoiser, {target: ScalePrior({}, 0.0)}, tmp_path / "copy.pt", "0")
        return Synthesizer(model, device="cpu", precision="fp32")

    return make


@pytest.fixture
def brain():
    """Voxels of a published grid, brighter to one side, with something at the edge."""
    voxels = np.zeros(GRID, dtype=np.int16)
    voxels[60:180, 40:200, 10:140] = 300 + np.arange(120)[:, None, None]
    voxels[2, 5, 77] = 4000  # in the 8 voxels that are cut off
    return voxels


@pytest.mark.parametrize(
    ("target", "first", "affine"),
    [
        (Modality.T1N, Modality.T1C, [-1.0, -1.0, 1.0]),
        (Modality.T2F, Modality.T1N, [1.0, 1.0, 1.0]),
    ],
)
def test_every_target_lies_on_the_grid_of_the_first_other_sequence(
    target, first, affine, make_image, copying, brain, tmp_path
):
    """Whatever the target, and whichever way the file's axes run."""
    for n, modality in enumerate(others(target)):
        make_image(
            f"case/x-{modality}.nii.gz",
            voxels=brain // (n + 1),
            affine=np.diag([*affine, 1.0]),
        )
    case = read_case(tmp_path / "case")
    synthesis = copying(target)(case, compat=True)
    image = nib.load(synthesis.write(tmp_path / "out"))
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.affine, nib.load(case.images[first]).affine)
    low, high = np.quantile(brain, [0.001, 0.999])
    expected = ((brain - low) / (high - low)).clip(0, 1)
    expected[expected <= 0.04] = 0
    expected[:8] = expected[-8:] = expected[:, :8] = expected[:, -8:] = 0
    np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-5)
    assert synthesis.provenance.target_scale == Scale(0.0, 1.0)
    assert synthesis.provenance.normalization == "published"


def test_with_the_target_there_comes_out_the_crop_without_geometry(
    make_case, copying, brain, tmp_path
):
    folder = make_case(voxels=brain)
    synthesis = copying(Modality.T1N)(read_case(folder), compat=True)
    image = nib.load(synthesis.write(tmp_path / "out"))
    assert image.shape == (224, 224, 155)
    np.testing.assert_array_equal(image.affine, np.eye(4))
    low, high = np.quantile(brain, [0.001, 0.999])
    expected = ((brain - low) / (high - low)).clip(0, 1)[8:-8, 8:-8]
    np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-5)


def test_wfm_is_told_the_time_of_the_data_at_its_single_step():
    one, two = (Sampling(sampler="euler", steps=steps) for steps in (1, 2))
    assert compat.network_time(Flow(), one) == 0
    assert Flow().network_time(torch.tensor([0])).item() == 1000  # where it was not trained
    assert compat.network_time(Flow(), two) is None
    assert compat.network_time(Diffusion(), one) is None


def test_what_their_scripts_could_not_take_is_refused(make_case, copying, tmp_path):
    synthesizer, case = copying(Modality.T1N), read_case(make_case())
    with pytest.raises(InputError, match="12 x 10 x 8 voxels, --compat published takes 240x240x"):
        synthesizer(case, compat=True)
    result = run("synthesize", "--input", make_case(), "--missing", "t2f", "--compat", "published")
    assert result.exit_code == 2
    assert "small-t2f was trained on 'robust' images" in result.stderr
    deep = Config.read("cwdm-t1n").as_dict() | {"network": {"kind": "wavunet"}}
    with pytest.raises(InputError, match="multiples of 64, --compat published has 224x224x160"):
        compat.check(Config.parse(deep, "deep"), tmp_path)
    assert run("synthesize", "--input", make_case(), "--compat", "mine").exit_code == 2
