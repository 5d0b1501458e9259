"""Simulated cases as training data without an end, each used for a while and never again.

Which case a step sees depends on (seed, step, lane) only. Successive steps take turns among a few
streams of cases, so that what follows each other differs, and so that a process that makes every
second, fourth or eighth sample simulates nothing that another one simulates as well. The streams
and lanes change their cases at different steps, so that the work is spread evenly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cwdm.anatomy import Anatomy, from_labels, mni152
from cwdm.intensity import NORMALIZATIONS, NormalizationName, Scale
from cwdm.modality import Modality
from cwdm.preparation import Box
from cwdm.simulate import SHAPE, Shape, SimulatedCase, simulate

__all__ = ["Simulator", "simulator"]

_STREAMS = 8
"""A number that the usual numbers of processes divide."""
_CENTRES = 4096


class Simulator:
    """An ``Endless`` source.

    It keeps one case, 30 MB at full size, for each stream and lane that it is asked for: of eight
    streams 240 MB per lane, which the processes that make samples share out among each other.

    Args:
        anatomies: what to call for a brain; they are taken in turn.
        per_case: turns of a stream, in one lane, before its case is replaced. Where other sources
            are mixed in, some of these turns are theirs.
        normalization: whose scales are measured.
        device: where cases are simulated.
        shape, spacing: of the cases, see ``simulate``.
    """

    def __init__(
        self,
        anatomies: Sequence[Callable[[], Anatomy]],
        *,
        seed: int,
        per_case: int,
        normalization: NormalizationName,
        device: torch.device | str = "cpu",
        shape: Shape = SHAPE,
        spacing: float = 1.0,
    ):
        self.anatomies, self.seed, self.per_case = anatomies, seed, per_case
        self.normalization, self.device = normalization, device
        self.shape, self.spacing = shape, spacing
        self._current: dict[tuple[int, int], tuple[int, _InMemory]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the cases: another process simulates its own."""
        return {**self.__dict__, "_current": {}}

    def case(self, step: int, lane: int) -> "_InMemory":
        """The case that this step's sample is cut from."""
        stream, turn = step % _STREAMS, step // _STREAMS
        turn += lane + stream * self.per_case // _STREAMS  # not all change at once
        number = _STREAMS * (turn // self.per_case) + stream
        known, case = self._current.get((lane, stream), (None, None))
        if case is None or known != number:
            case = self._simulate(number, lane)
            self._current[lane, stream] = number, case
        return case

    def _simulate(self, number: int, lane: int) -> "_InMemory":
        seed = int(np.random.SeedSequence([self.seed, lane]).generate_state(1)[0])
        anatomy = self.anatomies[(number + lane) % len(self.anatomies)]()
        case = simulate(
            seed, number, anatomy, shape=self.shape, spacing=self.spacing, device=self.device
        )
        return _InMemory.of(case, self.normalization)


def simulator(
    labels: Sequence[Path],
    *,
    seed: int,
    per_case: int,
    normalization: NormalizationName,
    device: torch.device | str = "cpu",
) -> Simulator:
    """From label maps with FreeSurfer's numbers; without any, from the MNI152 average brain."""
    return Simulator(
        [partial(_labelled, path) for path in labels] or [_average],
        seed=seed,
        per_case=per_case,
        normalization=normalization,
        device=device,
    )


@lru_cache(maxsize=32)
def _labelled(path: Path) -> Anatomy:
    return from_labels(path)


@lru_cache(maxsize=1)
def _average() -> Anatomy:
    return mni152()


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A simulated case as ``dataset.TrainingCase``."""

    id: str
    images: tuple[Modality, ...]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    box: Box
    scales: Mapping[NormalizationName, Mapping[Modality, Scale]]
    centres: NDArray[np.integer]
    voxels: Mapping[Modality, NDArray[np.int16]]
    """What is in the box; 0 outside the brain and nowhere in it."""

    @classmethod
    def of(cls, case: SimulatedCase, normalization: NormalizationName) -> "_InMemory":
        arrays = {modality: image.cpu().numpy() for modality, image in case.images.items()}
        brain = next(iter(arrays.values())) > 0
        box = Box.around(brain)
        measure = NORMALIZATIONS[normalization].measure
        scales = {m: measure(array.astype(np.float32), brain) for m, array in arrays.items()}
        inside = np.argwhere(box.crop(brain))
        chosen = inside[:: max(1, len(inside) // _CENTRES)]
        x, y, z = brain.shape
        return cls(
            case.id,
            tuple(arrays),
            (x, y, z),
            case.affine,
            box,
            {normalization: scales},
            chosen + np.array(box.start),
            {modality: box.crop(array) for modality, array in arrays.items()},
        )

    def read(self, modality: Modality, block: Box) -> NDArray[np.float32]:
        return self._part(block).crop(self.voxels[modality]).astype(np.float32)

    def mask(self, block: Box, modality: Modality | None = None) -> NDArray[np.bool_]:
        return self._part(block).crop(next(iter(self.voxels.values()))) > 0

    def _part(self, block: Box) -> Box:
        """The block in indices of what is stored."""
        x, y, z = (a - b for a, b in zip(block.start, self.box.start, strict=True))
        return Box((x, y, z), block.size)
