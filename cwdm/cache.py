"""Cases checked once and packed for training: one memory-mapped file each, cut to the brain.

A file holds, in canonical orientation and independent of any configuration,

    t1n, t1c, t2w, t2f, ct   (X', Y', Z') the block around the brain, float16 or uint8
    masks                    (X', Y', Z') uint8, a bit for the brain of each modality, 128 for most
    seg                      (X', Y', Z') uint8, if the case has a segmentation
    centres                  (N, 3) int16, indices of brain voxels on the whole grid, at random

and in its metadata what is needed to read them, the scales measured in the whole volumes, and which
files they came from. Reading a patch takes from the disk no more than the patch.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cwdm.case import Case, Kind
from cwdm.checks import findings, read_fit
from cwdm.dicom import Series, read_series
from cwdm.errors import InputError
from cwdm.files import atomic_write, safe_name
from cwdm.intensity import NORMALIZATIONS, NormalizationName, Scale
from cwdm.layouts import Found
from cwdm.machine import cores
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import Box, inside, majority
from cwdm.volume import Volume, is_synthetic, read_labels

__all__ = ["CachedCase", "Dtype", "Report", "Status", "fill", "in_processes", "is_cache"]
__all__ += ["open_cache"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Dtype = Literal["float16", "uint8"]
Status = Literal["written", "unchanged", "left out"]

_FORMAT, _CASE_FORMAT = "cwdm-cache-1", "cwdm-case-1"
_MARKER = "cwdm-cache.json"
_CENTRES = 4096
_MAJORITY = 7
"""The bit of ``masks`` that says what `preparation.majority` says."""
_EXACT = 2048.0
"""Float16 holds every whole number up to here."""
_STALE_SECONDS = 3600
"""A temporary file that is older belongs to a run that was killed: one is written in seconds."""
_ENOUGH = 4
"""Cases that make up for starting a process, which takes as long as two."""
_AIR = -1000.0
"""In HU: what is around a CT."""


class File(NamedTuple):
    """What tells whether a file is the same as before, and stands for the same."""

    kind: Kind
    path: str
    """Absolute, without links: files elsewhere may have the same name, size and time."""
    size: int
    """Bytes."""
    changed: int
    """When, in ns."""


@dataclass(frozen=True)
class Level:
    """How an image is stored: scanner units = offset + scale * stored."""

    offset: float
    scale: float
    background: float
    """Scanner units outside of the stored block."""


@dataclass(frozen=True)
class _Record:
    """The metadata of a file."""

    id: str
    affine: tuple[tuple[float, float, float, float], ...]
    shape: tuple[int, int, int]
    box: Box
    levels: dict[Modality, Level]
    scales: dict[NormalizationName, dict[Modality, Scale]]
    dtype: Dtype
    files: tuple[File, ...]
    """What it was made from."""
    accepted: frozenset[str]
    """Kinds of findings it was written in spite of."""
    notes: tuple[str, ...]


_RECORD = TypeAdapter(_Record)


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A case in the cache. It holds no open file, and can be sent to another process."""

    id: str
    path: Path
    images: tuple[Modality, ...]
    """What it has, in the order of `Modality`."""
    affine: NDArray[np.float64]
    """(4, 4), index on the whole grid -> world in mm."""
    shape: tuple[int, int, int]
    """(X, Y, Z) of the whole grid."""
    box: Box
    """The block that is stored."""
    scales: Mapping[NormalizationName, Mapping[Modality, Scale]]
    """As `preparation.prepare` measures them: hounsfield for CT, the others for MRI."""
    levels: Mapping[Modality, Level]
    segmented: bool
    size: int
    """Bytes on disk."""

    def read(self, modality: Modality, block: Box) -> NDArray[np.float32]:
        """A block of the whole grid, in scanner units; background where nothing is stored."""
        level = self.levels[modality]

        def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
            return stored.astype(np.float32) * np.float32(level.scale) + np.float32(level.offset)

        return self._read(modality, block, decode, level.background)

    def mask(self, block: Box, modality: Modality | None = None) -> NDArray[np.bool_]:
        """The brain in one modality, or where most of them have it, in a block of the grid."""
        bit = _MAJORITY if modality is None else _bit(modality)
        return self._read("masks", block, lambda bits: (bits >> bit & 1).astype(bool), False)

    def labels(self, block: Box) -> NDArray[np.uint8]:
        """The segmentation in a block of the grid, if the case is ``segmented``."""
        return self._read("seg", block, lambda labels: labels, 0)

    @property
    def centres(self) -> NDArray[np.int16]:
        """(N, 3) indices on the whole grid of up to 4096 voxels of the brain, in random order."""
        with _open(self.path) as file:
            centres: NDArray[np.int16] = file.get_tensor("centres")
        return centres

    def _read(
        self, name: str, block: Box, decode: Callable[[NDArray[Any]], NDArray[Any]], outside: float
    ) -> NDArray[Any]:
        """A block of a tensor, decoded; only what lies in the block is read."""
        starts = [a - b for a, b in zip(block.start, self.box.start, strict=True)]
        overlap = []
        for start, length, stored in zip(starts, block.size, self.box.size, strict=True):
            low = min(max(start, 0), stored - 1)  # one voxel at least: it takes no empty slices
            overlap.append(slice(low, max(min(start + length, stored), low + 1)))
        with _open(self.path) as file:
            values = decode(file.get_slice(name)[tuple(overlap)])
        x, y, z = (start - each.start for start, each in zip(starts, overlap, strict=True))
        return Box((x, y, z), block.size).crop(values, outside)


