"""What a missing modality costs a segmenter, and what each way to fill it in gives back.

    python benchmarks/handoff.py CASES --train TRAIN --msnet FILE --output handoff.csv

For each case and each modality: Dice of WT, TC and ET if that modality is

    real     as it was acquired
    zeros    0 everywhere, which for the network of cwdm is the same as left out
    copy     the nearest other modality: t1n for t1c, t2w for t2f, and the other way round
    mean     the mean of the complete cases in TRAIN, voxel by voxel, in the brain of the case
    cwdm     synthesized from the other three by the model that ships, not trained on CASES

It is compared with the segmentation of the case where it has one (`expert`), and with what the
same segmenter finds in the acquired images (`itself`). `real` with another seed shows how far a
segmenter that draws random numbers differs from itself. Rows that are in the output are not made
again.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cwdm import segnet
from cwdm.case import Case, find_cases
from cwdm.machine import Precision
from cwdm.modality import SEQUENCES, Modality
from cwdm.model import find_model
from cwdm.msnet import MSNet
from cwdm.segmentation import Labels, case_labels, dice, regions
from cwdm.synthesis import Synthesizer
from cwdm.volume import brain_mask, read_volume, read_volumes

Images = dict[Modality, NDArray[Any]]
Segment = Callable[[Images, int], Labels]
Key = tuple[str, ...]

WAYS = ("zeros", "copy", "mean", "cwdm")

NEAREST = {
    Modality.T1N: Modality.T1C,
    Modality.T1C: Modality.T1N,
    Modality.T2W: Modality.T2F,
    Modality.T2F: Modality.T2W,
}
FIELDS = ("segmenter", "case", "missing", "filled", "reference", "WT", "TC", "ET")


def standardized(voxels: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Mean 0 and deviation 1 in the brain."""
    inside = voxels[brain]
    standard: NDArray[np.float32] = (voxels - inside.mean()) / inside.std()
    return standard


def mean_images(folder: Path) -> Images:
    """Of complete cases in one space, standardized; the mean over those with brain there."""
    sums: Images = {}
    counts: Images = {}
    for case in find_cases(folder):
        for modality, volume in read_volumes(case, SEQUENCES).items():
            brain = brain_mask(volume)
            part = np.where(brain, standardized(volume.voxels, brain), 0).astype(np.float32)
            sums[modality] = sums.get(modality, np.float32(0)) + part
            counts[modality] = counts.get(modality, np.float32(0)) + brain.astype(np.float32)
    return {modality: sums[modality] / np.maximum(counts[modality], 1) for modality in sums}


@dataclass(frozen=True, eq=False)
class Gap:
    """A case of which one modality is to be filled in."""

    case: Case
    real: Images
    """With background at 0."""
    means: Images

    @classmethod
    def of(cls, case: Case, means: Images) -> Self:
        volumes = read_volumes(case, SEQUENCES)
        real = {m: (v.voxels * brain_mask(v)).astype(np.float32) for m, v in volumes.items()}
        return cls(case, real, means)

    def filled(self, target: Modality, way: str) -> Images | None:
        """All images that there are then; None where the way is not open for this case."""
        rest = {m: image for m, image in self.real.items() if m is not target}
        match way:
            case "zeros":
                return rest
            case "copy":
                return {**rest, target: self.real[NEAREST[target]]}
            case "cwdm":
                synthesizer = Synthesizer.load(target, find_model(f"small-{target}"))
                return {**rest, target: synthesizer(self.case.without(target)).volume.voxels}
        mean = self.means[target]
        brain = np.logical_or.reduce([image != 0 for image in rest.values()])
        if mean.shape != brain.shape:
            return None
        return {**rest, target: np.where(brain, mean - mean[brain].min() + 0.1, 0)}


def segmenters(msnet: Path | None, ours: Path | None, precision: Precision) -> dict[str, Segment]:
    found: dict[str, Segment] = {}
    if ours:
        net = segnet.load(ours)
        found["cwdm"] = lambda images, seed: segnet.labels_of(segnet.segment(net, images))
    if msnet:
        cascade = MSNet.load(msnet, precision=precision)

        def run(images: Images, seed: int) -> Labels:
            zeros = np.zeros_like(next(iter(images.values())))
            return cascade({m: images.get(m, zeros) for m in SEQUENCES}, seed=seed)

        found["msnet"] = run
    return found


def rows(name: str, segment: Segment, gap: Gap, done: set[Key]) -> Iterator[tuple[str, ...]]:
    """What is not done yet, a row at a time."""
    case, first = gap.case, gap.case.images[Modality.T1N]
    ways = [("", "real"), *product(map(str, SEQUENCES), WAYS)]
    ways += [("", "real, seed 1")] if name == "msnet" else []
    references = ["itself", "expert"] if case.segmentation else ["itself"]
    keys = {way: [(name, case.id, *way, each) for each in references] for way in ways}
    if done.issuperset(key for same in keys.values() for key in same):
        return
    truths = {"itself": segment(gap.real, 0)}
    if case.segmentation:
        truths["expert"] = case_labels(case, read_volume(first))
    for (missing, way), same in keys.items():
        if done.issuperset(same):
            continue
        images = gap.filled(Modality(missing), way) if missing else gap.real
        if images is None:
            continue
        found = regions(segment(images, int(way.endswith("seed 1"))))
        for key in same:
            truth = regions(truths[key[-1]])
            yield (*key, *(f"{dice(found[region], truth[region]):.4f}" for region in found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path, nargs="+", help="folders of cases")
    parser.add_argument("--train", type=Path, required=True, help="cases of the mean image")
    parser.add_argument("--msnet", type=Path, help="weights of MSNet (.npz)")
    parser.add_argument("--ours", type=Path, help="weights of the network of cwdm")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    done: set[Key] = set()
    if given.output.exists():
        table = pd.read_csv(given.output, keep_default_na=False, dtype=str)
        done = set(table[list(FIELDS[:5])].itertuples(index=False, name=None))
    means = mean_images(given.train)
    with given.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(FIELDS)
        for name, segment in segmenters(given.msnet, given.ours, given.precision).items():
            for case in (case for folder in given.cases for case in find_cases(folder)):
                for row in rows(name, segment, Gap.of(case, means), done):
                    writer.writerow(row)
                    file.flush()


if __name__ == "__main__":
    main()
