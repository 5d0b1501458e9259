"""Images whose figures are known, by every protocol, against independent implementations.

PSNR, MSE and SSIM are scikit-image's, those of the challenge torchmetrics', correlation is SciPy's.
Multi-scale SSIM, MAE and what protocols do before are written out from `docs/evaluate.md`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import pearsonr
from skimage.measure import block_reduce
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from cwdm.anatomy import mni152
from cwdm.cli.main import cwdm
from cwdm.floors import blurred, erased, zeros
from cwdm.metrics import Similarity
from cwdm.modality import Modality
from cwdm.protocols import FIGURES, PROTOCOLS, REGIONS, ProtocolName
from cwdm.segmentation import brats_labels
from cwdm.simulate import SimulatedCase, simulate, write_case
from cwdm.volume import Volume, new_volume, read_labels, read_volume

Voxels = NDArray[np.floating]
Mask = NDArray[np.bool_]
Figures = dict[str, dict[str, float]]
MeanSSIM = Callable[[Voxels, Voxels], float]
EVERY = pytest.mark.parametrize("name", list(PROTOCOLS))
TOLERANCE = {"psnr": 1e-3, "ssim": 1e-4, "ms_ssim": 1e-4, "mae": 1e-6, "mse": 1e-6, "ncc": 1e-5}
EXACT_DB = 100  # the most there is: equal but for rounding to float32


@dataclass(frozen=True, eq=False)
class Known:
    """An image and where its tumor is."""

    volume: Volume
    labels: NDArray[np.uint8]

    @property
    def truth(self) -> Voxels:
        return self.volume.voxels

    @property
    def brain(self) -> Mask:
        filled: Mask = ndimage.binary_fill_holes(self.truth != 0)
        return filled

    def masks(self, name: ProtocolName) -> dict[str, Mask]:
        """The regions written out; only the challenge looks at a tumor outside the brain."""
        where = np.ones_like(self.brain) if name == "brasyn" else self.brain
        found = {
            "brain": self.brain,
            "healthy": self.brain & (self.labels == 0),
            "WT": where & np.isin(self.labels, [1, 2, 3]),
            "TC": where & np.isin(self.labels, [1, 3]),
            "ET": where & (self.labels == 3),
            "cuboid": np.ones_like(self.brain),
        }
        return found | ({"non-tumor": self.labels == 0} if name == "brasyn" else {})


PREDICTIONS: dict[str, Callable[[Known], Voxels]] = {
    "identity": lambda known: known.truth,
    "affine": lambda known: np.where(known.truth > 0, 0.3 * known.truth + 90, 0),
    "negative": lambda known: np.where(known.truth > 0, known.truth - known.truth.max() / 4, 0),
    "zeros": lambda known: zeros(known.volume),
    "blurred": lambda known: blurred(known.volume),
    "erased": lambda known: erased(known.volume, known.labels > 0),
    "flipped": lambda known: known.truth[::-1],
    "shifted": lambda known: np.roll(known.truth, 1, axis=1),
}
PREDICTED = pytest.mark.parametrize("prediction", PREDICTIONS)


@pytest.fixture(scope="module")
def case() -> SimulatedCase:
    """Of 6 mm, with every kind of tumor, up to one voxel from the edge."""
    return simulate(0, 3, mni152(), shape=(34, 38, 28), spacing=6.0)


@pytest.fixture(scope="module")
def known(case: SimulatedCase) -> Known:
    image = case.images[Modality.T1C].numpy()
    return Known(new_volume(image, case.affine, np.int16), case.segmentation.numpy())


@pytest.fixture(scope="module")
def torchmetrics() -> ModuleType:
    """Its image metrics, without torchvision: not needed, and not every build can be loaded."""
    lookup = importlib.metadata.version

    def version(package: str) -> str:
        if package == "torchvision":
            raise importlib.metadata.PackageNotFoundError(package)
        return lookup(package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_utilities.core.imports._version", version)
        patch.setitem(sys.modules, "torchvision", None)
        import torchmetrics.functional.image

    return torchmetrics.functional.image


def figures(name: ProtocolName, prediction: Voxels, known: Known) -> Figures:
    """By cwdm."""
    rows = PROTOCOLS[name].figures(
        prediction.astype(np.float32), known.truth, known.brain, known.labels
    )
    return {region: {"voxels": size, **values} for region, size, values in rows}


def expected_figures(
    name: ProtocolName, prediction: Voxels, known: Known, challenge_ssim: MeanSSIM
) -> Figures:
    """By others."""
    p, t = scaled(name, prediction.astype(np.float64), known)
    ssim, scales = ssim_map(p, t), similarity_by_scale(p, t)
    found = {}
    for region, mask in known.masks(name).items():
        a, b = p[mask], t[mask]
        found[region] = {
            "voxels": mask.sum(),
            "psnr": np.inf if (a == b).all() else peak_signal_noise_ratio(b, a, data_range=1),
            "ssim": ssim[mask].mean(),
            "mae": np.abs(a - b).mean(),
            "ms_ssim": ms_ssim(scales, mask),
            "mse": mean_squared_error(a, b),
            "ncc": pearsonr(a, b).statistic if np.ptp(a) > 0 else 0.0,
        }
        if name == "brasyn":
            found[region]["ssim"] = challenge_ssim(np.where(mask, p, 0), np.where(mask, t, 0))
    return found


def scaled(name: ProtocolName, p: Voxels, known: Known) -> tuple[Voxels, Voxels]:
    """Prediction and truth as the protocol sees them."""
    t, brain = known.truth.astype(np.float64), known.brain
    if name == "aligned":
        slope, offset = np.polyfit(p[brain], t[brain], 1) if np.ptp(p) else (0, t[brain].mean())
        low, high = np.quantile(t[brain], [0.005, 0.995])
        p, t = ((each - low) / (high - low) for each in (slope * p + offset, t))
        return np.where(brain, p, 0), np.where(brain, t, 0)
    quantiles = {"brasyn": [0.005, 0.995], "published": [0.001, 0.999]}[name]

    def scale(image: Voxels) -> Voxels:
        low, high = np.quantile(image, quantiles)
        low = max(low, 0) if name == "brasyn" else low
        return (np.clip(image, low, high) - low) / (high - low) if high > low else 0 * image

    return scale(p), scale(t)


def ssim_map(p: Voxels, t: Voxels, data_range: float = 1.0, edge: str = "constant") -> Voxels:
    """scikit-image's, of images that go on as zeros (or mirrored) beyond their edge."""
    padded = [np.pad(each, 5, mode=edge) for each in (p, t)]  # type: ignore[call-overload]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, found = structural_similarity(*padded, data_range=data_range, full=True, **options)
    inner: Voxels = found[5:-5, 5:-5, 5:-5]
    return inner


