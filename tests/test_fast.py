"""The fast network is the plain one, with fewer operations."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cwdm.passes
from cwdm.case import find_cases
from cwdm.denoiser import Denoiser
from cwdm.diffusion import Diffusion
from cwdm.engine import Engine
from cwdm.errors import InputError
from cwdm.fast import FastUNet, Replayed, accelerated
from cwdm.machine import Precision, resident
from cwdm.memory import footprint
from cwdm.metrics import psnr
from cwdm.modality import Modality
from cwdm.model import default_model, load_model
from cwdm.passes import Passes
from cwdm.streamed import StreamedUNet, transposed
from cwdm.synthesis import Synthesizer
from cwdm.unet import UNet, UNetConfig
from cwdm.volume import brain_mask, read_volumes
from cwdm.wavunet import WavUNet, WavUNetConfig

SMALL = UNetConfig(channels=16, multipliers=(1, 2), res_blocks=1, groups=8)
VARIANTS = {
    "published": SMALL,
    "three levels": replace(SMALL, multipliers=(1, 2, 2), res_blocks=2),
    "averaged skips": replace(SMALL, additive_skips=True),
    "scale and shift": replace(SMALL, scale_shift=True),
    "two axes": replace(SMALL, resample_x=False),
    "attention": replace(SMALL, attention_factors=(2,), middle_attention=True, heads=2),
    "own resampling": replace(SMALL, resample_in_blocks=False),
    "own resampling of two axes": replace(SMALL, resample_in_blocks=False, resample_x=False),
    "labels": replace(SMALL, classes=3),
}


def network(config: UNetConfig, channels: int = 32) -> UNet:
    """With random weights everywhere, also where a new one has zeros."""
    torch.manual_seed(0)
    unet = UNet(config, channels)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, a=2)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return unet.eval()


def inputs(config: UNetConfig, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 32, 8, 12, 4, generator=generator)
    t = torch.tensor([3, 500])[:batch]
    label = (torch.tensor([0, 2])[:batch],) if config.classes else ()
    return x, t, *label


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@settings(deadline=None, max_examples=30)
@given(
    size=st.tuples(*[st.integers(1, 5)] * 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    factors=st.tuples(*[st.sampled_from([1, 2])] * 3),
    seed=st.integers(0, 9),
)
def test_repeating_and_convolving_is_one_transposed_convolution(
    size: tuple[int, int, int],
    channels: tuple[int, int],
    factors: tuple[int, int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels[0], *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(
        channels[1], channels[0], 3, 3, 3, generator=generator, dtype=torch.float64
    )
    repeated = x
    for axis, factor in enumerate(factors, start=2):
        repeated = repeated.repeat_interleave(factor, axis)
    expected = F.conv3d(repeated, weight, padding=1)
    found = F.conv_transpose3d(x, transposed(weight, factors), stride=factors, padding=1)
    torch.testing.assert_close(found, expected)


def kept_in_half(unet: UNet, dtype: torch.dtype = torch.float32) -> StreamedUNet:
    """What a processor gets that does not multiply in bfloat16."""
    return StreamedUNet(unet, dtype, arithmetic=torch.float32)


KINDS = [FastUNet, StreamedUNet, kept_in_half]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_it_is_the_same_network(kind: Callable[..., nn.Module], name: str) -> None:
    config = VARIANTS[name]
    plain, given = network(config), inputs(config)
    expected = plain(*given)
    assert error(kind(plain)(*given), expected) < 1e-5
    half = kind(plain, torch.bfloat16)(*given)
    assert half.dtype == torch.float32
    assert error(half, expected) < 2e-2
    assert torch.equal(plain(*given), expected)  # which has its weights still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_it_is_the_same_network_by_large_planes(name: str, dtype: torch.dtype) -> None:
    """Those that `winograd` convolves, in windows of which the last is not full."""
    config = VARIANTS[name]
    plain, (_, t, *label) = network(config), inputs(config, 1)
    x = torch.randn(1, 32, 20, 36, 32, generator=torch.Generator().manual_seed(2))
    expected = plain(x, t, *label)
    streamed = kept_in_half(plain, dtype)
    for _ in range(2):  # what it keeps is used again
        assert error(streamed(x, t, *label), expected) < (1e-5 if dtype is torch.float32 else 2e-2)
    planar = [each for each in streamed.modules() if getattr(each, "_planar", None)]
    assert bool(planar) == torch.backends.mkldnn.is_available()


@torch.inference_mode()
def test_it_does_not_matter_how_many_planes_are_taken_at_a_time() -> None:
    plain, given = network(VARIANTS["three levels"]), inputs(SMALL, 1)
    few, many = (StreamedUNet(plain, voxels=n)(*given) for n in (1, 10**6))
    assert error(few, many) < 1e-5


@torch.inference_mode()
def test_a_single_plane_is_enough() -> None:
    plain, (_, t) = network(SMALL), inputs(SMALL, 1)
    x = torch.randn(1, 32, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    assert error(StreamedUNet(plain)(x, t), plain(x, t)) < 1e-5


@torch.inference_mode()
def test_an_image_does_not_depend_on_the_one_before() -> None:
    plain, (small, t) = network(VARIANTS["three levels"]), inputs(SMALL, 1)
    large = torch.randn(1, 32, 8, 40, 40, generator=torch.Generator().manual_seed(4))
    streamed, other = StreamedUNet(plain), StreamedUNet(plain)
    streamed(small, t)
    assert torch.equal(streamed(large, t), other(large, t))


def test_bfloat16_needs_no_processor_for_it() -> None:
    """Of which oneDNN is told that it has less than it has."""
    code = """
