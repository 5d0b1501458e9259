"""Complete the cases of a cohort: what a case lacks is synthesized, the rest is handed on.

import cwdm

if __name__ == "__main__":  # after an interruption, processes import the script
    table = cwdm.impute("cohort", "completed")
"""

import dataclasses
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cwdm import __version__
from cwdm.case import Case, Kind
from cwdm.cohort import Tally, Worker, claim, due, run
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.executors import Executor, Local
from cwdm.files import atomic_write, gzip_copy, link_or_copy
from cwdm.layouts import (
    DESCRIPTIONS,
    Found,
    Layout,
    Problem,
    describe,
    find,
    image_path,
)
from cwdm.ledger import digest
from cwdm.machine import Precision, choose_device
from cwdm.modality import SEQUENCES, Modality, parse_modality
from cwdm.model import default_model
from cwdm.provenance import sidecar
from cwdm.segmentation import case_labels
from cwdm.synthesis import Synthesizer
from cwdm.volume import acquired, read_volume, read_volumes, stored_as, write_volume

__all__ = ["Imputation", "Plan", "impute", "plan"]

_TRIAL = 64
"""Voxels along each side of the block that is timed."""
_BRAIN = 0.4
"""Share of a 240 x 240 x 155 image that the box around the brain takes."""


@dataclass(frozen=True)
class Imputation:
    """How to complete a case; a ``cohort.Job``."""

    layout: Layout = "brats"
    """Of the output."""
    replace: tuple[Modality, ...] = ()
    """Modalities to synthesize although they were acquired: they are unusable."""
    model: Path | None = None
    """For every modality; without one, those that ship with cwdm."""
    preset: str | None = None
    """Of a published checkpoint."""
    seed: int = 0
    steps: int | tuple[int, ...] | None = None
    sampler: str | None = None
    precision: Precision = "auto"
    memory_limit: int | None = None
    """Bytes for each worker, see ``Engine.fit``; changes images by rounding at most."""
    copy: bool = False
    """Copy acquired images instead of linking to them."""

    def __post_init__(self) -> None:
        """Names become modalities, and the path one that is the same for workers elsewhere."""
        replaced = tuple(parse_modality(name) for name in self.replace)
        object.__setattr__(self, "replace", replaced)
        if self.model is not None:
            object.__setattr__(self, "model", Path(os.path.abspath(self.model)))

    @property
    def name(self) -> str:
        return "impute"

    def targets(self, case: Case) -> tuple[Modality, ...]:
        """What is synthesized for a case."""
        return tuple(m for m in SEQUENCES if m not in case.images or m in self.replace)

    def inputs(self, case: Case) -> Mapping[str, Path]:
        """The images and the segmentation, those to be replaced included."""
        if len(self.targets(case)) == len(SEQUENCES):
            raise InputError(
                f"case {case.id}: found no image to synthesize from, expected at least one of "
                f"{', '.join(SEQUENCES)}"
            )
        files = {str(modality): path for modality, path in case.images.items()}
        return files | ({"seg": case.segmentation} if case.segmentation else {})

    def settings(self, case: Case) -> Mapping[str, Any]:
        targets = self.targets(case)
        return {
            "layout": self.layout,
            "targets": list(targets),
            "models": {target: digest(self._model(target)) for target in targets},
            "preset": self.preset,
            "seed": self.seed,
            "steps": list(self.steps) if isinstance(self.steps, tuple) else self.steps,
            "sampler": self.sampler,
            "precision": self.precision,
            "copy": self.copy,
        }

    def outputs(self, case: Case) -> list[Path]:
        targets = self.targets(case)
        paths = [
            image_path(self.layout, case.id, kind, self._suffix(path))
            for kind, path in self._handed_on(case).items()
        ]
        for target in targets:
            image = image_path(self.layout, case.id, target)
            paths += [sidecar(image), image]
        return paths

    def worker(self, device: str) -> Worker:
        return _Imputer(self, device)

    def load(self, target: Modality, device: str) -> Synthesizer:
        """The model for a modality."""
        return Synthesizer.load(
            target,
            self.model,
            preset=self.preset,
            device=device,
            precision=self.precision,
            memory_limit=self.memory_limit,
        )

    def hand_on(self, case: Case, folder: Path) -> None:
        """Link or copy what was acquired to where the layout has it."""
        for kind, source in self._handed_on(case).items():
            path = folder / image_path(self.layout, case.id, kind, self._suffix(source))
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "seg" and (self.layout == "nnunet" or case.numbers):
                _write_labels(path, case)
            elif path.name.endswith(".gz") and not source.name.lower().endswith(".gz"):
                gzip_copy(source, path)
            else:
                link_or_copy(source, path, copy=self.copy)

    def _handed_on(self, case: Case) -> dict[Kind, Path]:
        """What the output takes over as it is."""
        if self.layout == "brasyn":
            return {}
        left = self.targets(case) if self.layout == "brats" else (*self.targets(case), Modality.CT)
        kept: dict[Kind, Path] = {m: path for m, path in case.images.items() if m not in left}
        return kept | ({"seg": case.segmentation} if case.segmentation else {})

    def _suffix(self, path: Path) -> str:
        """nnU-Net wants one ending throughout."""
        packed = path.name.lower().endswith(".gz") or self.layout == "nnunet"
        return ".nii.gz" if packed else ".nii"

    def _model(self, target: Modality) -> Path:
        return self.model or default_model(target)


