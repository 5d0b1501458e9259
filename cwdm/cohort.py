"""Work on every case of a cohort: each once, whatever dies meanwhile.

A worker makes the files of a case in a folder of its own, moves them to their places, and then
writes down the outcome, whole, in a file. Whoever waits for it collects the outcomes into the
ledger. So what is finished counts even if nobody waits any more, and what is not is done again.

    OUTPUT/...                   the files
    OUTPUT/.cwdm/ledger.sqlite   what became of each case
    OUTPUT/.cwdm/outcomes/       of cases that are just finished
    OUTPUT/.cwdm/staging/        files that are being made
"""

import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd

from cwdm.case import Case
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.executors import Executor
from cwdm.files import atomic_write, lock, move_new
from cwdm.layouts import Found
from cwdm.ledger import Entry, FileState, Ledger

__all__ = ["Job", "Tally", "Worker", "due", "run"]

_AT_A_TIME = 3
"""Cases of a worker: one is read, one computed, one written."""
_LIVES = 2
"""How often a case may lose its worker."""
_LAST = ["seconds", "message"]
"""Columns at the right of the table."""
_UNFIT = re.compile(r'^\.|[/\\:*?"<>|\x00-\x1f]')
"""What no file name may have in it."""

Worker = Callable[[Case, Path, Progress], Mapping[str, Any]]
"""Makes the outputs of a case below a folder; returns what the user is shown about it. It is called
from several threads, and calls the progress now and then, which ends it by raising."""


class Job(Protocol):
    """A kind of work. It can be pickled."""

    @property
    def name(self) -> str:
        """Of the kind; a ledger keeps kinds apart."""

    def inputs(self, case: Case) -> Mapping[str, Path]:
        """The files that the result depends on; InputError if it cannot be done with this case."""

    def settings(self, case: Case) -> Mapping[str, Any]:
        """What else it depends on, for JSON."""

    def outputs(self, case: Case) -> Sequence[Path]:
        """The files that will be made, relative to the output folder, the most important last."""

    def worker(self, device: str) -> Worker:
        """With everything loaded that it takes."""


class Tally(NamedTuple):
    """How far the work is."""

    total: int
    """Cases that are worked on; others have been finished before."""
    done: int
    failed: int


class _Task(NamedTuple):
    case: Case
    previous: tuple[str, ...]
    """Files that an earlier run made of this case."""


def due(job: Job, cases: Sequence[Case], output: Path) -> list[Case]:
    """The cases that a run would work on: new, failed, interrupted or changed ones."""
    path = Path(output) / ".cwdm" / "ledger.sqlite"
    if not path.exists():
        return list(cases)
    ledger = Ledger(path, job.name)
    try:
        return [case for case in cases if not _is_finished(job, case, ledger[case.id], output)]
    finally:
        ledger.close()


def run(
    job: Job,
    found: Found,
    output: Path,
    executor: Executor,
    report: Callable[[Tally], None] = lambda tally: None,
) -> pd.DataFrame:
    """Do the work on all cases that are due; a row per case, failed ones included.

    Columns: case, state (done, unchanged or failed), what the job tells, seconds, message. The same
    is written as ``<job>.csv``, there with the cases of earlier runs.

    Raises:
        InputError: the output cannot be written, another process is at work in it, or no worker
            can begin.
    """
    output = Path(os.path.abspath(output))
    place = output / ".cwdm"
    with lock(place / "lock"):
        _clear(place)
        ledger = Ledger(place / "ledger.sqlite", job.name)
        try:
            for entry in _collect(place):
                ledger.put([entry])
            tasks, entries = _plan(job, found, output, ledger)
            unchanged = {each.id for each in found.cases} - {each.case for each in entries}
            ledger.put(entries)
            for done, failed in _work(job, tasks, output, executor, ledger):
                report(Tally(len(tasks), done, failed))
            table = _table(ledger, unchanged)
        finally:
            ledger.close()
        with atomic_write(output / f"{job.name}.csv", overwrite=True) as temporary:
            table.to_csv(temporary, index=False)
    asked = {case.id for case in found.cases} | {problem.case for problem in found.problems}
    return table[table["case"].isin(asked)].reset_index(drop=True)


