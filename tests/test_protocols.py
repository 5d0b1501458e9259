"""Every protocol on known images, against MONAI, torch and formulas written out.

MONAI convolves with the whole window where cwdm goes axis by axis. torchmetrics, whose defaults are
the challenge's, does as `challenge_ssim`: torch's reflection, the same convolution, the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from numpy.typing import NDArray
from scipy import ndimage

from cwdm.floors import erased
from cwdm.modality import Modality
from cwdm.protocols import FIGURES, PROTOCOLS, REGIONS, ProtocolName
from cwdm.segmentation import brats_labels
from cwdm.volume import brain_mask, new_volume, read_labels, read_volume

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]
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


def without_tumor(truth: Voxels, labels: NDArray[np.uint8]) -> Voxels:
    return np.asarray(erased(new_volume(truth, np.eye(4), np.float32), labels > 0))


SPOIL: dict[str, Callable[[Voxels, NDArray[np.uint8]], Voxels]] = {
    "zeros": lambda truth, labels: np.zeros_like(truth),
    "blurred": lambda truth, labels: ndimage.gaussian_filter(truth, 1.5),
    "erased": without_tumor,
    "affine": lambda truth, labels: np.where(truth > 0, 0.3 * truth + 90, 0),
    "flipped": lambda truth, labels: truth[::-1],
    "shifted": lambda truth, labels: np.roll(truth, 1, axis=1),
}


def masks(truth: Voxels, labels: NDArray[np.uint8], name: str) -> dict[str, Mask]:
    """The regions written out."""
    brain = truth > 0
    found = {
        "brain": brain,
        "healthy": brain & (labels == 0),
        "WT": labels > 0,
        "TC": (labels == 1) | (labels == 3),
        "ET": labels == 3,
        "cuboid": np.ones(SHAPE, dtype=bool),
    }
    return found | ({"non-tumor": labels == 0} if name == "brasyn" else {})


def scaled(prediction: Voxels, truth: Voxels, name: str) -> tuple[Voxels, Voxels]:
    """Both images as the protocol sees them, in float64."""
    p, t = prediction.astype(np.float64), truth.astype(np.float64)
    brain = truth > 0
    if name == "aligned":
        columns = np.stack([p[brain], np.ones(brain.sum())], axis=1)
        fitted = np.linalg.lstsq(columns, t[brain])[0]
        p = p * fitted[0] + fitted[1]
        low, high = np.quantile(t[brain], [0.005, 0.995])
        return np.where(brain, (p - low) / (high - low), 0), np.where(
            brain, (t - low) / (high - low), 0
        )
    quantiles = {"brasyn": [0.005, 0.995], "published": [0.001, 0.999]}[name]

    def scale(image: Voxels) -> Voxels:
        low, high = np.quantile(image, quantiles)
        return (np.clip(image, low, high) - low) / (high - low) if high > low else 0 * image

    return scale(p), scale(t)


def tensor(image: Voxels) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).float()[None, None]


def maps(p: torch.Tensor, t: torch.Tensor, data_range: float = 1.0) -> list[Voxels]:
    """MONAI's SSIM map and contrast map, where the window fits into the images."""
    found = compute_ssim_and_cs(p, t, 3, (11,) * 3, (1.5,) * 3, data_range=data_range)
    return [each[0, 0].double().numpy() for each in found]


def zero_padded(p: Voxels, t: Voxels) -> list[Voxels]:
    """Both maps of images that go on as zeros."""
    return maps(tensor(np.pad(p, 5)), tensor(np.pad(t, 5)))


def challenge_ssim(p: Voxels, t: Voxels) -> float:
    """Mean over the whole volume of images mirrored at the edge, with their own range."""
    p_mirrored, t_mirrored = (
        torch.nn.functional.pad(tensor(each), (5,) * 6, mode="reflect") for each in (p, t)
    )
    return float(maps(p_mirrored, t_mirrored, float(max(np.ptp(p), np.ptp(t))))[0].mean())


def ms_ssim(p: Voxels, t: Voxels, mask: Mask) -> float:
    """Scale by scale, with torch's pooling and MONAI's maps."""
    sides = [-side % 16 for side in SHAPE]  # so that every scale can be halved
    images = [tensor(np.pad(each, [(0, side) for side in sides])) for each in (p, t, 1.0 * mask)]
    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale:
            images = [torch.nn.functional.avg_pool3d(each, 2) for each in images]
        small, other, share = (each[0, 0].double().numpy() for each in images)
        ssim, contrast = zero_padded(small, other)
        mean = ((ssim if scale == 4 else contrast) * share).sum() / share.sum()
        value *= max(mean, 0) ** weight
    return float(value)