class _Imputer:
    """A worker with its models, each loaded when it is first needed."""

    def __init__(self, job: Imputation, device: str):
        self.job, self.device = job, device
        self.loading = threading.Lock()
        self.synthesizers: dict[Modality, Synthesizer] = {}

    def __call__(self, case: Case, folder: Path, progress: Progress) -> Mapping[str, Any]:
        job = self.job
        notes: list[str] = []
        targets = job.targets(case)
        for target in targets:
            synthesis = self._synthesizer(target)(
                case.without(*(other for other in targets if other != target)),
                seed=job.seed,
                steps=job.steps,
                sampler=job.sampler,
                progress=progress,
            )
            synthesis.write_as(folder / image_path(job.layout, case.id, target))
            notes += synthesis.provenance.warnings
        job.hand_on(case, folder)
        return {
            "synthetic": list(targets),
            "given": [modality for modality in case.images if modality not in targets],
            "notes": " ".join(dict.fromkeys(notes)),
        }

    def _synthesizer(self, target: Modality) -> Synthesizer:
        with self.loading:
            if target not in self.synthesizers:
                self.synthesizers[target] = self.job.load(target, self.device)
            return self.synthesizers[target]


class Plan(NamedTuple):
    """What an imputation would do."""

    table: pd.DataFrame
    """A row per case: case, state (new, unchanged or failed), given, missing, message."""
    images: int
    """To be synthesized."""
    seconds: float
    """About; measured on a small block and on the first case that is read."""
    size: int
    """Bytes, about."""


def plan(
    job: Imputation, found: Found, output: Path, *, device: str = "auto", workers: int = 1
) -> Plan:
    """What there is to do; a network call is timed, nothing is written.

    Raises:
        InputError: the model cannot be loaded.
    """
    found = _acquired_only(found, job.replace)
    waiting = {case.id for case in due(job, found.cases, output)}
    rows, todo = [], []
    for case in found.cases:
        missing, message = job.targets(case), ""
        try:
            job.inputs(case)
        except InputError as error:
            message = str(error)
        state = "failed" if message else "new" if case.id in waiting else "unchanged"
        if state == "new":
            todo.append(case)
        given = [m for m in case.images if m not in missing]
        rows.append((case.id, state, " ".join(given), " ".join(missing), message))
    rows += [(each.case, "failed", "", "", each.message) for each in found.problems]
    table = pd.DataFrame(sorted(rows), columns=["case", "state", "given", "missing", "message"])
    wanted = Counter(target for case in todo for target in job.targets(case))
    seconds = _seconds(job, todo, wanted, device, max(1, min(workers, len(todo))))
    return Plan(table, wanted.total(), seconds, sum(_size(job, case, output) for case in todo))


def _seconds(
    job: Imputation,
    cases: Sequence[Case],
    wanted: Mapping[Modality, int],
    device: str,
    workers: int,
) -> float:
    """Computing, or reading if that takes longer. Each worker reads, and computes on a GPU of its
    own; on a CPU they share what one would have."""
    if not wanted:
        return 0.0
    for case in cases:
        began = time.perf_counter()
        with suppress(InputError):
            usable = [m for m in case.images if m not in job.replace]
            volumes = read_volumes(case, usable)
            break
    else:
        return 0.0  # none of them can be read
    reading = (time.perf_counter() - began) * sum(wanted.values())
    voxels = volumes[usable[0]].voxels.size * _BRAIN / _TRIAL**3
    computing = sum(
        job.load(target, device).seconds(_TRIAL, sampler=job.sampler, steps=job.steps)
        * voxels
        * count
        for target, count in wanted.items()
    )
    computers = workers if choose_device(device).type == "cuda" else 1
    return max(reading / workers, computing / computers)


