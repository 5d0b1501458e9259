"""How few steps are as good as all: PSNR in the brain by sampler and number of steps.

    python benchmarks/steps.py CASES [--target t2f] [--sampler ddim] [--steps 1,2,5] [--full N]
        [--block N]

Cases are complete ones that the model was not trained on; the target of each is withheld. PSNR is
that of the protocol "aligned", as in `cwdm evaluate`. The last number of steps is the full chain;
the fewest that are within 0.1 dB of it are marked. A block is the middle of every case, so many
voxels a side: a thousand steps of whole brains take hours on a processor.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import nibabel as nib
from scipy import ndimage
from tqdm import tqdm

from cwdm.case import Case, find_cases
from cwdm.evaluate import complete_cases
from cwdm.metrics import Aligned, psnr
from cwdm.modality import SEQUENCES, parse_modality
from cwdm.synthesis import Synthesizer
from cwdm.volume import brain_mask, read_volumes

NEAR_DB = 0.1


def middles(cases: Sequence[Case], side: int, folder: Path) -> list[Case]:
    """The same cases, cut to their middle."""
    for case in cases:
        for modality, volume in read_volumes(case, SEQUENCES).items():
            x, y, z = ndimage.center_of_mass(volume.voxels != 0)
            corner = [round(centre) - side // 2 for centre in (x, y, z)]
            box = tuple(slice(start, start + side) for start in corner)
            affine = volume.affine.copy()
            affine[:3, 3] = (affine @ [*corner, 1])[:3]
            cut = nib.Nifti1Image(volume.voxels[box], affine)
            (folder / case.id).mkdir(exist_ok=True)
            nib.save(cut, folder / case.id / f"{case.id}-{modality}.nii.gz")
    return find_cases(folder)


class Row(NamedTuple):
    """Means over the cases."""

    steps: int
    psnr: float
    seconds: float


def measured(
    synthesizer: Synthesizer,
    cases: Sequence[Case],
    sampler: str,
    steps: int,
    step_done: Callable[[], object],
) -> Row:
    target = synthesizer.target
    figures, seconds = [], []

    def show(done: int, total: int) -> None:
        step_done()

    for case in cases:
        truth = read_volumes(case, [target])[target]
        made = synthesizer(case.without(target), sampler=sampler, steps=steps, progress=show)
        aligned = Aligned.of(made.volume.voxels, truth.voxels, brain_mask(truth), rising=True)
        figures.append(psnr(aligned.prediction, aligned.truth, aligned.brain))
        seconds.append(made.provenance.seconds)
    return Row(steps, mean(figures), mean(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--target", default="t2f", type=parse_modality)
    parser.add_argument("--sampler", action="append", help="repeatable [ddim, ddpm, dpm++2m]")
    parser.add_argument("--steps", default="1,2,5,10,25,50,100")
    parser.add_argument("--full", default=1000, type=int, help="steps of the full chain")
    parser.add_argument("--block", type=int, help="voxels a side, instead of whole brains")
    parser.add_argument("--model", type=Path, help="a model file; else the one that ships")
    options = parser.parse_args()
    cases = complete_cases(find_cases(options.cases))
    if options.block:
        cases = middles(cases, options.block, Path(tempfile.mkdtemp()))
    synthesizer = Synthesizer.load(options.target, options.model)
    counts = [*sorted(map(int, options.steps.split(","))), options.full]
    print(f"{options.target}, {len(cases)} case(s), {synthesizer.model.config.name}")
    print("| sampler | steps | PSNR, dB | seconds | |\n|---|---:|---:|---:|---|")
    for sampler in options.sampler or ["ddim", "ddpm", "dpm++2m"]:
        with tqdm(total=len(cases) * sum(counts), desc=sampler, unit="step") as bar:
            rows = [measured(synthesizer, cases, sampler, steps, bar.update) for steps in counts]
        fewest = next(row.steps for row in rows if row.psnr >= rows[-1].psnr - NEAR_DB)
        for row in rows:
            told = "full chain" if row is rows[-1] else ""
            told = "fewest within 0.1 dB" if row.steps == fewest else told
            figures = f"{row.psnr:.2f} | {row.seconds:.1f}"
            print(f"| {sampler} | {row.steps} | {figures} | {told} |", flush=True)


if __name__ == "__main__":
    main()
