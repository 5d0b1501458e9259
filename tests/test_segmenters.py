"""Segmenters that are not ours give what they would give by themselves, on the grid of the case.

All of them follow one rule here, which tells every channel from the others: in a case of
`patient`, the whole tumor is what is bright in t2f, the core what is bright in t1n, and the
enhancing tumor what is bright in t1c.
"""

import inspect
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from gzip import decompress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers.inferer import SlidingWindowInferer
from monai.networks.nets.segresnet import SegResNet
from monai.transforms.intensity.array import NormalizeIntensity
from monai.transforms.io.array import LoadImage
from nibabel import orientations
from numpy.typing import NDArray
from torch import Tensor, nn

from cwdm import external, fidelity, segnet
from cwdm.case import Case, read_case
from cwdm.cli.main import WRONG_INPUT, explain
from cwdm.errors import InputError
from cwdm.handoff import segment
from cwdm.imputation import Imputation
from cwdm.modality import SEQUENCES, Modality
from cwdm.segmentation import (
    Descriptor,
    Region,
    brats_labels,
    brats_numbers,
    dice,
    from_regions,
    regions,
)
from cwdm.segmenters import KINDS, check_script, load
from cwdm.volume import read_labels, read_volumes

T1N, T1C, T2W, T2F = SEQUENCES
SHAPE = (22, 20, 18)
AS_IS = np.eye(4)
TURNED = np.array([[0.96, -0.28, 0, 3], [0.28, 0.96, 0, -7], [0, 0, 1, 20], [0, 0, 0, 1]])
Patient = Callable[..., Case]


@pytest.fixture
def truth() -> NDArray[np.uint8]:
    """Labels (X, Y, Z) that no axis can be turned round or exchanged in unnoticed."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:14, 6:13, 7:12] = 2
    labels[6:11, 6:11, 7:10] = 1
    labels[6:9, 7:9, 8:10] = 3
    return labels


@pytest.fixture
def patient(tmp_path: Path, truth: NDArray[np.uint8]) -> Patient:
    """Write a case with these labels, stored in some orientation."""

    def make(
        axes: str = "LPS",
        *,
        affine: Any = AS_IS,
        gain: float = 1,
        offset: float = 0,
        ending: str = ".gz",
    ) -> Case:
        grid = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
        brain = (grid**2).sum(0) < 8.5**2
        bright = {T2F: truth > 0, T1N: np.isin(truth, (1, 3)), T1C: truth == 3}
        texture = np.random.default_rng(0).integers(0, 9, SHAPE)
        folder = tmp_path / f"case-{axes}-{gain}{ending}"
        folder.mkdir()
        for modality in SEQUENCES:
            voxels = np.where(brain, 100 + texture + 900 * bright.get(modality, False), 0)
            voxels = gain * voxels + offset
            image = nib.Nifti1Image(voxels.astype(np.float32), affine)
            there = orientations.axcodes2ornt(tuple(axes))
            image = image.as_reoriented(
                orientations.ornt_transform(orientations.io_orientation(image.affine), there)
            )
            image.to_filename(folder / f"x-{modality}.nii{ending}")
        return read_case(folder)

    return make


def canonical(case: Case) -> dict[Modality, NDArray[np.float32]]:
    """The images (X, Y, Z), by nibabel alone."""
    images: dict[Modality, Any] = {key: nib.load(path) for key, path in case.images.items()}
    return {
        modality: nib.as_closest_canonical(image).get_fdata(dtype=np.float32)
        for modality, image in images.items()
    }


class Rule(nn.Module):
    """Logits of TC, WT, ET, in this order, from images in the order t2f, t1c, t1n."""

    def __init__(self, threshold: float, shift: int = 0, softmax: bool = False):
        super().__init__()
        self.threshold, self.shift, self.softmax = threshold, shift, softmax

    def forward(self, images: Tensor) -> Tensor:
        t2f, t1c, t1n = images[:, 0], images[:, 1], images[:, 2]
        logits = torch.stack([t1n, t2f, t1c], 1) - self.threshold
        if self.softmax:  # background, edema, ET, core: the innermost wins
            tc, wt, et = (logits > 0).float().unbind(1)
            logits = torch.stack([torch.full_like(wt, 0.5), wt, 3 * et, 2 * tc], 1)
        return torch.roll(logits, self.shift, 2)


NNUNET_REGIONS = {  # as in its data sets of BraTS: edema at 1
    "background": 0,
    "whole tumor": [1, 2, 3],
    "tumor core": [2, 3],
    "enhancing tumor": [3],
}
RULE = {"channels": ["t2f", "t1c", "t1n"], "regions": ["TC", "WT", "ET"]}


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Save a rule as TorchScript with its description; returns how `load` is told."""

    def make(
        threshold: float = 1.5, *, shift: int = 0, softmax: bool = False, **setting: Any
    ) -> str:
        path = tmp_path / "rule.pt"
        torch.jit.script(Rule(threshold, shift, softmax)).save(path)
        path.with_suffix(".json").write_text(json.dumps({**RULE, **setting}))
        return f"torchscript:{path}"

    return make


