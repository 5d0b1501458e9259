"""The U-Net against the published one: names, shapes and outputs."""

import pytest
import torch
from torch.testing import assert_close

from cwdm.unet import UNet, UNetConfig, timestep_embedding

NAMES = [
    *("u16_add_in8", "u16_attn_film_conv", "u16_cat_in32", "u16_cat_in32_e2e"),
    *("u16_resample2d", "u32_add_in8", "u32_cat_in8", "u32_cat_in32"),
]


@pytest.mark.parametrize("name", NAMES)
def test_output_equals_the_published_one(name, golden, golden_unet):
    numbers = {k: torch.from_numpy(v) for k, v in golden(f"unet_{name}").items()}
    unet = golden_unet(name)
    with torch.no_grad():
        for case in "ab":
            y = unet(numbers[f"x_{case}"], numbers[f"t_{case}"])
            assert_close(y, numbers[f"y_{case}"], rtol=0, atol=2e-5)


def test_timestep_embedding_equals_the_published_one(golden):
    numbers = golden("timestep_embedding")
    for dim in (32, 64, 65):
        embedding = timestep_embedding(torch.from_numpy(numbers["t"]), dim)
        # processors round exp differently in the last bit of 24, and angles go up to 999
        expected = torch.from_numpy(numbers[f"emb_{dim}"])
        assert_close(embedding, expected, rtol=0, atol=999 * 2**-24)


@pytest.mark.parametrize(
    ("file", "in_channels", "settings"),
    [
        ("cwdm_unet_224", 32, {}),
        ("wdm_unet_128", 8, {"additive_skips": True}),
        ("wdm_unet_256", 8, {"additive_skips": True, "multipliers": (1, 2, 2, 4, 4, 4)}),
    ],
)
def test_parameters_are_named_and_shaped_as_published(file, in_channels, settings, shared):
    lines = (shared / "golden" / f"keys_{file}.txt").read_text().splitlines()
    published = [line for line in lines if line and not line.startswith("#")]
    with torch.device("meta"):
        unet = UNet(UNetConfig(**settings), in_channels)
    ours = [f"{key}\t{tuple(value.shape)}" for key, value in unet.state_dict().items()]
    assert ours == published


def test_untrained_network_returns_zero():
    config = UNetConfig(channels=8, multipliers=(1, 2), res_blocks=1, groups=4)
    y = UNet(config, 16)(torch.randn(2, 16, 4, 4, 8), torch.tensor([0, 999]))
    assert y.shape == (2, 8, 4, 4, 8)
    assert y.abs().max() == 0


def test_grid_the_levels_cannot_halve_is_refused():
    config = UNetConfig(channels=8, multipliers=(1, 1, 1), res_blocks=1, groups=4)
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet(config, 8)(torch.zeros(1, 8, 4, 4, 6), torch.tensor([0]))


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="groups"):
        UNetConfig(channels=20, groups=8)


def test_a_level_has_a_block_at_least():
    with pytest.raises(ValueError, match="res_blocks = 0, expected at least 1"):
        UNetConfig(res_blocks=0)


def test_the_label_changes_the_output_as_the_time_does():
    config = UNetConfig(channels=8, multipliers=(1, 2), res_blocks=1, groups=4, classes=4)
    torch.manual_seed(0)
    unet = UNet(config, 8)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(1, 8, 4, 4, 4).expand(4, -1, -1, -1, -1), torch.full((4,), 7)
    with torch.no_grad():
        y = unet(x, t, torch.arange(4))
        for a in range(4):
            for b in range(a):
                assert (y[a] - y[b]).abs().max() > 1e-3
        # it is added to the embedding of the time
        unet.time_embed[2].bias += unet.label_emb.weight[2]
        unet.label_emb.weight.zero_()
        assert_close(unet(x[:1], t[:1], torch.tensor([0])), y[2:3])


def test_a_network_with_four_labels_has_four_more_vectors():
    with torch.device("meta"):
        plain, four = (UNet(UNetConfig(classes=classes), 32) for classes in (0, 4))
    count = {unet: sum(p.numel() for p in unet.parameters()) for unet in (plain, four)}
    assert count[four] == 81_512_072
    assert count[four] - count[plain] == 4 * 256
    assert set(four.state_dict()) - set(plain.state_dict()) == {"label_emb.weight"}