def _size(job: Imputation, case: Case, output: Path) -> int:
    """Bytes a case takes in the output: copies, and synthetic images as large as the others."""
    sizes = [path.stat().st_size for path in case.images.values() if path.exists()]
    handed_on = job.layout != "brasyn" and (job.copy or not _can_link(case, output))
    return sum(sizes) * handed_on + len(job.targets(case)) * max(sizes, default=0)


def _can_link(case: Case, output: Path) -> bool:
    """Whether the case lies on the same disk as the output."""
    there = next(each for each in (output, *output.absolute().parents) if each.exists())
    devices = {path.stat().st_dev for path in case.images.values() if path.exists()}
    return devices <= {there.stat().st_dev}


def impute(
    cohort: Path | str | Found,
    output: Path | str,
    *,
    job: Imputation = Imputation(),
    executor: Executor | None = None,
    report: Callable[[Tally], None] = lambda tally: None,
) -> pd.DataFrame:
    """Complete every case of a cohort.

    Cases that are finished and unchanged are left alone, so that the same call goes on after an
    interruption. A case that fails is a row of the table, and the others go on.

    Args:
        cohort: a folder or table, see ``layouts.find``; or what that found.
        output: a folder that belongs to cwdm: it is not inside the cohort, nor the other way round.
        job: how to do it.
        executor: where to work, by default this process (with several GPUs, one for each).

    Returns:
        A row per case: case, state (done, unchanged or failed), synthetic, given, notes, seconds,
        message.

    Raises:
        InputError: what concerns all cases: the cohort, the output, the model.

    Example:
        >>> cwdm.impute("cohort", "out", job=cwdm.Imputation(layout="nnunet"))  # doctest: +SKIP
    """
    output = Path(output)
    if not isinstance(cohort, Found):
        apart(Path(cohort), output)
        cohort = find(Path(cohort))
    for case in cohort.cases:  # of a table, they may be anywhere
        for path in case.images.values():
            if path.resolve().is_relative_to(output.resolve()):
                raise InputError(f"{output}: found {path} in it, expected another folder")
    claim(output, *DESCRIPTIONS.get(job.layout, ()))
    found = _acquired_only(cohort, job.replace)
    for target in {each for case in due(job, found.cases, output) for each in job.targets(case)}:
        # what is wrong with the model is told once, not for every case
        job.load(target, "cpu").engine.settings(job.sampler, job.steps)
    _keep_to(job.layout, output)
    table = run(job, found, output, executor or Local(), report)
    every = pd.read_csv(output / f"{job.name}.csv")
    describe(job.layout, output, int((every["state"] != "failed").sum()), __version__)
    return table


def _keep_to(layout: Layout, output: Path) -> None:
    """InputError if the output was begun in another layout."""
    note = output / ".cwdm" / "layout"
    if note.exists() and (found := note.read_text().strip()) != layout:
        raise InputError(f"{output}: found the layout {found}, expected it or another folder")
    with atomic_write(note, overwrite=True) as temporary:
        temporary.write_text(f"{layout}\n")


def apart(cohort: Path, output: Path) -> None:
    """InputError if one is inside the other: what we made would be taken for cases."""
    one, other = cohort.resolve(), output.resolve()
    if one.is_relative_to(other) or (other.is_relative_to(one) and one.is_dir()):
        raise InputError(f"{output}: found it in or around the input, expected another folder")


def _acquired_only(found: Found, replaced: Sequence[Modality]) -> Found:
    """Without synthetic images, which are no inputs. Those to be replaced are not looked at."""
    cases, problems = [], list(found.problems)
    for case in found.cases:
        try:
            kept = acquired(case.without(*replaced)).images
        except InputError as error:
            problems.append(Problem(case.id, str(error)))
            continue
        images = {m: path for m, path in case.images.items() if m in kept or m in replaced}
        cases.append(dataclasses.replace(case, images=images))
    return Found(cases, problems, found.series)


def _write_labels(path: Path, case: Case) -> None:
    """The segmentation with the labels of BraTS, which the data set's description promises."""
    like = read_volume(next(iter(case.images.values())))
    labels = case_labels(case, like)
    grid = dataclasses.replace(like, header=stored_as(np.uint8, like.header))
    write_volume(labels, grid, path, f"cwdm {__version__} labels 1 NCR, 2 ED, 3 ET")
