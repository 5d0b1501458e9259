"""The process against the published tables, and the denoiser and its loss."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.coefficients import encode
from cwdm.conditioning import condition
from cwdm.diffusion import Schedule, WaveletDenoiser
from cwdm.losses import band_loss
from cwdm.modality import Modality, others
from cwdm.wavelet import dwt3


@pytest.mark.parametrize(
    ("file", "schedule", "n"),
    [
        ("T1000", Schedule.linear(), None),
        ("T20", Schedule.linear(20), None),
        ("T1000_cosine", Schedule.cosine(), None),
        ("T1000_respaced10", Schedule.linear(), 10),
    ],
)
def test_schedule_equals_the_published_tables(file, schedule, n, golden):
    numbers = golden(f"schedule_{file}")
    times = schedule.timesteps(n)[:-1][::-1]
    assert [t - 1 for t in times] == numbers["timestep_map"].tolist()
    ours = schedule.alpha_bar[times].numpy()
    np.testing.assert_allclose(ours, numbers["alphas_cumprod"], rtol=1e-9, atol=1e-15)


def test_timesteps_fall_from_T_to_zero():
    schedule = Schedule.linear()
    for n in (1, 2, 3, 7, 999, 1000):
        times = schedule.timesteps(n)
        assert len(times) == n + 1
        assert (times[0], times[-1]) == (1000, 0)
        assert all(a > b for a, b in pairwise(times))
    with pytest.raises(ValueError, match="1001"):
        schedule.timesteps(1001)


def test_noise_has_the_level_of_the_schedule():
    schedule = Schedule.linear()
    x_0, noise = torch.full((2, 8, 2, 2, 2), 3.0), torch.full((2, 8, 2, 2, 2), 1.0)
    x_t = schedule.add_noise(x_0, noise, torch.tensor([0, 500]))
    assert_close(x_t[0], x_0[0])
    a = float(schedule.alpha_bar[500])
    assert_close(x_t[1], torch.full_like(x_0[1], 3 * math.sqrt(a) + math.sqrt(1 - a)))


def loss_inputs(numbers, suffix):
    t = torch.from_numpy(numbers["t"]) + 1
    if suffix is None:
        images, cond = torch.from_numpy(numbers["x_start"]), None
    else:
        everything = {m: torch.from_numpy(numbers[m.value]) for m in Modality}
        images = everything.pop(suffix)
        cond = condition(everything, suffix)
    seed = int(numbers["noise_seed"])
    noise = np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32)
    return encode(images), dwt3(torch.from_numpy(noise)), t, cond


@pytest.mark.parametrize("target", [None, *Modality])
def test_loss_and_gradients_equal_the_published_ones(target, golden, golden_unet):
    numbers = golden("loss_wdm" if target is None else "loss_cwdm")
    suffix = "" if target is None else f"_{target}"
    unet = golden_unet("u16_add_in8" if target is None else "u16_cat_in32")
    x_0, noise, t, cond = loss_inputs(numbers, target)
    x_t = Schedule.linear().add_noise(x_0, noise, t)
    losses = band_loss(WaveletDenoiser(unet)(x_t, t, cond), x_0)
    expected = torch.from_numpy(numbers[f"mse_wav{suffix}"])
    assert_close(losses, expected, rtol=0, atol=1e-6)
    losses.mean().backward()
    assert_close(losses.mean().item(), float(numbers[f"loss{suffix}"]), rtol=0, atol=1e-6)
    norms = {name: float(p.grad.norm()) for name, p in unet.named_parameters()}
    ours = np.array([norms[key] for key in numbers["grad_keys"]])
    np.testing.assert_allclose(ours, numbers[f"grad_norms{suffix}"], rtol=1e-4, atol=1e-9)


def test_five_training_steps_equal_the_published_ones(golden, golden_unet):
    numbers = golden("loss_wdm")
    unet = golden_unet("u16_add_in8").train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0)
    rng = np.random.default_rng(int(numbers["train_noise_seed"]))
    x_0 = encode(torch.from_numpy(numbers["x_start"]))
    schedule, denoiser = Schedule.linear(), WaveletDenoiser(unet)
    for t, expected in zip(numbers["train_t"], numbers["train_losses"], strict=True):
        time = torch.from_numpy(t) + 1
        noise = dwt3(torch.from_numpy(rng.standard_normal((2, 1, 16, 24, 16), dtype=np.float32)))
        loss = band_loss(denoiser(schedule.add_noise(x_0, noise, time), time), x_0).mean()
        assert_close(loss.item(), float(expected), rtol=0, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = torch.from_numpy(numbers["train_out2_weight"])
    assert_close(unet.out[2].weight.detach(), weight, rtol=0, atol=1e-5)


def test_residual_prediction_starts_at_the_mean_of_the_conditions():
    class Zero(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x[:, :8])

    images = {m: torch.rand(1, 1, 4, 4, 4) for m in others(Modality.T2F)}
    cond = condition(images, Modality.T2F)
    x_t, t = torch.randn(1, 8, 2, 2, 2), torch.tensor([1000])
    estimate = WaveletDenoiser(Zero(), "residual")(x_t, t, cond)
    assert_close(estimate, encode(torch.stack(list(images.values())).mean(dim=0)))
    assert WaveletDenoiser(Zero(), "x_0")(x_t, t, cond).abs().max() == 0


def test_a_missing_condition_becomes_the_mean_of_the_others():
    one, two = torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 4, 4, 4)
    cond = condition({Modality.T1N: one, Modality.T2W: two}, Modality.T2F)
    full = condition(
        {Modality.T1N: one, Modality.T1C: (one + two) / 2, Modality.T2W: two}, Modality.T2F
    )
    assert_close(cond, full)


def test_conditions_stand_in_the_published_order():
    images = {m: torch.full((1, 1, 2, 2, 2), float(i)) for i, m in enumerate(Modality)}
    for target in Modality:
        cond = condition(images, target)
        order = [round(float(v) * 3 / 8**0.5) for v in cond[0, ::8].flatten()]
        assert order == [i for i, m in enumerate(Modality) if m != target]
