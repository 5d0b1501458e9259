"""The simulator: signal equations and noise in closed form, anatomies, cases and their files."""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from cwdm import simulate as module
from cwdm.anatomy import CHANNELS, Anatomy, find_label_maps, from_labels, mni152
from cwdm.case import read_case
from cwdm.cli.main import cwdm
from cwdm.errors import InputError
from cwdm.modality import SEQUENCES, Modality
from cwdm.relaxation import (
    RELAXATION,
    Tissue,
    enhanced,
    inversion_recovery,
    nulling_time,
    spin_echo,
)
from cwdm.simulate import BRAIN_MM3, Chance, SimulatedCase, case_id, rician, simulate, write_case
from cwdm.volume import read_volume, read_volumes

SHAPE, SPACING = (48, 56, 44), 4.0
simulate_small = partial(simulate, shape=SHAPE, spacing=SPACING)
CASES = [(1, 0), (1, 1), (1, 2), (7, 0), (7, 1), (7, 2)]


def shells(spacing: float) -> tuple[torch.Tensor, np.ndarray]:
    """Tissue (X, Y, Z), or -1 outside, of nested ellipsoids; and their affine."""
    radii = np.array([65.0, 85.0, 65.0])
    axes = [np.arange(-radius - 8, radius + 8, spacing) for radius in radii]
    r = np.sqrt(
        sum((axis / radius) ** 2 for axis, radius in zip(np.ix_(*axes), radii, strict=True))
    )
    tissue = np.select(
        [r < 0.2, r < 0.4, r < 0.8, r < 0.95, r < 1],
        [Tissue.CSF, Tissue.DEEP, Tissue.WHITE, Tissue.CORTEX, Tissue.CSF],
        -1,
    )
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [axis[0] + 10 for axis in axes]
    return torch.from_numpy(tissue), affine


@pytest.fixture(scope="module")
def onion() -> Anatomy:
    """Ventricle, deep grey matter, white matter, cortex and fluid, one around the other."""
    tissue, affine = shells(4.0)
    fractions = torch.stack([(tissue == channel).float() for channel in CHANNELS])
    return Anatomy(fractions, affine)


@pytest.fixture(scope="module")
def cases(onion: Anatomy) -> list[SimulatedCase]:
    return [simulate_small(seed, index, onion) for seed, index in CASES]


