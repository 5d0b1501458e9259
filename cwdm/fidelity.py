"""How near a set of generated images is to a set of real ones, and how much either varies.

FID and MMD compare the distributions of a network's features; mean MS-SSIM between the images of a
set tells how alike they are. What the figures mean is in `PROTOCOL`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim
from monai.networks.nets.resnet import ResNet, resnet50
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn

from cwdm import __version__
from cwdm.config import Images
from cwdm.errors import InputError
from cwdm.files import atomic_write, sha256
from cwdm.intensity import NORMALIZATIONS
from cwdm.machine import choose_device
from cwdm.metrics import MS_SSIM_WEIGHTS
from cwdm.modality import Modality, find_modality
from cwdm.preparation import Frame
from cwdm.segmenters import check_script
from cwdm.significance import interval
from cwdm.uncertainty import MAPS
from cwdm.volume import brain_mask, is_synthetic, read_volume

__all__ = [
    "ENOUGH",
    "FILES",
    "PROTOCOL",
    "Extractor",
    "Figure",
    "Moments",
    "View",
    "caveats",
    "distances",
    "diversity",
    "draw_pairs",
    "features",
    "find_images",
    "frechet_distance",
    "kernel_distance",
    "med3d",
    "ms_ssim",
    "scales",
    "similarities",
    "voxel_size_mm",
    "write_tables",
]

Vector = NDArray[np.float32]

ENOUGH = 500
"""Images below which FID is mostly bias."""
SSIM_WINDOW = 7
FILES = ("fidelity.csv", "fidelity.json")
PROTOCOL = (
    "Images: brain in the middle of a block of one size for all, cut or padded; in it 0.1 % and "
    "99.9 % quantiles become 0 and 1, background 0; canonical orientation (RAS). FID: "
    "|m - m'|^2 + tr(C + C' - 2 (C C')^1/2) of the features' means and covariances. MMD: unbiased "
    "squared maximum mean discrepancy of the features with the cubic polynomial kernel "
    "(x.y / D + 1)^3 of KID. MS-SSIM: mean over pairs of images of one set (Gaussian window of 7 "
    "voxels, sigma 1.5, k1 0.01, k2 0.03); the lower, the more diverse; interval: 95 %, bootstrap "
    "over the pairs. FID depends on the number of images: compare only equal numbers."
)


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    name: str
    """fid, mmd or ms-ssim."""
    of: str
    """"generated", of which FID and MMD are the distance to the real ones; or "real"."""
    value: float
    low: float | None = None
    """Of the interval."""
    high: float | None = None
    pairs: int | None = None


def find_images(root: Path, modality: Modality | None = None) -> list[Path]:
    """The NIfTI files below `root`, sorted, without segmentations and maps of several samples.

    Args:
        modality: only those whose name ends with it (`<id>-t1n.nii.gz`, or any alias).

    Raises:
        InputError: fewer than two; or images of several modalities, and none was asked for.
    """
    if not root.is_dir():
        raise InputError(f"{root}: not a folder, expected one with images")
    kinds: dict[Path, str] = {}
    for path in sorted(root.rglob("*.nii*")):
        if path.name.startswith(".") or not path.name.endswith((".nii", ".nii.gz")):
            continue
        *_, of, kind = ["", *re.split("[-_]", path.name.partition(".nii")[0])]
        if kind.lower() != "seg" and not (kind in MAPS and find_modality(of)):
            kinds[path] = kind
    there = {found for kind in kinds.values() if (found := find_modality(kind))}
    if modality is None and len(there) > 1:
        listed = ", ".join(sorted(there))
        raise InputError(f"{root}: found images of {listed}, expected one modality to be chosen")
    paths = [
        path for path, kind in kinds.items() if modality is None or find_modality(kind) is modality
    ]
    if len(paths) < 2:
        what = f" of {modality}" if modality else ""
        raise InputError(f"{root}: found {len(paths)} image(s){what}, expected at least two")
    return paths


def voxel_size_mm(path: Path) -> float:
    """Of the image in a file: the edge of a cube as large as a voxel."""
    volume_mm3 = abs(np.linalg.det(read_volume(path).affine[:3, :3]))
    return round(float(np.cbrt(volume_mm3)), 6)  # 2 for an affine with 2 on its diagonal


@dataclass(frozen=True)
class View:
    """How the image in a file becomes what a network sees."""

    size: tuple[int, int, int]
    """Voxels, X Y Z."""
    spacing_mm: float | None = None
    """To which the image is resampled; none takes the voxels as they are."""

    def __call__(self, path: Path) -> Tensor:
        """(X, Y, Z) float32 in [0, 1]: the brain's extent in the middle, 0 outside the brain.

        Quantiles are those of what is in the block, so that they do not depend on how much
        background there was in the file.
        """
        volume = read_volume(path)
        mask = brain_mask(volume)
        affine, spacing_mm = volume.affine, self.spacing_mm
        if spacing_mm is None:
            affine, spacing_mm = np.eye(4), 1.0
        frame = Frame.of(mask, affine, Images(size=self.size, spacing_mm=spacing_mm), multiple=1)
        voxels = frame.box.crop(volume.voxels, outside=float(volume.voxels.min()))
        inside = frame.box.crop(mask)
        normalization = NORMALIZATIONS["published"]
        scale = normalization.measure(voxels, inside)
        return frame.to_network(normalization.normalize(voxels, inside, scale))


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that makes features (1, D) of an image (1, 1, X, Y, Z) in [0, 1]."""

    network: nn.Module
    path: Path
    sha256: str
    device: torch.device

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> Self:
        """Med3D's ResNet-50 (`resnet_50_23dataset.pth`), or any network as TorchScript.

        Raises:
            InputError: unreadable, or something else.
        """
        where = choose_device(device)
        digest = sha256(path)
        network = med3d(path) if path.suffix == ".pth" else _scripted(path)
        return cls(network.to(where).eval(), path, digest, where)

    def __call__(self, image: Tensor) -> Vector:
        """(X, Y, Z) -> (D,); InputError if that is not what the network puts out."""
        try:
            with torch.inference_mode():
                output = self.network(image[None, None].to(self.device))
        except RuntimeError as error:  # of TorchScript, whose last line says what was wrong
            reason = str(error).strip().splitlines()[-1]
            size = "x".join(map(str, image.shape))
            raise InputError(f"{self.path}: does not take an image of {size}: {reason}") from error
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != 1:
            raise InputError(f"{self.path}: put out {found}, expected features of shape (1, D)")
        vector: Vector = output[0].float().cpu().numpy()
        if not np.isfinite(vector).all():
            raise InputError(f"{self.path}: put out features that are not finite")
        return vector