def _clear(place: Path) -> None:
    """Remove what a killed run has left half-made."""
    shutil.rmtree(place / "staging", ignore_errors=True)
    for temporary in place.glob("outcomes/.cwdm-*"):
        temporary.unlink(missing_ok=True)


def _collect(place: Path) -> Iterator[Entry]:
    """The outcomes that lie there; each is removed once the caller has asked for the next."""
    for path in sorted(place.glob("outcomes/[!.]*.json")):
        yield Entry.parse(path.read_text(encoding="utf-8"))
        path.unlink()


def _plan(
    job: Job, found: Found, output: Path, ledger: Ledger
) -> tuple[dict[str, _Task], list[Entry]]:
    """What there is to do, and the new entries of all cases that are not finished."""
    tasks: dict[str, _Task] = {}
    entries = []

    def refuse(name: str, message: str) -> None:
        known = ledger[name]
        _remove(output, known.outputs if known else ())
        entries.append(Entry(case=name, state="failed", message=message))

    for problem in found.problems:
        refuse(problem.case, problem.message)
    for case in map(_absolute, found.cases):
        known = ledger[case.id]
        if _is_finished(job, case, known, output):
            continue
        previous = tuple(known.outputs) if known else ()
        try:
            planned = _outputs(job, case, output, previous)
        except InputError as error:
            refuse(case.id, str(error))
            continue
        tasks[case.id] = _Task(case, previous)
        both = dict.fromkeys([*previous, *planned])
        entries.append(Entry(case=case.id, state="running", outputs=both))
    return tasks, entries


def _absolute(case: Case) -> Case:
    """With paths that are the same for workers elsewhere."""
    images = {key: Path(os.path.abspath(path)) for key, path in case.images.items()}
    seg = case.segmentation and Path(os.path.abspath(case.segmentation))
    return replace(case, images=images, segmentation=seg)


def _outputs(job: Job, case: Case, output: Path, previous: Sequence[str]) -> list[str]:
    """The files to be made; InputError if the case is unfit, or another's file is in the way."""
    if _UNFIT.search(case.id):
        raise InputError(f"case {case.id}: found a name that no file can have, expected another")
    job.inputs(case)
    planned = [str(path) for path in job.outputs(case)]
    for name in planned:
        if name not in previous and os.path.lexists(output / name):
            raise InputError(
                f"{output / name}: already exists and cwdm {job.name} did not write it here, "
                "expected another output folder"
            )
    return planned


def _remove(output: Path, names: Iterable[str]) -> None:
    for name in names:
        (output / name).unlink(missing_ok=True)


def _is_finished(job: Job, case: Case, entry: Entry | None, output: Path) -> bool:
    """Whether all that it was made from and all that was made is still the same."""
    if entry is None or entry.state != "done":
        return False
    try:
        inputs = job.inputs(case)
        return (
            entry.settings == job.settings(case)
            and entry.inputs.keys() == inputs.keys()
            and all(entry.inputs[key].is_current(path) for key, path in inputs.items())
            and all(
                state is not None and state.is_current(output / name)
                for name, state in entry.outputs.items()
            )
        )
    except InputError:
        return False