class Report(NamedTuple):
    """What became of a case."""

    case: str
    status: Status
    images: tuple[Modality, ...]
    """What is in the cache."""
    problems: tuple[str, ...]
    """Why it is left out; or else what it lacks."""


def is_cache(folder: Path) -> bool:
    """Whether `fill` has made this folder."""
    try:
        marker = json.loads((Path(folder) / _MARKER).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("format") == _FORMAT


def open_cache(folder: Path) -> list[CachedCase]:
    """The cases in a cache, sorted by id.

    Raises:
        InputError: not a cache, or a file in it is damaged.
    """
    folder = Path(folder)
    if not is_cache(folder):
        raise InputError(f"{folder}: found no {_MARKER}, expected a folder that prepare has made")
    paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    return sorted(map(_open_case, paths), key=lambda case: case.id)


def fill(
    found: Found,
    folder: Path,
    *,
    dtype: Dtype = "float16",
    accept: frozenset[str] = frozenset(),
    workers: int | None = 1,
) -> Generator[Report, None, None]:
    """Check cases and write those that pass into a cache; a report of each as it is done.

    A case is left out, with all the reasons, if one of its files cannot be read or lies on another
    grid, or for a finding of `checks`; what was cached of it before is removed. A case whose files
    have not changed since it was written is not read again. Other cases in the cache stay.

    Args:
        dtype: float16 keeps 11 bits of every value; uint8 has 256 levels between the lowest value
            and the highest that normalization tells apart, and less space.
        accept: kinds of findings that do not matter.
        workers: processes to share the work, as `in_processes`.

    Raises:
        InputError: the folder cannot be written, or holds other things than a cache.
    """
    folder = Path(folder)
    _begin(folder, dtype)
    refused: dict[str, list[str]] = {}
    for problem, name in zip(found.problems, found.problem_names, strict=True):
        refused.setdefault(name, []).append(problem.message)
    for name, messages in refused.items():
        yield _leave_out(name, folder, messages)
    sources: list[Case | Series] = [*found.cases, *found.series]
    todo = []
    for source in sources:
        if report := _unchanged(source, folder, dtype, accept):
            yield report
        else:
            todo.append(source)
    work = partial(_prepare, folder=folder, dtype=dtype, accept=accept)
    yield from in_processes(work, todo, workers)


def in_processes(
    work: Callable[[Item], Result], todo: Sequence[Item], workers: int | None
) -> Generator[Result, None, None]:
    """The results of `work`, which can be pickled, on several processes; each as it is there.

    Args:
        workers: processes; None takes one for each core, if there is enough to do.

    Raises:
        InputError: a process was killed.
    """
    workers = workers or max(1, min(cores(), len(todo) // _ENOUGH))
    if workers == 1 or len(todo) < 2:
        yield from map(work, todo)
        return
    # Forking would copy the locks of torch's threads as they are just then.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(todo))
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        # One case per worker and none in line, so that an interruption waits for no other.
        waiting = iter(todo)
        running = {pool.submit(work, item) for item in islice(waiting, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(work, item) for item in islice(waiting, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise InputError(
            f"a process was killed, perhaps for memory: found {workers} workers, expected fewer"
        ) from None
    finally:
        pool.shutdown()


def _begin(folder: Path, dtype: Dtype) -> None:
    """Make the folder a cache, and clear away what a killed run has left."""
    if folder.is_dir() and not is_cache(folder):
        for entry in folder.iterdir():
            if not entry.name.startswith("."):
                raise InputError(f"{folder}: found {entry.name}, expected a new folder or a cache")
    with atomic_write(folder / _MARKER, overwrite=True) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "dtype": dtype}) + "\n")
    for left in folder.glob(".cwdm-*"):
        with suppress(FileNotFoundError):  # finished, or removed by another run
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _start_worker() -> None:
    """One thread per process; Ctrl-C is for the parent, and without it there is nothing to do."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(source: Case | Series, folder: Path, dtype: Dtype, accept: frozenset[str]) -> Report:
    """Read, check and write one case."""
    files = _files(source)  # before reading: a change meanwhile is noticed the next time
    volumes, labels, problems = _read(source)
    sequences = {m: volume for m, volume in volumes.items() if m in SEQUENCES}
    found = findings(sequences) if sequences else []
    problems += [each.message for each in found if each.kind not in accept]
    notes = _notes(source)
    if problems:
        return _leave_out(source.id, folder, [*problems, *notes])
    accepted = frozenset(each.kind for each in found)
    _write(source.id, volumes, labels, _path(folder, source.id), dtype, files, accepted, notes)
    return Report(source.id, "written", tuple(volumes), notes)


def _leave_out(case_id: str, folder: Path, messages: Sequence[str]) -> Report:
    """The report; what the cache has of the case is no longer true."""
    _path(folder, case_id).unlink(missing_ok=True)
    return Report(case_id, "left out", (), tuple(messages))


def _unchanged(
    source: Case | Series, folder: Path, dtype: Dtype, accept: frozenset[str]
) -> Report | None:
    """The report of a case that is in the cache as it would be written now."""
    try:
        record, _ = _read_record(_path(folder, source.id))
    except InputError:
        return None
    same = (record.dtype, record.files) == (dtype, _files(source))
    if same and record.accepted <= accept:
        return Report(source.id, "unchanged", tuple(record.levels), record.notes)
    return None


def _files(source: Case | Series) -> tuple[File, ...]:
    """All its files; none if one is not there."""
    paths: list[tuple[Kind, Path]]
    if isinstance(source, Case):
        paths = [*source.images.items()]
        if source.segmentation:
            paths.append(("seg", source.segmentation))
    else:
        paths = [(Modality.CT, Path(file)) for file in source.files]
    try:
        stats = [(kind, str(path.resolve()), path.stat()) for kind, path in paths]
    except OSError:
        return ()
    return tuple(File(kind, path, stat.st_size, stat.st_mtime_ns) for kind, path, stat in stats)


def _notes(source: Case | Series) -> tuple[str, ...]:
    """What a case with MRI lacks."""
    if isinstance(source, Series) or not set(source.images) & set(SEQUENCES):
        return ()
    return (f"found no image of {', '.join(source.missing)}",) if source.missing else ()


def _read(
    source: Case | Series,
) -> tuple[dict[Modality, Volume], NDArray[np.int32] | None, list[str]]:
    """The volumes and labels that can be read and lie on one grid, and why the others do not."""
    labels = None
    if isinstance(source, Series):
        try:
            volume = read_series(source)
        except InputError as error:
            return {}, None, [str(error)]
        constant = (low := volume.voxels.min()) == volume.voxels.max()
        message = f"{source.folder}: every voxel is {low:g}, expected an image"
        return {Modality.CT: volume}, None, [message] if constant else []
    volumes, unfit = read_fit(source)
    problems = [each.message for each in unfit]
    problems += [
        f"{volume.path}: is marked as synthetic, expected an acquired image to learn from"
        for volume in volumes.values()
        if is_synthetic(volume.path)
    ]
    if source.segmentation and volumes:
        try:
            labels = read_labels(source.segmentation, next(iter(volumes.values())))
        except InputError as error:
            problems.append(str(error))
        else:
            low, high = labels.min(), labels.max()
            if low < 0 or high > 255:
                found = f"labels {low} to {high}"
                problems.append(f"{source.segmentation}: found {found}, expected 0 to 255")
    return volumes, labels, problems


def _write(
    case_id: str,
    volumes: Mapping[Modality, Volume],
    labels: NDArray[np.int32] | None,
    path: Path,
    dtype: Dtype,
    files: tuple[File, ...],
    accepted: frozenset[str],
    notes: tuple[str, ...],
) -> None:
    """One file of the cache."""
    masks = {m: inside(volume, NORMALIZATIONS[_default(m)]) for m, volume in volumes.items()}
    brain = majority(list(masks.values()))
    box = Box.around(np.logical_or.reduce(list(masks.values())))
    scales: dict[NormalizationName, dict[Modality, Scale]] = {
        name: {
            modality: normalization.measure(volume.voxels, masks[modality])
            for modality, volume in volumes.items()
            if normalization.masked == (modality is not Modality.CT)
        }
        for name, normalization in NORMALIZATIONS.items()
    }
    bits = box.crop(brain).astype(np.uint8) << _MAJORITY
    tensors: dict[str, NDArray[Any]] = {}
    levels = {}
    for modality, volume in volumes.items():
        bits |= box.crop(masks[modality]).astype(np.uint8) << _bit(modality)
        block = box.crop(volume.voxels)
        scale = scales[_default(modality)][modality]
        highest = scale.offset + scale.scale * NORMALIZATIONS[_default(modality)].high
        tensors[modality], offset, step = _encode(block, dtype, highest)
        levels[modality] = Level(offset, step, _background(modality, volume, masks[modality]))
    tensors |= {"masks": bits, "centres": _centres(brain, case_id)}
    if labels is not None:
        tensors["seg"] = box.crop(labels).astype(np.uint8)
    first = next(iter(volumes.values()))
    x, y, z = first.voxels.shape
    record = _Record(
        id=case_id,
        affine=tuple((a, b, c, d) for a, b, c, d in first.affine.tolist()),
        shape=(x, y, z),
        box=box,
        levels=levels,
        scales=scales,
        dtype=dtype,
        files=files,
        accepted=accepted,
        notes=notes,
    )
    metadata = {"format": _CASE_FORMAT, "case": _RECORD.dump_json(record).decode()}
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def _encode(
    block: NDArray[np.float32], dtype: Dtype, highest: float
) -> tuple[NDArray[Any], float, float]:
    """Stored values, offset and scale; what is above ``highest`` may be cut off."""
    low, high = float(block.min()), float(block.max())
    if dtype == "uint8":
        step = (min(high, highest) - low) / 255 or 1.0
        return np.rint((block - low) / step).clip(0, 255).astype(np.uint8), low, step
    peak = max(-low, high)
    scale = 1.0 if 16 <= peak <= 60000 or not peak else peak / _EXACT
    return (block / scale).astype(np.float16), 0.0, scale


def _background(modality: Modality, volume: Volume, mask: NDArray[np.bool_]) -> float:
    """The value around the brain, which is one and the same but for dust."""
    if modality is Modality.CT:
        return _AIR
    if mask.all():
        return 0.0
    return float(volume.voxels[np.unravel_index(mask.argmin(), mask.shape)])


def _centres(brain: NDArray[np.bool_], case_id: str) -> NDArray[np.int16]:
    """(N, 3) voxels of the brain, drawn by the id."""
    rng = np.random.default_rng(list(case_id.encode()))
    voxels = np.flatnonzero(brain)
    drawn = rng.choice(voxels, min(_CENTRES, len(voxels)), replace=False)
    return np.stack(np.unravel_index(drawn, brain.shape), axis=1).astype(np.int16)


def _default(modality: Modality) -> NormalizationName:
    """The normalization that decides which values matter."""
    return "hounsfield" if modality is Modality.CT else "robust"


def _bit(modality: Modality) -> int:
    return list(Modality).index(modality)


def _path(folder: Path, case_id: str) -> Path:
    """Where a case is kept."""
    return folder / f"{safe_name(case_id)}.safetensors"


def _open_case(path: Path) -> CachedCase:
    """A case in the cache; InputError if its file is damaged."""
    record, names = _read_record(path)
    return CachedCase(
        id=record.id,
        path=path,
        images=tuple(modality for modality in Modality if modality in record.levels),
        affine=np.array(record.affine),
        shape=record.shape,
        box=record.box,
        scales=record.scales,
        levels=record.levels,
        segmented="seg" in names,
        size=path.stat().st_size,
    )


def _read_record(path: Path) -> tuple[_Record, set[str]]:
    """The metadata of a file and its tensors; InputError if it lacks something of what it says."""
    with _open(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    try:
        if metadata["format"] != _CASE_FORMAT:
            raise ValueError(f"format {metadata['format']}")
        record = _RECORD.validate_json(metadata["case"])
        if {shapes[name] for name in ("masks", *record.levels)} != {record.box.size}:
            raise ValueError("shapes")
    except (KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged ({reason}), expected a case from prepare") from error
    return record, set(shapes)


def _open(path: Path) -> Any:
    """The open file, a context manager."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}), expected a case from prepare") from error