import torch
from cwdm.streamed import StreamedUNet
from tests.test_fast import SMALL, error, inputs, network
plain, given = network(SMALL), inputs(SMALL, 1)
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
with torch.inference_mode():
    assert error(StreamedUNet(plain, torch.bfloat16)(*given), plain(*given)) < 2e-2
"""
    less = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env=less, cwd=root)


@torch.inference_mode()
def test_channels_may_come_in_parts() -> None:
    plain, (x, t) = network(SMALL), inputs(SMALL)
    streamed = StreamedUNet(plain)
    assert torch.equal(streamed.joining([x[:, :8], x[:, 8:]], t), streamed(x, t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["u16_add_in8", "u16_attn_film_conv", "u16_cat_in32"])
@torch.inference_mode()
def test_it_meets_the_numbers_of_the_published_network(
    kind: Callable[..., nn.Module],
    golden: Callable[[str], dict[str, NDArray[np.float32]]],
    golden_unet: Callable[[str], UNet],
    name: str,
) -> None:
    numbers = {key: torch.from_numpy(value) for key, value in golden(f"unet_{name}").items()}
    fast = kind(golden_unet(name))
    for case in "ab":
        found = fast(numbers[f"x_{case}"], numbers[f"t_{case}"])
        torch.testing.assert_close(found, numbers[f"y_{case}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "kind",
    [UNet, lambda *given: FastUNet(UNet(*given)), lambda *given: StreamedUNet(UNet(*given))],
)
def test_a_grid_that_cannot_be_halved_is_refused(kind: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        kind(SMALL, 8)(torch.zeros(1, 8, 4, 4, 5), torch.tensor([0]))


def test_it_multiplies_less_where_voxels_are_repeated() -> None:
    """Of the one convolution behind a repetition 8 of 27 multiplications are left."""
    config = replace(SMALL, multipliers=(1, 1))
    plain, given = network(config).to("meta"), [x.to("meta") for x in inputs(config, 1)]
    counts = []
    for each in (plain, FastUNet(plain)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            each(*given)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.convolution])
    voxels = given[0][0, 0].numel()
    saved = 2 * 16 * 16 * voxels * (27 - 8)
    averaging = 2 * 2 * 16 * voxels  # counted now that it is a convolution
    assert counts[0] - counts[1] == saved - averaging


def test_the_published_network_takes_half_of_the_memory() -> None:
    shape = (1, 32, 112, 112, 80)
    plain = footprint(lambda: UNet(UNetConfig(), 32), shape)
    fast = footprint(lambda: StreamedUNet(UNet(UNetConfig(), 32)), shape)
    assert fast.network < 0.5 * plain.network
    half = footprint(lambda: StreamedUNet(UNet(UNetConfig(), 32), torch.bfloat16), shape)
    assert half.network < 0.35 * plain.network
    half = footprint(lambda: kept_in_half(UNet(UNetConfig(), 32), torch.bfloat16), shape)
    assert half.network < 0.35 * plain.network


@pytest.mark.parametrize(("native", "arithmetic"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_computed_in_where_the_processor_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, arithmetic: torch.dtype
) -> None:
    about = {"amx_bf16": native, "cpu_name": "Intel Xeon"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about, raising=False)
    wishes: list[bool] = []
    monkeypatch.setattr(Passes, "choose", lambda self, *, compiled=False: wishes.append(compiled))
    model = load_model(default_model(Modality.T2F))
    engine = Engine(model, device="cpu", precision="bf16", compiled=True)
    assert isinstance(engine.denoiser.backbone, StreamedUNet)
    assert engine.denoiser.backbone.dtype is torch.bfloat16
    assert engine.arithmetic is arithmetic
    engine.prepare(engine.settings())
    assert wishes[-1] is native  # otherwise there is nothing to gain


def test_other_networks_keep_their_way() -> None:
    config = WavUNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4)
    torch.manual_seed(0)
    denoiser = Denoiser(WavUNet(config, 8).eval(), Diffusion(schedule="linear"))
    assert accelerated(denoiser, Passes("cpu"), bf16=False) is denoiser
    x, t = torch.randn(1, 8, 8, 8, 8), torch.tensor([5])
    with torch.inference_mode():
        expected = denoiser(x, t)
        half = accelerated(denoiser, Passes("cpu"), bf16=True)(x, t)
    assert half.dtype == torch.float32
    assert 0 < error(half, expected) < 2e-2


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", None)])
def test_a_whole_synthesis_is_the_same_image(
    any_model: Path, simulated: Path, precision: str, tolerance: float | None
) -> None:
    """In half precision within 0.1 dB of the truth as far as the plain one is."""
    case = find_cases(simulated)[0]
    target = Modality.T1N
    truth = read_volumes(case, [target])[target]
    brain = brain_mask(truth)
    ways = (
        Engine(load_model(any_model), device="cpu", precision=precision),  # type: ignore[arg-type]
        Engine(load_model(any_model), device="cpu", reference=True),
    )
    fast, plain = (
        Synthesizer(engine.model, target, engine=engine)(case.without(target)).volume.voxels
        for engine in ways
    )
    spread = plain[brain].std()
    if tolerance is not None:
        assert np.abs(fast - plain).max() < tolerance * spread
    span = float(np.ptp(truth.voxels[brain]))
    figures = [psnr(image, truth.voxels, brain, data_range=span) for image in (fast, plain)]
    assert figures[0] == pytest.approx(figures[1], abs=0.1)


def _estimated_and_measured(
    precision: Precision, sizes: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Bytes held before each chain, at most by the estimate, and at most in fact; in a new
    process."""
    engine = Engine(load_model(default_model(Modality.T2F)), device="cpu", precision=precision)
    channels = engine.model.config.transform.channels
    found = []
    for size in sizes:
        grid = [n // 2 for n in size]
        cond = torch.ones(1, 3 * channels, *grid)
        draw = partial(torch.randn, 1, channels, *grid)
        held, estimate = resident("VmRSS"), engine.peak(size)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        engine.run(engine.settings(), draw, cond=cond)
        found.append((held, estimate, resident("VmHWM")))
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_memory_is_near_what_is_measured(precision: Precision) -> None:
    """For the first chain of a process, and for those that follow smaller and larger ones."""
    sizes = [(256, 256, 192), (160, 160, 160), (160, 160, 160), (240, 240, 160), (160, 192, 144)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(_estimated_and_measured, precision, sizes).result()
    held, _, measured = found[0]
    assert measured > 1.5 * held  # there is something to estimate
    for _, estimate, measured in found:
        assert estimate == pytest.approx(measured, rel=0.15)


def test_what_a_process_holds_by_now_counts() -> None:
    engine = Engine(load_model(default_model(Modality.T2F)), device="cpu", precision="fp32")
    size = (64, 64, 64)
    engine.memory_limit = engine.peak(size) + 2**27
    engine.fit(size)
    more = torch.ones(2**26)  # a quarter of a GiB, as a later case may take
    with pytest.raises(InputError, match="found a limit of"):
        engine.fit(size)
    del more
    engine.fit(size)


@pytest.mark.parametrize("name", ["published", "averaged skips", "scale and shift", "two axes"])
@torch.inference_mode()
def test_it_is_the_same_network_with_the_kernels_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, kernels: Any, name: str
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(cwdm.passes, "kernels", lambda: kernels)
    passes = Passes("cuda")
    assert passes.way == "kernels"
    plain, given = network(VARIANTS[name]), inputs(VARIANTS[name], 1)
    expected = plain(*given)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        fast = FastUNet(plain, dtype, passes).to(device)
        assert error(fast(*(x.to(device) for x in given)).cpu(), expected) < tolerance
        plain.cpu()


class Recording:
    """What stands in for a CUDA graph: replaying calls the network again."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_network_is_recorded_at_the_second_call_of_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda recording: nullcontext())
    calls: list[int] = []

    class Counting(FastUNet):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            calls.append(x.shape[2])
            return super().forward(x, t, label)

    replayed = Replayed(Counting(network(SMALL)))
    x, t = inputs(SMALL, 1)
    with torch.inference_mode():
        expected = replayed(x, t)
        assert calls == [8]
        assert torch.equal(replayed(x, t), expected)
        assert calls == [8, 8]  # recorded
        other = replayed(x + 1, t)
        assert calls == [8, 8]  # replayed, with what was given now
        assert replayed._recording is not None
        assert torch.equal(replayed._recording.inputs[0], x + 1)
        assert other is not replayed._recording.output  # which the next call overwrites
        replayed(x[:, :, :4], t)
        assert calls == [8, 8, 4]
        replayed(x, t)
        assert calls == [8, 8, 4, 8]  # forgotten meanwhile


def test_an_engine_keeps_one_network() -> None:
    """In half precision the weights it was given are let go."""
    model = load_model(default_model(Modality.T2F))
    (conv,) = map(weakref.ref, [next(model.denoiser.backbone.input_blocks.parameters())])  # type: ignore[union-attr]
    engine = Engine(model, device="cpu", precision="bf16")
    del model
    gc.collect()
    assert conv() is None
    assert isinstance(engine.model.denoiser.backbone, StreamedUNet)


def test_more_than_the_limit_of_memory_is_refused() -> None:
    engine = Engine(load_model(default_model(Modality.T2F)), device="cpu", memory_limit=2**40)
    engine.fit((240, 240, 160))
    engine.memory_limit = 10**8
    with pytest.raises(
        InputError,
        match=r"small-t2f: 240x240x160 voxels take about .* GB, found a limit of 0.10 GB",
    ):
        engine.fit((240, 240, 160))
    engine.memory_limit = engine.peak((240, 240, 160)) - 10**6
    with pytest.raises(InputError, match="expected --precision bf16"):
        engine.fit((240, 240, 160))


@torch.inference_mode()
def test_on_a_gpu_it_goes_by_planes_where_the_limit_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A processor that is told to compute as a GPU does."""
    model = load_model(default_model(Modality.T2F))
    engine = Engine(model, device="cpu", precision="fp32", reference=True, memory_limit=2**40)
    engine._spare, engine.reference = deepcopy(engine.denoiser), False
    engine.streamed, engine._ways = False, (False, True)
    monkeypatch.setattr(cwdm.passes, "kernels", lambda: None)
    engine.passes = Passes("cuda")
    size, x, t = (256, 256, 256), torch.randn(1, 8, 32, 32, 32), torch.tensor([999])
    cond = torch.randn(1, 24, 32, 32, 32)
    expected, whole = engine.denoiser(x, t, cond), engine.footprint(size).network
    engine.fit(size)
    assert not engine.streamed
    engine.memory_limit = engine.peak(size) - whole // 4
    before = weakref.ref(engine.denoiser.backbone)
    del model
    engine.fit(size)
    gc.collect()
    assert before() is None
    assert engine.streamed
    assert isinstance(engine.model.denoiser.backbone, StreamedUNet)
    assert engine.footprint(size).network < whole * 3 / 4
    assert error(engine.denoiser(x, t, cond), expected) < 1e-5
    engine.fit([n // 2 for n in size])
    assert not engine.streamed  # which does not depend on the images before
    assert isinstance(engine.denoiser.backbone, FastUNet)
    assert error(engine.denoiser(x, t, cond), expected) < 1e-5
