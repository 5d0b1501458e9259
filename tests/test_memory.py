"""The estimate of memory, against closed forms, published networks and what torch allocates."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cwdm import memory
from cwdm.memory import footprint
from cwdm.passes import Passes
from cwdm.streamed import StreamedUNet
from cwdm.unet import UNet, UNetConfig
from cwdm.wavelet import filters
from cwdm.wavunet import WavUNet, WavUNetConfig

SMALL = UNetConfig(channels=32, multipliers=(1, 2), res_blocks=1, groups=8)


class Chain(nn.Module):
    """1 -> 3 -> 2 channels; the input stays alive, as in a sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 3, 1), nn.Conv3d(3, 2, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = h.view_as(h)  # the same memory
        return self.second(h).relu()  # type: ignore[no-any-return]


def test_a_chain_takes_what_is_alive_at_once() -> None:
    voxels = 8 * 9 * 10
    found = footprint(Chain, (1, 1, 8, 9, 10), channels=1)
    assert found.network == 4 * voxels * (1 + 3 + 2 + 2)
    assert found.weights == 4 * (3 + 3 + 6 + 2)
    assert found.sampler == 4 * voxels * 2
    assert found.total == found.network + found.weights + found.sampler


@pytest.mark.parametrize(
    ("config", "shape", "gib"),
    [
        (UNetConfig(), (1, 32, 32, 32, 32), 0.09),
        (UNetConfig(), (1, 32, 112, 112, 80), 2.87),
        (UNetConfig(additive_skips=True), (1, 8, 64, 64, 64), 0.46),
    ],
    ids=["cwdm at 64x64x64", "cwdm at 224x224x160", "wdm at 128x128x128"],
)
def test_published_networks(config: UNetConfig, shape: tuple[int, ...], gib: float) -> None:
    """What they need at the least, and no more than a tenth above it."""
    found = footprint(lambda: UNet(config, shape[1]), shape)
    assert 1 <= found.network / 2**30 / gib < 1.1


def test_what_torch_allocates() -> None:
    """Two images at once, since torch unfolds single small ones into a matrix."""
    torch.manual_seed(0)
    network, x = UNet(SMALL, 8).eval(), torch.randn(2, 8, 16, 16, 16)
    t = torch.zeros(2, dtype=torch.long)
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        network(x, t)
    events = record.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    now = peak = x.nbytes
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    assert footprint(lambda: UNet(SMALL, 8), x.shape).network == pytest.approx(peak, rel=0.25)


def test_half_precision_takes_less_but_not_for_the_weights() -> None:
    full, half = (
        footprint(lambda: UNet(SMALL, 8), (1, 8, 16, 16, 16), bf16=bf16) for bf16 in (False, True)
    )
    assert 0.5 < half.network / full.network < 0.8
    assert (half.weights, half.sampler) == (full.weights, full.sampler)
    assert full.weights == sum(4 * tensor.numel() for tensor in UNet(SMALL, 8).parameters())


def test_conditions_are_part_of_the_input_but_not_of_the_sampler() -> None:
    found = footprint(lambda: UNet(SMALL, 32), (1, 32, 8, 8, 8))
    assert found.sampler == 2 * 4 * 8 * 8**3


def test_a_network_with_labels() -> None:
    config = UNetConfig(channels=8, multipliers=(1,), groups=4, classes=4)
    assert footprint(lambda: UNet(config, 8), (1, 8, 8, 8, 8)).network > 0


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, classes=3, attention_factors=(2,), middle_attention=True, heads=2),
        replace(SMALL, additive_skips=True, scale_shift=True, resample_in_blocks=False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_operations_return_is_known_as_torch_finds_it(
    monkeypatch: pytest.MonkeyPatch, config: UNetConfig, dtype: torch.dtype
) -> None:
    known = memory._outlined
    compared = set()

    def compare(func: Any, args: Any, kwargs: Any) -> Any:
        found = known(func, args, kwargs)
        if found is not None:
            expected = func(*args, **kwargs)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype), func
            compared.add(func._schema.name)
        return found

    monkeypatch.setattr(memory, "_outlined", compare)
    outline = Passes("cpu").outline()
    footprint(lambda: StreamedUNet(UNet(config, 32), dtype, outline), (1, 32, 8, 8, 8))
    assert {"aten::linear", "aten::addmm", "aten::mean", "aten::arange"} <= compared


def test_an_estimate_does_not_load_the_compiler() -> None:
    """Which takes a second and 140 MB."""
    code = """
import sys
from cwdm.engine import Engine
from cwdm.model import find_model, load_model
for name in ("small-t2f", "small-brain"):
    engine = Engine(load_model(find_model(name)), device="cpu", precision="fp32")
    assert engine.footprint((64, 64, 64)).network > 0
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_without_numbers_stays_behind() -> None:
    config = WavUNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4)
    filters.cache_clear()  # which the network fills
    assert footprint(lambda: WavUNet(config, 8), (1, 8, 8, 8, 8)).network > 0
    network = WavUNet(config, 8)
    assert network(torch.randn(1, 8, 8, 8, 8), torch.zeros(1)).sum().item() != 0


def test_attention_never_makes_the_matrix_of_all_pairs() -> None:
    """Of its 4096 positions, 64 MiB."""
    config = replace(SMALL, channels=16, attention_factors=(1,))
    network, x = UNet(config, 8).eval(), torch.randn(1, 8, 16, 16, 16)
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        network(x, torch.tensor([5]))
    events = record.profiler.kineto_results.events()
    assert max(event.nbytes() for event in events if event.name() == "[memory]") < 2**25
