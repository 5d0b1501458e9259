"""Work on every case of a cohort: each once, whatever dies meanwhile.

A worker makes the files of a case in a folder of its own, moves them to their places, and then
writes down the outcome, whole, in a file. Whoever waits for it collects the outcomes into the
ledger. So what is finished counts even if nobody waits any more, and what is not is done again.

    OUTPUT/...                   the files
    OUTPUT/.cwdm/ledger.sqlite   what became of each case
    OUTPUT/.cwdm/JOB/run         which run it is; workers of an earlier one stop when they see that
    OUTPUT/.cwdm/JOB/outcomes/   of cases that are just finished
    OUTPUT/.cwdm/JOB/staging/    files that are being made

An acquired image may be in the output as a link, and be the last one. So nothing is removed or
replaced there but what cwdm made, one link of several, and unchanged copies of what still is in the
input.
"""

import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd

from cwdm.case import Case
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.executors import Executor
from cwdm.files import atomic_write, lock, sha256
from cwdm.layouts import Found
from cwdm.ledger import Entry, FileState, Ledger
from cwdm.volume import is_result

__all__ = ["Job", "Tally", "Worker", "claim", "due", "run"]

_AT_A_TIME = 3
"""Cases of a worker: one is read, one computed, one written."""
_BARREN = 2
"""Rounds without a case begun before the run is given up."""
_LAST = ["seconds", "message"]
"""Columns at the right of the table."""
_UNFIT = re.compile(r'^\.|[/\\:*?"<>|\x00-\x1f]')
"""What no file name may have in it."""
_LEDGER = Path(".cwdm", "ledger.sqlite")

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
    known: Entry | None
    """What an earlier run did with this case."""


def due(job: Job, cases: Sequence[Case], output: Path) -> list[Case]:
    """The cases that a run would work on: new, failed, interrupted or changed ones."""
    if not (path := Path(output) / _LEDGER).exists():
        return list(cases)
    ledger = Ledger(path, job.name)
    try:
        return [case for case in cases if not _is_finished(job, case, ledger[case.id], output)]
    finally:
        ledger.close()


def claim(output: Path, *names: str) -> None:
    """InputError if there is such a file in a folder that no cohort was written to yet."""
    if not (output / _LEDGER).exists():
        for name in names:
            if os.path.lexists(output / name):
                raise InputError(
                    f"{output / name}: already exists and cwdm did not write it, expected another "
                    "output folder"
                )


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
    claim(output, f"{job.name}.csv")
    with lock(output / ".cwdm" / "lock"):
        place = _Place.begin(output, job.name)
        ledger = Ledger(output / _LEDGER, job.name)
        try:
            for entry in place.collect():
                ledger.put([entry])
            tasks, entries = _plan(job, found, output, ledger)
            unchanged = {each.id for each in found.cases} - {each.case for each in entries}
            ledger.put(entries)
            for done, failed in _work(job, tasks, place, executor, ledger):
                report(Tally(len(tasks), done, failed))
            table = _table(ledger, unchanged)
            asked = _names(found)
        finally:
            ledger.close()
        with atomic_write(output / f"{job.name}.csv", overwrite=True) as temporary:
            table.to_csv(temporary, index=False)
    return table[table["case"].isin(asked)].reset_index(drop=True)


@dataclass(frozen=True)
class _Place:
    """Where the workers of one run leave what they make."""

    output: Path
    job: str
    token: str
    """Of the run."""
    interrupted: frozenset[str] = frozenset()
    """Cases that were being made when the run before was killed."""

    @classmethod
    def begin(cls, output: Path, job: str) -> "_Place":
        """Take over, and clear away what a killed run has left half-made."""
        folder = output / ".cwdm" / job
        with atomic_write(folder / "run", overwrite=True) as temporary:
            temporary.write_text(token := secrets.token_hex(8))
        left = frozenset(path.name for path in folder.glob("staging/*/*"))
        shutil.rmtree(folder / "staging", ignore_errors=True)
        for place in (output, folder.parent, folder, folder / "outcomes"):
            for path in place.glob(".cwdm-*"):
                path.unlink(missing_ok=True)
        return cls(output, job, token, left)

    @property
    def folder(self) -> Path:
        return self.output / ".cwdm" / self.job

    def staging(self, case: str) -> Path:
        return self.folder / "staging" / self.token / case

    def is_over(self) -> bool:
        """Whether another run has begun since."""
        try:
            return (self.folder / "run").read_text() != self.token
        except OSError:
            return True

    def leave(self, entry: Entry) -> None:
        """Write down an outcome."""
        path = self.folder / "outcomes" / f"{entry.case}.json"
        with atomic_write(path, overwrite=True) as temporary:
            temporary.write_text(entry.as_json(), encoding="utf-8")

    def collect(self) -> Iterator[Entry]:
        """The outcomes there are; each is removed once the caller asks for the next."""
        for path in sorted(self.folder.glob("outcomes/[!.]*.json")):
            yield Entry.parse(path.read_text(encoding="utf-8"))
            path.unlink()