def mirrored_ssim(p: Voxels, t: Voxels) -> float:
    """The challenge's, where torchmetrics takes too long."""
    return float(ssim_map(p, t, float(max(np.ptp(p), np.ptp(t))), "reflect").mean())


def similarity_by_scale(p: Voxels, t: Voxels) -> list[Voxels]:
    """Maps of contrast and structure at four scales, of SSIM at the fifth."""

    def mean(image: Voxels) -> Voxels:
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5, mode="constant")

    found = []
    for _ in range(4):
        covariance = mean(p * t) - mean(p) * mean(t)
        variances = mean(p * p) - mean(p) ** 2 + mean(t * t) - mean(t) ** 2
        found.append((2 * covariance + 0.03**2) / (variances + 0.03**2))
        p, t = (block_reduce(each, 2, np.mean) for each in (p, t))
    return [*found, ssim_map(p, t)]


def ms_ssim(scales: list[Voxels], mask: Mask) -> float:
    share, value = mask.astype(np.float64), 1.0
    for values, weight in zip(scales, (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), strict=True):
        value *= max(float(np.average(values, weights=share)), 0.0) ** weight
        share = block_reduce(share, 2, np.mean)
    return value


def assert_equal(found: Mapping[Any, float], expected: Mapping[str, float], where: str) -> None:
    assert found["voxels"] == expected["voxels"], where
    for figure in FIGURES:
        if figure == "psnr" and expected[figure] > EXACT_DB:
            assert found[figure] >= EXACT_DB, where
        else:
            close = pytest.approx(expected[figure], rel=1e-5, abs=TOLERANCE[figure])
            assert found[figure] == close, (where, figure)


@EVERY
@PREDICTED
def test_every_figure_in_every_region_is_that_of_others(
    known: Known, torchmetrics: ModuleType, name: ProtocolName, prediction: str
) -> None:
    def challenge_ssim(p: Voxels, t: Voxels) -> float:
        images = (torch.from_numpy(each).float()[None, None] for each in (p, t))
        return float(torchmetrics.structural_similarity_index_measure(*images))

    image = PREDICTIONS[prediction](known)
    found = figures(name, image, known)
    expected = expected_figures(name, image, known, challenge_ssim)
    assert set(found) == set(expected) == set(known.masks(name))
    assert set(REGIONS) - set(found) == ({"non-tumor"} if name != "brasyn" else set())
    for region in expected:
        assert_equal(found[region], expected[region], region)


@EVERY
def test_the_truth_itself_is_perfect(known: Known, name: ProtocolName) -> None:
    for region, found in figures(name, known.truth, known).items():
        for figure in ("ssim", "ms_ssim", "ncc"):
            assert found[figure] == pytest.approx(1, abs=1e-6), region
        assert found["psnr"] == EXACT_DB
        assert found["mae"] < 1e-6


def test_after_a_fit_an_affine_change_is_the_truth_itself(known: Known) -> None:
    for region, found in figures("aligned", PREDICTIONS["affine"](known), known).items():
        for figure in ("ssim", "ms_ssim", "ncc"):
            assert found[figure] == pytest.approx(1, abs=1e-6), region
        assert found["psnr"] == EXACT_DB


