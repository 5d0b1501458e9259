"""Samplers against the published chains, two other libraries, and a case with a closed form."""

from functools import partial

import numpy as np
import pytest
import torch
from monai.networks.schedulers.ddim import DDIMScheduler
from monai.networks.schedulers.ddpm import DDPMScheduler
from torch.testing import assert_close

from cwdm.coefficients import Transform
from cwdm.denoiser import Denoiser
from cwdm.diffusion import Diffusion
from cwdm.flow import Flow
from cwdm.noise import noise_stream
from cwdm.sampling import SAMPLERS, ddim, ddpm, dpmpp_2m, heun, one_step

LINEAR, FLOW = Diffusion(), Flow(source="noise")
HAAR = Transform()


def named(name, eta):
    return partial(ddim, eta=eta) if eta else SAMPLERS[name]


def run_golden(numbers, unet, process, *, clamp, cond=None, sampler=ddpm, times=None):
    denoiser = Denoiser(unet, process)

    @torch.no_grad()
    def denoise(x_t, t):
        times = torch.full((len(x_t),), t)
        estimate = denoiser.x_0(denoiser(x_t, times, cond), x_t, times, cond)
        return HAAR.clamp(estimate, *clamp) if clamp else estimate

    init = torch.from_numpy(numbers["init"])
    rng = np.random.default_rng(int(numbers.get("noise_seed", 0)))
    rng.standard_normal(init.shape, dtype=np.float32)  # the published stream begins with init

    def draw():
        return torch.from_numpy(rng.standard_normal(init.shape, dtype=np.float32))

    return list(sampler(denoise, init, process, times or process.timesteps(), draw))


def check(chain, numbers):
    assert_close(chain[-1], torch.from_numpy(numbers["final"]), rtol=0, atol=5e-5)
    volume = torch.from_numpy(numbers["volume"])
    assert_close(HAAR.decode(chain[-1]), volume, rtol=0, atol=1e-4)
    for name, value in numbers.items():
        if name.startswith("x_after_"):
            x = chain[int(name.removeprefix("x_after_")) - 1]
            assert_close(x, torch.from_numpy(value), rtol=0, atol=5e-5)


def test_a_chain_of_twenty_steps_equals_the_published_one(golden, golden_unet):
    numbers = golden("sample_wdm_T20")
    unet = golden_unet("u16_add_in8")
    check(run_golden(numbers, unet, Diffusion(steps=20), clamp=(-1, 1)), numbers)