def _plan(
    job: Job, found: Found, output: Path, ledger: Ledger
) -> tuple[dict[str, _Task], list[Entry]]:
    """What there is to do, and the new entries of all cases that are not finished."""
    tasks: dict[str, _Task] = {}
    entries: list[Entry] = []
    entry_of = {entry.case: entry for entry in ledger.entries()}
    owners = {
        name: entry.case
        for entry in entry_of.values()
        if entry.state == "done"
        for name in entry.outputs
    }

    def refuse(name: str, message: str) -> None:
        entries.append(_failed(name, message, entry_of.get(name)))

    for problem, name in zip(found.problems, found.problem_names, strict=True):
        refuse(name, problem.message)
    for case in map(_absolute, found.cases):
        known = entry_of.get(case.id)
        if _is_finished(job, case, known, output):
            continue
        try:
            planned = _outputs(job, case, output, known)
            for name in planned:
                if (owner := owners.setdefault(name, case.id)) != case.id:
                    raise InputError(
                        f"case {case.id}: its {name} would be that of case {owner}, expected "
                        "another layout or another name"
                    )
        except InputError as error:
            refuse(case.id, str(error))
            continue
        tasks[case.id] = _Task(case, known)
        previous = known.outputs if known else {}
        outputs = {**dict.fromkeys(planned), **previous}
        inputs = known.inputs if known else {}
        entries.append(Entry(case=case.id, state="running", outputs=outputs, inputs=inputs))
    return tasks, entries


def _failed(case: str, message: str, known: Entry | None) -> Entry:
    """A failure, which remembers what lies in the output and from what it was made."""
    known = known or Entry(case=case, state="failed")
    return replace(known, state="failed", message=message, notes={}, seconds=0.0)


def _names(found: Found) -> set[str]:
    return {case.id for case in found.cases}.union(found.problem_names)


def _absolute(case: Case) -> Case:
    """With paths that are the same for workers elsewhere."""
    images = {key: Path(os.path.abspath(path)) for key, path in case.images.items()}
    seg = case.segmentation and Path(os.path.abspath(case.segmentation))
    return replace(case, images=images, segmentation=seg)


def _outputs(job: Job, case: Case, output: Path, known: Entry | None) -> list[str]:
    """The files to be made; InputError if the case is unfit, or another's file is in the way."""
    if _UNFIT.search(case.id):
        raise InputError(f"case {case.id}: found a name that no file can have, expected another")
    job.inputs(case)
    planned = [str(path) for path in job.outputs(case)]
    for name in planned:
        _check_free(output / name, name in known.outputs if known else False)
    return planned


def _check_free(path: Path, known: bool) -> None:
    if os.path.lexists(path) and not (known and path.is_file()):
        raise InputError(
            f"{path}: already exists and cwdm did not write it, expected another output folder"
        )


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
    job: Job, tasks: dict[str, _Task], place: _Place, executor: Executor, ledger: Ledger
) -> Iterator[tuple[int, int]]:
    """Until every task has an outcome; yields how many are done and how many have failed.

    A case that was in work when a worker died is suspected of it, and done alone and last: if that
    worker dies, too, it is the case.
    """
    counts: Counter[str] = Counter()
    waiting = dict(tasks)
    suspects = waiting.keys() & place.interrupted
    barren = 0  # rounds in which workers died before they had begun

    def collect() -> None:
        for entry in place.collect():
            ledger.put([entry])
            if waiting.pop(entry.case, None):
                counts[entry.state] += 1

    while waiting:
        yield counts["done"], counts["failed"]
        alone = suspects >= waiting.keys()
        share = [task for name, task in waiting.items() if alone or name not in suspects]
        begin = partial(_begin, job, place)
        for _ in executor.run(begin, share, alone=alone):
            collect()
            yield counts["done"], counts["failed"]
        collect()
        begun = [name for name in waiting if place.staging(name).exists()]
        for name in begun:
            shutil.rmtree(place.staging(name), ignore_errors=True)
            known = ledger[name]  # with what it may have moved into place already
            waiting[name] = waiting[name]._replace(known=known)
            suspects.add(name)
            if alone:
                message = f"case {name}: the process that worked on it died, perhaps for memory"
                ledger.put([_failed(name, message, known)])
                del waiting[name]
                counts["failed"] += 1
        barren = 0 if begun else barren + 1
        if waiting and barren == _BARREN:
            raise InputError(
                "workers die before they begin: perhaps for memory (fewer help), or for a script "
                'without if __name__ == "__main__", which they import'
            )
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