@EVERY
def test_an_affine_change_keeps_the_correlation_but_without_a_fit_not_the_rest(
    known: Known, name: ProtocolName
) -> None:
    """Quantiles change as the voxels do: in the brain one image is a line of the other."""
    found = figures(name, PREDICTIONS["affine"](known), known)
    for region in ("brain", "healthy", "WT", "TC", "ET"):
        assert found[region]["ncc"] == pytest.approx(1, abs=1e-6)
    assert (found["brain"]["psnr"] == EXACT_DB) == (name == "aligned")


def test_zeros_have_the_error_of_the_truth_or_of_its_mean(known: Known) -> None:
    brain, image = known.brain, known.truth.astype(np.float64)
    low, high = np.quantile(image[brain], [0.005, 0.995])
    variance = image[brain].var() / (high - low) ** 2
    whole = np.clip(image / np.quantile(image, 0.995), 0, 1)
    expected = {
        "aligned": {"brain": variance, "cuboid": variance * brain.mean()},
        "brasyn": {"brain": (whole[brain] ** 2).mean(), "cuboid": (whole**2).mean()},
    }
    for name, regions in expected.items():
        found = figures(name, PREDICTIONS["zeros"](known), known)  # type: ignore[arg-type]
        for region, value in regions.items():
            assert found[region]["mse"] == pytest.approx(value, rel=1e-5)
            assert found[region]["psnr"] == pytest.approx(-10 * np.log10(value), abs=1e-4)
        assert found["brain"]["ncc"] == 0


@EVERY
def test_figures_do_not_know_left_from_right(known: Known, name: ProtocolName) -> None:
    mirror = Known(
        new_volume(known.truth[::-1], known.volume.affine, np.int16), known.labels[::-1].copy()
    )
    shifted = PREDICTIONS["shifted"](known)
    found = figures(name, shifted[::-1], mirror)
    for region, expected in figures(name, shifted, known).items():
        del expected["ms_ssim"]  # halving begins on the left
        for figure in expected:
            assert found[region][figure] == pytest.approx(expected[figure], rel=1e-5, abs=1e-5)


def test_contrast_at_every_scale_is_that_of_torchmetrics(torchmetrics: ModuleType) -> None:
    """Which leaves out the outer 5 voxels: there edges do not matter."""
    rng = np.random.default_rng(0)
    truth = ndimage.gaussian_filter(rng.random((64, 52, 48)), 1)
    prediction = truth + 0.05 * rng.normal(size=truth.shape)
    found = Similarity.of(prediction, truth)
    images = [torch.from_numpy(each).float()[None, None] for each in (prediction, truth)]
    for scale in range(3):
        expected = torchmetrics.multiscale_structural_similarity_index_measure(
            *images, data_range=1.0, betas=(1.0, 0.0)
        )
        assert 0.1 < float(expected) < 0.99
        inner = found.contrast_maps[scale][5:-5, 5:-5, 5:-5]
        assert float(inner.mean()) == pytest.approx(float(expected), abs=1e-4)
        images = [torch.nn.functional.avg_pool3d(each, 2) for each in images]


@EVERY
def test_the_command_gives_the_same_figures(
    case: SimulatedCase, known: Known, tmp_path: Path, name: ProtocolName
) -> None:
    folder = write_case(case, tmp_path / "truth")
    file = f"{case.id}-t1c.nii.gz"
    stored = nib.Nifti1Image.from_filename(folder / file)  # from right to left, front to back
    (tmp_path / "made").mkdir()
    prediction = PREDICTIONS["flipped"](known)
    nib.Nifti1Image(prediction[::-1, ::-1], stored.affine).to_filename(tmp_path / "made" / file)
    words = ["--truth", tmp_path / "truth", "--pred", tmp_path / "made", "--output", tmp_path / "o"]
    result = CliRunner().invoke(cwdm, ["evaluate", *map(str, words), "--protocol", name])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "o" / "metrics.csv")
    methods = {"cwdm": "flipped", "zeros": "zeros", "tumor erased": "erased", "blurred": "blurred"}
    for method, image in methods.items():
        rows = table[table["method"] == method].set_index("region").to_dict("index")
        expected = expected_figures(name, PREDICTIONS[image](known), known, mirrored_ssim)
        assert set(rows) == set(expected)
        for region in expected:
            assert_equal(rows[region], expected[region], f"{method} {region}")


@pytest.fixture(scope="module")
def acquired(shared: Path) -> Known:
    folder = shared / "data" / "val" / "Brats18_CBICA_AQN_1"
    truth = read_volume(folder / f"{folder.name}-{Modality.T1C}.nii.gz")
    path = folder / f"{folder.name}-seg.nii.gz"
    return Known(truth, brats_labels(read_labels(path, truth), path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prediction"),
    [("aligned", "blurred"), ("brasyn", "flipped"), ("published", "shifted")],
)
def test_figures_of_a_real_case_are_those_of_others(
    acquired: Known, name: ProtocolName, prediction: str
) -> None:
    image = PREDICTIONS[prediction](acquired)
    found = figures(name, image, acquired)
    expected = expected_figures(name, image, acquired, mirrored_ssim)
    assert set(found) == set(expected)
    for region in expected:
        assert_equal(found[region], expected[region], region)
