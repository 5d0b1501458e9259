"""Samplers against the published chains, MONAI's schedulers, and a case with a closed form."""

import numpy as np
import pytest
import torch
from monai.networks.schedulers.ddim import DDIMScheduler
from monai.networks.schedulers.ddpm import DDPMScheduler
from torch.testing import assert_close

from cwdm.coefficients import decode, encode
from cwdm.diffusion import Schedule, WaveletDenoiser
from cwdm.sampling import clamped, ddim_step, ddpm_step, noise_stream, sample

LINEAR = Schedule.linear()


def run_golden(numbers, unet, schedule, *, clamp, cond=None, step=ddpm_step, times=None):
    denoiser = WaveletDenoiser(unet)

    def denoise(x_t, t):
        return denoiser(x_t, torch.full((len(x_t),), t), cond)

    init = torch.from_numpy(numbers["init"])
    rng = np.random.default_rng(int(numbers.get("noise_seed", 0)))
    rng.standard_normal(init.shape, dtype=np.float32)  # the published stream begins with init
    return list(
        sample(
            clamped(denoise, *clamp) if clamp else denoise,
            init,
            schedule,
            draw=lambda: torch.from_numpy(rng.standard_normal(init.shape, dtype=np.float32)),
            step=step,
            times=times,
        )
    )


def check(chain, numbers, volume_of=decode):
    assert_close(chain[-1], torch.from_numpy(numbers["final"]), rtol=0, atol=5e-5)
    volume = torch.from_numpy(numbers["volume"])
    assert_close(volume_of(chain[-1]), volume, rtol=0, atol=1e-4)
    for name, value in numbers.items():
        if name.startswith("x_after_"):
            x = chain[int(name.removeprefix("x_after_")) - 1]
            assert_close(x, torch.from_numpy(value), rtol=0, atol=5e-5)


def test_a_chain_of_twenty_steps_equals_the_published_one(golden, golden_unet):
    numbers = golden("sample_wdm_T20")
    unet = golden_unet("u16_add_in8")
    check(run_golden(numbers, unet, Schedule.linear(20), clamp=(-1, 1)), numbers)


