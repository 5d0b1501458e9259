"""Segmenters that work on files: any program, nnU-Net, the BraTS containers.

They get copies of a case's images, `<id>-<modality>.nii.gz` in a temporary folder, and have to
leave one NIfTI file of labels on the same grid.
"""

import hashlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from gzip import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cwdm.case import Case, nifti_names
from cwdm.engine import Progress
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES, Modality, find_modality
from cwdm.segmentation import (
    Labels,
    brats_labels,
    brats_numbers,
    check_complete,
    digest,
)
from cwdm.volume import Volume, new_volume, read_labels, read_volumes, write_volume

__all__ = ["BRATS", "Brats", "Command", "NnUnet"]

_PLACEHOLDERS = ("input", "output", *SEQUENCES, "id")
_TIMEOUT_S = 3600.0
_POLL_S = 0.5
_TAIL = 400
"""Characters of a program's output in an error."""

BRATS = {
    "adult-glioma": "AdultGliomaPreTreatment",
    "africa": "Africa",
    "goat": "GoAT",
    "meningioma": "Meningioma",
    "metastases": "Metastases",
}
"""Tasks whose labels are those of BraTS 2023, and what the classes of `brats` are called."""


class _OnFiles:
    """What they share: from a case to files and back."""

    partial = False
    lps = False
    """Whether it takes voxels as they are stored, so that they have to be stored as in BraTS."""
    spec: str
    sha256: str
    channels: tuple[Modality, ...]

    def __call__(self, case: Case, progress: Progress | None = None) -> Labels:
        """See `segmentation.Segmenter`."""
        check_complete(self, case)
        volumes = read_volumes(case, self.channels)
        with TemporaryDirectory(prefix="cwdm-", ignore_cleanup_errors=True) as temporary:
            images, output = Path(temporary) / "input", Path(temporary) / "output"
            images.mkdir()
            output.mkdir()
            staged = _stage(case, volumes, images, lps=self.lps)
            self.run(case.id, staged, output, progress)
            values = self._read(output, volumes[self.channels[0]])
        if progress:
            progress(1, 1)
        return self.labels(values)

    def run(
        self,
        case_id: str,
        images: Mapping[Modality, Path],
        output: Path,
        progress: Progress | None = None,
    ) -> None:
        """Leave one NIfTI file in `output` or below; the progress may raise to end it."""
        raise NotImplementedError

    def labels(self, values: NDArray[np.int32]) -> Labels:
        """The values in that file as labels of BraTS."""
        return brats_labels(values, self.spec)

    def _read(self, output: Path, like: Volume) -> NDArray[np.int32]:
        found = [
            folder / name
            for folder in (output, *(each for each in output.rglob("*") if each.is_dir()))
            for name in nifti_names(folder)
        ]
        if len(found) != 1:
            listed = ", ".join(path.name for path in found[:4]) or "none"
            raise InputError(f"{self.spec}: left {listed}, expected one NIfTI file of labels")
        try:
            return read_labels(found[0], like)
        except InputError as error:
            raise InputError(f"{self.spec}: {error}") from error


def _stage(
    case: Case, volumes: Mapping[Modality, Volume], folder: Path, *, lps: bool
) -> dict[Modality, Path]:
    """Copies, so that nobody can write on the originals; stored as BraTS has them if asked for."""
    staged = {}
    for modality, volume in volumes.items():
        path = folder / f"{case.id}-{modality}.nii.gz"
        staged[modality] = path
        if lps:
            like = new_volume(volume.voxels, volume.affine, np.float32, lps=True)
            write_volume(volume.voxels, like, path, "cwdm copy of an input")
            continue
        data = case.images[modality].read_bytes()
        path.write_bytes(data if data[:2] == b"\x1f\x8b" else compress(data, 1))
    return staged


