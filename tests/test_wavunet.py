"""The WavU-Net against the published one: names, shapes, the shared blocks and outputs."""

import io

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.unet import UNetConfig
from cwdm.wavelet import dwt3, idwt3
from cwdm.wavunet import (
    DownBlock,
    UpBlock,
    WaveletDownsample,
    WavUNet,
    WavUNetConfig,
)

W8 = WavUNetConfig(channels=8, multipliers=(1, 2), groups=4)


def golden_weights(parameters, seed=103, out_gain=0.25, lll_bias=0.12):
    """Weights of the golden numbers: one seeded stream of uniform numbers, key by key."""
    rng = np.random.default_rng(seed)
    for name, parameter in parameters:
        value = 2 * rng.random(tuple(parameter.shape), dtype=np.float32) - 1
        if value.ndim >= 2:
            value *= np.float32(np.sqrt(3 / np.prod(value.shape[1:])))
        else:
            value = 1 + np.float32(0.2) * value if "weight" in name else np.float32(0.1) * value
        if name.startswith("out.2."):
            value *= np.float32(out_gain)
            if name.endswith("bias"):
                value[0] += np.float32(lll_bias)
        yield name, torch.from_numpy(value)


@pytest.fixture
def w8():
    """The published small network; a shared block is filled once, under its first name."""
    net = WavUNet(W8, 8).eval()
    weights = dict(golden_weights(net.named_parameters()))
    shared_names = set(net.state_dict()) - set(weights)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == (shared_names, [])
    return net


def test_output_equals_the_published_one(golden, w8):
    numbers = {k: torch.from_numpy(v) for k, v in golden("unet_w8_in8").items()}
    with torch.no_grad():
        for case in "ab":
            y = w8(numbers[f"x_{case}"], numbers[f"t_{case}"])
            assert_close(y, numbers[f"y_{case}"], rtol=0, atol=2e-5)


def test_a_published_checkpoint_loads(w8, shared):
    checkpoint = torch.load(shared / "golden" / "w8_in8.pt", weights_only=True)
    net = WavUNet(W8, 8)
    net.load_state_dict(checkpoint)
    assert list(net.state_dict()) == list(checkpoint)
    for name, value in w8.state_dict().items():
        assert_close(net.state_dict()[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("file", "multipliers", "entries", "parameters"),
    [
        ("wdm_wnet_128", (1, 2, 2, 4, 4), 418, 89_706_056),
        ("wdm_wnet_256", (1, 2, 2, 4, 4, 4), 490, 125_499_720),
    ],
)
class TestPublishedNetwork:
    def test_its_size(self, file, multipliers, entries, parameters):
        net = on_meta(multipliers)
        assert len(net.state_dict()) == entries
        assert sum(p.numel() for p in net.parameters()) == parameters

    def test_names_shapes_and_shared_tensors(self, file, multipliers, entries, parameters, shared):
        lines = (shared / "golden" / f"keys_{file}.txt").read_text().splitlines()
        published = [line.split("\t") for line in lines if line and not line.startswith("#")]
        state = on_meta(multipliers).state_dict(keep_vars=True)
        ours, first = [], {}
        for key, value in state.items():
            other = first.setdefault(value, key)
            ours.append([key, str(tuple(value.shape)), *([f"= {other}"] if other != key else [])])
        assert ours == published


def on_meta(multipliers):
    with torch.device("meta"):
        return WavUNet(WavUNetConfig(multipliers=multipliers), 8)


def test_default_configuration_is_the_published_one():
    assert WavUNetConfig() == WavUNetConfig(multipliers=(1, 2, 2, 4, 4))
    assert WavUNetConfig().divisor == 32


def test_both_names_of_a_shared_block_are_one_tensor_before_and_after_saving(w8):
    file = io.BytesIO()
    torch.save(w8.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert len(state) == 198  # 178 tensors, 20 of them under two names
    other = WavUNet(W8, 8)
    other.load_state_dict(state)
    for net in (w8, other):
        for level in (0, 3):
            assert net.output_blocks[level + 2][0] is net.output_blocks[level + 1][0]
        assert len(list(net.parameters())) == 178
    for name, value in other.state_dict().items():
        assert_close(value, w8.state_dict()[name], rtol=0, atol=0)


def test_a_shared_block_is_applied_twice(w8):
    calls = []
    w8.output_blocks[1][0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        w8(torch.zeros(1, 8, 4, 4, 4), torch.tensor([0]))
    assert len(calls) == 2


def test_untrained_blocks_change_nothing_but_the_grid():
    settings = UNetConfig(channels=8, multipliers=(1,), groups=4)
    down, up = (kind(8, 8, embedding=6, config=settings) for kind in (DownBlock, UpBlock))
    x, embedding = torch.randn(2, 8, 4, 6, 8), torch.randn(2, 6)
    half, high = down(x, embedding)
    assert high.shape == (2, 8, 7, 2, 3, 4)
    assert_close(half, dwt3(x)[:, ::8] / 3)
    bands = torch.cat([3 * half[:, :, None], high], dim=2)
    assert_close(up(half, embedding, high), idwt3(bands.flatten(1, 2)))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_enters_after_the_transform(scale_shift):
    settings = UNetConfig(channels=8, multipliers=(1,), groups=4, scale_shift=scale_shift)
    block = DownBlock(8, 8, embedding=6, config=settings)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x, embedding = torch.randn(2, 8, 4, 6, 8), torch.randn(2, 6)
    h = dwt3(block.in_layers(x))[:, ::8] / 3
    time = block.emb_layers(embedding)[:, :, None, None, None]
    norm, *rest = block.out_layers
    h = norm(h) * (1 + time[:, :8]) + time[:, 8:] if scale_shift else norm(h + time)
    for layer in rest:
        h = layer(h)
    assert_close(block(x, embedding)[0], h + dwt3(x)[:, ::8] / 3, rtol=1e-4, atol=1e-4)


def test_pyramid_is_ordered_band_by_band():
    layer = WaveletDownsample(3, 24)
    torch.nn.init.dirac_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.randn(2, 3, 4, 6, 8)
    bands = dwt3(x)
    assert_close(layer(x), torch.cat([bands[:, b::8] for b in range(8)], dim=1) / 3)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_every_parameter_is_used(scale_shift):
    config = WavUNetConfig(channels=8, multipliers=(1, 2), groups=4, scale_shift=scale_shift)
    net = WavUNet(config, 16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    y = net(torch.randn(2, 16, 4, 4, 8), torch.tensor([0, 999]))
    assert y.shape == (2, 8, 4, 4, 8)
    y.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_last_convolution_does_not_start_at_zero():
    net = WavUNet(W8, 8)
    assert net.out[2].weight.abs().max() > 0
    assert net.out_res[0][0].out_layers[3].weight.abs().max() == 0


def test_grid_the_levels_cannot_halve_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        WavUNet(W8, 8)(torch.zeros(1, 8, 4, 4, 6), torch.tensor([0]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"channels": 20, "groups": 8}, "groups"),
        ({"res_blocks": 1}, "applied twice"),
        ({"res_blocks": 0, "multipliers": (1, 1)}, "applied twice"),
        ({"additive_skips": True}, "additive_skips"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        WavUNetConfig(**settings)
