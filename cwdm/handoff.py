"""Segment the tumors of a cohort with a segmenter of the user's choice.

import cwdm

if __name__ == "__main__":  # after an interruption, processes import the script
    table = cwdm.segment("cohort", "segmented", model="nnunet:results", impute_missing=True)
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from cwdm import __version__
from cwdm.case import Case
from cwdm.cohort import Tally, Worker, run
from cwdm.engine import TURN, Progress
from cwdm.executors import Executor, Local
from cwdm.files import sha256
from cwdm.imputation import Imputation, apart, impute
from cwdm.layouts import Found, Problem, find
from cwdm.machine import Precision
from cwdm.modality import SEQUENCES, Modality
from cwdm.provenance import SegmentationProvenance, Source, segmentation_warnings, sidecar
from cwdm.segmentation import ET, Segmenter, check_complete, regions
from cwdm.segmenters import load
from cwdm.volume import is_synthetic, read_volume, stored_as, write_volume

__all__ = ["COMPLETED", "Segmentation", "segment"]

COMPLETED = "completed"
"""The folder below the output where completed cases are."""


@dataclass(frozen=True)
class Segmentation:
    """How to segment a case; a ``cohort.Job``."""

    spec: str
    """The segmenter, see ``segmenters.load``."""
    sha256: str
    channels: tuple[Modality, ...]
    partial: bool
    enhancing: int = ET
    """The label of enhancing tumor in the output: 3 since BraTS 2023, 4 before."""
    precision: Precision = "auto"
    timeout_s: float | None = None
    """For programs; it does not change results."""

    @classmethod
    def of(
        cls,
        spec: str,
        *,
        enhancing: int = ET,
        precision: Precision = "auto",
        timeout_s: float | None = None,
    ) -> Self:
        """Load the segmenter once, to see that it works and what it looks at."""
        segmenter = load(spec, device="cpu", timeout_s=timeout_s)
        return cls(
            spec,
            segmenter.sha256,
            segmenter.channels,
            segmenter.partial,
            enhancing,
            precision,
            timeout_s,
        )

    @property
    def name(self) -> str:
        return "segment"

    def inputs(self, case: Case) -> Mapping[str, Path]:
        check_complete(self, case)
        return {str(m): case.images[m] for m in self.channels if m in case.images}

    def settings(self, case: Case) -> Mapping[str, Any]:
        names = ("spec", "sha256", "enhancing", "precision")
        return {name: getattr(self, name) for name in names}

    def outputs(self, case: Case) -> list[Path]:
        image = Path(f"{case.id}-seg.nii.gz")
        return [sidecar(image), image]

    def worker(self, device: str) -> Worker:
        segmenter = load(
            self.spec, device=device, precision=self.precision, timeout_s=self.timeout_s
        )
        return _Worker(self, segmenter)


@dataclass(frozen=True)
class _Worker:
    job: Segmentation
    segmenter: Segmenter

    def __call__(self, case: Case, folder: Path, progress: Progress) -> Mapping[str, Any]:
        inputs = {m: path for m in SEQUENCES if (path := case.images.get(m))}
        used = {m: path for m, path in inputs.items() if m in self.job.channels}
        synthetic = tuple(m for m, path in used.items() if is_synthetic(path))
        absent = tuple(m for m in SEQUENCES if m in self.job.channels and m not in used)
        like = read_volume(next(iter(used.values())))
        with TURN:
            progress(0, 1)  # nobody may want it any more
            began = time.perf_counter()
            labels = self.segmenter(case, progress)
            seconds = time.perf_counter() - began
        ml = abs(np.linalg.det(like.affine[:3, :3])) / 1000
        sizes = {str(r): round(float(mask.sum() * ml), 3) for r, mask in regions(labels).items()}
        record = SegmentationProvenance(
            cwdm=__version__,
            case=case.id,
            segmenter=self.segmenter.spec,
            segmenter_sha256=self.segmenter.sha256,
            inputs={m: Source(name=path.name, sha256=sha256(path)) for m, path in used.items()},
            synthetic_inputs=synthetic,
            absent=absent,
            labels={1: "NCR", 2: "ED", self.job.enhancing: "ET"},
            volumes_ml=sizes,
            seconds=round(seconds, 3),
            warnings=segmentation_warnings(synthetic, absent, partial=self.job.partial),
        )
        image = folder / self.job.outputs(case)[-1]
        stored = np.where(labels == ET, self.job.enhancing, labels).astype(np.uint8)
        grid = replace(like, header=stored_as(np.uint8, like.header))
        write_volume(stored, grid, image, record.description)
        record.write(sidecar(image))
        return {
            "synthetic": list(synthetic),
            "absent": list(absent),
            **{f"{name} ml": size for name, size in sizes.items()},
            "notes": " ".join(record.warnings),
        }


def segment(
    cohort: Path | str | Found,
    output: Path | str,
    *,
    model: str = "default",
    impute_missing: bool | Imputation = False,
    enhancing: int = ET,
    precision: Precision = "auto",
    timeout_s: float | None = None,
    executor: Executor | None = None,
    report: Callable[[Tally], None] = lambda tally: None,
) -> pd.DataFrame:
    """Segment every case of a cohort into ``<id>-seg.nii.gz``, with a record of what it rests on.

    Images that are marked as synthetic are used, and named in the record.

    Args:
        cohort: a folder or table, see ``layouts.find``; or what that found.
        output: a folder that belongs to cwdm.
        model: the segmenter, see ``segmenters.load``.
        impute_missing: complete the cases first, into ``completed`` below the output; perhaps how.
        enhancing: label of enhancing tumor in the output, 3 or 4.
        timeout_s: for a program, per case.
        executor: where to work, by default this process (with several GPUs, one for each).

    Returns:
        A row per case: case, state (done, unchanged or failed), synthetic, absent, WT ml, TC ml,
        ET ml, notes, seconds, message.

    Raises:
        InputError: what concerns all cases: the cohort, the output, the segmenter.
    """
    output, executor = Path(output), executor or Local()
    job = Segmentation.of(model, enhancing=enhancing, precision=precision, timeout_s=timeout_s)
    if not isinstance(cohort, Found):
        apart(Path(cohort), output)
        cohort = find(Path(cohort))
    if impute_missing:
        how = impute_missing if isinstance(impute_missing, Imputation) else Imputation()
        how = replace(how, layout="brats")  # which is read back below
        cohort = _completed(cohort, output / COMPLETED, how, executor, report)
    return run(job, cohort, output, executor, report)


def _completed(
    cohort: Found,
    folder: Path,
    how: Imputation,
    executor: Executor,
    report: Callable[[Tally], None],
) -> Found:
    """The same cases with nothing missing."""
    table = impute(cohort, folder, job=how, executor=executor, report=report)
    failed = table[table["state"] == "failed"]
    problems = [Problem(*row) for row in failed[["case", "message"]].itertuples(index=False)]
    names = set(table["case"]) - set(failed["case"])
    cases = [each for each in find(folder).cases if each.id in names] if names else []
    return Found(cases, problems)
