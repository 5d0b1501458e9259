"""What every protocol promises; its figures themselves are in `test_known_answers.py`."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.protocols import PROTOCOLS, ProtocolName

Voxels = NDArray[np.floating]
SHAPE = (30, 28, 26)
EVERY = pytest.mark.parametrize("name", list(PROTOCOLS))


@pytest.fixture(scope="module")
def labels() -> NDArray[np.uint8]:
    """(X, Y, Z): edema around enhancing tumor around necrosis, off the middle."""
    grid = np.indices(SHAPE) - np.array([18, 15, 12]).reshape(3, 1, 1, 1)
    radius = np.sqrt((grid**2).sum(axis=0))
    return np.select([radius < 2, radius < 4, radius < 6], [1, 3, 2], 0).astype(np.uint8)


@pytest.fixture(scope="module")
def truth(labels: NDArray[np.uint8]) -> Voxels:
    """(X, Y, Z) in scanner units: a brain in zeros that nearly reaches the edge, with a tumor."""
    generator = np.random.default_rng(5)
    center = (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    brain = (((np.indices(SHAPE) - center) / (center - 1.5)) ** 2).sum(axis=0) < 1
    tissue = ndimage.gaussian_filter(generator.normal(size=SHAPE), 1.2)
    signal = 400 + 500 * tissue + 10 * generator.normal(size=SHAPE) + 150 * (labels > 0)
    return np.where(brain, (signal + 250 * (labels == 3)).clip(20), 0).astype(np.float32)


def test_background_raises_the_figure_of_the_challenge_and_no_other(
    truth: Voxels, labels: NDArray[np.uint8]
) -> None:
    def enhancing(name: ProtocolName, margin: int) -> dict[str, float]:
        image, tumor = np.pad(truth, margin), np.pad(labels, margin)
        figures = PROTOCOLS[name].figures(0 * image, image, image > 0, tumor)
        return next(each for region, _, each in figures if region == "ET")

    assert enhancing("brasyn", 0)["ssim"] < 0.9
    assert enhancing("brasyn", 20)["ssim"] > 0.98  # though nothing of it is there
    assert enhancing("brasyn", 20)["psnr"] < 3
    few, many = enhancing("aligned", 0), enhancing("aligned", 20)
    assert few["ssim"] < 0.5
    assert many["ssim"] == pytest.approx(few["ssim"], abs=1e-5)
    assert many["psnr"] == pytest.approx(few["psnr"])


@EVERY
def test_without_labels_or_with_empty_ones_there_is_no_tumor(
    truth: Voxels, labels: NDArray[np.uint8], name: ProtocolName
) -> None:
    protocol = PROTOCOLS[name]
    bare = [region for region, *_ in protocol.figures(truth, truth, truth > 0, None)]
    assert bare == ["brain", "cuboid"]
    empty = [region for region, *_ in protocol.figures(truth, truth, truth > 0, 0 * labels)]
    assert not {"WT", "TC", "ET"} & set(empty)


@EVERY
def test_a_protocol_says_what_it_does(name: ProtocolName) -> None:
    text = PROTOCOLS[name].text
    assert text.startswith(f"Protocol {name}. ")
    assert "ata range" in text
    assert "region" in text