@EVERY
@pytest.mark.parametrize("spoil", SPOIL)
def test_figures_of_a_spoilt_truth_equal_independent_ones(
    truth: Voxels, labels: NDArray[np.uint8], name: ProtocolName, spoil: str
) -> None:
    prediction = SPOIL[spoil](truth, labels).astype(np.float32)
    found = {
        region: (size, figures)
        for region, size, figures in PROTOCOLS[name].figures(prediction, truth, truth > 0, labels)
    }
    p, t = scaled(prediction, truth, name)
    ssim_map, _ = zero_padded(p, t)
    expected_masks = masks(truth, labels, name)
    assert set(found) == set(expected_masks) <= set(REGIONS)
    for region, mask in expected_masks.items():
        size, figures = found[region]
        assert size == mask.sum()
        assert set(figures) == set(FIGURES)
        error = p[mask] - t[mask]
        constant = np.ptp(p[mask]) < 1e-9
        with np.errstate(invalid="ignore"):
            correlation = 0 if constant else np.corrcoef(p[mask], t[mask])[0, 1]
        if name == "brasyn":
            ssim = challenge_ssim(np.where(mask, p, 0), np.where(mask, t, 0))
        else:
            ssim = float(ssim_map[mask].mean())
        psnr = -10 * np.log10((error**2).mean())
        assert figures["mae"] == pytest.approx(np.abs(error).mean(), abs=1e-5)
        assert figures["mse"] == pytest.approx((error**2).mean(), abs=1e-5)
        assert figures["ncc"] == pytest.approx(correlation, abs=1e-4)
        assert figures["ssim"] == pytest.approx(ssim, abs=1e-4)
        if psnr > 80:  # equal but for rounding: the affine change, fitted
            assert figures["psnr"] > 80
        else:
            assert figures["psnr"] == pytest.approx(psnr, abs=1e-2)
        if region in ("brain", "ET"):
            assert figures["ms_ssim"] == pytest.approx(ms_ssim(p, t, mask), abs=1e-4)


@EVERY
def test_the_truth_itself_is_perfect_everywhere(
    truth: Voxels, labels: NDArray[np.uint8], name: ProtocolName
) -> None:
    for region, _, figures in PROTOCOLS[name].figures(truth, truth, truth > 0, labels):
        for figure in ("ssim", "ms_ssim", "ncc"):
            assert figures[figure] == pytest.approx(1, abs=1e-5), (region, figure)
        assert figures["mae"] < 1e-6
        assert figures["psnr"] > 100


def test_only_a_fit_forgives_other_units(truth: Voxels, labels: NDArray[np.uint8]) -> None:
    other = SPOIL["affine"](truth, labels).astype(np.float32)
    brain = {
        name: next(iter(protocol.figures(other, truth, truth > 0, None)))[2]
        for name, protocol in PROTOCOLS.items()
    }
    assert brain["aligned"]["psnr"] > 80
    assert brain["brasyn"]["psnr"] < 40
    assert brain["published"]["psnr"] < 40
    assert all(figures["ncc"] > 0.99 for figures in brain.values())


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


@pytest.mark.slow
def test_a_real_case_of_full_size_equals_the_whole_window(shared: Path) -> None:
    folder = shared / "data" / "val" / "Brats18_CBICA_AQN_1"
    truth, copy = (
        read_volume(folder / f"{folder.name}-{each}.nii.gz")
        for each in (Modality.T1C, Modality.T1N)
    )
    path = folder / f"{folder.name}-seg.nii.gz"
    labels = brats_labels(read_labels(path, truth), path)
    figures = PROTOCOLS["brasyn"].figures(copy.voxels, truth.voxels, brain_mask(truth), labels)
    found = {region: figure["ssim"] for region, _, figure in figures}
    p, t = scaled(copy.voxels, truth.voxels, "brasyn")
    for region, mask in (("WT", labels > 0), ("non-tumor", labels == 0)):
        expected = challenge_ssim(np.where(mask, p, 0), np.where(mask, t, 0))
        assert found[region] == pytest.approx(expected, abs=1e-4)
