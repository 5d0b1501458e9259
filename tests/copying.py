"""A job for tests of cohorts: copies files, and dies when it is told to. Run it as a script:

    python copying.py COHORT OUTPUT EXECUTOR [KEY=VALUE ...]

It writes the table as JSON. A line of LOG says that a case was begun.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdm.case import Case
from cwdm.cohort import Worker, run
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.executors import Executor, Local, Ray, Slurm
from cwdm.layouts import find


@dataclass(frozen=True)
class Copying:
    log: str
    seconds: float = 0.0
    """That a case takes."""
    setting: int = 0
    kills: str = ""
    """A case whose worker dies, the first time or always."""
    always: bool = False
    refuses: bool = False
    """No worker can begin."""
    flat: bool = False
    """All cases have outputs of the same names."""
    name: str = "copy"

    def inputs(self, case: Case) -> Mapping[str, Path]:
        if not case.images:
            raise InputError(f"case {case.id}: found nothing")
        return {str(modality): path for modality, path in case.images.items()}

    def settings(self, case: Case) -> Mapping[str, Any]:
        return {"setting": self.setting}

    def outputs(self, case: Case) -> list[Path]:
        if self.flat:
            return [Path(f"{modality}.txt") for modality in case.images]
        return [Path(case.id, path.name) for path in case.images.values()]

    def worker(self, device: str) -> Worker:
        if self.refuses:
            raise InputError("model.safetensors: no such file")
        return self._work

    def _work(self, case: Case, folder: Path, progress: Progress) -> Mapping[str, Any]:
        with open(self.log, "a") as log:
            log.write(f"{case.id}\n")
        died = Path(f"{self.log}.died")
        if case.id == self.kills and (self.always or not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for step in range(10):
            time.sleep(self.seconds / 10)
            progress(step + 1, 10)
        for path, source in zip(self.outputs(case), case.images.values(), strict=True):
            text = source.read_text()
            if text == "corrupt":
                raise InputError(f"{source}: truncated")
            if text == "surprise":
                raise RuntimeError("what is this?")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(f"{text} {self.setting}")
        return {"copied": list(case.images)}


def executor(name: str, output: Path, workers: int) -> Executor:
    match name:
        case "ray":
            return Ray(workers)
        case "slurm":
            return Slurm(output / ".cwdm" / "slurm", workers, {"timeout_min": 2}, "local")
    return Local(workers, "cpu")


def main(cohort: str, output: str, name: str, *words: str) -> None:
    values: dict[str, Any] = {"log": f"{output}.log"}
    for word in words:
        key, _, value = word.partition("=")
        values[key] = value if key == "kills" else json.loads(value)
    workers = values.pop("workers", 2)
    job = Copying(**values)
    table = run(job, find(Path(cohort)), Path(output), executor(name, Path(output), workers))
    print(table.to_json(orient="records"))


if __name__ == "__main__":
    main(*sys.argv[1:])
