"""What became of each case of a cohort, in an SQLite file that one process writes."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from cwdm.errors import InputError
from cwdm.files import sha256

__all__ = ["Entry", "FileState", "Ledger", "State", "digest"]

State = Literal["running", "done", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS cases (
    job TEXT NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    entry TEXT NOT NULL,
    PRIMARY KEY (job, id)
)
"""


class FileState(NamedTuple):
    """What tells whether a file has changed."""

    path: str
    size: int
    """Bytes."""
    changed: int
    """When, in ns."""
    sha256: str = ""

    @classmethod
    def of(cls, path: Path, *, digest: bool = False) -> Self:
        """Of a file now; InputError if it cannot be read."""
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read, {error.strerror or error}") from error
        return cls(str(path), status.st_size, status.st_mtime_ns, sha256(path) if digest else "")

    def is_current(self, path: Path) -> bool:
        """Whether `path` holds the same. It is read only if it is another place or time."""
        try:
            now = FileState.of(path)
        except InputError:
            return False
        if now == self._replace(sha256=""):
            return True
        return bool(self.sha256) and now.size == self.size and sha256(path) == self.sha256


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A case, what was done with it and from what."""

    case: str
    state: State
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the result depends on besides the input files."""
    inputs: Mapping[str, FileState] = field(default_factory=dict)
    """By what they are: t1n, t1c, ..."""
    outputs: Mapping[str, FileState | None] = field(default_factory=dict)
    """By their path in the output folder; None while they are being made."""
    seconds: float = 0.0
    message: str = ""
    """Why it failed."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the user is shown about it."""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `as_json` wrote."""
        values = json.loads(text)
        for key in ("inputs", "outputs"):
            values[key] = {k: v and FileState(*v) for k, v in values[key].items()}
        return cls(**values)


def digest(path: Path) -> str:
    """SHA-256 of a file; read again only if its size or time has changed."""
    return _digest(FileState.of(path))


@lru_cache
def _digest(state: FileState) -> str:
    return sha256(Path(state.path))


class Ledger:
    """The entries of one kind of work; a kill -9 at any moment leaves it readable."""

    def __init__(self, path: Path, job: str):
        self.job = job
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path)
            with self._database:
                self._database.execute(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"{path}: not a ledger that can be written, {error}") from error

    def __getitem__(self, case: str) -> Entry | None:
        """The entry of a case, if there is one."""
        rows = self._database.execute(
            "SELECT entry FROM cases WHERE job = ? AND id = ?", (self.job, case)
        )
        row = rows.fetchone()
        return Entry.parse(row[0]) if row else None

    def entries(self) -> list[Entry]:
        """All of them, by the names of the cases."""
        rows = self._database.execute(
            "SELECT entry FROM cases WHERE job = ? ORDER BY id", (self.job,)
        )
        return [Entry.parse(text) for (text,) in rows]

    def put(self, entries: Iterable[Entry]) -> None:
        """Write all of them or, if killed meanwhile, none."""
        rows = [(self.job, each.case, each.state, each.as_json()) for each in entries]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO cases VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()
