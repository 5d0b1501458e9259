"""MSNet against the same network written in numpy, against known geometry, and on a real case."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cwdm import msnet
from cwdm.case import read_case
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES, Modality
from cwdm.msnet import CHANNELS, MSNet, Network, tensor_shapes
from cwdm.segmentation import Region, brats_labels, dice, regions
from cwdm.volume import read_labels, read_volumes

Array = NDArray[np.floating[Any]]
Arrays = dict[str, Array]

NAMES = {Region.WT: "wt", Region.TC: "tc", Region.ET: "en"}
VIEWS = ("ax", "sg", "cr")


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Random weights of all nine networks."""
    rng = np.random.default_rng(0)
    result: Arrays = {}
    for region, name in NAMES.items():
        for view in VIEWS:
            for key, shape in tensor_shapes(region).items():
                values = rng.standard_normal(shape).astype(np.float32)
                if key.endswith("/w"):
                    values /= np.float32(np.sqrt(np.prod(shape[:3]) * 32))
                elif not key.endswith("beta"):
                    values = 0.5 + 0.2 * values
                result[f"{name}_{view}/{key}"] = values
    return result


@pytest.fixture(scope="module")
def model(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> MSNet:
    path = tmp_path_factory.mktemp("msnet") / "weights.npz"
    np.savez(path, allow_pickle=False, **arrays)
    return MSNet.load(path, precision="fp32")


class Reference:
    """The published network in numpy: float64, (B, slices, rows, columns, channels)."""

    def __init__(self, weights: Mapping[str, Array]):
        self.weights = {key: value.astype(np.float64) for key, value in weights.items()}

    def __call__(self, x: Array) -> Array:
        twice = "pred1/w" not in self.weights
        x = self.fuse("fuse1", self.block("1_2", self.block("1_1", x)))
        if twice:
            x = self.down("downsample1", x)
        a = self.fuse("fuse2", self.block("2_2", self.block("2_1", x)))
        x = self.down("downsample2", a)
        for name, dilation in (("3_1", 1), ("3_2", 2), ("3_3", 3)):
            x = self.block(name, x, dilation)
        b = x = self.fuse("fuse3", x)
        for name, dilation in (("4_1", 3), ("4_2", 2), ("4_3", 1)):
            x = self.block(name, x, dilation)
        c = self.up("pred_up3_1", self.fuse("fuse4", x))
        b = self.up("pred_up2_1", b[:, 1:-1])
        if twice:
            a = self.up("pred_up1", a[:, 2:-2])
            b, c = self.up("pred_up2_2", b), self.up("pred_up3_2", c)
        else:
            a = conv(a[:, 2:-2], self.weights["pred1/w"])
        scores = conv(np.concatenate([a, b, c], -1), self.weights["final_pred/w"])
        return np.asarray(1 / (1 + np.exp(scores[..., 0] - scores[..., 1])))

    def block(self, name: str, x: Array, dilation: int = 1) -> Array:
        y = x
        for i in ("0", "1"):
            y = self.activate(f"block{name}/bn_{i}", f"block{name}/prelu_acti_{i}", y)
            y = conv(y, self.weights[f"block{name}/conv_{i}/w"], dilation)
        if x.shape[-1] == 4:
            x = np.pad(x, [(0, 0)] * 4 + [(14, 14)])
        return y + x

    def fuse(self, layer: str, x: Array) -> Array:
        w = self.weights[f"{layer}_bn_prelu/conv_/w"]
        x = sum(x[:, k : x.shape[1] - 2 + k] @ w[k, 0, 0] for k in range(3))
        return self.activated(layer, x)

    def down(self, layer: str, x: Array) -> Array:
        w = self.weights[f"{layer}_bn_prelu/conv_/w"]
        x = np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)])
        rows, columns = (range(0, side - 2, 2) for side in x.shape[2:4])
        y = [[np.einsum("bdhwi,hwio->bdo", x[:, :, r : r + 3, c : c + 3], w[0])
              for c in columns] for r in rows]  # fmt: skip
        return self.activated(layer, np.moveaxis(np.array(y), (0, 1), (2, 3)))

    def up(self, layer: str, x: Array) -> Array:
        w = self.weights[f"{layer}_bn_prelu/deconv_/w"]
        batch, depth, height, width, _ = x.shape
        y = np.zeros((batch, depth, 2 * height + 1, 2 * width + 1, w.shape[3]))
        for r in range(height):
            for c in range(width):
                y[:, :, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3] += np.einsum(
                    "bdi,hwoi->bdhwo", x[:, :, r, c], w[0]
                )
        return self.activated(layer, y[:, :, :-1, :-1])

    def activated(self, layer: str, x: Array) -> Array:
        return self.activate(f"{layer}_bn_prelu/bn_", f"{layer}_bn_prelu/prelu_acti_", x)

    def activate(self, norm: str, prelu: str, x: Array) -> Array:
        axes = (0, 1, 2, 3)
        x = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
        x = x * self.weights[f"{norm}/gamma"] + self.weights[f"{norm}/beta"]
        return np.asarray(np.where(x > 0, x, self.weights[f"{prelu}/alpha"] * x))


