"""FID, MMD and MS-SSIM against closed forms, Med3D's network, the cache, and the command."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.ndimage import correlate1d
from torch import Tensor, nn

from cwdm.cli.main import cwdm
from cwdm.errors import InputError
from cwdm.fidelity import (
    FILES,
    Extractor,
    Moments,
    View,
    caveats,
    distances,
    diversity,
    draw_pairs,
    features,
    find_images,
    frechet_distance,
    kernel_distance,
    med3d,
    ms_ssim,
    scales,
    voxel_size_mm,
)
from cwdm.modality import Modality
from cwdm.volume import read_volume, write_volume

MakeImage = Callable[..., Path]


def moments(vectors: NDArray[np.floating]) -> Moments:
    whole = Moments()
    whole.add(vectors)
    return whole


def test_moments_of_a_stream_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(1000, 0.1, (57, 5)).astype(np.float32)  # far from 0: sums of squares fail
    stream = Moments()
    for part in np.split(vectors, [1, 2, 10, 40]):
        stream.add(part)
    np.testing.assert_allclose(stream.mean, vectors.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(stream.covariance, np.cov(vectors.T.astype(float)), rtol=1e-9)


def test_fid_of_two_normal_distributions_is_the_closed_form() -> None:
    """For covariances that commute it is |m - m'|^2 + sum (s - s')^2 over the axes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 6))
    noise -= noise.mean(axis=0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T  # covariance exactly 1
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    one, other = np.array([1, 2, 3, 4, 5, 6.0]), np.array([2, 2, 1, 4, 7, 0.5])
    shift = np.arange(6) / 10
    x, y = (white * one) @ turn, (white * other) @ turn + shift
    expected = shift @ shift + ((one - other) ** 2).sum()
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-8)


def test_fid_of_fewer_images_than_features() -> None:
    """The covariances are singular; the trace of the root is the nuclear norm of X Y^T / (n-1)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 64)), rng.normal(0.2, 1.1, size=(20, 64))
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum() / 19
    traces = (np.square(a).sum() + np.square(b).sum()) / 19
    expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + traces - 2 * root
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-5)


def test_a_root_with_a_large_imaginary_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scipy.linalg.sqrtm", lambda matrix: matrix + 0.01j * np.eye(len(matrix)))
    one = moments(np.random.default_rng(0).normal(size=(9, 3)))
    with pytest.raises(InputError, match=r"imaginary part of 0\.01"):
        frechet_distance(one, one)


def test_a_root_that_is_not_finite_is_taken_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_singular(matrix: NDArray[np.float64]) -> NDArray[Any]:
        return np.full_like(matrix, np.nan) if np.linalg.matrix_rank(matrix) < 3 else sqrtm(matrix)

    flat = np.random.default_rng(0).normal(size=(9, 3)) * [1, 1, 0]
    monkeypatch.setattr("scipy.linalg.sqrtm", fail_on_singular)
    other = flat * [2, 2, 1]
    expected = np.trace(np.cov(flat.T))  # (1 - 2)^2 times the variances
    found = frechet_distance(moments(flat), moments(other))
    assert found - np.square(flat.mean(axis=0)).sum() == pytest.approx(expected, rel=1e-4)


def test_mmd_is_the_sum_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(0.5, 1, size=(5, 3))

    def k(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3)

    def within(z: NDArray[np.floating]) -> float:
        pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
        return sum(k(z[i], z[j]) for i, j in pairs) / len(pairs)

    between = sum(k(a, b) for a in x for b in y) / (7 * 5)
    assert kernel_distance(x, y) == pytest.approx(within(x) + within(y) - 2 * between)


def test_mmd_tells_shifted_sets_from_those_of_one_distribution() -> None:
    rng = np.random.default_rng(0)
    same = [kernel_distance(*rng.normal(size=(2, 100, 8))) for _ in range(50)]
    assert np.mean(same) == pytest.approx(0, abs=3 * np.std(same) / np.sqrt(50))  # no bias
    assert min(same) < 0
    x, y = rng.normal(size=(2, 100, 8))
    assert kernel_distance(x, y + 1) > 20 * np.std(same)


class Bottleneck(nn.Module):
    """As MedicalNet writes it: 1x1x1, 3x3x3 dilated, 1x1x1, and a shortcut."""

    def __init__(self, inside: int, planes: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inside, planes, 1, bias=False)
        self.conv2 = nn.Conv3d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.conv3 = nn.Conv3d(planes, 4 * planes, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm3d(planes), nn.BatchNorm3d(planes)
        self.bn3 = nn.BatchNorm3d(4 * planes)
        self.downsample = None
        if stride != 1 or inside != 4 * planes:
            shortcut = nn.Conv3d(inside, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class MedicalNet(nn.Module):
    """ResNet-50 of MedicalNet, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        inside = 64
        for number, (planes, blocks, stride, dilation) in enumerate(
            [(64, 3, 1, 1), (128, 4, 2, 1), (256, 6, 1, 2), (512, 3, 1, 4)], start=1
        ):
            layer = [Bottleneck(inside, planes, stride, dilation)]
            layer += [Bottleneck(4 * planes, planes, 1, dilation) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*layer))
            inside = 4 * planes

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return x.mean(dim=(2, 3, 4))