@pytest.fixture
def onnx(tmp_path: Path) -> str:
    """The rule as ONNX, for images of any size."""
    pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx.helper")
    element = 1  # float
    names = ["t2f", "t1c", "t1n"]
    nodes = [
        helper.make_node("Split", ["images"], names, axis=1, num_outputs=3),
        helper.make_node("Concat", ["t1n", "t2f", "t1c"], ["bright"], axis=1),
        helper.make_node("Sub", ["bright", "threshold"], ["scores"]),
    ]
    size = [1, 3, "x", "y", "z"]
    graph = helper.make_graph(
        nodes,
        "rule",
        [helper.make_tensor_value_info("images", element, size)],
        [helper.make_tensor_value_info("scores", element, size)],
        [helper.make_tensor("threshold", element, [], [1.5])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = tmp_path / "rule.onnx"
    path.write_bytes(model.SerializeToString())
    path.with_suffix(".json").write_text(json.dumps(RULE))
    return f"onnx:{path}"


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
@pytest.mark.parametrize("setting", [{}, {"patch": [12, 12, 12]}, {"multiple": 8}])
def test_labels_come_out_on_the_grid_of_the_case(
    script: Callable[..., str], patient: Patient, truth: Any, axes: str, setting: dict[str, Any]
) -> None:
    segmenter = load(script(**setting))
    assert segmenter.channels == (T2F, T1C, T1N)
    assert not segmenter.partial
    assert (segmenter(patient(axes)) == truth).all()


def test_an_oblique_case_is_taken_along_its_own_axes(
    script: Callable[..., str], patient: Patient, truth: Any
) -> None:
    assert (load(script())(patient("LPS", affine=TURNED)) == truth).all()


def test_onnx_gives_what_torch_gives(onnx: str, patient: Patient, truth: Any) -> None:
    assert (load(onnx)(patient()) == truth).all()


@pytest.mark.parametrize(("orientation", "sign"), [("RAS", 1), ("LPS", -1), ("LAS", -1)])
def test_the_network_sees_the_orientation_it_asks_for(
    script: Callable[..., str], patient: Patient, truth: Any, orientation: str, sign: int
) -> None:
    labels = load(script(shift=2, orientation=orientation))(patient("PIR"))
    assert (labels == np.roll(truth, 2 * sign, axis=0)).all()


def test_the_network_sees_the_voxel_size_it_asks_for(
    script: Callable[..., str], patient: Patient, truth: Any
) -> None:
    """Two voxels of 1 mm there are one voxel of 2 mm here."""
    spec = script(threshold=550, shift=2, spacing_mm=1, normalization="none")
    case = patient("RAS", affine=np.diag([2, 2, 2, 1]))
    assert (load(spec)(case) == np.roll(truth, 1, axis=0)).all()


def test_nearly_the_same_voxel_size_is_taken_as_it_is(
    script: Callable[..., str], patient: Patient, truth: Any
) -> None:
    case = patient("RAS", affine=np.diag([1.09, 0.92, 1, 1]))
    assert (load(script(spacing_mm=1))(case) == truth).all()


@pytest.mark.parametrize("normalization", ["nonzero-zscore", "zscore", "none"])
def test_images_are_normalized_as_described(
    script: Callable[..., str], patient: Patient, truth: Any, normalization: str
) -> None:
    """A threshold just below and just above the darkest enhancing voxel tells the unit."""
    case = patient()
    voxels = canonical(case)[T1C].astype(np.float64)
    used = voxels[voxels != 0] if normalization == "nonzero-zscore" else voxels
    mean, deviation = (0, 1) if normalization == "none" else (used.mean(), used.std())
    darkest = (voxels[voxels > 999].min() - mean) / deviation
    for threshold, complete in ((darkest - 0.01, True), (darkest + 0.01, False)):
        labels = load(script(threshold, normalization=normalization))(case)
        assert ((labels == 3) == (truth == 3)).all() == complete


def test_only_unnormalized_images_depend_on_the_gain(
    script: Callable[..., str], patient: Patient, truth: Any
) -> None:
    case = patient(gain=0.01)
    assert (load(script(normalization="zscore"))(case) == truth).all()
    assert not load(script(normalization="none", threshold=500))(case).any()
    assert (load(script(normalization="none", threshold=5))(case) == truth).all()


def test_a_background_that_is_not_0_is_made_0(
    script: Callable[..., str], patient: Patient, truth: Any
) -> None:
    case = patient(offset=5000)
    assert (load(script())(case) == truth).all()
    assert not load(script(threshold=6010, normalization="none"))(case).any()
    assert (load(script(threshold=5500, normalization="none"))(case) == truth).all()
    assert (load(script(threshold=1, normalization="none"))(case)[0, 0] == 0).all()


@pytest.mark.parametrize("enhancing", [3, 4])
def test_of_labels_the_largest_score_counts(
    script: Callable[..., str], patient: Patient, truth: Any, enhancing: int
) -> None:
    spec = script(softmax=True, regions=None, labels=[0, 2, enhancing, 1])
    assert (load(spec)(patient()) == truth).all()


def test_probabilities_are_not_taken_for_logits(
    script: Callable[..., str], patient: Patient, truth: Any
) -> None:
    """Of -0.5 .. 0.4, nothing is a probability above a half."""
    case = patient(gain=1e-3)
    setting: dict[str, Any] = {"threshold": 0.6, "normalization": "none"}
    assert (load(script(**setting))(case) == truth).all()
    assert not load(script(**setting, activation="none"))(case).any()


def test_progress_counts_windows(script: Callable[..., str], patient: Patient) -> None:
    seen: list[tuple[int, int]] = []
    segmenter = load(script(patch=[12, 12, 12], overlap=0.25))
    segmenter(patient(), progress=lambda done, total: seen.append((done, total)))
    count = 3 * 2 * 2  # steps of 9 voxels along 22, 20 and 18: 0 9 10, 0 8, 0 6
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_what_it_is_made_of_is_in_the_digest(script: Callable[..., str]) -> None:
    first = load(script()).sha256
    assert load(script()).sha256 == first
    assert load(script(1.6)).sha256 != first
    assert load(script(patch=[8, 8, 8])).sha256 != first


def test_a_missing_sequence_is_named(script: Callable[..., str], patient: Patient) -> None:
    with pytest.raises(InputError, match=r"^case x: has no t1c, which torchscript:.*rule.pt needs"):
        load(script())(patient().without(T1C))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("onx:a", "no such segmenter, expected one of default, monai-bundle:FOLDER.*mean onnx?"),
        ("model.onnx", "no such segmenter, expected one of default,"),
        ("onnx:", "onnx:: expected onnx:FILE"),
        ("onnx", "onnx: expected onnx:FILE"),
        ("default:x", "default:x: expected default"),
        ("torchscript:nowhere.pt", "nowhere.pt: cannot be read, No such file"),
        ("msnet:nowhere.npz", "nowhere.npz: no such file"),
        ("nnunet:nowhere", "nowhere/dataset.json: No such file or directory, expected a results f"),
        ("monai-bundle:nowhere", "nowhere/configs: no inference.json or inference.yaml or"),
        ("brats:adult-gliom", "no such task, expected one of adult-glioma, .*mean adult-glioma?"),
        ("command:no-such-program {input} {output}", "no-such-program is no program that can be"),
        ("command:true {input} {ouput}", "found {ouput}, expected .*did you mean {output}?"),
        ("command:true {input}", "expected {input} or images, and {output}"),
        ("command:true 'a {input}", "No closing quotation"),
    ],
)
def test_a_wrong_name_is_one_line_that_helps(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?").replace("{", r"\{")):
        load(spec)


def test_every_kind_is_explained() -> None:
    assert all(f"`{kind}" in (inspect.getdoc(load) or "") for kind in KINDS)


@pytest.mark.parametrize(
    ("kind", "module"), [("onnx", "onnxruntime"), ("nnunet", "nnunetv2"), ("brats", "brats")]
)
def test_an_extra_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    for installed in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, installed)
    monkeypatch.setitem(sys.modules, module, None)
    dataset = {"channel_names": {"0": "T1"}, "labels": NNUNET_REGIONS}
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").touch()
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(ModuleNotFoundError) as error:
        load("brats:africa" if kind == "brats" else f"{kind}:{tmp_path}")
    message, code = explain(error.value)
    assert message.endswith(f"is not installed, expected pip install 'cwdm[{kind}]'")
    assert code == WRONG_INPUT


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_a_network_without_description_is_refused_with_an_example(
    tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.bin"
    path.write_bytes(b"1")
    with pytest.raises(InputError, match=r"net.json: No such file.*of net.bin such as \{") as error:
        load(f"{kind}:{path}")
    Descriptor.parse("{" + str(error.value).partition("{")[2], "example")
    path.with_suffix(".json").write_text(json.dumps(RULE))
    with pytest.raises(InputError, match=r"net.bin: not a readable (ONNX|TorchScript) file"):
        load(f"{kind}:{path}")


class Saving(nn.Module):
    """Writes a file each time that it is asked."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, self.path)
        return images


class Same(nn.Module):
    """Puts out what is put in."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Within(nn.Module):
    """Hides another module two levels down."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.parts = nn.Sequential(nn.Sequential(module))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.parts(images)
        return output


@pytest.mark.parametrize("wrap", [lambda module: module, Within])
def test_torchscript_that_writes_files_is_refused(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    path, written = tmp_path / "net.pt", tmp_path / "written"
    torch.jit.script(wrap(Saving(str(written)))).save(path)
    path.with_suffix(".json").write_text(json.dumps({**RULE, "activation": "none"}))
    message = (
        f"{path}: found save in its code, expected operations on tensors alone; it is not loaded "
        "because it could write files"
    )
    with pytest.raises(InputError) as refusal:
        load(f"torchscript:{path}")
    assert str(refusal.value) == message
    with pytest.raises(InputError) as refusal:
        fidelity.Extractor.load(path, device="cpu")
    assert str(refusal.value) == message
    assert not written.exists()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('ops.aten.save(images, "F")', "save"),
        ('t = torch\n    t.save(images, "F")', "save"),
        ('getattr(torch, "sa" "ve")(images, "F")', "getattr"),
        ('getattr(torch, "s\\141ve")(images, "F")', "getattr"),
        ('getattr(torch, "save")(images, "F")', "save"),
        ('g = getattr\n    g(torch, "sa" "ve")(images, "F")', "getattr"),
        ('images = torch.from_file("F", True, 10)', "from_file"),
        ('ops.image.write_file("F", images)', "ops.image.write_file"),
        ('getattr(getattr(ops, "image"), "write_file")("F", images)', "ops"),
    ],
)
def test_no_disguise_lets_torchscript_write_files(tmp_path: Path, line: str, found: str) -> None:
    path = rewritten(tmp_path, "    return images", f"    {line}\n    return images")
    with pytest.raises(InputError, match=f"net.pt: found {found} in its code, expected operations"):
        check_script(path)


def test_torchscript_cannot_write_files_as_it_is_loaded(tmp_path: Path) -> None:
    written = tmp_path / "written"
    default = f'images: Tensor = torch.from_file("{written}", True, 10)'
    path = rewritten(tmp_path, "images: Tensor", default)
    path.with_suffix(".json").write_text(json.dumps(RULE))
    with pytest.raises(InputError, match="found from_file in its code"):
        load(f"torchscript:{path}")
    assert not written.exists()
    torch.jit.load(path)  # what it is refused for
    assert written.exists()


def rewritten(folder: Path, old: str, new: str) -> Path:
    """A TorchScript file that puts out what is put in, with another text in its code."""
    made, path = folder / "made.pt", folder / "net.pt"
    torch.jit.script(Same()).save(made)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(".py"):
                assert old.encode() in data
                data = data.replace(old.encode(), new.encode())
            if not name.endswith(".debug_pkl"):
                target.writestr(name, data)
    return path


@pytest.mark.parametrize("network", [SegResNet(3, 8, 3), nn.Sequential(nn.LSTM(3, 3))])
def test_torchscript_of_networks_only_computes(tmp_path: Path, network: nn.Module) -> None:
    torch.jit.script(network).save(tmp_path / "net.pt")
    check_script(tmp_path / "net.pt")


def test_a_description_that_does_not_fit_is_one_line(
    script: Callable[..., str], patient: Patient, onnx: str
) -> None:
    case = patient()
    with pytest.raises(InputError, match=r"rule.pt: put out \(1, 3, 22, 20, 18\), .*\(1, 2, 22,"):
        load(script(regions=None, labels=[0, 3]))(case)
    with pytest.raises(InputError, match=r"rule.pt: failed on an image of shape \(1, 2, 22, 20,"):
        load(script(channels=["t1n", "t2f"]))(case)
    beside = Path(onnx.removeprefix("onnx:")).with_suffix(".json")
    beside.write_text(json.dumps({**RULE, "channels": ["t1n", "t2f"]}))
    with pytest.raises(InputError, match=r"rule.onnx: failed on a window of shape \(1, 2, 22, 20"):
        load(onnx)(case)


# A bundle of MONAI


def bundle(folder: Path, network: nn.Module, **changes: Any) -> str:
    """Write what the published `brats_mri_segmentation` consists of, with changes by key."""
    config: dict[str, Any] = {
        "imports": ["$import os"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/data",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "SegResNet",
            "blocks_down": [1, 2],
            "blocks_up": [1],
            "init_filters": 8,
            "in_channels": 4,
            "out_channels": 3,
            "dropout_prob": 0.2,
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {
                    "_target_": "NormalizeIntensityd",
                    "keys": "image",
                    "nonzero": True,
                    "channel_wise": True,
                },
            ],
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": [24, 24, 24],
            "sw_batch_size": 1,
            "overlap": 0.5,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "meta_keys": "pred_meta_dict",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
                {
                    "_target_": "Lambdad",
                    "keys": "pred",
                    "func": "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, 0))",
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "resample": False,
                },
            ],
        },
        "evaluator": {"_target_": "SupervisedEvaluator", "val_data_loader": "@dataloader"},
    }
    inputs = {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"}
    outputs = {"0": "Tumor core", "1": "Whole tumor", "2": "Enhancing tumor"}
    formats = {
        "inputs": {"image": {"channel_def": changes.pop("inputs", inputs)}},
        "outputs": {"pred": {"channel_def": changes.pop("outputs", outputs)}},
    }
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return f"monai-bundle:{folder}"


def segresnet() -> SegResNet:
    torch.manual_seed(0)
    network = SegResNet(3, 8, in_channels=4, out_channels=3, blocks_down=(1, 2), blocks_up=(1,))
    return network.eval()


CONVOLUTION = {
    "_target_": "torch.nn.Conv3d",
    "in_channels": 4,
    "out_channels": 3,
    "kernel_size": 3,
    "padding": 1,
}


def convolution(shift: int = 0, bias: float = -1.5) -> nn.Conv3d:
    """TC, WT, ET from t1c, t1n, t2w, t2f as the rule says; looks `shift` voxels along X."""
    network = nn.Conv3d(4, 3, 3, padding=1)
    network.load_state_dict(
        {"weight": torch.zeros_like(network.weight), "bias": torch.full((3,), bias)}
    )
    with torch.no_grad():
        for output, channel in enumerate((1, 3, 0)):
            network.weight[output, channel, 1 + shift, 1, 1] = 1
    return network


def test_a_bundle_gives_what_its_network_gives(tmp_path: Path, patient: Patient) -> None:
    """As MONAI alone would load, normalize and infer a file that is stored as LPS."""
    network, case = segresnet(), patient("LPS")
    segmenter = load(bundle(tmp_path / "bundle", network), precision="fp32")
    assert segmenter.channels == (T1C, T1N, T2W, T2F)
    loaded = LoadImage(image_only=True)([case.images[modality] for modality in segmenter.channels])
    image = NormalizeIntensity(nonzero=True, channel_wise=True)(loaded)
    with torch.no_grad():
        inferer = SlidingWindowInferer([24, 24, 24], overlap=0.5)
        logits = torch.as_tensor(inferer(torch.as_tensor(image)[None], network))[0]
    tc, wt, et = (logits.sigmoid() > 0.5).numpy()[:, ::-1, ::-1]  # LPS -> RAS
    expected = from_regions({Region.TC: tc, Region.WT: wt, Region.ET: et})
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    assert (segmenter(case) == expected).all()
    assert not (tmp_path / "bundle" / "eval").exists()


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([], -1),  # as BraTS files are: LPS
        ([{"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}], 1),
        (
            [
                {"_target_": "Orientationd", "keys": "image", "axcodes": "LAS"},
                {"_target_": "EnsureTyped", "keys": "image"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [1, 1, 1]},
            ],
            -1,
        ),
    ],
)
def test_a_bundle_gets_its_orientation(
    tmp_path: Path, patient: Patient, truth: Any, transforms: list[Any], expected: int
) -> None:
    normalization = {"_target_": "ScaleIntensityd", "keys": "image", "channel_wise": True}
    spec = bundle(
        tmp_path / "bundle",
        convolution(1, bias=-0.5),
        network_def=CONVOLUTION,
        preprocessing={
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                *transforms,
                normalization,
            ],
        },
    )
    # a convolution that looks one voxel further moves the image one voxel back
    assert (load(spec)(patient("PIR")) == np.roll(truth, -expected, axis=0)).all()


def test_a_bundle_as_torchscript_and_yaml(tmp_path: Path, patient: Patient, truth: Any) -> None:
    folder = tmp_path / "bundle"
    spec = bundle(folder, convolution(), network_def=None)
    torch.jit.script(convolution()).save(folder / "models" / "model.ts")
    (folder / "models" / "model.pt").unlink()
    (folder / "configs" / "inference.json").rename(folder / "configs" / "inference.yaml")
    assert (load(spec)(patient()) == truth).all()


def test_a_bundle_may_put_out_labels(tmp_path: Path, patient: Patient, truth: Any) -> None:
    """Background, edema, core, enhancing, in the order of the outputs."""
    network = nn.Conv3d(4, 4, 1)
    weight = torch.zeros_like(network.weight)
    for output, channel, size in ((1, 3, 1), (2, 1, 3), (3, 0, 9)):
        weight[output, channel] = size
    network.load_state_dict({"weight": weight, "bias": torch.tensor([0, -1.5, -4.5, -13.5])})
    names = {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing tumor"}
    spec = bundle(
        tmp_path / "bundle",
        network,
        network_def={**CONVOLUTION, "out_channels": 4, "kernel_size": 1, "padding": 0},
        outputs=names,
        postprocessing={
            "_target_": "Compose",
            "transforms": [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}],
        },
    )
    assert (load(spec, precision="fp32")(patient()) == truth).all()


def compose(*transforms: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": list(transforms)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {}}, "inputs.image.channel_def: found nothing, expected all channels"),
        ({"inputs": {"1": "T1"}}, "inputs.image.channel_def: found {'1': 'T1'}, expected all"),
        ({"inputs": {"0": "CT"}}, "input channels are CT, expected MRI sequences"),
        ({"outputs": {"0": "liver"}}, "output channels are liver, expected whole tumor,"),
        ({"outputs": {"0": "ET"}}, "expected the regions WT, TC and ET"),
        ({"inferer": None}, "inference.json: has no inferer, which a bundle for inference needs"),
        ({"network_def": None}, "inference.json: has no network_def"),
        ({"network_def": {"_target_": "NoNet"}}, "inference.json: network_def: .*NoNet"),
        ({"network_def": "$3"}, "network_def: found a int, expected a network"),
        ({"network_def": CONVOLUTION}, "model.pt: does not fit network_def"),
        (
            {"preprocessing": compose({"_target_": "CropForegroundd", "keys": "image",
                                       "source_key": "image"})},
            "preprocessing: cwdm does not know what to make of this CropForegroundd",
        ),
        (
            {"preprocessing": compose({"_target_": "Orientationd", "keys": "image",
                                       "axcodes": "PLI"})},
            "preprocessing: cwdm does not know what to make of this Orientationd",
        ),
        (
            {"preprocessing": compose({"_target_": "Spacingd", "keys": "image",
                                       "pixdim": [1, 1, 2]})},
            "preprocessing: cwdm does not know what to make of this Spacingd",
        ),
        (
            {"postprocessing": compose({"_target_": "AsDiscreted", "keys": "pred",
                                        "threshold": 0.4})},
            "postprocessing: cwdm does not know what to make of this AsDiscreted",
        ),
        (
            {"postprocessing": compose({"_target_": "KeepLargestConnectedComponentd",
                                        "keys": "pred"})},
            "postprocessing: cwdm does not know what to make of this KeepLargest",
        ),
    ],
)  # fmt: skip
def test_a_bundle_that_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    spec = bundle(tmp_path / "bundle", segresnet(), **changes)
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        load(spec)


def test_weights_of_a_bundle_that_would_run_code_are_refused(tmp_path: Path) -> None:
    spec = bundle(tmp_path / "bundle", segresnet())
    torch.save(SimpleNamespace(), tmp_path / "bundle" / "models" / "model.pt")
    with pytest.raises(InputError, match=r"model.pt: holds more than tensors"):
        load(spec)


# Our own network, and the published cascade


@pytest.fixture
def own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> segnet.SegNet:
    """Random weights in the place of those that ship."""
    torch.manual_seed(1)
    net = segnet.SegNet(segnet.SegNetConfig(filters=8, down=(1, 1), up=(1,)))
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "segment-any.safetensors"
    segnet.save(net, path, overwrite=False)
    monkeypatch.setattr("cwdm.segmenters.resources.files", lambda package: tmp_path)
    return segnet.load(path)


@pytest.mark.parametrize("absent", [(), (T1N,), (T1N, T1C, T2W)])
def test_ours_takes_whatever_sequences_there_are(
    own_weights: segnet.SegNet, patient: Patient, absent: tuple[Modality, ...]
) -> None:
    case = patient("PIR").without(*absent)
    segmenter = load(precision="fp32")
    probabilities = segnet.segment(own_weights, canonical(case), precision="fp32")
    expected = segnet.labels_of(probabilities)
    assert len(np.unique(expected)) > 2
    assert (segmenter(case) == expected).all()
    assert segmenter.partial
    assert segmenter.channels == SEQUENCES


def test_ours_needs_at_least_one_sequence(own_weights: segnet.SegNet, patient: Patient) -> None:
    with pytest.raises(InputError, match="case x: has no t1n, t1c, t2w, t2f, which default needs"):
        load()(patient().without(*SEQUENCES))


class Cascade:
    """Stands in for the published one: the rule, on images as it is promised them."""

    @classmethod
    def load(cls, path: Path, device: str, precision: str) -> "Cascade":
        assert (device, precision) == ("cpu", "bf16")
        return cls()

    def __call__(self, images: Any, *, seed: int, progress: Any) -> NDArray[np.uint8]:
        assert seed == 7
        progress(9, 9)
        for image in images.values():
            assert image[0, 0, 0] == 0
        return from_regions(
            {
                region: images[modality] > 550
                for region, modality in ((Region.WT, T2F), (Region.TC, T1N), (Region.ET, T1C))
            }
        )


@pytest.mark.parametrize("spacing_mm", [1, 0.5, 2])
def test_the_cascade_gets_images_of_1_mm_in_canonical_orientation(
    tmp_path: Path,
    patient: Patient,
    truth: Any,
    monkeypatch: pytest.MonkeyPatch,
    spacing_mm: float,
) -> None:
    monkeypatch.setattr("cwdm.segmenters.MSNet", Cascade)
    (tmp_path / "x.npz").write_bytes(b"")
    segmenter = load(f"msnet:{tmp_path / 'x.npz'}", device="cpu", precision="bf16", seed=7)
    seen = []
    case = patient("LPS", affine=np.diag([spacing_mm, spacing_mm, spacing_mm, 1]))
    labels = segmenter(case, progress=lambda *counts: seen.append(counts))
    assert seen == [(9, 9)]
    if spacing_mm >= 1:
        assert (labels == truth).all()
    else:  # half the voxels cannot hold all
        assert dice(labels > 0, truth > 0) > 0.85
    with pytest.raises(InputError, match="has no t1n, which msnet:"):
        segmenter(case.without(T1N))


@pytest.mark.slow
def test_the_cascade_segments_a_real_case_as_published(shared: Path) -> None:
    case = read_case(shared / "data" / "val" / "Brats18_CBICA_AQN_1")
    labels = load(f"msnet:{shared / 'models' / 'brats17_msnet.npz'}")(case)
    assert case.segmentation is not None
    (like,) = read_volumes(case, [T2F]).values()
    expected = regions(brats_labels(read_labels(case.segmentation, like), case.segmentation))
    found = regions(labels)
    for region, published in ((Region.WT, 0.897), (Region.TC, 0.906), (Region.ET, 0.812)):
        assert dice(found[region], expected[region]) == pytest.approx(published, abs=0.03)


# Any program

PROGRAM = """
import sys
from pathlib import Path
import nibabel as nib
import numpy as np

t1n, t1c, t2f, output, number = sys.argv[1:]
images = {name: nib.load(path) for name, path in (("t1n", t1n), ("t1c", t1c), ("t2f", t2f))}
bright = {name: np.asanyarray(image.dataobj) > 550 for name, image in images.items()}
labels = np.where(bright["t2f"], 2, 0)
labels[bright["t1n"]] = 1
labels[bright["t1c"]] = int(number)
image = nib.Nifti1Image(labels.astype(np.uint8), images["t2f"].affine)
CHANGE
image.to_filename(output)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """Write a program that segments by the rule; returns how to start it."""

    def make(change: str = "", text: str = PROGRAM) -> str:
        path = tmp_path / "a program.py"
        path.write_text(text.replace("CHANGE", change))
        return f"command:{sys.executable} '{path}'"

    return make


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
@pytest.mark.parametrize("change", ["", "image = nib.as_closest_canonical(image)"])
def test_a_program_may_answer_in_any_orientation(
    program: Callable[..., str], patient: Patient, truth: Any, axes: str, change: str
) -> None:
    segmenter = load(program(change) + " {t1n} {t1c} {t2f} {output}/{id}.nii.gz 3")
    assert segmenter.channels == (T1N, T1C, T2F)
    assert (segmenter(patient(axes, affine=TURNED)) == truth).all()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_program_gets_a_folder_of_compressed_images(
    program: Callable[..., str], patient: Patient, truth: Any, ending: str
) -> None:
    case = patient(ending=ending)
    words = " {input}/{id}-t1n.nii.gz {input}/x-t1c.nii.gz {t2f} {output}.nii 4"
    segmenter = load(program() + words)
    assert segmenter.channels == SEQUENCES
    assert (segmenter(case) == truth).all()


def test_a_program_cannot_write_on_the_images(
    program: Callable[..., str], patient: Patient
) -> None:
    case = patient()
    before = {path: path.read_bytes() for path in case.images.values()}
    change = "Path(t2f).chmod(0o600); output = t2f  #"
    with pytest.raises(InputError, match="left none, expected one NIfTI file of labels"):
        load(program(change) + " {t1n} {t1c} {t2f} {output} 3")(case)
    assert {path: path.read_bytes() for path in case.images.values()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sys.exit()", "left none, expected one NIfTI file"),
        ("image.to_filename(Path(output).parent / 'b' / '2.nii')", "ended with exit code 1: .*No"),
        ("image.to_filename(Path(output).parent / '2.nii')", "left 2.nii, x.nii.gz, expected one"),
        ("print('no weights', file=sys.stderr); sys.exit(3)", "with exit code 3: no weights$"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV$"),
        ("print('a' * 5000); sys.exit(1)", r"exit code 1: \.\.\.a{400}$"),
        ("image = image.slicer[1:]", r"x-t1n.nii.gz and .*found shapes .*\(21, 20, 18\), expected"),
        ("image = nib.Nifti1Image(labels / 1, np.diag([-1, -1, 1.1, 1]))", "grids .* mm apart"),
        ("image = nib.Nifti1Image(np.full(labels.shape, 7, np.uint8), image.affine)", "labels 7,"),
        ("image = nib.Nifti1Image(labels / 2, image.affine)", "not whole numbers, expected labels"),
        ("Path(output).write_text('x'); sys.exit()", "x.nii.gz: not NIfTI data"),
    ],
)
def test_what_a_program_did_wrong_is_one_line(
    program: Callable[..., str], patient: Patient, change: str, message: str
) -> None:
    segmenter = load(program(change) + " {t1n} {t1c} {t2f} {output}/x.nii.gz 3")
    with pytest.raises(InputError, match=message) as error:
        segmenter(patient())
    assert str(error.value).startswith(f"{segmenter.spec}: ")


def is_running(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(listed.stdout.strip()) and not listed.stdout.startswith("Z")


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("pid", child.pid, flush=True)
time.sleep(60)
"""


def test_a_program_that_takes_too_long_is_killed_with_its_children(
    program: Callable[..., str], patient: Patient
) -> None:
    segmenter = load(program(text=PARENT) + " {input} {output}", timeout_s=2)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"took longer than 2 s: pid \d+$") as error:
        segmenter(patient())
    assert time.monotonic() - begin < 20
    pid = int(str(error.value).split()[-1])
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_program_that_nobody_wants_any_more_is_killed(patient: Patient) -> None:
    segmenter = load(
        f"command:{sys.executable} -c 'import time; time.sleep(60)' {{input}}{{output}}"
    )

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        segmenter(patient(), stop)
    assert time.monotonic() - began < 30


def test_nothing_of_a_command_is_left_to_a_shell(patient: Patient, tmp_path: Path) -> None:
    spec = f"command:echo {{input}} {{output}} ; touch {tmp_path}/made > {tmp_path}/made $HOME"
    with pytest.raises(InputError, match="left none, expected"):
        load(spec)(patient())
    assert not (tmp_path / "made").exists()


def test_the_digest_of_a_command_is_that_of_its_words() -> None:
    one = load("command:cat {input} {output}")
    assert one.sha256 == load("command:cat  '{input}' {output}").sha256
    assert one.sha256 != load("command:cat {output} {input}").sha256


def test_an_interrupted_program_is_killed(
    program: Callable[..., str], patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    wait = subprocess.Popen.wait

    def interrupted(process: Any, timeout: float | None = None) -> int:
        if not started:
            started.append(process.pid)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(program(text=PARENT) + " {input} {output}")(patient())
    assert not is_running(started[0])


# nnU-Net


def nnunet(folder: Path, **changes: Any) -> str:
    """Write a results folder whose network follows the rule, with other label numbers.

    In a network of two stages, the features of the first pass straight through: kernels are 1 in
    the middle, and what is 2.5 deviations above the mean of a window is bright.
    """
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    architecture = {
        "n_stages": 2,
        "features_per_stage": [3, 3],
        "kernel_sizes": [[3, 3, 3]] * 2,
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin_kwargs": {"inplace": True},
    }
    network = PlainConvUNet(
        3,
        num_classes=3,
        conv_op=nn.Conv3d,
        norm_op=nn.InstanceNorm3d,
        nonlin=nn.LeakyReLU,
        **architecture,
    )
    weights = network.state_dict()
    for key in weights:
        if key.endswith(("conv.weight", "seg_layers.0.weight")):
            weights[key].zero_()
    for channel in range(3):
        for key in weights:
            if key.startswith("encoder.stages.0") and key.endswith("conv.weight"):
                weights[key][channel, channel, 1, 1, 1] = 1
            elif key.startswith("decoder.stages.0") and key.endswith("conv.weight"):
                weights[key][channel, 3 + channel, 1, 1, 1] = 1  # what skips the second stage
    for output, channel in enumerate((0, 2, 1)):  # WT, TC, ET of t2f, t1c, t1n
        weights["decoder.seg_layers.0.weight"][output, channel] = 1
    weights["decoder.seg_layers.0.bias"].fill_(-2.5)
    intensities = dict.fromkeys(
        ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0
    )
    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [20, 20, 20],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 3,
        "use_mask_for_norm": [False] * 3,
        "architecture": {
            "network_class_name": f"{PlainConvUNet.__module__}.PlainConvUNet",
            "arch_kwargs": {
                **architecture,
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "nonlin": "torch.nn.LeakyReLU",
                "dropout_op": None,
                "dropout_op_kwargs": None,
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {
            "is_seg": kind == "seg",
            "order": 1,
            "order_z": 0,
            "force_separate_z": None,
        }
    plans = {
        "dataset_name": "Dataset137_BraTS",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): intensities for i in range(3)},
    }
    dataset = {
        "channel_names": {"0": "FLAIR", "1": "T1ce", "2": "T1"},
        "labels": NNUNET_REGIONS,
        "regions_class_order": [1, 2, 3],
        "numTraining": 1,
        "file_ending": ".nii.gz",
        **changes,
    }
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": weights,
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return f"nnunet:{folder}"


def test_nnunet_gives_labels_of_brats(
    tmp_path: Path, patient: Patient, truth: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nnunetv2")
    segmenter = load(nnunet(tmp_path / "results"), device="cpu")
    assert segmenter.channels == (T2F, T1C, T1N)
    assert (segmenter(patient("PIR", ending="")) == truth).all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
def test_nnunet_sees_images_as_brats_stores_them(
    tmp_path: Path, patient: Patient, axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nnunetv2")
    segmenter = load(nnunet(tmp_path / "results"), device="cpu")
    seen = []

    def look(
        self: Any, case_id: str, images: dict[Modality, Path], output: Path, progress: Any
    ) -> None:
        seen.append(nib.Nifti1Image.from_bytes(decompress(images[T2F].read_bytes())))
        zeros = nib.Nifti1Image(np.zeros(seen[0].shape, np.uint8), seen[0].affine)
        zeros.to_filename(output / "x.nii.gz")

    monkeypatch.setattr(type(segmenter), "run", look)
    case = patient(axes)
    segmenter(case)
    assert nib.aff2axcodes(seen[0].affine) == ("L", "P", "S")
    turned = canonical(case)[T2F][::-1, ::-1]
    assert np.array_equal(seen[0].get_fdata(), turned)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (NNUNET_REGIONS, {0: 0, 1: 2, 2: 1, 3: 3}),
        (
            {"background": 0, "whole_tumour": [1, 2, 4], "TC": [1, 4], "ET": 4, "ignore": 5},
            {0: 0, 1: 1, 2: 2, 4: 3},
        ),
        (
            {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3},
            {0: 0, 1: 2, 2: 1, 3: 3},
        ),
        ({"background": 0, "NCR": 1, "ED": 2, "ET": 3}, {0: 0, 1: 1, 2: 2, 3: 3}),
        (
            {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
            {0: 0, 1: 2, 2: 1, 3: 3},
        ),
    ],
)
def test_label_numbers_of_nnunet_follow_from_their_names(labels: Any, numbers: Any) -> None:
    assert brats_numbers(labels, Path("x")) == numbers


@pytest.mark.parametrize(
    "labels",
    [
        None,
        ["background"],
        {"background": 0, "tumor": 1},
        {"background": 1, "NCR": 0, "ED": 2, "ET": 3},
        {"background": 0, "NCR": 1, "ED": 2, "ET": 3, "RC": 4},
        {"background": 0, "NCR": "one", "ED": 2, "ET": 3},
        {"background": 0, "NCR": [1, 4], "ED": 2, "ET": 3},
        {"background": 0, "whole tumor": [1, 2], "tumor core": [2, 3], "enhancing tumor": [3]},
        {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3]},
    ],
)
def test_labels_of_nnunet_that_are_not_understood_are_refused(tmp_path: Path, labels: Any) -> None:
    dataset = {"channel_names": {"0": "T1"}, "labels": labels}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(InputError, match=r"dataset.json: labels are .*, expected background, and"):
        load(f"nnunet:{tmp_path}")


def test_a_results_folder_of_nnunet_has_to_be_complete(tmp_path: Path) -> None:
    for channels, message in (
        ({"0": "T1", "1": "CT"}, "channel_names are T1, CT, expected MRI sequences"),
        ({}, "channel_names are absent, expected MRI sequences"),
        ({"0": "T1"}, r"no fold_\*/checkpoint_final.pth in it"),
    ):
        dataset = {"channel_names": channels, "labels": NNUNET_REGIONS}
        (tmp_path / "dataset.json").write_text(json.dumps(dataset))
        with pytest.raises(InputError, match=message):
            load(f"nnunet:{tmp_path}")


# The containers of BraTS


class Container:
    """Stands in for a class of `brats`, with its calls."""

    answer = ""

    def __init__(
        self,
        algorithm: Any = SimpleNamespace(name="BraTS23_1"),  # noqa: B008
        cuda_devices: str = "0",
        force_cpu: bool = False,
    ):
        self.chosen = (algorithm.name, cuda_devices, force_cpu)
        self.algorithm = SimpleNamespace(run_args=SimpleNamespace(docker_image=algorithm.name))

    def infer_single(
        self, t1c: Path, t1n: Path, t2f: Path, t2w: Path, output_file: Path, backend: Any
    ) -> None:
        from brats.utils.exceptions import BraTSContainerException

        print("a table of citations")
        if self.answer == "failure":
            raise BraTSContainerException("Container finished with an error")
        images: list[Any] = [nib.load(path) for path in (t1c, t1n, t2f)]
        enhancing = 4 if self.answer == "cavity" else 3
        labels = np.select([image.get_fdata() > 550 for image in images], [enhancing, 1, 2])
        assert t2w.name == "x-t2w.nii.gz"
        nib.Nifti1Image(labels.astype(np.uint8), images[0].affine).to_filename(output_file)


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> type[Container]:
    brats = pytest.importorskip("brats")
    monkeypatch.setattr(brats, "AdultGliomaPreTreatmentSegmenter", Container)
    monkeypatch.setattr("brats.core.docker.client", object())
    monkeypatch.setattr(Container, "answer", "")
    return Container


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [
        ("adult-glioma", "auto", ("BraTS23_1", "0", False)),
        ("adult-glioma/BraTS23_3", "cpu", ("BraTS23_3", "0", True)),
        ("adult-glioma", "cuda:2", ("BraTS23_1", "2", False)),
    ],
)
def test_a_container_of_brats_gets_the_four_sequences(
    container: type[Container],
    patient: Patient,
    truth: Any,
    capfd: pytest.CaptureFixture[str],
    name: str,
    device: str,
    chosen: tuple[str, str, bool],
) -> None:
    segmenter = load(f"brats:{name}", device=device)
    assert isinstance(segmenter, external.Brats)
    assert segmenter.segmenter.chosen == chosen
    assert (segmenter(patient("PIR")) == truth).all()
    assert capfd.readouterr() == ("", "")


def test_what_a_container_of_brats_did_wrong_is_one_line(
    container: type[Container], patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, case = load("brats:adult-glioma"), patient()
    for answer, message in (
        ("failure", "^brats:adult-glioma: Container finished with an error$"),
        ("cavity", "^brats:adult-glioma: found label 4, expected those of BraTS 2023: 0 to 3$"),
    ):
        monkeypatch.setattr(Container, "answer", answer)
        with pytest.raises(InputError, match=message):
            segmenter(case)


def test_the_tasks_of_brats_are_those_that_the_package_has() -> None:
    brats = pytest.importorskip("brats")
    for name in external.BRATS.values():
        assert hasattr(brats, f"{name}Segmenter")
        assert hasattr(brats.constants, f"{name}Algorithms")


def test_brats_needs_docker_and_a_known_algorithm(
    container: type[Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no such algorithm, expected one of BraTS23_1, BraTS23_2"):
        load("brats:adult-glioma/BraTS22_1")
    monkeypatch.setattr("brats.core.docker.client", None)
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(InputError, match="brats:adult-glioma: Docker does not answer"):
        load("brats:adult-glioma")


# --- after synthesis


@pytest.mark.parametrize("kind", ["bundle", "onnx", "torchscript", "command"])
def test_a_completed_case_is_segmented_by_every_kind(
    kind: str,
    patient: Patient,
    truth: Any,
    any_model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The rule does not look at t2w, so that a synthetic one must not change a thing."""
    case = patient("LPS")
    case.images[T2W].unlink()
    if kind == "bundle":
        spec = bundle(tmp_path / "bundle", convolution(), network_def=CONVOLUTION)
    elif kind == "onnx":
        spec = request.getfixturevalue("onnx")
    elif kind == "torchscript":
        spec = request.getfixturevalue("script")()
    else:
        spec = request.getfixturevalue("program")() + " {t1n} {t1c} {t2f} {output}/{id}.nii.gz 3"
    table = segment(
        case.images[T1N].parent,
        tmp_path / "out",
        model=spec,
        impute_missing=Imputation(model=any_model, precision="fp32"),
        precision="fp32",
    )
    assert list(table["state"]) == ["done"]
    like = read_volumes(case, [T1N])[T1N]
    assert (read_labels(tmp_path / "out" / "x-seg.nii.gz", like) == truth).all()
    record = json.loads((tmp_path / "out" / "x-seg.json").read_text())
    assert record["synthetic_inputs"] == (["t2w"] if kind == "bundle" else [])