class Command(_OnFiles):
    """A program, started without a shell, that reads and writes files.

    In its words, `{input}` is a folder with the images, `{t1n}`, `{t1c}`, `{t2w}` and `{t2f}` are
    single ones and `{id}` is the case. `{output}` is an empty folder for the labels; a program that
    wants to be told a file gets `{output}.nii.gz`, which is fine, too. It runs in the current
    folder, and is killed with all its children when the time is up.
    """

    def __init__(self, spec: str, command: str, *, timeout_s: float | None = None):
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"{spec}: {error}") from error
        named = {name for word in self.words for name in re.findall(r"\{(\w+)\}", word)}
        for name in sorted(named - {*_PLACEHOLDERS}):
            nearest = get_close_matches(name, _PLACEHOLDERS, n=1)
            hint = f"; did you mean {{{nearest[0]}}}?" if nearest else ""
            known = ", ".join(f"{{{each}}}" for each in _PLACEHOLDERS)
            raise InputError(f"{spec}: found {{{name}}}, expected {known}{hint}")
        given = tuple(modality for modality in SEQUENCES if modality in named)
        if "output" not in named or not ("input" in named or given):
            raise InputError(f"{spec}: expected {{input}} or images, and {{output}}")
        if shutil.which(self.words[0]) is None:
            raise InputError(f"{spec}: {self.words[0]} is no program that can be run")
        self.spec = spec
        self.channels = SEQUENCES if "input" in named else given
        self.timeout_s = _TIMEOUT_S if timeout_s is None else timeout_s
        self.sha256 = hashlib.sha256("\0".join(self.words).encode()).hexdigest()

    def run(
        self,
        case_id: str,
        images: Mapping[Modality, Path],
        output: Path,
        progress: Progress | None = None,
    ) -> None:
        """InputError with the end of what the program said if it fails or takes too long."""
        folder = output / "segmentation"
        folder.mkdir()
        fill = {str(modality): str(path) for modality, path in images.items()}
        fill |= {"input": str(output.parent / "input"), "output": str(folder), "id": case_id}
        words = [re.sub(r"\{(\w+)\}", lambda match: fill[match[1]], word) for word in self.words]
        with (output.parent / "log").open("w+b") as log:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,  # not a pipe, which a child that lives on would keep open
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a process group of its own, to be killed whole
                )
            except OSError as error:
                raise InputError(f"{self.spec}: {error.strerror}") from error
            try:
                code = self._wait(process, progress)
            except subprocess.TimeoutExpired as error:
                what = f"took longer than {self.timeout_s:g} s"
                raise InputError(f"{self.spec}: {what}{_tail(log)}") from error
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                what = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                raise InputError(f"{self.spec}: ended with {what}{_tail(log)}")

    def _wait(self, process: subprocess.Popen[bytes], progress: Progress | None) -> int:
        """The exit code; TimeoutExpired when the time is up, or whatever the progress raises."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                return process.wait(max(0.0, min(left, _POLL_S)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    raise
            if progress:
                progress(0, 1)


def _tail(log: io.BufferedRandom) -> str:
    """The end of what was written, to append to an error."""
    log.seek(max(0, log.seek(0, io.SEEK_END) - 10 * _TAIL))
    text = " ".join(log.read().decode(errors="replace").split())
    return f": {'...' if len(text) > _TAIL else ''}{text[-_TAIL:]}" if text else ""


class NnUnet(_OnFiles):
    """A results folder of nnU-Net v2, such as `nnUNetTrainer__nnUNetPlans__3d_fullres`.

    All its folds are averaged, mirrored as in training. Its checkpoints are pickles, which can run
    code: load only folders that you trust.
    """

    lps = True

    def __init__(self, spec: str, folder: Path, device: torch.device):
        dataset = folder / "dataset.json"
        try:
            described = json.loads(dataset.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"{dataset}: {reason}, expected a results folder of nnU-Net v2"
            ) from error
        self.channels = _nnunet_channels(described, dataset)
        self.numbers = brats_numbers(described.get("labels"), dataset)
        checkpoints = sorted(folder.glob("fold_*/checkpoint_final.pth"))
        if not checkpoints:
            raise InputError(f"{folder}: no fold_*/checkpoint_final.pth in it")
        folds = [path.parent.name.removeprefix("fold_") for path in checkpoints]
        folds = [fold for fold in folds if fold != "all"] or folds
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        self.spec = spec
        self.sha256 = digest([dataset, folder / "plans.json", *checkpoints])
        with redirect_stdout(io.StringIO()):
            self.predictor = nnUNetPredictor(device=device, allow_tqdm=False)
            try:
                self.predictor.initialize_from_trained_model_folder(str(folder), folds)
            except MemoryError:
                raise
            except Exception as error:  # such as a trainer that is not installed
                raise InputError(f"{folder}: nnU-Net cannot load it, {error}") from error
        if self.predictor.configuration_manager.previous_stage_name is not None:
            raise InputError(f"{folder}: second stage of a cascade, expected a single network")

    def run(
        self,
        case_id: str,
        images: Mapping[Modality, Path],
        output: Path,
        progress: Progress | None = None,
    ) -> None:
        files = [str(images[modality]) for modality in self.channels]
        with redirect_stdout(io.StringIO()):
            self.predictor.predict_from_files_sequential([files], [str(output / case_id)])

    def labels(self, values: NDArray[np.int32]) -> Labels:
        table = np.zeros(max(self.numbers) + 1, np.uint8)
        for number, label in self.numbers.items():
            table[number] = label
        labels: Labels = table[values]
        return labels


def _nnunet_channels(described: Mapping[str, Any], where: Path) -> tuple[Modality, ...]:
    names = described.get("channel_names") or described.get("modality") or {}
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    channels = tuple(find_modality(name) for name in ordered)
    if not channels or not {*channels} <= {*SEQUENCES}:
        raise InputError(
            f"{where}: channel_names are {', '.join(ordered) or 'absent'}, expected MRI sequences"
        )
    return tuple(channel for channel in channels if channel)


class Brats(_OnFiles):
    """A winner of a BraTS challenge, in a container of the BrainLesion suite (package `brats`).

    It runs in Docker, or where that does not answer in Singularity, and downloads gigabytes the
    first time.
    """

    channels: tuple[Modality, ...] = SEQUENCES
    lps = True

    def __init__(self, spec: str, name: str, device: str):
        task, _, algorithm = name.partition("/")
        if task not in BRATS:
            nearest = get_close_matches(task, BRATS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise InputError(f"{spec}: no such task, expected one of {', '.join(BRATS)}{hint}")
        with _quiet_brats():
            import brats
            from brats import constants
            from brats.core import docker

        segmenter = getattr(brats, f"{BRATS[task]}Segmenter")
        algorithms = getattr(constants, f"{BRATS[task]}Algorithms").__members__
        algorithm = algorithm or inspect.signature(segmenter).parameters["algorithm"].default.name
        if algorithm not in algorithms:
            raise InputError(f"{spec}: no such algorithm, expected one of {', '.join(algorithms)}")
        if docker.client is not None:
            self.backend = constants.Backends.DOCKER
        elif shutil.which("singularity"):
            self.backend = constants.Backends.SINGULARITY
        else:
            raise InputError(f"{spec}: Docker does not answer, expected it (or Singularity) to run")
        self.spec = spec
        with _quiet_brats():
            self.segmenter = segmenter(
                algorithms[algorithm],
                cuda_devices=device.removeprefix("cuda:") if device.startswith("cuda:") else "0",
                force_cpu=device == "cpu",
            )
        image = str(self.segmenter.algorithm.run_args.docker_image)
        self.sha256 = hashlib.sha256(image.encode()).hexdigest()

    def run(
        self,
        case_id: str,
        images: Mapping[Modality, Path],
        output: Path,
        progress: Progress | None = None,
    ) -> None:
        from brats.utils import exceptions
        from docker.errors import DockerException

        files = {str(modality): path for modality, path in images.items()}
        target = output / f"{case_id}.nii.gz"
        try:
            with _quiet_brats():
                self.segmenter.infer_single(**files, output_file=target, backend=self.backend)
        except (
            exceptions.AlgorithmNotCPUCompatibleException,
            exceptions.BraTSContainerException,
            exceptions.ZenodoException,
            DockerException,
            OSError,
        ) as error:
            raise InputError(f"{self.spec}: {str(error)[-_TAIL:]}") from error

    def labels(self, values: NDArray[np.int32]) -> Labels:
        if (values == 4).any():  # since 2024: a resection cavity, not enhancing tumor
            raise InputError(f"{self.spec}: found label 4, expected those of BraTS 2023: 0 to 3")
        return brats_labels(values, self.spec)


@contextmanager
def _quiet_brats() -> Iterator[None]:
    """Without the logs, tables and spinners of `brats`."""
    from loguru import logger

    logger.disable("brats")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