def conv(x: Array, w: Array, dilation: int = 1) -> Array:
    """1 x 3 x 3, same size, kernel (1, 3, 3, in, out)."""
    height, width = x.shape[2:4]
    x = np.pad(x, [(0, 0), (0, 0), (dilation, dilation), (dilation, dilation), (0, 0)])
    rows, columns = ([slice(k * dilation, k * dilation + n) for k in range(3)]
                     for n in (height, width))  # fmt: skip
    return np.asarray(
        sum(x[:, :, rows[r], columns[c]] @ w[0, r, c] for r in range(3) for c in range(3))
    )


@pytest.mark.parametrize(
    ("region", "view"), [(Region.WT, "sg"), (Region.TC, "cr"), (Region.ET, "ax")]
)
def test_a_network_equals_the_one_in_numpy(
    region: Region, view: str, arrays: Arrays, model: MSNet
) -> None:
    prefix = f"{NAMES[region]}_{view}/"
    own = {key.removeprefix(prefix): w for key, w in arrays.items() if key.startswith(prefix)}
    slabs = torch.randn(2, 4, 19, 12, 16, generator=torch.Generator().manual_seed(1))
    expected = Reference(own)(slabs.permute(0, 2, 3, 4, 1).double().numpy())
    with torch.inference_mode():
        found = model.networks[region, view](slabs)
    assert found.shape == (2, 11, 12, 16)
    assert expected.std() > 0.05
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_work_in_parts_changes_nothing(model: MSNet, monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = torch.randn(1, 4, 19, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model.networks[Region.WT, "ax"](slabs)
        monkeypatch.setattr(msnet, "_PIXELS", 3 * 256)
        torch.testing.assert_close(model.networks[Region.WT, "ax"](slabs), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalization_takes_the_statistics_of_the_batch(dtype: torch.dtype) -> None:
    gamma, beta, alpha = (
        torch.tensor([2.0, 0.5]),
        torch.tensor([-1.0, 0.3]),
        torch.tensor([0.1, 0.5]),
    )
    network = Network({"x/bn_0/gamma": gamma, "x/bn_0/beta": beta, "x/prelu_acti_0/alpha": alpha})
    x = (torch.randn(6, 2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 20).to(dtype)
    exact = functional.batch_norm(
        x.double(), None, None, gamma.double(), beta.double(), training=True
    )
    expected = functional.prelu(exact, alpha.double())
    found = network._activation("x", "0", x)(x)
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_bf16_changes_probabilities_little(arrays: Arrays, model: MSNet, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", allow_pickle=False, **arrays)
    rough = MSNet.load(tmp_path / "w.npz", precision="bf16").networks[Region.ET, "ax"]
    slabs = torch.randn(2, 4, 19, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        exact = model.networks[Region.ET, "ax"](slabs)
        difference = (rough(slabs.bfloat16()) - exact).abs()
    assert 0 < difference.mean() < 0.01


class Threshold:
    """Stands for a network: certain wherever one of its channels is above a limit."""

    def __init__(self, channel: Modality, limit: float):
        self.channel, self.limit = CHANNELS.index(channel), limit
        self.weights = {"final_pred/w": torch.zeros(())}
        self.slabs: list[Tensor] = []

    def __call__(self, slabs: Tensor) -> Tensor:
        self.slabs.append(slabs)
        return (slabs[:, self.channel, 4:-4] > self.limit).float()


def box_in(
    shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]
) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


SHAPE = (40, 52, 61)
BRAIN = box_in(SHAPE, (3, 4, 0), (38, 50, 61))
NESTED = {
    Region.WT: box_in(SHAPE, (5, 20, 8), (20, 36, 23)),
    Region.TC: box_in(SHAPE, (8, 22, 10), (19, 34, 21)),
    Region.ET: box_in(SHAPE, (9, 28, 12), (17, 33, 18)),
}
SHOWN = {Region.WT: Modality.T2F, Region.TC: Modality.T1C, Region.ET: Modality.T2W}


@pytest.fixture
def bright() -> dict[Modality, NDArray[np.float32]]:
    """Four images (X, Y, Z) of a brain; in three of them one region is 100 times as bright.

    After standardization it is above 4, which the rest of the brain is not.
    """
    images = {modality: BRAIN.astype(np.float32) for modality in SEQUENCES}
    for region, mask in NESTED.items():
        images[SHOWN[region]] += 99 * mask
    return images


def test_each_voxel_gets_the_label_of_its_place(bright: Mapping[Modality, Any]) -> None:
    networks: Any = {(region, view): Threshold(SHOWN[region], 4)
                     for region in Region for view in VIEWS}  # fmt: skip
    calls: list[tuple[int, int]] = []
    labels = MSNet(networks, torch.device("cpu"))(
        bright, progress=lambda done, total: calls.append((done, total))
    )
    found = regions(labels)
    for region, mask in NESTED.items():
        assert np.array_equal(found[region], mask), region
    assert labels.dtype == np.uint8
    assert calls == [(done, 9) for done in range(1, 10)]


def test_networks_see_slabs_in_the_axes_of_the_published_files(
    bright: Mapping[Modality, Any],
) -> None:
    networks: Any = {(region, view): Threshold(SHOWN[region], 4)
                     for region in Region for view in VIEWS}  # fmt: skip
    MSNet(networks, torch.device("cpu"))(bright)
    # columns run from right to left, rows from front to back; the box is the brain plus 5 voxels
    slabs = networks[Region.WT, "ax"].slabs
    assert [len(batch) for batch in slabs] == [3, 3]
    assert slabs[0].shape == (3, 4, 19, 180, 160)
    whole = torch.cat(slabs)[:, 0, 4:-4].flatten(0, 1)[:61] > 4
    region, brain = (mask.transpose(2, 1, 0)[:, ::-1, ::-1] for mask in (NESTED[Region.WT], BRAIN))
    rows, columns = (180 - 52) // 2, (160 - 40) // 2
    inside = whole[:, rows : rows + 52, columns : columns + 40].numpy()
    assert np.array_equal(inside & brain, region)
    assert networks[Region.WT, "cr"].slabs[0].shape[2:] == (19, 160, 160)
    assert networks[Region.ET, "sg"].slabs[0].shape[2:] == (19, 96, 96)


def test_the_search_ends_where_nothing_is_found(bright: Mapping[Modality, Any]) -> None:
    networks: Any = {(region, view): Threshold(Modality.T2F, 1e9)
                     for region in Region for view in VIEWS}  # fmt: skip
    assert not MSNet(networks, torch.device("cpu"))(bright).any()
    assert not networks[Region.TC, "ax"].slabs


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msnet, "_WINDOWS", dict.fromkeys(VIEWS, (16, 16)))
    monkeypatch.setattr(msnet, "_WINDOW", (16, 16))


@pytest.mark.usefixtures("small_windows")
def test_random_weights_run_and_depend_on_the_seed_only(
    model: MSNet, ball: Callable[..., NDArray[np.float64]]
) -> None:
    image = ball((18, 22, 13)).astype(np.float32)
    images = dict.fromkeys(SEQUENCES, image) | {Modality.T1C: np.zeros_like(image)}
    labels = model(images, seed=3)
    assert labels.shape == image.shape
    assert labels.any()
    assert not labels[image == 0].any()
    assert np.array_equal(model(images, seed=3), labels)
    assert not np.array_equal(model(images, seed=4), labels)


def test_no_brain_has_no_labels(model: MSNet) -> None:
    empty = np.zeros((9, 8, 7), np.float32)
    assert not model(dict.fromkeys(SEQUENCES, empty)).any()


def test_brains_are_standardized_and_backgrounds_are_noise() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(50, 900, (2, 20, 20, 20)).astype(np.float32)
    images[:, :8] = 0
    images[1] = 0
    result = msnet._standardize(images, torch.Generator().manual_seed(0))
    assert result[0, 8:].mean() == pytest.approx(0, abs=1e-5)
    assert result[0, 8:].std() == pytest.approx(1, abs=1e-5)
    for background in (result[0, :8], result[1]):
        assert background.mean() == pytest.approx(0, abs=0.06)
        assert background.std() == pytest.approx(1, abs=0.06)


def test_specks_go_and_large_components_stay() -> None:
    large, second = box_in(SHAPE, (0, 0, 0), (10, 10, 10)), box_in(SHAPE, (20, 0, 0), (30, 5, 4))
    speck = box_in(SHAPE, (0, 30, 0), (3, 33, 11))
    assert np.array_equal(msnet._without_specks(large | second | speck), large | second)
    assert not msnet._without_specks(np.zeros(SHAPE, bool)).any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "no such file"),
        ({"wt_ax/block3_1/conv_1/w": None}, "wt_ax/block3_1/conv_1/w: found nothing"),
        (
            {"en_cr/pred1/w": np.zeros((3, 3), np.float32)},
            "found shape (3, 3), expected shape (1, 3, 3",
        ),
        ({"tc_sg/fuse1_bn_prelu/bn_/beta": np.array([{}])}, "not a readable npz file"),
    ],
)
def test_damaged_weights_are_named(
    damage: dict[str, Any] | None, message: str, arrays: Arrays, tmp_path: Path
) -> None:
    path = tmp_path / "weights.npz"
    if damage is not None:
        kept: Any = {key: w for key, w in (arrays | damage).items() if w is not None}
        np.savez(path, **kept)
    with pytest.raises(InputError) as caught:
        MSNet.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no weights at all"])
def test_what_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable npz file"):
        MSNet.load(path)


@pytest.mark.slow
def test_a_real_case_reaches_the_known_dice(shared: Path) -> None:
    weights = shared / "models" / "brats17_msnet.npz"
    if not weights.exists():
        pytest.skip("no weights")
    case = read_case(shared / "data" / "val" / "Brats18_CBICA_AQN_1")
    volumes = read_volumes(case, SEQUENCES)
    assert case.segmentation is not None
    truth = regions(
        brats_labels(read_labels(case.segmentation, volumes[Modality.T1N]), case.segmentation)
    )
    labels = MSNet.load(weights)({modality: v.voxels for modality, v in volumes.items()})
    found = regions(labels)
    # what an independent implementation reaches
    for region, expected in {Region.WT: 0.897, Region.TC: 0.906, Region.ET: 0.812}.items():
        assert dice(found[region], truth[region]) == pytest.approx(expected, abs=0.03), region
