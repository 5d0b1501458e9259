"""The straight path: its levels, its ends, its velocity, and Euler's steps along it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from cwdm.conditioning import mean_of_conditions
from cwdm.denoiser import Denoiser
from cwdm.flow import Flow
from cwdm.sampling import SAMPLERS

SHAPE = (2, 8, 2, 2, 2)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Backbone(torch.nn.Module):
    """A velocity that depends on the image, the conditions and the time; remembers the times."""

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, t):
        self.times.append(t.tolist())
        x_t, cond = x[:, :8], x[:, 8:]
        return torch.sin(x_t) + cond[:, :8] * t.reshape(-1, 1, 1, 1, 1) / 1000 - 0.3 * cond[:, 16:]


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_levels_are_straight_lines(steps):
    flow = Flow(steps=steps)
    r = np.arange(steps + 1) / steps
    np.testing.assert_allclose(flow.noises, r, atol=1e-15)
    np.testing.assert_allclose(flow.signals, 1 - r, atol=1e-15)
    assert (flow.signal(0), flow.noise(0)) == (1, 0)
    assert (flow.signal(steps), flow.noise(steps)) == (0, 1)


def test_the_network_is_told_zero_at_the_start_and_1000_at_the_data():
    for steps in (10, 1000, 4000):
        times = Flow(steps=steps).network_time(torch.tensor([steps, steps // 2, 0]))
        assert times.tolist() == [0, 500, 1000]


@given(st.integers(1, 300), st.integers(1, 300))
def test_timesteps_are_equal_parts(steps, n):
    flow = Flow(steps=steps)
    if n > steps:
        with pytest.raises(ValueError, match=f"within 1..{steps}"):
            flow.timesteps(n)
        return
    times = flow.timesteps(n)
    assert len(times) == n + 1
    assert (times[0], times[-1]) == (steps, 0)
    parts = [a - b for a, b in pairwise(times)]
    assert min(parts) >= 1
    assert all(abs(part - steps / n) <= 1 for part in parts)


def test_no_number_of_steps_means_all_and_a_stride_begins_below():
    assert Flow(steps=5).timesteps() == [5, 4, 3, 2, 1, 0]
    assert Flow(steps=100).timesteps(5, "stride") == [81, 61, 41, 21, 1, 0]
    with pytest.raises(ValueError, match="at least one"):
        Flow(steps=0).timesteps()


def test_a_chain_starts_at_the_mean_of_the_conditions_or_at_noise():
    noise, cond = random(SHAPE), random((2, 24, 2, 2, 2), 1)
    from_conditions = Denoiser(Backbone(), Flow(), "velocity")
    mean = (cond[:, :8] + cond[:, 8:16] + cond[:, 16:]) / 3
    assert_close(from_conditions.start(noise, cond), mean)
    with pytest.raises(ValueError, match="needs conditions"):
        from_conditions.start(noise)
    from_noise = Denoiser(Backbone(), Flow(source="noise"), "velocity")
    assert torch.equal(from_noise.start(noise, cond), noise)
    assert torch.equal(from_noise.start(noise), noise)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_euler_adds_the_velocity_in_equal_parts(n):
    backbone, flow = Backbone(), Flow()
    denoiser = Denoiser(backbone, flow, "velocity")
    cond = random((2, 24, 2, 2, 2), 1)

    def denoise(x_t, t):
        times = torch.full((len(x_t),), t)
        return denoiser.x_0(denoiser(x_t, times, cond), x_t, times, cond)

    start = denoiser.start(random(SHAPE), cond)
    ours = list(SAMPLERS["euler"](denoise, start, flow, flow.timesteps(n), lambda: random(SHAPE)))
    assert len(ours) == n
    assert backbone.times == [[1000 * i / n] * 2 for i in range(n)]
    x = mean_of_conditions(cond, 8)
    for i, x_s in enumerate(ours):
        x = x + Backbone()(torch.cat([x, cond], dim=1), torch.full((2,), 1000 * i / n)) / n
        assert_close(x_s, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bridge_noise", [0.0, 0.5, 2.0])
def test_mix_has_the_mean_of_the_path_and_the_deviation_of_the_bridge(bridge_noise):
    flow = Flow(bridge_noise=bridge_noise, steps=8)
    x_0, start, noise = (random((9, 8, 2, 2, 2), seed) for seed in range(3))
    t = torch.arange(9)
    r = t.reshape(-1, 1, 1, 1, 1) / 8
    above, below = flow.mix(x_0, start, noise, t), flow.mix(x_0, start, -noise, t)
    assert_close((above + below) / 2, (1 - r) * x_0 + r * start)
    assert_close((above - below) / 2, bridge_noise * (r * (1 - r)).sqrt() * noise)
    assert torch.equal(above[0], x_0[0])
    assert torch.equal(above[8], start[8])


def test_the_goal_of_a_velocity_leads_from_anywhere_on_the_path_to_x_0():
    flow = Flow(bridge_noise=0.0, steps=10)
    denoiser = Denoiser(Backbone(), flow, "velocity")
    x_0, start = random((11, 8, 2, 2, 2)), random((11, 8, 2, 2, 2), 1)
    t = torch.arange(11)
    x_t = flow.mix(x_0, start, torch.ones_like(x_0), t)
    goal = denoiser.goal(x_0, start)
    assert_close(goal, x_0 - start)
    assert_close(denoiser.x_0(goal, x_t, t), x_0)
    # one step back from x_t is where the path is then
    assert_close((x_t + goal / 10)[1:], flow.mix(x_0, start, start, (t - 1).clamp(min=0))[1:])
