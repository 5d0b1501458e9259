"""Fixtures that several test modules share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

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
