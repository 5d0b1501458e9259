"""Simulated training data: which case a step gets, who simulates it, and what is read from it."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cwdm import endless as module
from cwdm.anatomy import Anatomy
from cwdm.dataset import Endless, TrainingCase
from cwdm.endless import Simulator, simulator
from cwdm.intensity import NORMALIZATIONS, NormalizationName
from cwdm.modality import SEQUENCES, Modality
from cwdm.preparation import Box
from cwdm.simulate import SimulatedCase, simulate

SHAPE, SPACING = (24, 28, 22), 8.0
STREAMS = 8


def ball(radius: float) -> Anatomy:
    """White matter with cortex and some fluid around it, 4 mm voxels."""
    n = round(radius / 4) + 2
    place = 4.0 * (np.indices((2 * n + 1,) * 3) - n)
    r = np.sqrt((place**2).sum(0)) / radius
    layers = np.stack([(r >= 0.95) & (r < 1), (r >= 0.8) & (r < 0.95), r < 0, r < 0.8])
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -4 * n
    return Anatomy(torch.from_numpy(layers.astype(np.float32)), affine)


BRAIN = ball(70)


def brain() -> Anatomy:
    return BRAIN


def small(seed: int = 3, per_case: int = 2, name: NormalizationName = "robust") -> Simulator:
    return Simulator(
        [brain], seed=seed, per_case=per_case, normalization=name, shape=SHAPE, spacing=SPACING
    )


def whole(case: TrainingCase) -> NDArray[np.float32]:
    """(4, X, Y, Z)."""
    everything = Box((0, 0, 0), case.shape)
    return np.stack([case.read(modality, everything) for modality in SEQUENCES])


@dataclass
class Counted:
    """Stands in for `simulate`: a speck of noise, and a note of what was asked for."""

    asked: list[tuple[int, int]] = field(default_factory=list)
    anatomies: list[Any] = field(default_factory=list)

    def __call__(self, seed: int, index: int, anatomy: Any, **_: Any) -> SimulatedCase:
        self.asked.append((seed, index))
        self.anatomies.append(anatomy)
        noise = np.random.default_rng([seed, index]).integers(1, 1000, (4, 3, 3, 3))
        images = dict(zip(SEQUENCES, torch.from_numpy(noise.astype(np.int16)), strict=True))
        labels = torch.zeros(3, 3, 3, dtype=torch.uint8)
        return SimulatedCase(f"{seed}-{index}", images, labels, np.eye(4))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(module, "simulate", counted)
    return counted


# which case


def test_a_case_depends_on_the_seed_the_step_and_the_lane_alone():
    keys = [(0, 0), (1, 0), (0, 1), (8, 1), (17, 0)]
    one, other = small(), small()
    forwards = [whole(one.case(*key)) for key in keys]
    backwards = [whole(other.case(*key)) for key in reversed(keys)]
    for here, there in zip(forwards, reversed(backwards), strict=True):
        assert np.array_equal(here, there)
    assert len({image.tobytes() for image in forwards}) == len(keys)
    assert not np.array_equal(forwards[0], whole(small(seed=4).case(*keys[0])))


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("per_case", [1, 3, 16])
def test_a_case_serves_its_turns_in_a_row_and_never_again(per_case: int):
    source = small(per_case=per_case)
    for stream in range(STREAMS):
        ids = [source.case(turn * STREAMS + stream, 2).id for turn in range(4 * per_case)]
        changes = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1]]
        assert len(set(ids)) == len(changes) + 1
        assert set(np.diff(changes)) <= {per_case}
        assert changes[0] <= per_case


def test_successive_steps_see_different_cases(counted: Counted):
    source = small(per_case=16)
    ids = [source.case(step, 0).id for step in range(STREAMS)]
    assert len(set(ids)) == STREAMS
    assert len(counted.asked) == STREAMS


# who simulates it


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_no_process_simulates_what_another_one_simulates(counted: Counted, processes: int):
    steps, per_case, lanes = 24 * STREAMS, 6, 2
    expected: set[tuple[int, int]] = set()
    for process in range(processes):
        before = len(counted.asked)
        source = small(per_case=per_case)
        for step in range(process, steps, processes):
            for lane in range(lanes):
                source.case(step, lane)
        mine = counted.asked[before:]
        assert len(set(mine)) == len(mine), "a case was simulated twice"
        assert not expected & set(mine), "another process has simulated it as well"
        expected |= set(mine)
    assert len(expected) == pytest.approx(steps * lanes / per_case, rel=0.25)


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_once_it_runs_a_step_waits_for_one_case_at_most(counted: Counted, lanes: int):
    source = small(per_case=16)
    work = []
    for step in range(40 * STREAMS):
        before = len(counted.asked)
        for lane in range(lanes):
            source.case(step, lane)
        work.append(len(counted.asked) - before)
    assert work[:STREAMS] == [lanes] * STREAMS
    assert max(work[STREAMS:]) == 1


def test_it_can_be_sent_to_another_process():
    source = small()
    sent = pickle.loads(pickle.dumps(source))
    assert np.array_equal(whole(sent.case(5, 1)), whole(source.case(5, 1)))


# anatomies


def test_anatomies_are_taken_in_turn(counted: Counted):
    makers: Any = [lambda: "a", lambda: "b", lambda: "c"]
    source = Simulator(makers, seed=0, per_case=1, normalization="robust")
    for step in range(6):
        source.case(step, 0)
    assert counted.anatomies == ["a", "b", "c", "a", "b", "c"]


def test_a_label_map_is_read_once(
    counted: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    read: list[Path] = []

    def from_labels(path: Path) -> str:
        read.append(path)
        return path.name

    monkeypatch.setattr(module, "from_labels", from_labels)
    paths = [tmp_path / "1.nii.gz", tmp_path / "2.nii.gz"]
    source = simulator(paths, seed=0, per_case=1, normalization="robust")
    for step in range(6):
        source.case(step, 0)
    assert counted.anatomies == ["1.nii.gz", "2.nii.gz"] * 3
    assert read == paths


def test_without_label_maps_the_average_brain_is_taken(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
):
    module._average.cache_clear()
    monkeypatch.setattr(module, "mni152", lambda: "average")
    simulator([], seed=0, per_case=1, normalization="robust").case(0, 0)
    module._average.cache_clear()
    assert counted.anatomies == ["average"]


# what is read


@pytest.fixture(scope="module")
def simulated() -> SimulatedCase:
    """What `small` simulates for step 0 and lane 0."""
    counted = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "simulate", counted)
        small().case(0, 0)
    return simulate(*counted.asked[0], BRAIN, shape=SHAPE, spacing=SPACING)


@pytest.fixture(scope="module")
def case() -> TrainingCase:
    source: Endless = small()
    return source.case(0, 0)


starts = st.tuples(*[st.integers(-60, 60)] * 3)
sizes = st.tuples(*[st.integers(1, 40)] * 3)


@given(start=starts, size=sizes, modality=st.sampled_from(SEQUENCES))
def test_any_block_is_what_was_simulated_there(
    case: TrainingCase,
    simulated: SimulatedCase,
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    modality: Modality,
):
    around = np.pad(simulated.images[modality].numpy(), 100)
    there = tuple(slice(100 + a, 100 + a + n) for a, n in zip(start, size, strict=True))
    block = case.read(modality, Box(start, size))
    assert block.dtype == np.float32
    assert np.array_equal(block, around[there])
    assert np.array_equal(case.mask(Box(start, size)), around[there] > 0)
    assert np.array_equal(case.mask(Box(start, size), modality), around[there] > 0)


def test_a_case_says_what_it_is(case: TrainingCase, simulated: SimulatedCase):
    assert case.id == simulated.id
    assert list(case.images) == list(SEQUENCES)
    assert case.shape == SHAPE
    assert np.array_equal(case.affine, simulated.affine)
    mask = simulated.images[Modality.T1N].numpy() > 0
    assert case.box == Box.around(mask)


@pytest.mark.parametrize("name", ["published", "published-wdm", "robust"])
def test_scales_are_those_of_the_whole_volume(simulated: SimulatedCase, name: NormalizationName):
    scales = small(name=name).case(0, 0).scales[name]
    assert list(scales) == list(SEQUENCES)
    for modality, image in simulated.images.items():
        voxels = image.numpy().astype(np.float32)
        assert scales[modality] == NORMALIZATIONS[name].measure(voxels, voxels > 0)


def test_centres_lie_all_over_the_brain(case: TrainingCase, simulated: SimulatedCase):
    mask = simulated.images[Modality.T1N].numpy() > 0
    assert mask[tuple(case.centres.T)].all()
    assert len(np.unique(case.centres, axis=0)) == len(case.centres) > 1000
    voxels = np.argwhere(mask)
    np.testing.assert_allclose(case.centres.mean(0), voxels.mean(0), atol=0.2)
    np.testing.assert_allclose(case.centres.std(0), voxels.std(0), rtol=0.05)