def med3d(path: Path) -> ResNet:
    """Med3D's ResNet-50 with weights from a file; 2048 features, the mean over layer 4.

    Chen et al. 2019, arXiv 1904.00625: layers 3 and 4 keep the resolution of layer 2 and are
    dilated by 2 and 4 instead.

    Raises:
        InputError: no such file, or one with other weights.
    """
    network = resnet50(
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_stride=2,
        shortcut_type="B",
        bias_downsample=False,
        feed_forward=False,
    )
    _dilate(network.layer3, 2)
    _dilate(network.layer4, 4)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {
            key.removeprefix("module."): value for key, value in checkpoint["state_dict"].items()
        }
        network.load_state_dict(weights)
    except Exception as error:  # torch raises whatever its unpickler meets in a foreign file
        raise InputError(
            f"{path}: not the weights of Med3D's ResNet-50, expected resnet_50_23dataset.pth"
        ) from error
    return network


def _dilate(layer: nn.Module, dilation: int) -> None:
    """Spread the 3x3x3 convolutions of a layer instead of striding."""
    for module in layer.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, 1, 1)
            if module.kernel_size == (3, 3, 3):
                module.dilation = module.padding = (dilation,) * 3


def _scripted(path: Path) -> nn.Module:
    """A TorchScript file: tensors and operations of torch, no Python."""
    try:
        check_script(path)
        network: nn.Module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise InputError(
            f"{path}: not TorchScript, expected that (.pt) or the weights of Med3D (.pth)"
        ) from error
    return network


def features(
    paths: Iterable[Path], view: View, extractor: Extractor, cache: Path
) -> Iterator[Vector]:
    """(D,) of one image after the other.

    Args:
        cache: folder where they are kept, in a file for each, by what was in the image's file and
            in the network's, by the view and the version of cwdm.
    """
    for path in paths:
        made_of = f"{__version__} {sha256(path)} {extractor.sha256} {view}"
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        file = cache / f"{path.name.partition('.nii')[0]}-{key}.npy"
        if file.exists():
            yield np.load(file)
            continue
        vector = extractor(view(path))
        with atomic_write(file) as temporary:
            np.save(temporary, vector)
        yield vector


class Moments:
    """Mean and covariance of vectors that come one after the other, in constant memory.

    Chan, Golub and LeVeque 1979, equation 2.1: the sums of two parts give those of the whole.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(())
        """(D,)"""
        self.scatter: NDArray[np.float64] = np.zeros(())
        """(D, D): sum of (x - mean) (x - mean)^T."""

    def add(self, vectors: NDArray[np.floating]) -> None:
        """More vectors, (N, D)."""
        part = np.asarray(vectors, np.float64)
        mean = part.mean(axis=0)
        apart = mean - self.mean
        count = self.count + len(part)
        centered = part - mean
        weight = self.count * len(part) / count
        self.scatter = self.scatter + centered.T @ centered + weight * np.outer(apart, apart)
        self.mean = self.mean + apart * len(part) / count
        self.count = count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(D, D), unbiased."""
        covariance: NDArray[np.float64] = self.scatter / (self.count - 1)
        return covariance


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Frechet distance of two normal distributions, FID (Heusel et al. 2017, equation 6).

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2), computed as published: where the root is not finite,
    1e-6 is added to the diagonals; its imaginary part, if below 1e-3, is dropped.

    Raises:
        InputError: the imaginary part is larger.
    """
    a, b = one.covariance, other.covariance
    root = linalg.sqrtm(a @ b)
    if not np.isfinite(root).all():
        nudge = 1e-6 * np.eye(len(a))
        root = linalg.sqrtm((a + nudge) @ (b + nudge))
    if (imaginary := float(np.abs(np.diagonal(root).imag).max())) > 1e-3:
        raise InputError(
            f"FID: found an imaginary part of {imaginary:.2g} in the root of the covariances, "
            "expected more images"
        )
    difference = one.mean - other.mean
    return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


def kernel_distance(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3.

    Gretton et al. 2012, equation 3; the kernel is that of KID (Binkowski et al. 2018). It may be
    slightly negative.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _within(a) + _within(b) - 2 * float(_kernel(a, b).mean())


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, M) of vectors (N, D) and (M, D)."""
    kernel: NDArray[np.float64] = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel


def _within(a: NDArray[np.float64]) -> float:
    """Mean kernel of two different vectors of one set."""
    kernel = _kernel(a, a)
    return float((kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1)))


def distances(real: Iterable[Vector], generated: Iterable[Vector]) -> list[Figure]:
    """FID and MMD from the features of both sets, one image after the other."""
    sets = []
    for vectors in (real, generated):
        moments, kept = Moments(), []
        for vector in vectors:
            moments.add(vector[None])
            kept.append(vector)
        sets.append((moments, np.stack(kept)))
    (a, x), (b, y) = sets
    return [
        Figure("fid", "generated", frechet_distance(a, b)),
        Figure("mmd", "generated", kernel_distance(x, y)),
    ]


def scales(size: Sequence[int]) -> int:
    """How many of the five scales of MS-SSIM an image of that size has room for.

    Raises:
        InputError: not even one.
    """
    room = [
        count
        for count in range(1, len(MS_SSIM_WEIGHTS) + 1)
        # the smallest image has to hold the window; MONAI asks for the second
        if min(size) // max(2 ** (count - 1), (count - 1) ** 2) >= SSIM_WINDOW
    ]
    if not room:
        raise InputError(f"size {min(size)}: too small for MS-SSIM, expected {SSIM_WINDOW} or more")
    return room[-1]


def ms_ssim(one: Tensor, other: Tensor) -> float:
    """MS-SSIM of two images (X, Y, Z) in [0, 1], as published for WDM (arXiv 2402.19043).

    Below 112 voxels there is no room for five scales: the weights of those there are then sum to 1.
    """
    weights = np.array(MS_SSIM_WEIGHTS[: scales(one.shape)])
    value = compute_ms_ssim(
        one[None, None],
        other[None, None],
        spatial_dims=3,
        kernel_size=SSIM_WINDOW,
        weights=list(weights if len(weights) == len(MS_SSIM_WEIGHTS) else weights / weights.sum()),
    )
    return float(value)


def draw_pairs(count: int, wanted: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """Some of the pairs i < j of `count` images, no pair twice; all of them if no more are wanted.

    They are sorted, so that neighbors share an image.
    """
    first, second = np.triu_indices(count, 1)
    if wanted < len(first):
        chosen = np.random.default_rng(seed).choice(len(first), wanted, replace=False)
        first, second = first[np.sort(chosen)], second[np.sort(chosen)]
    return list(zip(first.tolist(), second.tolist(), strict=True))


def similarities(
    paths: Sequence[Path], pairs: Iterable[tuple[int, int]], view: View, device: torch.device
) -> Iterator[float]:
    """`ms_ssim` of one pair of images after the other."""
    held, one = -1, torch.empty(0)
    for i, j in pairs:
        if i != held:
            held, one = i, view(paths[i]).to(device)
        yield ms_ssim(one, view(paths[j]).to(device))


def diversity(of: str, values: Iterable[float], *, seed: int = 0) -> Figure:
    """The mean of `similarities`, with its bootstrap interval."""
    found = list(values)
    low, high = interval(found, seed)
    return Figure("ms-ssim", of, float(np.mean(found)), low, high, len(found))


def caveats(real: Sequence[Path], generated: Sequence[Path]) -> list[str]:
    """What to know about the two sets before believing the figures."""
    found = []
    if min(len(real), len(generated)) < ENOUGH:
        found.append(
            f"{len(real)} real and {len(generated)} generated images: FID depends on the number, "
            "compare only equal numbers"
        )
    if made := sum(map(is_synthetic, real)):
        found.append(f"{made} of {len(real)} real images are marked as synthetic")
    return found


def write_tables(
    figures: Sequence[Figure],
    folder: Path,
    *,
    notes: Mapping[str, object],
    overwrite: bool = False,
) -> list[Path]:
    """Write `FILES`; InputError as `atomic_write`.

    Args:
        notes: what else belongs into the JSON, such as the network and the numbers of images.
    """
    rows = [asdict(figure) for figure in figures]
    paths = [folder / name for name in FILES]
    with (
        atomic_write(paths[0], overwrite) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(Figure.__annotations__))
        writer.writeheader()
        writer.writerows(rows)
    record = {"version": __version__, "protocol": PROTOCOL, **notes, "figures": rows}
    with atomic_write(paths[1], overwrite) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return paths