def _work(
    job: Job, tasks: dict[str, _Task], output: Path, executor: Executor, ledger: Ledger
) -> Iterator[tuple[int, int]]:
    """Until every task has an outcome; yields how many are done and how many have failed."""
    counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    place = output / ".cwdm"

    def collect() -> None:
        for entry in _collect(place):
            ledger.put([entry])
            if waiting.pop(entry.case, None):
                counts[entry.state] += 1

    waiting = dict(tasks)
    barren = 0  # rounds in which workers died before they had begun
    while waiting:
        yield counts["done"], counts["failed"]
        for _ in executor.run(partial(_begin, job, output), list(waiting.values())):
            collect()
            yield counts["done"], counts["failed"]
        collect()
        begun = [name for name in waiting if (place / "staging" / name).exists()]
        for name in begun:
            shutil.rmtree(place / "staging" / name, ignore_errors=True)
            lost[name] += 1
            # it may have moved some of its files already
            known = ledger[name]
            waiting[name] = waiting[name]._replace(previous=tuple(known.outputs if known else ()))
            if lost[name] == _LIVES:
                message = f"case {name}: the process that worked on it died, perhaps for memory"
                ledger.put([Entry(case=name, state="failed", message=message)])
                _remove(output, waiting.pop(name).previous)
                counts["failed"] += 1
        barren = 0 if begun else barren + 1
        if waiting and barren == _LIVES:
            raise InputError("workers die before they begin, perhaps for memory; expected fewer")
    yield counts["done"], counts["failed"]


def _table(ledger: Ledger, unchanged: set[str]) -> pd.DataFrame:
    """A row for every case that was ever worked on."""
    rows = []
    for entry in ledger.entries():
        state = "unchanged" if entry.case in unchanged else entry.state
        told = {key: _text(value) for key, value in entry.notes.items()}
        row = {"case": entry.case, "state": state, **told, "seconds": round(entry.seconds, 2)}
        rows.append({**row, "message": entry.message})
    table = pd.DataFrame(rows, columns=None if rows else ["case", "state", *_LAST])
    return table[[*(name for name in table if name not in _LAST), *_LAST]]


def _text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _begin(job: Job, output: Path, device: str) -> Callable[[Sequence[_Task]], Iterator[None]]:
    return _Bench(job, output, job.worker(device)).work


@dataclass
class _Bench:
    """Where a worker stands, and what keeps it busy."""

    job: Job
    output: Path
    worker: Worker
    stopped: threading.Event = field(default_factory=threading.Event)

    def work(self, tasks: Sequence[_Task]) -> Iterator[None]:
        with ThreadPoolExecutor(min(_AT_A_TIME, len(tasks))) as threads:
            try:
                for _ in threads.map(self._one, tasks):
                    yield
            except BaseException:
                self.stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, task: _Task) -> None:
        """A case from its files to its outcome."""
        began = time.perf_counter()
        case, place = task.case, self.output / ".cwdm"
        staging = place / "staging" / case.id
        staging.mkdir(parents=True, exist_ok=True)
        entry = Entry(case=case.id, state="failed")
        outputs: dict[str, FileState] = {}
        try:
            files = self.job.inputs(case)
            inputs = {key: FileState.of(path, digest=True) for key, path in files.items()}
            settings = self.job.settings(case)
            notes = self.worker(case, staging, self._progress)
            _remove(self.output, task.previous)
            for path in self.job.outputs(case):
                move_new(staging / path, self.output / path)
                outputs[str(path)] = FileState.of(self.output / path)
            entry = Entry(
                case=case.id,
                state="done",
                settings=settings,
                inputs=inputs,
                outputs=outputs,
                notes=notes,
            )
        except _Stopped:
            return
        except Exception as error:  # whatever it is, the others go on
            message = (
                str(error)
                if isinstance(error, InputError)
                else f"case {case.id}: unexpected {type(error).__name__}: {error}"
            )
            entry = replace(entry, message=" ".join(message.split()))
            _remove(self.output, [*task.previous, *outputs])
        entry = replace(entry, seconds=time.perf_counter() - began)
        with atomic_write(place / "outcomes" / f"{case.id}.json", overwrite=True) as temporary:
            temporary.write_text(entry.as_json(), encoding="utf-8")
        shutil.rmtree(staging, ignore_errors=True)

    def _progress(self, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise _Stopped


class _Stopped(Exception):
    """Nobody wants the result any more."""