def _begin(job: Job, place: _Place, device: str) -> Callable[[Sequence[_Task]], Iterator[None]]:
    return _Bench(job, place, job.worker(device)).work


@dataclass
class _Bench:
    """Where a worker stands, and what keeps it busy."""

    job: Job
    place: _Place
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
        if self.stopped.is_set() or self.place.is_over():
            return
        case, staging = task.case, self.place.staging(task.case.id)
        outputs: dict[str, FileState | None] = {}
        try:
            staging.mkdir(parents=True, exist_ok=True)
            files = self.job.inputs(case)
            inputs = {key: FileState.of(path, digest=True) for key, path in files.items()}
            settings = self.job.settings(case)
            notes = self.worker(case, staging, self._progress)
            if self.place.is_over():
                return
            for name in self._publish(task, inputs.keys()):
                outputs[name] = FileState.of(self.place.output / name, digest=True)
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
            there = {**(task.known.outputs if task.known else {}), **outputs}
            if any(_is_altered(self.place.output / name, there[name]) for name in there):
                left = there  # whoever changed a result wants its record, too
            else:
                left = self._clear(there, lost=self._lost(task, None))
            message = " ".join(message.split())
            entry = replace(_failed(case.id, message, task.known), outputs=left)
        self.place.leave(replace(entry, seconds=time.perf_counter() - began))
        shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, task: _Task, inputs: Iterable[str]) -> Iterator[str]:
        """Move what was made into place; yields what is there. All or nothing may be replaced."""
        known = task.known.outputs if task.known else {}
        lost = self._lost(task, inputs)
        staging, output = self.place.staging(task.case.id), self.place.output
        planned = [str(path) for path in self.job.outputs(task.case)]
        kept = {name for name in planned if _is_same(staging / name, output / name)}
        for name in planned:
            path = output / name
            if name in kept or not os.path.lexists(path):
                continue
            _check_free(path, name in known)
            if not _is_disposable(path, known[name], lost):
                raise InputError(
                    f"{path}: found what cwdm cannot make again, never replaced; expected another "
                    "output folder"
                )
        self._clear({name: known[name] for name in known if name not in planned}, lost=lost)
        for name in planned:
            if name not in kept:
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(output / name)
            yield name

    def _clear(
        self, names: Mapping[str, FileState | None], *, lost: bool
    ) -> dict[str, FileState | None]:
        """Remove what may be removed; what is left."""
        left = {}
        for name, state in names.items():
            path = self.place.output / name
            with suppress(OSError):
                if _is_disposable(path, state, lost):
                    path.unlink()
            if os.path.lexists(path):
                left[name] = state
        return left

    def _lost(self, task: _Task, inputs: Iterable[str] | None) -> bool:
        """Whether something that the case was made from is no longer in the input."""
        if inputs is None:
            with suppress(InputError):
                inputs = self.job.inputs(task.case)
        return task.known is not None and not set(task.known.inputs) <= set(inputs or ())

    def _progress(self, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise _Stopped


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; False unless both are there."""
    if not (one.is_file() and other.is_file()):
        return False
    if one.samefile(other):
        return True
    return one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)


def _is_altered(path: Path, state: FileState | None) -> bool:
    """Whether somebody changed a file that an earlier run put there. A link changes with the input
    and is not meant."""
    if state is None or not path.is_file() or path.stat().st_nlink > 1:
        return False
    return not state.is_current(path)


def _is_disposable(path: Path, state: FileState | None, lost: bool) -> bool:
    """Whether nothing is lost with a file that an earlier run put there."""
    if not path.is_file() or _is_altered(path, state):
        return False
    if path.suffix == ".json" or path.stat().st_nlink > 1:
        return True
    with suppress(InputError):
        if is_result(path):
            return True
    return state is not None and not lost


class _Stopped(Exception):
    """Nobody wants the result any more."""