@pytest.mark.parametrize("kind", ["wdm", "cwdm"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_respaced_chain_equals_the_published_one(kind, clip, golden, golden_unet):
    numbers = golden(f"sample_{kind}_T1000_respaced10" + ("" if clip else "_noclip"))
    cond = torch.from_numpy(numbers["cond"]) if kind == "cwdm" else None
    if cond is not None:
        images = [torch.from_numpy(numbers[f"cond_{i}"]) for i in (1, 2, 3)]
        assert_close(encode(torch.cat(images, dim=1)), cond, rtol=0, atol=2e-6)
    unet = golden_unet("u16_cat_in32" if kind == "cwdm" else "u16_add_in8")
    clamp = ((0, 1) if kind == "cwdm" else (-1, 1)) if clip else None
    chain = run_golden(numbers, unet, LINEAR, clamp=clamp, cond=cond, times=LINEAR.timesteps(10))
    check(chain, numbers)
    for x, expected in zip(chain, numbers.get("x", []), strict=False):
        assert_close(x, torch.from_numpy(expected), rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wdm", "cwdm"])
def test_a_full_chain_equals_the_published_one(kind, golden, golden_unet):
    numbers = golden(f"sample_{kind}_T1000_full")
    cond = torch.from_numpy(numbers["cond"]) if kind == "cwdm" else None
    unet = golden_unet("u16_cat_in32" if kind == "cwdm" else "u16_add_in8")
    clamp = (0, 1) if kind == "cwdm" else (-1, 1)
    check(run_golden(numbers, unet, LINEAR, clamp=clamp, cond=cond), numbers)


def test_ddim_equals_the_published_one(golden, golden_unet):
    numbers = golden("sample_wdm_ddim10")
    # published time 0 is our time 1; the published last step ends there too, not at x_0
    times = [*(int(t) + 1 for t, _ in numbers["t_pairs"]), 1]
    unet = golden_unet("u16_add_in8")
    chain = run_golden(numbers, unet, LINEAR, clamp=(-1, 1), step=ddim_step, times=times)
    assert_close(chain[-1], torch.from_numpy(numbers["final"]), rtol=0, atol=5e-4)
    assert_close(decode(chain[-1]), torch.from_numpy(numbers["volume"]), rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("step", "scheduler", "n"),
    [
        (ddpm_step, DDPMScheduler(1000, clip_sample=False, variance_type="fixed_large"), 1000),
        (ddim_step, DDIMScheduler(1000, clip_sample=False), 1000),
        (ddim_step, DDIMScheduler(1000, clip_sample=False), 50),
    ],
)
def test_steps_equal_those_of_monai(step, scheduler, n):
    scheduler.prediction_type = "sample"
    scheduler.alphas_cumprod = LINEAR.alpha_bar[1:]
    scheduler.alphas = LINEAR.alpha_bar[1:] / LINEAR.alpha_bar[:-1]
    scheduler.betas = 1 - scheduler.alphas
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    scheduler.one = torch.tensor(1.0)
    scheduler.set_timesteps(n)
    times = [int(t) + 1 for t in scheduler.timesteps]

    def denoise(x, t):
        return torch.tanh(x) * 0.5 + t / 2000

    x = theirs = noise_stream((1, 8, 2, 2, 2), 1)().double()
    generator = torch.Generator().manual_seed(2)
    ours = torch.Generator().manual_seed(2)

    def draw():
        return torch.randn(x.shape, generator=ours, dtype=x.dtype)

    for t in times:
        s = max(t - 1000 // n, 0)  # where MONAI steps to, wherever its next time is
        x = step(LINEAR, x, denoise(x, t), t, s, draw)
        if step is ddpm_step:
            theirs, _ = scheduler.step(denoise(theirs, t), t - 1, theirs, generator=generator)
        else:
            theirs, _ = scheduler.step(denoise(theirs, t), t - 1, theirs, eta=0.0)
        assert_close(x, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("step", "n"), [(ddpm_step, None), (ddim_step, None), (ddim_step, 100)])
def test_a_gaussian_comes_back_with_its_mean_and_deviation(step, n):
    mean, deviation = 0.7, 0.3

    def ideal(x_t, t):
        a = float(LINEAR.alpha_bar[t])
        gain = a**0.5 * deviation**2 / (a * deviation**2 + 1 - a)
        return mean + gain * (x_t - a**0.5 * mean)

    draw = noise_stream((1, 8, 16, 16, 16), 0)
    *_, x = sample(ideal, draw(), LINEAR, draw=draw, step=step, times=LINEAR.timesteps(n))
    # 32768 samples: standard errors 0.002 and 0.001; 100 DDIM steps lose 0.01 of the deviation
    assert abs(float(x.mean()) - mean) < 0.01
    assert abs(float(x.std()) - deviation) < (0.02 if n else 0.006)


def test_noise_depends_on_the_seed_and_the_draw_only():
    first, again, other = (noise_stream((2, 3), seed) for seed in (1, 1, 2))
    torch.rand(100)  # the global generator plays no part
    a, b = first(), first()
    assert_close(a, again(), rtol=0, atol=0)
    assert_close(b, again(), rtol=0, atol=0)
    assert not torch.equal(a, b)
    assert not torch.equal(a, other())


def test_one_step_returns_the_estimate():
    draw = noise_stream((1, 8, 2, 2, 2), 0)
    times = LINEAR.timesteps(1)
    for step in (ddpm_step, ddim_step):
        (x,) = sample(
            lambda x, t: torch.full_like(x, 0.25), draw(), LINEAR, draw=draw, step=step, times=times
        )
        assert_close(x, torch.full((1, 8, 2, 2, 2), 0.25), rtol=0, atol=1e-6)
