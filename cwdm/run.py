"""The folder of a training run: checkpoints to go on from, the models, and what happened when.

config.json       the resolved configuration
data.json         what the run is trained on, and how it looks to the network
steps.jsonl       a line per step
validation.jsonl  a line per validation, its pictures in validation/
checkpoints/      the last few, whole or not there
model.safetensors the latest average weights; best.safetensors those that validated best
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cwdm.config import Config
from cwdm.errors import InputError
from cwdm.files import atomic_write, check_target, lock
from cwdm.model import to_bytes

__all__ = ["BEST", "CONFIG", "DATA", "MODEL", "STEPS", "VALIDATION", "Checkpoint", "RunFolder"]

CONFIG, DATA = "config.json", "data.json"
STEPS, VALIDATION = "steps.jsonl", "validation.jsonl"
MODEL, BEST = "model.safetensors", "best.safetensors"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything a run needs to go on."""

    step: int
    """Steps done."""
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    """What else there is to remember, for JSON."""


class RunFolder:
    """One run at a time writes to it.

    Args:
        main: this is the process that writes; others of the same run only read.

    Raises:
        InputError: it cannot be written, or another process is at work in it.
    """

    def __init__(self, path: Path, *, main: bool = True):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None
        if not main:
            return
        check_target(self.path / CONFIG, overwrite=True)
        self._lock = lock(self.path / ".lock")
        for folder in (self.path, self.checkpoints):  # of a process that was killed
            for left_over in folder.glob(".cwdm-*"):
                left_over.unlink(missing_ok=True)

    def latest(self, config: Config, data: Mapping[str, Any]) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are skipped with a warning.

        Raises:
            InputError: it is of a run with another configuration, or on other data.
        """
        for path in sorted(self.checkpoints.glob("step-*.safetensors"), reverse=True):
            try:
                with safe_open(path, framework="pt") as file:
                    notes = json.loads(file.metadata()["run"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                _log.warning("%s: skipped, not a whole checkpoint (%s)", path, error)
                if self._lock is not None and path.exists():
                    path.rename(path.with_suffix(".damaged"))  # it is no longer one of the last
                continue
            saved = _fixed(Config.parse(notes["config"], str(path)))
            differing = [key for key, value in _fixed(config).items() if saved[key] != value]
            if differing:
                raise InputError(
                    f"{self.path}: holds a run with other settings ({', '.join(differing)}), "
                    "expected the same or a new folder"
                )
            if notes["data"] != json.loads(json.dumps(data)):
                raise InputError(
                    f"{self.path}: holds a run on other data, expected the same or a new folder "
                    "(--init starts from a model)"
                )
            return Checkpoint(notes["step"], tensors, notes)
        return None

    def save(
        self,
        config: Config,
        data: Mapping[str, Any],
        checkpoint: Checkpoint,
        keep: int,
    ) -> None:
        """Write a checkpoint, then remove all but the last ``keep``."""
        notes = {
            **checkpoint.notes,
            "config": config.as_dict(),
            "data": data,
            "step": checkpoint.step,
        }
        path = self.checkpoints / f"step-{checkpoint.step:08d}.safetensors"
        with atomic_write(path, overwrite=True) as temporary:
            temporary.write_bytes(to_bytes(checkpoint.tensors, {"run": json.dumps(notes)}))
        written = sorted(self.checkpoints.glob("step-*.safetensors"))
        for old in written[: written.index(path) + 1][:-keep]:
            old.unlink(missing_ok=True)

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """A record that is written once."""
        with atomic_write(self.path / name, overwrite=True) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """A line of a log; InputError where the disk is full."""
        path = self.path / name
        try:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written, {error.strerror or error}") from error

    def rewind(self, step: int) -> None:
        """Forget what was logged after a step: it is about to be done again."""
        for name in (STEPS, VALIDATION):
            path = self.path / name
            if path.exists():
                kept = [json.dumps(line) for line in read_lines(path) if line["step"] <= step]
                with atomic_write(path, overwrite=True) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in kept))

    def validations(self) -> list[dict[str, Any]]:
        """The records of all so far."""
        path = self.path / VALIDATION
        return list(read_lines(path)) if path.exists() else []

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log; a last line that a killed process left half-written is ignored."""
    with path.open() as file:
        for line in file:
            try:
                record: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                return
            yield record


def _fixed(config: Config) -> dict[str, Any]:
    """What has to stay the same in a run that goes on; it may become longer unless that would
    have changed the learning rate."""
    values = config.as_dict()
    free = {"checkpoint_every", "keep", "validate_every", "validation_steps"}
    free |= set() if config.training.decay else {"iterations"}
    values["training"] = {k: v for k, v in values["training"].items() if k not in free}
    return values
