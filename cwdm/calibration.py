"""Measure on cases with a known truth what the spread of a model's samples is worth.

The rule is in `uncertainty`. Cases should be ones that the model was not trained on.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from cwdm.case import Case, find_cases
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES
from cwdm.synthesis import Synthesis, Synthesizer
from cwdm.uncertainty import (
    FLOOR,
    Calibration,
    HeldOut,
    Scores,
    conformal_quantile,
    leave_one_out,
)
from cwdm.volume import acquired, brain_mask, read_labels, read_volumes

__all__ = ["calibrate", "calibration_cases"]


def calibration_cases(root: Path) -> list[Case]:
    """The cases at or below a folder that have all four modalities, acquired ones.

    Raises:
        InputError: fewer than two.
    """
    cases = [case for case in map(acquired, find_cases(root)) if set(SEQUENCES) <= set(case.images)]
    if len(cases) < 2:
        raise InputError(f"{root}: found {len(cases)} complete cases, expected at least 2")
    return cases


def calibrate(
    synthesizer: Synthesizer,
    cases: Sequence[Case],
    *,
    samples: int = 6,
    coverage: float = 0.8,
    seed: int = 0,
    steps: int | tuple[int, ...] | None = None,
    sampler: str | None = None,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Calibration, list[HeldOut]]:
    """Withhold the target of every case, sample it, and compare it with the truth.

    Args:
        cases: at least two complete ones.
        samples: per case; the calibration is for that number.
        coverage: share of the brain's voxels that the interval is to hold.
        steps, sampler: as for the synthesizer.
        progress: called after every sample.

    Returns:
        The calibration, to be kept with the model (`model.save_calibrated`), and for each case what
        the others' is worth on it.
    """
    target, scores = synthesizer.target, []
    for case in cases:
        synthesis = synthesizer(
            case.without(target),
            seed=seed,
            samples=samples,
            steps=steps,
            sampler=sampler,
            progress=_per_sample(progress, samples),
        )
        scores.append(_scored(synthesis, case))
    made = synthesis.provenance
    rows = leave_one_out(scores, coverage)
    calibration = Calibration(
        coverage=coverage,
        q=conformal_quantile(np.concatenate([each.brain for each in scores]), coverage),
        floor=FLOOR,
        samples=samples,
        sampler=made.sampler,
        steps=made.steps,
        cases=len(cases),
        date=datetime.now(UTC).date().isoformat(),
        held_out=tuple(row.coverage for row in rows),
    )
    return calibration, rows


def _scored(synthesis: Synthesis, case: Case) -> Scores:
    """The samples of a withheld image against what was acquired."""
    target, maps = synthesis.provenance.target, synthesis.uncertainty
    assert maps is not None
    truth = read_volumes(case, [target])[target]
    tumor = read_labels(case.segmentation, truth) > 0 if case.segmentation else None
    brain = brain_mask(truth) & maps.brain
    return Scores.of(case.id, synthesis.volume.voxels, maps.std, truth.voxels, brain, tumor)


def _per_sample(progress: Callable[[], object], samples: int) -> Progress:
    """Calls it when a sample is complete."""

    def show(done: int, total: int) -> None:
        if done % (total // samples) == 0:
            progress()

    return show