@pytest.mark.parametrize("kind", ["wdm", "cwdm"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_respaced_chain_equals_the_published_one(kind, clip, golden, golden_unet):
    numbers = golden(f"sample_{kind}_T1000_respaced10" + ("" if clip else "_noclip"))
    cond = torch.from_numpy(numbers["cond"]) if kind == "cwdm" else None
    if cond is not None:
        images = [torch.from_numpy(numbers[f"cond_{i}"]) for i in (1, 2, 3)]
        assert_close(HAAR.encode(torch.cat(images, dim=1)), cond, rtol=0, atol=2e-6)
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
    chain = run_golden(numbers, unet, LINEAR, clamp=(-1, 1), sampler=ddim, times=times)
    assert_close(chain[-1], torch.from_numpy(numbers["final"]), rtol=0, atol=5e-4)
    volume = torch.from_numpy(numbers["volume"])
    assert_close(HAAR.decode(chain[-1]), volume, rtol=0, atol=5e-4)


def estimate(x, t):
    """Of x_0: not linear in x, and different at every time."""
    return torch.tanh(x) * 0.5 + t / 2000


def start_and_draw(seed):
    """N(0, 1) to begin with, and a stream that another generator of that seed repeats."""
    start = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(seed)
    return start, lambda: torch.randn(start.shape, generator=generator, dtype=start.dtype)


@pytest.mark.parametrize(
    ("name", "eta", "n"),
    [("ddpm", 0, 1000), ("ddim", 0, 1000), ("ddim", 0, 50), ("ddim", 0.4, 50), ("ddim", 1, 1000)],
)
def test_steps_equal_those_of_monai(name, eta, n):
    if name == "ddpm":
        scheduler = DDPMScheduler(1000, clip_sample=False, variance_type="fixed_large")
    else:
        scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.prediction_type = "sample"
    scheduler.alphas_cumprod = LINEAR.alpha_bar[1:]
    scheduler.alphas = LINEAR.alpha_bar[1:] / LINEAR.alpha_bar[:-1]
    scheduler.betas = 1 - scheduler.alphas
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    scheduler.one = torch.tensor(1.0)
    scheduler.set_timesteps(n)
    x, draw = start_and_draw(2)
    theirs, generator = x, torch.Generator().manual_seed(2)
    sampler = named(name, eta)
    for t in (int(t) + 1 for t in scheduler.timesteps):
        s = max(t - 1000 // n, 0)  # where MONAI steps to, wherever its next time is
        x = next(sampler(estimate, x, LINEAR, [t, s], draw))
        arguments = {"generator": generator} if name == "ddpm" or eta else {}
        if name == "ddim":
            arguments["eta"] = float(eta)
        theirs, _ = scheduler.step(estimate(theirs, t), t - 1, theirs, **arguments)
        assert_close(x, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n", [2, 8, 20])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpm_solver_equals_that_of_diffusers(n):
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    times = LINEAR.timesteps(n)
    scheduler = DPMSolverMultistepScheduler(
        1000,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="sample",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    scheduler.sigmas = (LINEAR.noises / LINEAR.signals)[times]
    theirs, draw = start_and_draw(0)
    for t, x in zip(times, dpmpp_2m(estimate, theirs, LINEAR, times, draw), strict=False):
        (theirs,) = scheduler.step(estimate(theirs, t), t - 1, theirs, return_dict=False)
        assert_close(x, theirs, rtol=0, atol=1e-6)  # theirs goes through float32


def velocity(x, t):
    """What diffusers calls the model's output: start - x_0."""
    return (x - estimate(x, t)) / FLOW.noise(t)


@pytest.mark.parametrize("n", [1, 7, 20])
def test_euler_equals_that_of_diffusers(n):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    times = FLOW.timesteps(n)
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(sigmas=FLOW.noises[times[:-1]].tolist())
    theirs, draw = start_and_draw(0)
    chain = SAMPLERS["euler"](estimate, theirs, FLOW, times, draw)
    for t, time, x in zip(times, scheduler.timesteps, chain, strict=False):
        assert float(time) == pytest.approx(t)
        (theirs,) = scheduler.step(velocity(theirs, t), time, theirs, return_dict=False)
        assert_close(x, theirs, rtol=0, atol=2e-6)  # theirs goes through float32


@pytest.mark.parametrize("n", [2, 7, 20])
def test_heun_equals_that_of_diffusers(n):
    from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
        FlowMatchHeunDiscreteScheduler,
    )

    times = FLOW.timesteps(n)
    scheduler = FlowMatchHeunDiscreteScheduler(1000)
    scheduler.set_timesteps(n)
    # its own times end at 1, these at 1000 / n
    sigmas = FLOW.noises[times]
    inner = sigmas[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
    visited = [times[0], *(t for t in times[1:-1] for _ in range(2))]
    scheduler.timesteps = torch.tensor(visited, dtype=torch.float64)
    theirs, draw = start_and_draw(0)
    results = []
    for t, time in zip(visited, scheduler.timesteps, strict=True):
        (theirs,) = scheduler.step(velocity(theirs, t), time, theirs, return_dict=False)
        results.append(theirs)
    # each step but the last takes two of theirs
    expected = [*results[1::2], results[-1]]
    chain = list(heun(estimate, start_and_draw(0)[0], FLOW, times, draw))
    assert len(chain) == len(expected) == n
    for x, other in zip(chain, expected, strict=True):
        assert_close(x, other, rtol=0, atol=2e-6)  # theirs goes through float32


MEAN, DEVIATION = 0.7, 0.3


def spread(process, t):
    """Deviation of x_t where x_0 is N(MEAN, DEVIATION)."""
    return ((process.signal(t) * DEVIATION) ** 2 + process.noise(t) ** 2) ** 0.5


def gaussian(sampler, process, times):
    """Mean and deviation of what a chain makes of N(0, 1), given the ideal denoiser.

    That denoiser is linear, so the result is a sum over a constant, x_T and each draw of noise. The
    chain is run on the coefficients of that sum, and the two moments are exact.
    """
    constant, start, *draws = torch.eye(len(times) + 1, dtype=torch.float64)

    def ideal(x, t):
        gain = process.signal(t) * DEVIATION**2 / spread(process, t) ** 2
        return MEAN * constant + gain * (x - process.signal(t) * MEAN * constant)

    noise = iter(draws)
    *_, x = sampler(ideal, start, process, times, lambda: next(noise))
    return float(x[0]), float(x[1:].norm())


@pytest.mark.parametrize(
    ("name", "eta", "process", "n", "tolerance"),
    [
        ("ddpm", 0, LINEAR, None, 0.0012),
        ("ddim", 0, LINEAR, None, 0.002),
        ("ddim", 0.5, LINEAR, None, 0.0025),
        ("ddim", 1, LINEAR, None, 0.004),
        ("ddim", 0, LINEAR, 100, 0.015),
        ("heun", 0, LINEAR, 50, 0.0005),
        ("dpm++2m", 0, LINEAR, 200, 0.003),
        ("euler", 0, FLOW, None, 0.001),
        ("euler", 0, FLOW, 100, 0.006),
        ("heun", 0, FLOW, 20, 0.004),
        ("dpm++2m", 0, FLOW, 50, 0.0025),
    ],
)
def test_a_gaussian_comes_back_with_its_mean_and_deviation(name, eta, process, n, tolerance):
    mean, deviation = gaussian(named(name, eta), process, process.timesteps(n))
    assert abs(mean - MEAN) < 0.002  # a diffusion's x_T holds 0.6 % of x_0
    assert abs(deviation - DEVIATION) < tolerance


@pytest.mark.parametrize("process", [LINEAR, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++2m", 2)]
)
def test_halving_the_steps_divides_the_error_by_two_or_by_four(name, order, process):
    """The flow of probability keeps the number of deviations: x_s is known at every s."""
    end = 104
    exact = spread(process, end) / spread(process, 1000)

    def error(stride):
        times = list(range(1000, end - 1, -stride))
        assert times[-1] == end
        return abs(gaussian(SAMPLERS[name], process, times)[1] - exact)

    coarse, middle, fine = (error(stride) for stride in (16, 8, 4))
    assert coarse / middle == pytest.approx(2**order, rel=0.15)
    assert middle / fine == pytest.approx(2**order, rel=0.08)


def test_one_step_is_the_first_estimate():
    for process in (LINEAR, FLOW):
        for times in (process.timesteps(1), process.timesteps(5)):
            x = torch.linspace(-2, 2, 5)
            (result,) = one_step(estimate, x, process, times, lambda: torch.ones(5))
            assert torch.equal(result, estimate(x, 1000))
            assert SAMPLERS["one-step"] is one_step


@pytest.mark.parametrize("process", [LINEAR, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_chain_of_one_step_returns_the_estimate(name, process):
    draw = noise_stream((1, 8, 2, 2, 2), 0)
    (x,) = SAMPLERS[name](
        lambda x, t: torch.full_like(x, 0.25), draw(), process, process.timesteps(1), draw
    )
    assert_close(x, torch.full((1, 8, 2, 2, 2), 0.25), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++2m"])
def test_only_ancestral_samplers_draw_noise(name):
    def draw():
        raise AssertionError("drew noise")

    x = torch.ones(3)
    assert len(list(SAMPLERS[name](estimate, x, LINEAR, [1000, 500, 0], draw))) == 2
    for sampler in (ddpm, partial(ddim, eta=0.5)):
        with pytest.raises(AssertionError, match="drew noise"):
            list(sampler(estimate, x, LINEAR, [1000, 500, 0], draw))


def test_noise_depends_on_the_seed_and_the_draw_only():
    first, again, other = (noise_stream((2, 3), seed) for seed in (1, 1, 2))
    torch.rand(100)  # the global generator plays no part
    a, b = first(), first()
    assert_close(a, again(), rtol=0, atol=0)
    assert_close(b, again(), rtol=0, atol=0)
    assert not torch.equal(a, b)
    assert not torch.equal(a, other())
