"""The segmentation network: its file, its regions, its loss, and what the shipped one can do."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from cwdm.anatomy import CHANNELS, Anatomy, mni152
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import Box
from cwdm.segnet import (
    REGIONS,
    SegNet,
    SegNetConfig,
    labels_of,
    load,
    normalize,
    region_loss,
    regions_of,
    save,
    segment,
)
from cwdm.simulate import SimulatedCase, simulate, write_case

SHIPPED = Path(str(resources.files("cwdm") / "weights" / "segment-any.safetensors"))
SMALL = SegNetConfig(filters=8, down=(1, 1), up=(1,), window=32)
SHAPE = (44, 52, 44)
"""Of simulated cases at 4 mm."""


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """A ball: fluid around cortex around white matter."""
    grid = np.indices((90, 100, 80), np.float32) - np.array([45, 50, 40])[:, None, None, None]
    radius = 2 * np.sqrt((grid**2).sum(0))
    shells = [
        (radius < 72) & (radius >= 68),
        (radius < 68) & (radius >= 58),
        radius < 0,
        radius < 58,
    ]
    assert len(shells) == len(CHANNELS)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -90, -100, -80
    return Anatomy(torch.from_numpy(np.stack(shells).astype(np.float32)), affine)


@pytest.fixture(scope="module")
def case(anatomy: Anatomy) -> SimulatedCase:
    return simulate(3, 0, anatomy, shape=SHAPE, spacing=4)


@pytest.fixture
def net() -> SegNet:
    torch.manual_seed(0)
    return SegNet(SMALL).eval()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "train_segmenter.py"
    spec = importlib.util.spec_from_file_location("train_segmenter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_segmenter"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def arrays(case: SimulatedCase) -> dict[Modality, NDArray[np.int16]]:
    return {modality: image.numpy() for modality, image in case.images.items()}


def dice(found: NDArray, truth: NDArray) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


# The network and its file


def test_logits_have_the_shape_of_the_images(net: SegNet) -> None:
    assert net.multiple == 4
    assert net(torch.randn(2, 4, 8, 12, 16)).shape == (2, len(REGIONS), 8, 12, 16)


def test_any_multiple_of_the_standard_network_will_do() -> None:
    standard = SegNet(SegNetConfig())
    assert standard.multiple == 16
    assert standard(torch.randn(1, 4, 16, 32, 48)).shape == (1, 3, 16, 32, 48)
    assert 1e6 < sum(weight.numel() for weight in standard.parameters()) < 3e6


def test_what_is_saved_is_loaded_in_half_precision(net: SegNet, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(net, path, overwrite=False)
    loaded = load(path)
    assert loaded.config == net.config
    for name, weight in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())
    x = torch.randn(1, 4, 8, 8, 8)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=5e-3)
    with pytest.raises(InputError, match="already exists"):
        save(net, path, overwrite=False)


def _other_format(path: Path, net: SegNet) -> None:
    save_file(net.state_dict(), path, {"format": "cwdm-model-1"})


def _no_configuration(path: Path, net: SegNet) -> None:
    save_file(net.state_dict(), path, {"format": "cwdm-segnet-1"})


def _damaged_configuration(path: Path, net: SegNet) -> None:
    config = json.dumps({"filters": "many"})
    save_file(net.state_dict(), path, {"format": "cwdm-segnet-1", "config": config})


def _impossible_configuration(path: Path, net: SegNet) -> None:
    config = json.dumps({"filters": 12, "groups": 8})
    save_file(net.state_dict(), path, {"format": "cwdm-segnet-1", "config": config})


def _weights_of_another(path: Path, net: SegNet) -> None:
    config = json.dumps({"filters": 8})
    save_file(net.state_dict(), path, {"format": "cwdm-segnet-1", "config": config})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, net: None, "no such file"),
        (lambda path, net: path.write_bytes(b"no tensors"), "not a readable safetensors file"),
        (_other_format, "format 'cwdm-model-1', expected 'cwdm-segnet-1'"),
        (_no_configuration, "metadata are damaged"),
        (_damaged_configuration, "metadata are damaged"),
        (_impossible_configuration, "metadata are damaged"),
        (_weights_of_another, "weights do not fit"),
    ],
)
def test_another_file_is_refused(
    write: Callable[[Path, SegNet], None], message: str, net: SegNet, tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    write(path, net)
    with pytest.raises(InputError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


# Regions, labels and loss


def test_labels_and_regions_are_the_same_thing() -> None:
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (1, 5, 6, 7)))
    assert np.array_equal(labels_of(regions_of(labels)[0].numpy()), labels[0].numpy())


def test_regions_lie_inside_each_other() -> None:
    whole, core, enhancing = np.meshgrid(*3 * [[0.4, 0.6]], indexing="ij")
    labels = labels_of(np.stack([whole, core, enhancing]))
    assert labels[1, 1, 1] == 3  # all three
    assert labels[1, 1, 0] == 1  # not enhancing
    assert (labels[1, 0] == 2).all()  # no core, whatever is said of enhancement
    assert (labels[0] == 0).all()  # no tumor, whatever is said of its parts


def test_loss_without_a_clue_in_closed_form() -> None:
    labels = torch.tensor([0, 0, 0, 2, 2, 1, 3, 3]).view(1, 2, 2, 2)
    n, sizes = 8, (5, 3, 2)
    overlap = [(2 * size / 2 + 1) / (n / 2 + size + 1) for size in sizes]  # p = 1/2 everywhere
    expected = math.log(2) + 1 - sum(overlap) / 3
    assert region_loss(torch.zeros(1, 3, 2, 2, 2), labels).item() == pytest.approx(expected)


def test_loss_of_the_truth_is_zero() -> None:
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (2, 6, 6, 6)))
    logits = 40 * (2 * regions_of(labels) - 1)
    assert region_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)
    assert region_loss(-logits, labels).item() > 10


# One case, in and out


def test_normalized_images_do_not_depend_on_gain_and_offset(case: SimulatedCase) -> None:
    images = arrays(case)
    brain = images[Modality.T1N] > 0
    once, _ = normalize(images, brain)
    other = {m: (i + 1) * 0.3 * image + 50 * i for i, (m, image) in enumerate(images.items())}
    again, _ = normalize(other, brain)
    torch.testing.assert_close(again, once, rtol=0, atol=1e-4)


def test_normalized_images_are_standardized_in_the_brain_and_zero_elsewhere(
    case: SimulatedCase,
) -> None:
    images = arrays(case)
    del images[Modality.T1C]
    normalized, box = normalize(images)
    assert normalized.shape == (4, *box.size)
    brain = box.crop(images[Modality.T2W] > 0)
    assert brain.sum() == (images[Modality.T2W] > 0).sum()
    inside = normalized.numpy()[:, brain]
    assert (normalized.numpy()[:, ~brain] == 0).all()
    given = [i for i, modality in enumerate(SEQUENCES) if modality in images]
    np.testing.assert_allclose(inside[given].mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(inside[given].std(1), 1, atol=1e-5)
    assert not inside[SEQUENCES.index(Modality.T1C)].any()


def test_nothing_to_segment_is_an_error() -> None:
    with pytest.raises(InputError, match="no image to segment, expected any of t1n"):
        normalize({Modality.CT: np.ones((4, 4, 4))})
    with pytest.raises(InputError, match="0 everywhere"):
        normalize({Modality.T1N: np.zeros((4, 4, 4))})


def test_probabilities_lie_where_the_brain_is(net: SegNet, case: SimulatedCase) -> None:
    images = arrays(case)
    probabilities = segment(net, images, precision="fp32")
    assert probabilities.shape == (3, *SHAPE)
    brain = images[Modality.T1N] > 0
    assert (probabilities[:, ~brain] == 0).all()
    assert ((probabilities[:, brain] > 0) & (probabilities[:, brain] < 1)).all()

    moved = {m: np.roll(np.pad(image, 6), (3, -2, 1), (0, 1, 2)) for m, image in images.items()}
    again = segment(net, moved, precision="fp32")
    back = np.roll(again, (-3, 2, -1), (1, 2, 3))[:, 6:-6, 6:-6, 6:-6]
    np.testing.assert_allclose(back, probabilities, atol=1e-5)


# Training


def test_training_on_one_case_makes_the_loss_fall(case: SimulatedCase) -> None:
    torch.manual_seed(0)
    net = SegNet(SMALL)
    normalized, box = normalize(arrays(case))
    segmentation = box.crop(case.segmentation.numpy())
    block = Box.centred(segmentation > 0, 3 * [SMALL.window])
    image = torch.from_numpy(np.stack([block.crop(channel) for channel in normalized.numpy()]))
    labels = torch.from_numpy(block.crop(segmentation))[None]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = region_loss(net(image[None]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    whole = labels_of(segment(net.eval(), arrays(case), precision="fp32")) > 0
    assert dice(whole, case.segmentation.numpy() > 0) > 0.6


def test_every_subset_is_drawn_and_never_none(example: ModuleType) -> None:
    rng = np.random.default_rng(0)
    drawn = [example.drop([0, 1, 2, 3], rng) for _ in range(3000)]
    assert len(set(drawn)) == 15
    share = drawn.count((0, 1, 2, 3)) / len(drawn)
    assert share == pytest.approx(0.3 + 0.7 / 15, abs=0.04)
    assert set(example.drop([2], rng) for _ in range(20)) == {(2,)}


def test_a_patch_shows_images_and_labels_of_the_same_place(
    example: ModuleType, case: SimulatedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "DISTORTED", 0)
    images = arrays(case)
    brain = images[Modality.T1N] > 0
    marked: dict[Modality, NDArray] = {m: case.segmentation.numpy() + brain for m in images}
    rng = np.random.default_rng(1)
    whole = example.Example.of(marked, case.segmentation.numpy(), brain, rng)
    for _ in range(8):
        seen, labels = example.patch(whole, 24, rng)
        assert seen.shape == (4, 24, 24, 24)
        assert labels.shape == (24, 24, 24)
        (kept, *_) = [image for image in seen if image.any()]
        levels = [kept[(labels == label) & (kept != 0)] for label in labels.unique()]
        levels = [level for level in levels if level.numel()]
        assert all(level.std(correction=0) < 1e-3 * kept.std() for level in levels)


def test_the_example_trains_and_measures(
    example: ModuleType, anatomy: Anatomy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "mni152", lambda: anatomy)
    real = simulate(4, 1, anatomy, shape=SHAPE, spacing=4)
    former = torch.where(real.segmentation == 3, 4, real.segmentation).to(torch.uint8)
    write_case(replace(real, segmentation=former), tmp_path / "train")
    held_out = simulate(4, 2, anatomy, shape=SHAPE, spacing=4)
    write_case(held_out, tmp_path / "val")
    output = tmp_path / "net.safetensors"
    command = ["--steps", "2", "--patch", "32", "--filters", "8", "--spacing", "4"]
    command += ["--simulated", "1", "--data", str(tmp_path / "train"), "--output", str(output)]
    result = CliRunner().invoke(example.main, [*command, "--val", str(tmp_path / "val")])
    assert result.exit_code == 0, result.output
    assert load(output).config.filters == 8
    rows = [line for line in result.output.splitlines() if line.startswith("| t")]
    assert len(rows) == 15

    (read,) = example.read(tmp_path / "train")
    assert np.array_equal(read.labels, real.segmentation.numpy())

    again = [*command, "--overwrite", "--val", str(tmp_path / "train")]
    result = CliRunner().invoke(example.main, again)
    assert result.exit_code == 1
    assert f"holds {real.id}, which is also in --data" in result.output


# The network that ships


def test_the_shipped_network_is_small() -> None:
    assert SHIPPED.stat().st_size < 6e6
    assert {weight.dtype for weight in load_file(SHIPPED).values()} == {torch.float16}
    assert load(SHIPPED).multiple == 16


@pytest.fixture(scope="module")
def average_brain() -> SimulatedCase:
    """A case at 1 mm from an anatomy that the network was not trained on."""
    return simulate(11, 0, mni152())


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [SEQUENCES, (Modality.T2F,), (Modality.T1N, Modality.T1C)], ids="+".join
)
def test_the_shipped_network_beats_every_threshold(
    given: tuple[Modality, ...], average_brain: SimulatedCase
) -> None:
    """Even the one that knows the truth."""
    truth = average_brain.segmentation.numpy() > 0
    images = {modality: arrays(average_brain)[modality] for modality in given}
    floor = 0.0
    for image in images.values():
        brain = image > 0
        for threshold in np.quantile(image[brain], np.linspace(0.01, 0.99, 50)):
            floor = max(floor, dice(image > threshold, truth))
            floor = max(floor, dice(brain & (image < threshold), truth))
    whole = labels_of(segment(load(SHIPPED), images)) > 0
    assert dice(whole, truth) > floor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (SEQUENCES, (0.844, 0.846, 0.695)),
        ((Modality.T1N, Modality.T1C), (0.561, 0.671, 0.516)),
        ((Modality.T2F,), (0.862, 0.674, 0.334)),
    ],
    ids=["all", "t1n+t1c", "t2f"],
)
def test_a_real_case_is_segmented_as_well_as_the_card_says(
    given: tuple[Modality, ...],
    expected: tuple[float, float, float],
    example: ModuleType,
    shared: Path,
) -> None:
    (case,) = example.read(shared / "data" / "val")
    scores = example.dice(load(SHIPPED), case, kept=given)
    assert np.greater(scores, np.array(expected) - 0.05).all(), scores
