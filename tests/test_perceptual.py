"""The perceptual distance against MONAI's, sums written out, and what must not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses.perceptual import MedicalNetPerceptualSimilarity
from monai.networks.nets.resnet import resnet50
from numpy.typing import NDArray
from torch import Tensor, nn

from cwdm.errors import InputError
from cwdm.fidelity import Extractor
from cwdm.files import sha256
from cwdm.perceptual import Perceptual

Voxels = NDArray[np.float32]
Mask = NDArray[np.bool_]
SHAPE = (35, 40, 26)  # sides whose last cell has 7, 4 and 6 voxels


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Med3D's, with random weights."""
    torch.manual_seed(0)
    network = resnet50(
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_stride=2,
        shortcut_type="B",
        bias_downsample=False,
        feed_forward=False,
    )
    path = tmp_path_factory.mktemp("med3d") / "resnet_50_23dataset.pth"
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def perceptual(weights: Path) -> Perceptual:
    return Perceptual.load(weights, device="cpu")


@pytest.fixture(scope="module")
def images() -> tuple[Voxels, Voxels]:
    """A prediction and a truth without any 0."""
    prediction, truth = np.random.default_rng(0).uniform(0.1, 1, (2, *SHAPE)).astype(np.float32)
    truth[:12] += 1
    return prediction, truth


def tensor(image: Voxels) -> Tensor:
    return torch.from_numpy(image)[None, None]


def test_the_distance_is_that_of_monai(
    perceptual: Perceptual, images: tuple[Voxels, Voxels]
) -> None:
    monai = MedicalNetPerceptualSimilarity.__new__(MedicalNetPerceptualSimilarity)
    nn.Module.__init__(monai)  # its own would download a network
    monai.model, monai.channel_wise = perceptual.network, False
    with torch.inference_mode():
        expected = monai(*map(tensor, images))
    assert expected.shape == (1, 1, 1, 1, 1)
    assert float(expected) > 1e-3
    assert perceptual(*images) == pytest.approx(float(expected), rel=1e-4)


def test_the_features_are_those_whose_mean_med3d_puts_out(
    perceptual: Perceptual, weights: Path, images: tuple[Voxels, Voxels]
) -> None:
    image = torch.from_numpy(images[0])
    with torch.inference_mode():
        features = perceptual.network(image[None, None])
    assert features.shape == (1, 2048, 5, 5, 4)
    expected = Extractor.load(weights, device="cpu")(image)
    np.testing.assert_allclose(features.mean(dim=(2, 3, 4))[0], expected, rtol=1e-4)
    assert perceptual.sha256 == sha256(weights)


class Pick(nn.Module):
    """Two features: the value in the middle of every cell, and 1."""

    def forward(self, image: Tensor) -> Tensor:
        values = image[..., ::8, ::8, ::8]
        return torch.cat([values, torch.ones_like(values)], dim=1)


def test_a_region_is_the_mean_of_cells_by_their_share(images: tuple[Voxels, Voxels]) -> None:
    corner, whole = np.zeros(SHAPE, dtype=bool), np.ones(SHAPE, dtype=bool)
    corner[-3:, -9:, :13] = True
    picked = Perceptual(Pick(), "", torch.device("cpu"))
    found = picked.distances(*images, {"corner": corner, "rest": ~corner, "cuboid": whole})

    units = []
    for image in images:
        values = ((image - image.mean()) / image.std(ddof=1))[::8, ::8, ::8].astype(np.float64)
        features = np.stack([values, np.ones_like(values)])
        units.append(features / np.linalg.norm(features, axis=0))
    distance = ((units[0] - units[1]) ** 2).sum(axis=0)
    sizes, inside = np.zeros((2, *distance.shape))
    for voxel in np.ndindex(SHAPE):
        cell = tuple(
            min((place + 4) // 8, last - 1)
            for place, last in zip(voxel, distance.shape, strict=True)
        )
        sizes[cell] += 1
        inside[cell] += corner[voxel]
    share = inside / sizes
    assert found["corner"] == pytest.approx((distance * share).sum() / share.sum(), rel=1e-4)
    assert found["rest"] == pytest.approx((distance * (1 - share)).sum() / (1 - share).sum(), 1e-4)
    assert found["cuboid"] == pytest.approx(distance.mean(), rel=1e-4)
    assert found["cuboid"] == pytest.approx(picked(*images))


def test_background_and_units_change_nothing(
    perceptual: Perceptual, images: tuple[Voxels, Voxels]
) -> None:
    prediction, truth = images
    left: Mask = np.indices(SHAPE)[0] < 12
    expected = perceptual.distances(prediction, truth, {"left": left, "right": ~left})
    assert expected["left"] != pytest.approx(expected["right"], rel=1e-2)
    margin = ((9, 3), (0, 5), (20, 1))
    masks: dict[str, Mask] = {
        "left": np.pad(left, margin),
        "right": np.pad(~left, margin),
        "outside": np.pad(np.zeros(SHAPE, dtype=bool), margin, constant_values=True),
    }
    found = perceptual.distances(np.pad(3 * prediction, margin), np.pad(truth / 5, margin), masks)
    assert np.isnan(found.pop("outside"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_image_is_at_distance_zero_from_itself_alone(
    perceptual: Perceptual, images: tuple[Voxels, Voxels]
) -> None:
    prediction, truth = images
    assert perceptual(truth, truth) == 0
    assert perceptual(0 * truth, 0 * truth) == 0
    slight = truth + 0.1 * prediction
    assert 0 < perceptual(slight, truth) < perceptual(prediction, truth) < 2
    assert 0 < perceptual(0 * truth, truth) < 2


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet_10.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="expected resnet_50_23dataset"):
        Perceptual.load(path)
