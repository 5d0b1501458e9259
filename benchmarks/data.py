"""An epoch from the cache beside one from NIfTI: normalized training images, a patch per case.

    python benchmarks/data.py CASES [--cases N] [--epochs N]

Both read the same cases and cut the same size; the cache is made first and its time is printed too.
Augmentation, which costs the same either way, is off.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cwdm.cache import CachedCase, fill, open_cache
from cwdm.case import Case
from cwdm.config import Config
from cwdm.dataset import Source, TrainingData
from cwdm.layouts import Found, find
from cwdm.modality import SEQUENCES
from cwdm.preparation import prepare
from cwdm.volume import read_volumes


def from_nifti(cases: Sequence[Case], config: Config) -> None:
    """Every case decoded, masked, measured, normalized; a patch of it."""
    patch = config.training.patch
    assert patch is not None
    for case in cases:
        prepared = prepare(read_volumes(case, SEQUENCES), config.images, multiple=config.multiple)
        images = torch.stack(list(prepared.images.values()))
        middle = [max(0, (n - p) // 2) for n, p in zip(images.shape[1:], patch, strict=True)]
        x, y, z = (slice(m, m + p) for m, p in zip(middle, patch, strict=True))
        images[:, x, y, z].clone()


def from_cache(cases: Sequence[CachedCase], config: Config) -> None:
    data = TrainingData([Source("cache", cases)], config, plain=True)
    for number, case in enumerate(cases):
        data.sample(case, np.random.default_rng(number))


def seconds(epoch: Callable[[], object]) -> float:
    began = time.perf_counter()
    epoch()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="CASES")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = Config.read("small-t2f")
    found = find(arguments.folder)
    found = Found(found.cases[: arguments.cases], [])
    with tempfile.TemporaryDirectory() as folder:
        filling = seconds(lambda: list(fill(found, Path(folder))) and None)
        cached = open_cache(Path(folder))
        usable = {case.id for case in cached}
        cases = [case for case in found.cases if case.id in usable]
        times: dict[str, list[float]] = {"NIfTI": [], "cache": []}
        for _ in range(arguments.epochs):  # in turn: both see the same state of the machine
            times["NIfTI"].append(seconds(lambda: from_nifti(cases, config)))
            times["cache"].append(seconds(lambda: from_cache(cached, config)))
        size = sum(case.size for case in cached) / len(cached) / 1e6
    median = {name: statistics.median(each) / len(cases) for name, each in times.items()}
    print(f"{len(cases)} cases, {arguments.epochs} epochs, one thread, {size:.1f} MB a case")
    print(f"packing once   {filling / len(cases):8.3f} s per case")
    for name, value in median.items():
        low, high = (end(times[name]) / len(cases) for end in (min, max))
        print(f"from {name:9} {value:8.3f} s per case ({low:.3f} to {high:.3f})")
    print(f"ratio          {median['NIfTI'] / median['cache']:8.1f}")


if __name__ == "__main__":
    main()