@pytest.fixture
def label_map(tmp_path: Path) -> Path:
    """The same shells as `onion`, numbered by FreeSurfer, with no label for the outer fluid."""
    tissue, affine = shells(3.0)
    labels = np.select(
        [tissue == Tissue.CSF, tissue == Tissue.DEEP, tissue == Tissue.WHITE, tissue >= 0],
        [4, 10, 2, 3],
        0,
    )
    x = np.arange(labels.shape[0])[:, None, None]
    labels = np.where((labels > 4) | (labels == 0) | (x < x.size // 2), labels, labels + 39)
    outer = (labels == 4) | (labels == 43)
    middle = np.array(labels.shape) // 2
    outer[tuple(slice(m - 8, m + 8) for m in middle)] = False
    labels[outer] = 0
    path = tmp_path / "labels" / "one.nii.gz"
    path.parent.mkdir()
    nib.Nifti1Image(labels.astype(np.uint8), affine).to_filename(path)
    return path


# signal


def tensors(tissue: Tissue, field: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    constants = RELAXATION[tissue]
    values = constants.t1(field), constants.t2, constants.pd
    return torch.tensor(values[0]), torch.tensor(values[1]), torch.tensor(values[2])


def test_the_spin_echo_is_the_closed_form():
    t1, t2, pd = torch.tensor(800.0), torch.tensor(80.0), torch.tensor(0.7)
    relaxed = spin_echo(t1, t2, pd, tr=1e9, te=0)
    torch.testing.assert_close(relaxed, pd)
    half_of_half = spin_echo(t1, t2, pd, tr=800 * math.log(2), te=80 * math.log(2))
    torch.testing.assert_close(half_of_half, pd / 4)


def test_inversion_recovery_is_the_closed_form():
    t1, t2, pd = torch.tensor(800.0), torch.tensor(80.0), torch.tensor(0.7)
    inverted = inversion_recovery(t1, t2, pd, tr=1e9, te=0, ti=0)
    torch.testing.assert_close(inverted, -pd)
    recovered = inversion_recovery(t1, t2, pd, tr=1e9, te=80 * math.log(2), ti=1e8)
    torch.testing.assert_close(recovered, pd / 2)
    half = inversion_recovery(t1, t2, pd, tr=1e9, te=0, ti=800 * math.log(4))
    torch.testing.assert_close(half, pd / 2)


@pytest.mark.parametrize("tr", [3000.0, 9000.0, 1e7])
def test_at_the_nulling_time_there_is_no_signal(tr):
    t1 = torch.tensor(4300.0, dtype=torch.float64)
    ti = nulling_time(4300.0, tr)
    signal = inversion_recovery(t1, torch.tensor(1500.0), torch.tensor(1.0), tr=tr, te=100, ti=ti)
    assert abs(signal.item()) < 1e-12
    assert ti <= 4300 * math.log(2)


def test_contrast_agent_adds_to_the_relaxation_rate():
    t1 = torch.tensor([600.0, 1200.0])
    torch.testing.assert_close(enhanced(t1, 0.0), t1)
    rates = 1 / enhanced(t1, torch.tensor([0.5, 1.0])) - 1 / t1
    torch.testing.assert_close(rates * 1000, torch.tensor([2.05, 4.1]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tissue", Tissue)
def test_t1_goes_through_the_measured_values(tissue):
    constants = RELAXATION[tissue]
    assert constants.t1(1.5) == pytest.approx(constants.t1_low)
    assert constants.t1(3.0) == pytest.approx(constants.t1_high)
    assert constants.t1_low <= constants.t1(2.0) <= constants.t1_high


@pytest.mark.parametrize("field", [1.5, 3.0])
def test_each_sequence_orders_the_tissues_as_radiologists_know_them(field):
    ti = nulling_time(RELAXATION[Tissue.CSF].t1(field), 9000)
    t1w = {t: spin_echo(*tensors(t, field), tr=600, te=12).item() for t in Tissue}
    t2w = {t: spin_echo(*tensors(t, field), tr=5000, te=100).item() for t in Tissue}
    t2f = {t: inversion_recovery(*tensors(t, field), tr=9000, te=120, ti=ti).item() for t in Tissue}
    assert t1w[Tissue.WHITE] > t1w[Tissue.DEEP] > t1w[Tissue.CORTEX] > t1w[Tissue.CSF] > 0
    assert t2w[Tissue.CSF] > t2w[Tissue.EDEMA] > t2w[Tissue.CORTEX] > t2w[Tissue.WHITE]
    assert t2w[Tissue.CORTEX] > t2w[Tissue.DEEP]
    assert t2f[Tissue.EDEMA] > t2f[Tissue.CORTEX] > t2f[Tissue.WHITE] > 5 * abs(t2f[Tissue.CSF])
    for part in (Tissue.NECROSIS, Tissue.ENHANCING, Tissue.EDEMA):
        assert t1w[part] < t1w[Tissue.WHITE]
        assert t2f[part] > 1.2 * t2f[Tissue.WHITE]


# noise and random fields


def test_without_signal_the_noise_is_rayleigh():
    noise = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
    magnitude = rician(torch.zeros(400_000), 3 * noise)
    assert magnitude.mean().item() == pytest.approx(3 * math.sqrt(math.pi / 2), rel=0.01)
    assert magnitude.var().item() == pytest.approx(9 * (2 - math.pi / 2), rel=0.01)


@pytest.mark.parametrize("signal", [-5.0, 5.0, 100.0])
def test_the_noise_is_rician(signal):
    noise = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
    magnitude = rician(torch.full((400_000,), signal), 3 * noise)
    assert magnitude.square().mean().item() == pytest.approx(signal**2 + 18, rel=0.01)
    if signal == 100:
        assert magnitude.mean().item() == pytest.approx(math.sqrt(signal**2 + 9), rel=1e-3)
        assert magnitude.std().item() == pytest.approx(3, rel=0.01)


def test_random_fields_have_unit_variance_everywhere_and_are_smooth():
    chance = Chance(3, 0, torch.device("cpu"))
    fields = torch.stack([chance.field(8.0, (30, 24, 20), 2.0) for _ in range(1500)])
    assert fields.mean(0).abs().max() < 0.15
    torch.testing.assert_close(fields.var(0), torch.ones(30, 24, 20), rtol=0, atol=0.25)
    here, next_to_it, far = fields[:, 5, 12, 10], fields[:, 6, 12, 10], fields[:, 25, 12, 10]
    assert torch.corrcoef(torch.stack([here, next_to_it]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([here, far]))[0, 1].abs() < 0.1


# anatomies


def test_sampling_at_voxels_gives_their_fractions(onion: Anatomy):
    index = torch.tensor([[0, 3, 5], [18, 22, 17], [9, 30, 20]])
    affine = torch.from_numpy(onion.affine).float()
    points = index.float() @ affine[:3, :3].T + affine[:3, 3]
    points = points.T[..., None, None]
    sampled = onion.sample(points)[..., 0, 0]
    expected = torch.stack([onion.fractions[:, i, j, k] for i, j, k in index], 1)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-4)
    assert onion.sample(points + 1000).abs().max() == 0


def test_an_anatomy_knows_its_place_and_size(onion: Anatomy):
    assert onion.middle == pytest.approx((10, 10, 10), abs=4)
    assert onion.volume_mm3 == pytest.approx(4 / 3 * math.pi * 65 * 85 * 65, rel=0.03)


def test_label_maps_become_fractions_with_fluid_around_the_cortex(label_map: Path):
    anatomy = from_labels(label_map)
    volume = read_volume(label_map)
    labels = volume.voxels
    index = np.indices(labels.shape).reshape(3, -1)
    points = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    points = points.reshape(3, *labels.shape).astype(np.float32)
    fractions = anatomy.sample(torch.from_numpy(points)).numpy()
    fractions[:, fractions.sum(0) < 1e-3] = 0  # rounding of places
    total = fractions.sum(0)
    assert np.allclose(total[total > 0], 1, atol=1e-5)
    middle = tuple(n // 2 for n in labels.shape)
    assert fractions[Tissue.CSF][middle] > 0.99
    assert (total[labels > 0] > 0).all()
    assert ((fractions[Tissue.WHITE] > 0.6) <= np.isin(labels, (2, 41))).all()
    assert ((fractions[Tissue.CORTEX] > 0.6) <= np.isin(labels, (3, 42))).all()
    around = (total > 0) & (labels == 0)
    assert 0.05 < around.sum() / (labels > 0).sum() < 0.3
    assert (fractions[Tissue.CSF][around] > 0.5).all()
    blurred = (fractions > 0.05) & (fractions < 0.95)
    assert blurred.any(), "no partial volume"


def test_labels_of_other_schemes_count_as_what_is_nearest(label_map: Path):
    image: Any = nib.load(label_map)
    labels = np.asarray(image.dataobj).copy()
    before = from_labels(label_map).fractions
    inside = tuple(np.argwhere(labels == 2)[100])
    labels[inside] = 77 + 100
    nib.Nifti1Image(labels, image.affine).to_filename(label_map)
    after = from_labels(label_map).fractions
    torch.testing.assert_close(after, before, rtol=0, atol=0.2)


def test_a_map_without_white_matter_is_refused(make_image):
    voxels = np.zeros((12, 12, 12), np.uint8)
    voxels[3:9, 3:9, 3:9] = 3
    path = make_image("tissue.nii.gz", voxels=voxels)
    with pytest.raises(InputError, match=r"tissue.nii.gz: no label of WHITE, expected FreeSurfer"):
        from_labels(path)


def test_a_folder_without_label_maps_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="found no label maps"):
        find_label_maps(tmp_path)


def test_without_nilearn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(InputError, match=r"nilearn is not installed.*cwdm\[simulate\]"):
        mni152()


def test_the_template_is_a_brain():
    pytest.importorskip("nilearn")
    anatomy = mni152()
    total = anatomy.fractions.sum(0)
    assert torch.allclose(total[total > 0], torch.tensor(1.0))
    assert 1.6e6 < anatomy.volume_mm3 < 2.0e6
    share = anatomy.fractions.sum((1, 2, 3)) / total.sum()
    assert 0.4 < share[Tissue.CORTEX] < 0.65
    assert 0.25 < share[Tissue.WHITE] < 0.45
    assert 0.005 < share[Tissue.DEEP] < 0.05
    # a ventricle, the corpus callosum, a putamen, on both sides; MNI mm
    for side in (-1, 1):
        points = torch.tensor([[side * 8.0, 20, 10], [side * 4.0, 26, 6], [side * 26.0, 0, 2]])
        found = anatomy.sample(points.T[..., None, None])[..., 0, 0].argmax(0).tolist()
        assert found == [Tissue.CSF, Tissue.WHITE, Tissue.DEEP]


# cases


def test_a_case_depends_on_its_seed_and_index_alone(onion: Anatomy, cases: list[SimulatedCase]):
    again = simulate_small(*CASES[4], onion)
    assert again.id == cases[4].id == "SIM-00007-001"
    assert torch.equal(again.segmentation, cases[4].segmentation)
    for modality in SEQUENCES:
        assert torch.equal(again.images[modality], cases[4].images[modality])


def test_the_voxel_size_changes_the_image_and_not_the_brain(onion: Anatomy):
    coarse = simulate(3, 1, onion, shape=(48, 56, 44), spacing=4.0).images[Modality.T1N] > 0
    fine = simulate(3, 1, onion, shape=(95, 111, 87), spacing=2.0).images[Modality.T1N] > 0
    assert fine.sum().item() == pytest.approx(8 * coarse.sum().item(), rel=0.02)
    assert (fine[::2, ::2, ::2] ^ coarse).sum() < 1e-3 * coarse.sum()


def test_the_host_waits_for_the_device_only_to_find_the_brain(onion: Anatomy):
    """What reads a number from a tensor, or needs to know how many there are, makes it wait."""
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = func.overloadpacket.__name__
            selects = name in {"index", "index_put", "index_put_"}
            flags = [i.dtype == torch.bool for i in args[1] if i is not None] if selects else []
            if any(flags) or name in {"_local_scalar_dense", "nonzero", "masked_select", "equal"}:
                waits.append(name)
            return func(*args, **(kwargs or {}))

    simulate_small(1, 0, onion)  # its place and size are measured once
    with Watch():
        simulate_small(1, 0, onion)
    assert waits == ["nonzero"]


def test_no_two_cases_are_alike(cases: list[SimulatedCase]):
    masks = [case.images[Modality.T1N] > 0 for case in cases]
    for i, case in enumerate(cases):
        for j in range(i):
            assert (masks[i] ^ masks[j]).sum() > 0.02 * masks[i].sum()
            assert not torch.equal(case.segmentation, cases[j].segmentation)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_background_is_zero_and_the_brain_is_not(cases: list[SimulatedCase], number: int):
    case = cases[number]
    assert list(case.images) == list(SEQUENCES)
    mask = case.images[Modality.T1N] > 0
    for image in case.images.values():
        assert image.dtype == torch.int16
        assert image.shape == SHAPE
        assert torch.equal(image > 0, mask)
        assert image.min() == 0
        assert image[mask].float().std() > 0.1 * image[mask].float().mean()
    assert mask.sum() * SPACING**3 == pytest.approx(BRAIN_MM3, rel=0.3)
    assert case.segmentation.dtype == torch.uint8
    assert not case.segmentation[~mask].any()
    assert set(case.segmentation.unique().tolist()) <= {0, 1, 2, 3}
    assert (case.segmentation > 0).any()


def test_scanner_units_vary(cases: list[SimulatedCase]):
    for modality in SEQUENCES:
        levels = [c.images[modality][c.images[modality] > 0].float().median() for c in cases]
        assert max(levels) > 2 * min(levels)


def ratios(cases: list[SimulatedCase], label: int) -> dict[Modality, float]:
    """Median of a part of the tumor over that of the brain without tumor, typical of the cases."""
    found: dict[Modality, list[float]] = {modality: [] for modality in SEQUENCES}
    for case in cases:
        part = case.segmentation == label
        if part.sum() < 5:
            continue
        for modality, image in case.images.items():
            healthy = image[(image > 0) & (case.segmentation == 0)].float().median()
            found[modality].append((image[part].float().median() / healthy).item())
    assert found[Modality.T1N], f"no case with label {label}"
    return {modality: float(np.median(values)) for modality, values in found.items()}


def test_enhancing_tumor_is_bright_with_contrast_agent_and_not_without(cases):
    enhancing = ratios(cases, 3)
    assert enhancing[Modality.T1C] > 1.25
    assert enhancing[Modality.T1N] < 1.1
    assert enhancing[Modality.T1C] > ratios(cases, 1)[Modality.T1C] + 0.2
    assert enhancing[Modality.T1C] > ratios(cases, 2)[Modality.T1C] + 0.2


def test_edema_is_bright_in_flair_and_t2_and_takes_up_no_contrast_agent(cases):
    edema = ratios(cases, 2)
    assert edema[Modality.T2F] > 1.2
    assert edema[Modality.T2W] > 1.1
    assert edema[Modality.T1C] == pytest.approx(edema[Modality.T1N], abs=0.15)


def test_necrosis_is_dark_in_t1_and_bright_in_t2(cases):
    necrosis = ratios(cases, 1)
    assert necrosis[Modality.T1N] < 1
    assert necrosis[Modality.T2W] > 1.3


# files


def test_a_case_is_written_as_brats_writes_it(cases: list[SimulatedCase], tmp_path: Path):
    case = cases[0]
    folder = write_case(case, tmp_path)
    assert folder == tmp_path / "SIM-00001-000"
    names = [f"SIM-00001-000-{name}.nii.gz" for name in ("seg", "t1c", "t1n", "t2f", "t2w")]
    assert sorted(path.name for path in folder.iterdir()) == names
    found = read_case(folder)
    assert found.id == case.id
    assert not found.missing
    assert found.segmentation == folder / names[0]
    for path in folder.iterdir():
        image: Any = nib.load(path)
        header = image.header
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.affine.tolist() == [[-4, 0, 0, 0], [0, -4, 0, 220], [0, 0, 4, 0], [0, 0, 0, 1]]
        assert (header["sform_code"], header["qform_code"]) == (1, 1)
        assert header.get_xyzt_units()[0] == "mm"
        assert b"simulated" in header["descrip"].item()
        assert header.get_data_dtype() == (np.uint8 if "seg" in path.name else np.int16)
    for modality, volume in read_volumes(found, SEQUENCES).items():
        assert np.array_equal(volume.voxels, case.images[modality].numpy())
        assert np.array_equal(volume.affine, case.affine)
    assert np.array_equal(read_volume(folder / names[0]).voxels, case.segmentation.numpy())


def test_a_case_that_is_there_is_not_overwritten(cases: list[SimulatedCase], tmp_path: Path):
    folder = write_case(cases[0], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"SIM-00001-000: already exists"):
        write_case(cases[0], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    write_case(cases[0], tmp_path, overwrite=True)


# the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "simulate", simulate_small)


@pytest.mark.usefixtures("small")
def test_the_command_writes_the_cases_of_the_library(label_map: Path, tmp_path: Path):
    words = ["simulate", "--output", str(tmp_path / "out"), "--cases", "2", "--seed", "5"]
    result = CliRunner().invoke(cwdm, [*words, "--labels", str(label_map.parent)])
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [case_id(5, 0), case_id(5, 1)]
    expected = simulate_small(5, 1, from_labels(label_map))
    folder = tmp_path / "out" / case_id(5, 1)
    for modality, volume in read_volumes(read_case(folder), SEQUENCES).items():
        assert np.array_equal(volume.voxels, expected.images[modality].numpy())


@pytest.mark.usefixtures("small")
def test_the_command_refuses_a_case_that_is_there_before_it_works(label_map: Path, tmp_path: Path):
    (tmp_path / case_id(0, 1)).mkdir()
    words = ["simulate", "--output", str(tmp_path), "--cases", "2"]
    result = CliRunner().invoke(cwdm, [*words, "--labels", str(label_map.parent)])
    assert result.exit_code == 2
    assert "SIM-00000-001: already exists" in result.stderr
    assert not (tmp_path / case_id(0, 0)).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 11])
def test_real_label_maps_become_cases(shared: Path, number: int):
    path = find_label_maps(shared / "data" / "labelmaps")[number]
    case = simulate(0, number, from_labels(path), shape=(120, 120, 78), spacing=2.0)
    flair = case.images[Modality.T2F].float()
    assert (flair > 0).sum() * 8 == pytest.approx(BRAIN_MM3, rel=0.3)
    assert ratios([case], 2)[Modality.T2F] > 1.1
