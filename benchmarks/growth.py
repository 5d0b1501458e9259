"""How cost grows with voxels, channels and steps: seconds on this machine, as a picture.

    python benchmarks/growth.py docs/growth.png

Weights are random. Each point is the quickest of three runs of what `cwdm synthesize` runs. Lines
begin at the first point. Needs matplotlib.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import torch

from cwdm.checkpoints import assumed_priors
from cwdm.config import Config
from cwdm.engine import Engine
from cwdm.model import Model, build_denoiser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIDES = (48, 64, 80, 96, 128, 160)
CHANNELS = (16, 32, 64, 128)
STEPS = (1, 2, 4, 8, 16)


def seconds(config: Config, side: int, steps: int) -> float:
    """Of a chain for an image of so many voxels a side."""
    model = Model(config, build_denoiser(config).eval(), assumed_priors(config), Path("none"), "")
    engine = Engine(model)
    grid = (side // config.transform.factor,) * 3
    cond = torch.zeros(1, config.in_channels - config.transform.channels, *grid)
    cond = cond.to(engine.device)
    draw = partial(torch.randn, 1, config.transform.channels, *grid, device=engine.device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        engine.run(engine.settings(steps=steps), draw, cond=cond)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    config = Config.read("small-t2f")

    def wide(channels: int) -> Config:
        return replace(config, network=replace(config.network, channels=channels))

    panels: list[tuple[str, Sequence[int], list[float], int]] = [
        ("voxels a side", SIDES, [seconds(config, side, 1) for side in SIDES], 3),
        ("channels", CHANNELS, [seconds(wide(n), 64, 1) for n in CHANNELS], 2),
        ("steps", STEPS, [seconds(config, 64, n) for n in STEPS], 1),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), constrained_layout=True)
    for axis, (name, values, times, power) in zip(axes, panels, strict=True):
        line = [times[0] * (value / values[0]) ** power for value in values]
        axis.loglog(values, line, color="0.7", label=f"by its power {power}")
        axis.loglog(values, times, "o-", color="tab:blue", label="measured")
        axis.set(xlabel=name, ylabel="seconds", xticks=values)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.legend(fontsize=7)
        print(name, *(f"{value}: {took:.3g} s" for value, took in zip(values, times, strict=True)))
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
