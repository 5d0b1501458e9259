"""Fixtures that several test modules share."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cwdm.anatomy import mni152
from cwdm.config import Config, Images, Sampling, Training
from cwdm.intensity import ScalePrior
from cwdm.modality import SEQUENCES, others
from cwdm.model import build_denoiser, save_model
from cwdm.simulate import simulate, write_case
from cwdm.unet import UNet, UNetConfig

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # several workers share the cores out, as do the programs that they start
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are interpreted: read when Triton is imported

Ball = Callable[[tuple[int, int, int]], NDArray[np.float64]]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real cases, where there is one; it is not part of the repository."""
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("CWDM_SHARED", beside))
    if not (folder / "data").is_dir():
        pytest.skip("no real cases")
    return folder


@pytest.fixture(scope="session")
def kernels() -> Any:
    """`cwdm.kernels`, interpreted where there is no GPU."""
    pytest.importorskip("triton")
    import cwdm.kernels

    return cwdm.kernels


@pytest.fixture(scope="session")
def ball() -> Ball:
    """Make a ball (X, Y, Z) of intensities around 100 in zeros, no two neighbors alike."""

    def make(shape: tuple[int, int, int]) -> NDArray[np.float64]:
        grid = np.indices(shape, dtype=np.float64)
        center = (np.array(shape, np.float64).reshape(3, 1, 1, 1) - 1) / 2
        inside = (((grid - center) / (center + 0.5)) ** 2).sum(axis=0) < 0.7
        return np.where(inside, 80 + 5 * grid[0] + 3 * grid[1] + grid[2], 0)

    return make


@pytest.fixture
def make_image(tmp_path: Path, ball: Ball) -> Callable[..., Path]:
    """Write a NIfTI file, by nibabel alone, below `tmp_path`: a small ball or the voxels given."""

    def make(
        name: str = "x-t1n.nii.gz",
        *,
        voxels: NDArray[Any] | None = None,
        affine: NDArray[Any] | None = None,
    ) -> Path:
        voxels = ball((12, 10, 8)).astype(np.int16) if voxels is None else voxels
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine
        image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
        image.header.set_xyzt_units("mm")
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.to_filename(path)
        return path

    return make


@pytest.fixture
def make_case(make_image: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a folder with one image for each ending; `image` goes to `make_image`."""

    def make(
        folder: str = "case",
        case_id: str = "x",
        endings: tuple[str, ...] = ("-t1n", "-t1c", "-t2w", "-t2f"),
        **image: Any,
    ) -> Path:
        for ending in endings:
            make_image(f"{folder}/{case_id}{ending}.nii.gz", **image)
        return tmp_path / folder

    return make


@pytest.fixture(scope="session")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for any gap."""
    config = Config(
        name="tiny-any",
        target="any",
        conditioning="any",
        images=Images(spacing_mm=8.0),
        network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4, classes=4),
        sampling=Sampling(sampler="ddpm", steps=3),
        training=Training(drop_conditions=0.1),
    )
    torch.manual_seed(0)
    state = build_denoiser(config).backbone.state_dict()
    weights = {k: torch.randn_like(v) * 0.05 for k, v in state.items()}
    priors = {m: ScalePrior({other: 0.0 for other in others(m)}, 4.0) for m in SEQUENCES}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(config, weights, priors, path, overwrite=False)
    return path


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four complete simulated cases of 8 mm."""
    root = tmp_path_factory.mktemp("complete")
    for number in range(4):
        write_case(simulate(0, number, mni152(), shape=(24, 28, 20), spacing=8.0), root)
    return root


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str], dict[str, NDArray[Any]]]:
    """Load numbers the published implementation made; the larger files only where they are."""

    def load(name: str) -> dict[str, NDArray[Any]]:
        path = Path(__file__).parent / "data" / f"{name}.npz"
        if not path.exists():
            path = request.getfixturevalue("shared") / "golden" / f"{name}.npz"
        with np.load(path) as file:
            return dict(file)

    return load


@pytest.fixture(scope="session")
def golden_unet(request: pytest.FixtureRequest) -> Callable[[str], UNet]:
    """Make a U-Net with the weights of the golden numbers, which come from a seed."""

    def make(name: str) -> UNet:
        path = Path(__file__).parent / "data" / "unet_meta.json"
        entry = json.loads(path.read_text()).get(name)
        if entry is None:
            path = request.getfixturevalue("shared") / "golden" / "unet_meta.json"
            entry = json.loads(path.read_text())[name]
        published = entry["config"]
        config = UNetConfig(
            channels=published["num_channels"],
            multipliers=tuple(int(m) for m in published["channel_mult"].split(",")),
            res_blocks=published["num_res_blocks"],
            groups=published["num_groups"],
            additive_skips=published["additive_skips"],
            scale_shift=published["use_scale_shift_norm"],
            resample_in_blocks=published.get("resblock_updown", True),
            resample_x=not published["resample_2d"],
            attention_factors=tuple(
                published["image_size"] // int(size)
                for size in published["attention_resolutions"].split(",")
                if size
            ),
            middle_attention=published["bottleneck_attention"],
            heads=published["num_heads"],
        )
        unet = UNet(config, published["in_channels"]).eval()
        unet.load_state_dict(_golden_weights(entry))
        return unet

    return make


def _golden_weights(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Uniform numbers from one seeded stream, key by key, scaled by the kind of parameter."""
    rng = np.random.default_rng(entry["weight_seed"])
    weights = {}
    for name, shape in entry["keys"]:
        value = 2 * rng.random(tuple(shape), dtype=np.float32) - 1
        if len(shape) >= 2:
            value = value * np.float32(np.sqrt(3 / np.prod(shape[1:])))
        else:
            value = (
                value * np.float32(0.2) + 1 if name.endswith("weight") else value * np.float32(0.1)
            )
        if name.startswith("out.2."):
            value = value * np.float32(entry["out_gain"])
            if name.endswith("bias"):
                value[0] += np.float32(entry["lll_bias"])
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights
