"""The process against the published tables, and the denoiser and its loss."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from cwdm.coefficients import Transform
from cwdm.conditioning import condition, mean_of_conditions
from cwdm.denoiser import Denoiser
from cwdm.diffusion import Diffusion
from cwdm.losses import band_loss
from cwdm.modality import SEQUENCES, Modality, others
from cwdm.sampling import ddpm
from cwdm.wavelet import dwt3

LINEAR = Diffusion()
HAAR = Transform()
WHICH = {"availability": True}


@pytest.mark.parametrize(
    ("file", "process", "n", "spacing"),
    [
        ("T1000", LINEAR, None, "even"),
        ("T20", Diffusion(steps=20), None, "even"),
        ("T1000_cosine", Diffusion(schedule="cosine"), None, "even"),
        ("T1000_respaced10", LINEAR, 10, "even"),
        ("T1000_respaced_10_15_20", LINEAR, (10, 15, 20), "even"),
        ("T1000_respaced_ddim50", LINEAR, 50, "stride"),
    ],
)
class TestPublishedTables:
    def test_times_and_levels(self, file, process, n, spacing, golden):
        numbers = golden(f"schedule_{file}")
        times = process.timesteps(n, spacing)[:-1][::-1]
        assert [t - 1 for t in times] == numbers["timestep_map"].tolist()
        levels = numbers["alphas_cumprod"]
        same = {"rtol": 1e-9, "atol": 1e-15}
        np.testing.assert_allclose(process.alpha_bar[times].numpy(), levels, **same)
        np.testing.assert_allclose(process.signals[times].numpy(), levels**0.5, **same)
        np.testing.assert_allclose(process.noises[times].numpy(), (1 - levels) ** 0.5, **same)

    def test_a_step_mixes_estimate_image_and_noise(self, file, process, n, spacing, golden):
        numbers = golden(f"schedule_{file}")

        def steps(x_0, x_t, noise):
            """What each step makes of numbers; of T first, as the tables are the other way."""
            values = [
                next(ddpm(lambda x, t: x_0, x_t, process, [t, s], lambda: noise))
                for t, s in pairwise(process.timesteps(n, spacing))
            ]
            return np.array(values[::-1])

        same = {"rtol": 1e-9, "atol": 1e-15}
        np.testing.assert_allclose(steps(1.0, 0.0, 0.0), numbers["posterior_mean_coef1"], **same)
        np.testing.assert_allclose(steps(0.0, 1.0, 0.0), numbers["posterior_mean_coef2"], **same)
        variance = steps(0.0, 0.0, 1.0) ** 2
        assert variance[0] == 0  # published: multiplied by zero
        np.testing.assert_allclose(variance[1:], numbers["betas"][1:], **same)
        np.testing.assert_allclose(variance[1:], numbers["model_variance_fixed_large"][1:], **same)


def test_continuous_schedule_has_the_levels_of_its_equation():
    two = Diffusion(schedule="continuous", steps=2).alpha_bar
    np.testing.assert_allclose(1 - two[1:] / two[:-1], [0.92132403, 0.99945103], atol=5e-9)
    np.testing.assert_allclose(two[1:], [0.07867597, 4.31905e-5], rtol=1e-6)
    fine = Diffusion(schedule="continuous").alpha_bar
    time = np.linspace(1e-3, 1, 1001)
    level = np.exp(-0.5 * time**2 * 19.9 - 0.1 * time)
    np.testing.assert_allclose(fine, level / level[0], rtol=1e-12)


def test_a_subset_takes_levels_of_the_finer_schedule():
    full = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    hundred = Diffusion(steps=100, subset_of=1000).alpha_bar
    np.testing.assert_allclose(hundred[1:], full[np.linspace(0, 999, 100).astype(int)], rtol=1e-12)
    assert float(hundred[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    ten = [0.9999, 0.87360, 0.59681, 0.31862, 0.13286, 0.04325, 0.010984, 0.0021753, 3.357e-4]
    ours = Diffusion(steps=10, subset_of=1000).alpha_bar
    np.testing.assert_allclose(ours[1:], [*ten, 4.036e-5], rtol=2e-4)
    assert (float(hundred[0]), float(ours[0])) == (1, 1)
    with pytest.raises(ValueError, match="fewer"):
        Diffusion(steps=100, subset_of=99)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "continuous"])
@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_signal_falls_from_one_and_the_two_levels_make_unit_variance(schedule, steps):
    process = Diffusion(schedule=schedule, steps=steps)
    assert process.signals.shape == process.noises.shape == (steps + 1,)
    assert (process.signal(0), process.noise(0)) == (1, 0)
    assert (process.signals.diff() < 0).all()
    assert_close(process.signals**2 + process.noises**2, torch.ones(steps + 1).double())
    assert process.signal(steps) < 0.01
    assert process.network_time(torch.tensor([1, steps])).tolist() == [0, steps - 1]


def test_timesteps_fall_from_T_to_zero():
    for n in (1, 2, 3, 7, 999, 1000):
        times = LINEAR.timesteps(n)
        assert len(times) == n + 1
        assert (times[0], times[-1]) == (1000, 0)
        assert all(a > b for a, b in pairwise(times))
    assert LINEAR.timesteps() == list(range(1000, -1, -1))


@given(st.integers(1, 200), st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_sections_share_the_times_equally(steps, counts):
    sizes = [len(part) for part in np.array_split(np.arange(steps), len(counts))]
    process = Diffusion(steps=steps, subset_of=1000)
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="steps must lie within"):
            process.timesteps(counts)
        return
    times = process.timesteps(counts)
    assert times[-1] == 0
    assert all(a > b for a, b in pairwise(times))
    ends = np.cumsum(sizes)
    inside, _ = np.histogram(times[:-1], bins=[1, *(ends + 1)])
    if len(counts) > 1:
        assert inside.tolist() == counts
        assert all(ends[i] in times for i, count in enumerate(counts) if count > 1)


@pytest.mark.parametrize(
    ("n", "spacing", "reason"),
    [
        (1001, "even", "1001"),
        (0, "even", "within 1..1000"),
        ((), "even", "at least one"),
        ((335, 1, 1), "even", "335"),
        (600, "stride", "no stride takes 600 of 1000"),
        (0, "stride", "no stride"),
    ],
)
def test_steps_that_do_not_exist_are_refused(n, spacing, reason):
    with pytest.raises(ValueError, match=reason):
        LINEAR.timesteps(n, spacing)


def test_noise_has_the_level_of_the_schedule():
    x_0, noise = torch.full((2, 8, 2, 2, 2), 3.0), torch.full((2, 8, 2, 2, 2), 1.0)
    x_t = LINEAR.mix(x_0, LINEAR.start(noise, None), noise, torch.tensor([0, 500]))
    assert_close(x_t[0], x_0[0])
    a = float(LINEAR.alpha_bar[500])
    assert_close(x_t[1], torch.full_like(x_0[1], 3 * math.sqrt(a) + math.sqrt(1 - a)))


def loss_inputs(numbers, suffix):
    t = torch.from_numpy(numbers["t"]) + 1
    if suffix is None:
        images, cond = torch.from_numpy(numbers["x_start"]), None
    else:
        everything = {m: torch.from_numpy(numbers[m.value]) for m in SEQUENCES}
        images = everything.pop(suffix)
        cond = condition(everything, suffix, HAAR)
    seed = int(numbers["noise_seed"])
    noise = np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32)
    return HAAR.encode(images), dwt3(torch.from_numpy(noise)), t, cond


@pytest.mark.parametrize("target", [None, *SEQUENCES])
def test_loss_and_gradients_equal_the_published_ones(target, golden, golden_unet):
    numbers = golden("loss_wdm" if target is None else "loss_cwdm")
    suffix = "" if target is None else f"_{target}"
    unet = golden_unet("u16_add_in8" if target is None else "u16_cat_in32")
    denoiser = Denoiser(unet, LINEAR)
    x_0, noise, t, cond = loss_inputs(numbers, target)
    start = denoiser.start(noise, cond)
    x_t = LINEAR.mix(x_0, start, noise, t)
    losses = band_loss(denoiser(x_t, t, cond), denoiser.goal(x_0, start, cond)).mean(dim=0)
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
    x_0 = HAAR.encode(torch.from_numpy(numbers["x_start"]))
    denoiser = Denoiser(unet, LINEAR)
    for t, expected in zip(numbers["train_t"], numbers["train_losses"], strict=True):
        time = torch.from_numpy(t) + 1
        noise = dwt3(torch.from_numpy(rng.standard_normal((2, 1, 16, 24, 16), dtype=np.float32)))
        loss = band_loss(denoiser(LINEAR.mix(x_0, noise, noise, time), time), x_0).mean()
        assert_close(loss.item(), float(expected), rtol=0, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = torch.from_numpy(numbers["train_out2_weight"])
    assert_close(unet.out[2].weight.detach(), weight, rtol=0, atol=1e-5)


class Zero(torch.nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x[:, :8])


def test_residual_prediction_starts_at_the_mean_of_the_conditions():
    images = {m: torch.rand(1, 1, 4, 4, 4) for m in others(Modality.T2F)}
    cond = condition(images, Modality.T2F, HAAR)
    x_t, t = torch.randn(1, 8, 2, 2, 2), torch.tensor([1000])
    residual, plain = (Denoiser(Zero(), LINEAR, prediction) for prediction in ("residual", "x_0"))
    estimate = residual.x_0(residual(x_t, t, cond), x_t, t, cond)
    assert_close(estimate, HAAR.encode(torch.stack(list(images.values())).mean(dim=0)))
    assert plain.x_0(plain(x_t, t, cond), x_t, t, cond).abs().max() == 0
    with pytest.raises(ValueError, match="there is none"):
        residual.goal(x_t, x_t, None)


@pytest.mark.parametrize("prediction", ["x_0", "residual"])
def test_an_output_that_is_its_goal_stands_for_x_0(prediction):
    denoiser = Denoiser(Zero(), LINEAR, prediction)
    x_0, start, cond = (
        torch.randn(2, 8, 2, 2, 2),
        torch.randn(2, 8, 2, 2, 2),
        torch.randn(2, 24, 2, 2, 2),
    )
    t = torch.tensor([3, 1000])
    x_t = LINEAR.mix(x_0, start, start, t)
    assert_close(denoiser.x_0(denoiser.goal(x_0, start, cond), x_t, t, cond), x_0)


def test_a_network_with_classes_is_told_the_label_and_the_published_time():
    told = []

    class Spy(torch.nn.Module):
        def forward(self, x, t, label):
            told.append((x.shape[1], t.tolist(), label.tolist()))
            return x[:, :8]

    x_t, cond = torch.zeros(2, 8, 2, 2, 2), torch.zeros(2, 24, 2, 2, 2)
    Denoiser(Spy(), LINEAR)(x_t, torch.tensor([1, 1000]), cond, torch.tensor([3, 0]))
    assert told == [(32, [0, 999], [3, 0])]


@pytest.mark.parametrize("transform", [HAAR, Transform(wavelet="identity"), Transform(levels=2)])
def test_a_missing_condition_becomes_the_mean_of_the_others(transform):
    one, two = torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 4, 4, 4)
    cond = condition({Modality.T1N: one, Modality.T2W: two}, Modality.T2F, transform)
    full = {Modality.T1N: one, Modality.T1C: (one + two) / 2, Modality.T2W: two}
    assert_close(cond, condition(full, Modality.T2F, transform))
    mean = mean_of_conditions(cond, transform.channels)
    assert_close(mean, transform.encode((one + two) / 2))


def test_conditions_stand_in_the_published_order():
    images = {m: torch.full((1, 1, 2, 2, 2), float(i)) for i, m in enumerate(SEQUENCES)}
    for target in SEQUENCES:
        cond = condition(images, target, HAAR)
        order = [round(float(v) * 3 / 8**0.5) for v in cond[0, ::8].flatten()]
        assert order == [i for i, m in enumerate(SEQUENCES) if m != target]


def test_a_linear_schedule_too_short_for_its_ends_is_refused():
    assert float(Diffusion(steps=20).alpha_bar[-1]) == 0  # the last beta is one
    with pytest.raises(ValueError, match="beta would exceed 1"):
        Diffusion(steps=19)


def test_an_image_of_zeros_is_no_missing_one():
    image = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    black = torch.zeros_like(image)
    shown = condition({Modality.T1N: image, Modality.T2W: black}, Modality.T2F, HAAR, **WHICH)
    missing = condition({Modality.T1N: image}, Modality.T2F, HAAR, **WHICH)
    assert shown.shape == missing.shape == (2, 36, 2, 2, 2)
    assert torch.equal(shown[:, :32], missing[:, :32])
    assert shown[0, 32:, 0, 0, 0].tolist() == [1, 0, 1, 0]
    assert missing[0, 32:, 0, 0, 0].tolist() == [1, 0, 0, 0]
    coefficients = HAAR.encode(image)
    assert_close(mean_of_conditions(shown, 8, **WHICH), coefficients / 2)
    assert_close(mean_of_conditions(missing, 8, **WHICH), coefficients)


def test_the_target_is_never_among_its_conditions():
    images = {m: torch.randn(1, 1, 4, 4, 4) for m in SEQUENCES}
    for number, target in enumerate(SEQUENCES):
        cond = condition(images, target, HAAR, **WHICH)
        assert cond[:, 8 * number : 8 * number + 8].abs().max() == 0
        assert cond[0, 32:, 0, 0, 0].tolist() == [float(m is not target) for m in SEQUENCES]
