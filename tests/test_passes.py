"""What lies between convolutions, in every way, against what torch has for it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cwdm.compilers as compilers
import cwdm.passes as module
from cwdm.passes import Passes, rows

SIZE = (4, 6, 10)
WAYS = ["torch", "kernels"]


@pytest.fixture
def passes(request: pytest.FixtureRequest) -> Any:
    """The functions, in one of the ways."""
    return Passes("cpu") if request.param == "torch" else request.getfixturevalue("kernels")


def on(passes: Any) -> str:
    """The device it works on."""
    cuda = torch.cuda.is_available() and not isinstance(passes, Passes)
    return "cuda" if cuda else "cpu"


def features(channels: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, *SIZE, generator=generator) * 2 + 1
    return x.to(device, dtype, memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("passes", WAYS, indirect=True)
@pytest.mark.parametrize("channels", [8, 24, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_and_activating_are_group_normalization_and_silu(
    passes: Any, channels: int, dtype: torch.dtype
) -> None:
    device, groups, eps = on(passes), 4, 1e-5
    x = features(channels, dtype, device)
    weight, bias, offset = torch.randn(3, channels).to(device)
    shifted = x.float() + offset[:, None, None, None]
    expected = F.silu(F.group_norm(shifted, groups, weight, bias, eps))
    flat = rows(x)
    scale, shift = passes.scaling(flat, offset, weight, bias, groups, eps)
    found = passes.activate(flat, scale, shift)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), rows(expected), atol=tolerance, rtol=tolerance)
    passes.activate_(flat, scale, shift)  # and in place
    torch.testing.assert_close(flat, found)


@pytest.mark.parametrize("passes", WAYS, indirect=True)
@pytest.mark.parametrize("repeat", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_what_goes_around_is_repeated_and_added(passes: Any, repeat: tuple[int, ...]) -> None:
    device = on(passes)
    x = features(24, torch.float32, device)
    around = torch.randn(1, 24, *(n // f for n, f in zip(SIZE, repeat, strict=True)))
    around = around.to(device, memory_format=torch.channels_last_3d)
    offset = torch.randn(24).to(device)
    wide = F.interpolate(around, scale_factor=[float(f) for f in repeat])
    expected = x + wide + offset[:, None, None, None]
    passes.add(rows(x), rows(around), offset, SIZE, repeat)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("passes", WAYS, indirect=True)
@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2)])
def test_averages_are_those_of_pooling(passes: Any, factors: tuple[int, ...]) -> None:
    x = features(24, torch.float32, on(passes))
    found = passes.averaged(rows(x), SIZE, factors)
    expected = F.avg_pool3d(x.contiguous(), factors)
    torch.testing.assert_close(
        found, rows(expected.contiguous(memory_format=torch.channels_last_3d))
    )


@pytest.mark.parametrize("passes", WAYS, indirect=True)
def test_joined_rows_have_the_channels_of_both(passes: Any) -> None:
    one, other = (features(n, torch.bfloat16, on(passes), n) for n in (16, 24))
    assert torch.equal(
        passes.joined(rows(one), rows(other)), torch.cat([rows(one), rows(other)], 1)
    )


@pytest.fixture(params=["torch", pytest.param("compiled", marks=pytest.mark.slow)])
def windows(request: pytest.FixtureRequest) -> Passes:
    """Those for windows, in one of the ways."""
    made = Passes("cpu")
    if made.choose(compiled=request.param == "compiled") != request.param:
        pytest.skip("no compiler here")
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_are_filled_with_what_is_activated(windows: Passes, dtype: torch.dtype) -> None:
    x, (scale, shift) = features(24, dtype, "cpu"), torch.randn(2, 24)
    wide = torch.zeros(rows(x).shape[0], 40, dtype=dtype)
    windows.fill(rows(x), scale, shift, wide[:, 8:32])
    expected = F.silu(rows(x).float() * scale + shift)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(wide[:, 8:32].float(), expected, atol=tolerance, rtol=tolerance)
    assert not wide[:, :8].any()
    assert not wide[:, 32:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("besides", [True, False])
def test_what_is_put_is_summed(windows: Passes, dtype: torch.dtype, besides: bool) -> None:
    x, around = (rows(features(24, dtype, "cpu", seed)) for seed in (0, 1))
    result = torch.empty_like(x)
    sums = windows.put(x.clone(), around if besides else None, result)
    expected = x.double() + (around.double() if besides else 0)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    true = torch.stack([result.double().sum(0), result.double().square().sum(0)])
    torch.testing.assert_close(sums.double(), true, atol=tolerance * 100, rtol=tolerance)


@settings(deadline=None, max_examples=20)
@given(size=st.tuples(*[st.integers(1, 5)] * 3), channels=st.integers(1, 9))
def test_rows_are_a_view(size: tuple[int, int, int], channels: int) -> None:
    x = torch.randn(1, channels, *size).contiguous(memory_format=torch.channels_last_3d)
    flat = rows(x)
    assert torch.equal(flat, x[0].flatten(1).T)
    flat.zero_()
    assert not x.any()


def test_outlines_have_the_shapes_of_the_work() -> None:
    passes, x, offset = Passes("cpu"), features(24, torch.bfloat16, "cpu"), torch.zeros(24)
    outline = passes.outline()
    calls: dict[str, tuple[Any, ...]] = {
        "scaling": (rows(x), offset, offset, offset, 4, 1e-5),
        "activate": (rows(x), offset, offset),
        "averaged": (rows(x), SIZE, (2, 2, 2)),
        "joined": (rows(x), rows(x)),
    }
    for name, arguments in calls.items():
        found, expected = (getattr(each, name)(*arguments) for each in (outline, passes))
        for one, other in zip(tuple(found), tuple(expected), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
    before = x.clone()
    outline.activate_(rows(x), offset, offset)
    outline.add(rows(x), rows(x), offset, SIZE, (1, 1, 1))
    assert torch.equal(x, before)


def test_without_a_compiler_there_is_a_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*_: object) -> None:
            raise RuntimeError("No working C++ compiler found\nand much more")

        return fail

    monkeypatch.setattr(compilers, "loops", broken)
    monkeypatch.setattr(
        module, "loops_work", compilers.loops_work.__wrapped__
    )  # not what it found before
    with caplog.at_level("INFO"):
        passes = Passes("cpu")
        assert passes.choose(compiled=True) == "torch"
    assert caplog.messages == ["without compiled loops: No working C++ compiler found"]


def test_without_a_gpu_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compilers.kernels.__wrapped__() is None


def test_kernels_are_chosen_where_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [each.__name__ for each in module._WHOLE]
    theirs = SimpleNamespace(**{name: object() for name in names})
    monkeypatch.setattr(module, "kernels", lambda: theirs)
    passes = Passes("cuda")
    assert passes.way == "kernels"
    assert [getattr(passes, name) for name in names] == [getattr(theirs, name) for name in names]


def test_the_transform_as_a_kernel(kernels: Any) -> None:
    from cwdm.wavelet import dwt3, idwt3

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 6, 8, 10)
    y = dwt3(x[:, None], lll=0.3, rest=2.0)
    found = kernels.haar(x.to(device), 0.3, 2.0).cpu()
    torch.testing.assert_close(found, y)
    back = kernels.inverse_haar(y.to(device), 1 / 0.3, 0.5).cpu()
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(idwt3(y, lll=1 / 0.3, rest=0.5)[:, 0], x)