def test_med3d_computes_what_its_own_construction_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    oracle = MedicalNet()
    image = torch.rand(40, 32, 36)
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1  # statistics of this image: every layer then has a say
    with torch.no_grad():
        oracle(image[None, None])
    oracle.eval()
    state = {f"module.{name}": value for name, value in oracle.state_dict().items()}
    path = tmp_path / "resnet_50_23dataset.pth"
    torch.save({"epoch": 1, "state_dict": state}, path)
    with torch.inference_mode():
        expected = oracle(image[None, None])[0].numpy()
    found = Extractor.load(path, device="cpu")(image)
    assert found.shape == (2048,)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    del state["module.layer4.2.conv3.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(InputError, match="not the weights of Med3D"):
        med3d(path)


class Tiny(nn.Module):
    """Four features: means over eighths of the image, mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d(2)
        self.mix = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.pool(image).flatten(1))
        return mixed


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "features.pt"
    torch.jit.save(torch.jit.script(Tiny()), path)
    return path


@pytest.fixture
def write(make_image: MakeImage) -> Callable[..., Path]:
    """Write an image of a smooth brain of its own for each seed."""

    def write(name: str, seed: int = 0, pad: int = 2, voxel_mm: float = 1.0) -> Path:
        rng = np.random.default_rng(seed)
        shape = (20, 22, 18)
        grid = (np.indices(shape).T - (np.array(shape) - 1) / 2).T
        brain = (np.square(grid) / np.reshape([100, 121, 81], (3, 1, 1, 1))).sum(axis=0) < 1
        voxels = np.where(brain, rng.uniform(100, 300, shape) + 10 * rng.normal() * grid[0], 0)
        affine = np.diag([-voxel_mm, -voxel_mm, voxel_mm, 1])
        return make_image(name, voxels=np.pad(voxels, pad).astype(np.int16), affine=affine)

    return write


def test_the_view_does_not_depend_on_background_position_or_unit(
    write: Callable[..., Path], make_image: MakeImage
) -> None:
    view = View((32, 32, 32))
    image = view(write("a.nii.gz"))
    assert image.shape == (32, 32, 32)
    assert (float(image.min()), float(image.max())) == (0, 1)
    torch.testing.assert_close(view(write("b.nii.gz", pad=9)), image)
    volume = read_volume(write("a.nii.gz"))
    stored = np.pad(3 * volume.voxels[::-1, ::-1], ((0, 5), (0, 0), (7, 0)))
    moved = make_image("c.nii.gz", voxels=stored, affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    torch.testing.assert_close(view(moved), image)
    assert view(write("a.nii.gz"))[:6].abs().max() == 0  # the brain is in the middle
    tight = View((8, 8, 8))(write("a.nii.gz"))
    assert (tight > 0).float().mean() > 0.9


def test_a_view_brings_voxels_to_a_size(write: Callable[..., Path]) -> None:
    coarse = write("a.nii.gz", voxel_mm=2.0)
    assert voxel_size_mm(coarse) == pytest.approx(2)
    fine = View((64, 64, 64), spacing_mm=1.0)(coarse)
    taken = View((32, 32, 32))(coarse)
    assert fine.sum() == pytest.approx(8 * float(taken.sum()), rel=0.01)
    torch.testing.assert_close(View((32, 32, 32), spacing_mm=2.0)(coarse), taken)


def test_features_are_computed_once(
    write: Callable[..., Path], network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(f"{seed}.nii.gz", seed) for seed in range(3)]
    extractor, view, cache = Extractor.load(network), View((16, 16, 16)), tmp_path / "cache"
    seen: list[Path] = []
    look = View.__call__

    def count(self: View, path: Path) -> Tensor:
        seen.append(path)
        return look(self, path)

    monkeypatch.setattr(View, "__call__", count)
    first = list(features(paths[:2], view, extractor, cache))
    again = list(features(paths[::-1], view, extractor, cache))
    assert seen == paths
    np.testing.assert_array_equal(again[::-1][:2], first)
    np.testing.assert_allclose(first[0], extractor(look(view, paths[0])))
    write("0.nii.gz", seed=9)  # another image of the same name
    (changed,) = features(paths[:1], view, extractor, cache)
    assert not np.allclose(changed, first[0])
    list(features(paths[:1], View((18, 16, 16)), extractor, cache))
    assert len(seen) == 5


def test_the_order_of_images_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30, 4)).astype(np.float32)
    values = [
        [f.value for f in distances(x[order], y[order])]
        for order in ([*range(30)], rng.permutation(30))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def published_ms_ssim(x: NDArray[np.floating], y: NDArray[np.floating], levels: int) -> float:
    """By separable windows, from the equations of Wang et al. 2003."""
    window = np.exp(-((np.arange(7) - 3) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def smooth(image: NDArray[np.floating]) -> NDArray[np.floating]:
        for axis in range(3):
            image = correlate1d(image, window, axis)
        return image[3:-3, 3:-3, 3:-3]

    def halve(image: NDArray[np.floating]) -> NDArray[np.floating]:
        a, b, c = (n // 2 for n in image.shape)
        blocks = image[: 2 * a, : 2 * b, : 2 * c].reshape(a, 2, b, 2, c, 2)
        halved: NDArray[np.floating] = blocks.mean(axis=(1, 3, 5))
        return halved

    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:levels]
    result = 1.0
    for level, weight in enumerate(weights / weights.sum()):
        mx, my = smooth(x), smooth(y)
        vx, vy, c = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        contrast = (2 * c + 0.03**2) / (vx + vy + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        term = (luminance * contrast if level == levels - 1 else contrast).mean()
        result *= max(term, 0) ** weight
        x, y = halve(x), halve(y)
    return float(result)


def test_ms_ssim_is_that_of_its_equations() -> None:
    rng = np.random.default_rng(0)
    one = rng.random((30, 28, 33))
    other = 0.7 * one + 0.3 * rng.random(one.shape)
    found = ms_ssim(*(torch.from_numpy(each).float() for each in (one, other)))
    assert found == pytest.approx(published_ms_ssim(one, other, 3), abs=1e-4)
    assert ms_ssim(torch.ones(9, 9, 9), torch.ones(9, 9, 9)) == pytest.approx(1)


def test_ms_ssim_has_as_many_scales_as_there_is_room_for() -> None:
    sizes = (7, 13, 14, 28, 63, 96, 112, 256)
    assert [scales((size, 300, 300)) for size in sizes] == [1, 1, 2, 3, 4, 4, 5, 5]
    with pytest.raises(InputError, match="too small"):
        scales((6, 300, 300))


def test_pairs_are_drawn_without_repetition() -> None:
    everything = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert draw_pairs(6, 15) == draw_pairs(6, 100) == everything
    some = draw_pairs(6, 5, seed=1)
    assert len(set(some)) == 5
    assert set(some) < set(everything)
    assert some == draw_pairs(6, 5, seed=1) != draw_pairs(6, 5, seed=2)
    found = diversity("real", [0.25, 0.75])
    assert (found.value, found.low, found.high, found.pairs) == (0.5, 0.25, 0.75, 2)


def test_images_are_found_by_modality(make_image: MakeImage, tmp_path: Path) -> None:
    for name in ("p1/p1-t1n", "p1/p1-t1c", "p1/p1-seg", "p2/p2_t1", "p2/p2_flair"):
        make_image(f"cases/{name}.nii.gz")
    for name in ("sample_0_0", "sample_1_0"):
        make_image(f"made/{name}.nii.gz")
    found = find_images(tmp_path / "cases", Modality.T1N)
    assert [path.name for path in found] == ["p1-t1n.nii.gz", "p2_t1.nii.gz"]
    assert len(find_images(tmp_path / "made")) == 2
    with pytest.raises(InputError, match="found images of t1c, t1n, t2f, expected one"):
        find_images(tmp_path / "cases")
    with pytest.raises(InputError, match=r"found 1 image\(s\) of t1c, expected at least two"):
        find_images(tmp_path / "cases", Modality.T1C)
    with pytest.raises(InputError, match="not a folder"):
        find_images(tmp_path / "absent")


def test_maps_of_several_samples_are_no_images(make_image: MakeImage, tmp_path: Path) -> None:
    """As `cwdm synthesize --samples 2` writes them; an image may be called high all the same."""
    for case in ("p1", "p2"):
        for ending in ("t1n", "t1n-high", "t1n-low", "t1n-std", "seg"):
            make_image(f"made/{case}-{ending}.nii.gz")
    for modality in (None, Modality.T1N):
        found = find_images(tmp_path / "made", modality)
        assert [path.name for path in found] == ["p1-t1n.nii.gz", "p2-t1n.nii.gz"]
    for name in ("field-high", "field-low"):
        make_image(f"named/{name}.nii.gz")
    assert len(find_images(tmp_path / "named")) == 2


def run(*words: object) -> Result:
    return CliRunner().invoke(cwdm, ["fidelity", *map(str, words)])


def test_the_command_measures_and_records(
    write: Callable[..., Path], network: Path, tmp_path: Path
) -> None:
    for seed in range(4):
        write(f"real/{seed}/{seed}-t1n.nii.gz", seed)
        write(f"made/{seed}-t1n.nii.gz", seed, pad=3)
        write(f"other/{seed}-t1n.nii.gz", seed + 10)
    output = tmp_path / "out"
    words = ("--features", network, "--size", 32, "--pairs", 4, "--output", output)
    result = run("--real", tmp_path / "real", "--generated", tmp_path / "made", *words)
    assert result.exit_code == 0, result.output
    assert "note: 4 real and 4 generated images: FID depends on the number" in result.stderr
    assert "4 real and 4 generated images" in result.stdout
    with (output / FILES[0]).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["of"], row["pairs"]) for row in rows] == [
        ("fid", "generated", ""),
        ("mmd", "generated", ""),
        ("ms-ssim", "generated", "4"),
        ("ms-ssim", "real", "4"),
    ]
    assert float(rows[0]["value"]) == pytest.approx(0, abs=1e-6)  # the same brains
    assert rows[2]["value"] == rows[3]["value"]
    record = json.loads((output / FILES[1]).read_text())
    assert record["real"]["images"] == record["generated"]["images"] == 4
    assert (record["size"], record["spacing_mm"], record["scales of MS-SSIM"]) == (32, 1.0, 3)
    others = ("--real", tmp_path / "real", "--generated", tmp_path / "other", *words)
    assert "already exists" in run(*others).stderr
    assert run(*others, "--overwrite").exit_code == 0
    with (output / FILES[0]).open() as file:
        assert float(next(csv.DictReader(file))["value"]) > 1e-6
    assert len(list((output / "features").iterdir())) == 12


def test_what_is_no_extractor_is_refused(
    write: Callable[..., Path], network: Path, tmp_path: Path
) -> None:
    for seed in range(2):
        write(f"images/{seed}.nii.gz", seed)
    images = ("--real", tmp_path / "images", "--generated", tmp_path / "images")
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "text.pth").write_text("no network")
    torch.jit.save(torch.jit.script(nn.Conv3d(1, 2, 1)), tmp_path / "conv.pt")
    torch.jit.save(torch.jit.script(nn.Conv3d(4, 2, 1)), tmp_path / "four.pt")
    for name, said in {
        "text.pt": "expected that (.pt) or the weights of Med3D (.pth)",
        "text.pth": "not the weights of Med3D's ResNet-50",
        "conv.pt": "put out (1, 2, 16, 16, 16), expected features of shape (1, D)",
        "four.pt": "does not take an image of 16x16x16",
        "absent.pt": "cannot be read",
    }.items():
        words = ("--features", tmp_path / name, "--size", 16, "--output", tmp_path / "out")
        result = run(*images, *words)
        assert (result.exit_code, said in result.stderr) == (2, True), (name, result.stderr)
    assert not (tmp_path / "out" / FILES[0]).exists()


def test_synthetic_images_among_the_real_ones_are_told(make_image: MakeImage) -> None:
    paths = [make_image(f"{number}.nii.gz") for number in range(2)]
    image = read_volume(paths[0])
    write_volume(image.voxels, image, paths[0].with_name("made.nii.gz"), "cwdm 1 SYNTHETIC")
    paths[0] = paths[0].with_name("made.nii.gz")
    assert caveats(paths, paths)[1] == "1 of 2 real images are marked as synthetic"
    assert len(caveats(paths[1:] * 500, paths * 250)) == 0
    assert "499 real and 500 generated" in caveats(paths[1:] * 499, paths * 250)[0]
