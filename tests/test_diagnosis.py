"""Diagnosis: healthy records have no problem, those with one disease exactly that one."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.testing import assert_allclose

from cwdm.case import find_cases
from cwdm.cli.main import cwdm
from cwdm.coefficients import Transform
from cwdm.config import Config, Images, Sampling, Training
from cwdm.diagnosis import (
    _CLIPPED,
    Finding,
    _expected,
    diagnose,
    energies,
    errors_by_time,
    read_run,
)
from cwdm.diffusion import Diffusion
from cwdm.errors import InputError
from cwdm.flow import Flow
from cwdm.intensity import NORMALIZATIONS, NormalizationName
from cwdm.modality import SEQUENCES, Modality
from cwdm.volume import brain_mask, read_volumes

CONFIG = Config(
    name="healthy",
    target=Modality.T2F,
    sampling=Sampling(sampler="ddim", steps=20),
    training=Training(iterations=1000, learning_rate=1e-4, warmup=50, ema=0.99),
)
TIMES = [1000, 750, 500, 251, 1]
TRIVIAL = 0.5
ONE_STEP = Sampling(sampler="ddim", steps=1)


@dataclass
class Records:
    """What is in the folder of a run, for a test to spoil; None: not there."""

    config: Config
    data: dict[str, Any] | None
    steps: list[dict[str, Any]] | None
    validations: list[dict[str, Any]] | None = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        assert self.validations
        return self.validations[-1]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.as_dict()))
        if self.data is not None:
            (folder / "data.json").write_text(json.dumps(self.data))
        for name, lines in (("steps", self.steps), ("validation", self.validations)):
            if lines is not None:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (folder / f"{name}.jsonl").write_text(text)
        return folder


def usual_error(t: np.ndarray | float, steps: int) -> Any:
    """Of a trained network: nothing to see at t = T, everything at t = 0."""
    return 0.002 + 0.3 * (np.asarray(t) / steps) ** 2


def healthy(config: Config = CONFIG, seed: int = 0) -> Records:
    """The records of a run that went well."""
    rng = np.random.default_rng(seed)
    training, last = config.training, config.process.steps
    n, m = training.iterations, training.batch
    times = rng.integers(1, last + 1, (n, m))
    times[rng.random((n, m)) < (training.noise_share or 0.1)] = last
    learning = 1 + 3 * np.exp(-np.arange(n)[:, None] / 50)
    errors = usual_error(times, last) * learning * rng.lognormal(sigma=0.4, size=(n, m))
    if config.prediction == "velocity":
        errors /= (times / last) ** 2
    channels = config.transform.channels
    energy = 0.5 ** np.arange(channels).clip(max=8) + 0.01
    energy *= TRIVIAL / energy.mean()
    rates = training.learning_rate * np.minimum(1, np.arange(1, n + 1) / max(training.warmup, 1))
    steps = [
        {
            "step": i + 1,
            "loss": float(errors[i].mean()),
            "bands": [float(errors[i].mean())] * channels,
            "times": times[i].tolist(),
            "errors": errors[i].tolist(),
            "rate": float(rates[i]),
            "norm": float(rng.lognormal(sigma=0.7)),
            "seconds": 0.1,
        }
        for i in range(n)
    ]
    normalization = NORMALIZATIONS[config.images.normalization]
    width = normalization.high - normalization.low
    robust = config.images.normalization == "robust"
    mean, deviation = (0.2, 1.3) if robust else (normalization.low + 0.5 * width, 0.15 * width)
    modalities = [str(m) for m in config.modalities]
    data = {
        "sources": [{"name": "cases", "cases": 200, "weight": 1.0}],
        "cases": 200,
        "ids": ["a"],
        "clipped": dict.fromkeys(modalities, 0.002),
        "mean": dict.fromkeys(modalities, mean),
        "deviation": dict.fromkeys(modalities, deviation),
        "energy": energy.tolist(),
        "held_out": 2,
        "overfit": False,
    }
    probed = [max(1, round(t * last / 1000)) for t in TIMES]
    validations = []
    for step in np.linspace(n / 4, n, 4).astype(int).tolist():
        level = usual_error(np.array(probed), last) * (1 + math.exp(-10 * step / n))
        validations.append(
            {
                "step": step,
                "times": probed,
                "held_out": (1.1 * level).tolist(),
                "fitted": level.tolist(),
                "raw": (1.2 * level).tolist(),
                "trivial": [TRIVIAL] * len(probed),
                "energy": {"samples": (0.9 * energy).tolist(), "data": energy.tolist()},
                "scores": [score(24.0), score(25.0)] if config.conditional else [],
            }
        )
    return Records(config, data, steps, validations)


def score(psnr: float, ssim: float = 0.8) -> dict[str, Any]:
    """Of one image whose floor has 22 dB and 0.7."""
    floor = {"floor": "copy t2w", "floor_psnr": 22.0, "floor_ssim": 0.7}
    return {"case": "x", "modality": "t2f", "psnr": psnr, "ssim": ssim, "mae": 0.1, **floor}


def training(config: Config, **changes: Any) -> Config:
    return replace(config, training=replace(config.training, **changes))


VARIANTS = {
    "conditional": CONFIG,
    "one step": replace(CONFIG, sampling=ONE_STEP),
    "batch of three, annealed": training(CONFIG, batch=3, patch=(32, 32, 32), decay=True),
    "no average": training(CONFIG, ema=0.0),
    "published units": replace(CONFIG, images=Images(normalization="published")),
    "unconditional": replace(CONFIG, conditioning="none", prediction="x_0"),
    "unconditional ct": replace(
        CONFIG,
        target=Modality.CT,
        conditioning="none",
        images=Images(normalization="hounsfield"),
    ),
    "flow": replace(
        CONFIG, process=Flow(), prediction="velocity", sampling=Sampling(sampler="euler", steps=2)
    ),
    "two times": replace(
        CONFIG,
        process=Diffusion(schedule="continuous", steps=2),
        sampling=Sampling(sampler="ddpm", steps=2),
    ),
    "wavelet packet": replace(CONFIG, transform=Transform(levels=2)),
    "voxels": replace(CONFIG, transform=Transform(wavelet="identity")),
}


def findings(records: Records, folder: Path) -> list[Finding]:
    return diagnose(read_run(records.write(folder)))


def ill(found: Sequence[Finding]) -> list[tuple[str, str]]:
    """(severity, about) of what is not good."""
    return [each[:2] for each in found if each.severity != "good"]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("seed", range(2))
def test_a_healthy_run_says_so_in_one_line(config: Config, seed: int, tmp_path: Path) -> None:
    (finding,) = findings(healthy(config, seed), tmp_path)
    assert finding[:2] == ("good", "run")
    assert "1000 steps" in finding.message


Spoil = Callable[[Records], None]
DISEASES: dict[str, tuple[Config, Spoil, tuple[str, str], str]] = {}
"""Name -> (configuration, what is done to healthy records, the finding, words of its message)."""


def disease(severity: str, about: str, words: str, config: Config = CONFIG) -> Callable[..., Spoil]:
    def enter(spoil: Spoil) -> Spoil:
        DISEASES[spoil.__name__.replace("_", " ")] = (config, spoil, (severity, about), words)
        return spoil

    return enter


@disease("problem", "normalization", "t1c: 5.0% of the brain lies beyond -8..10")
def clipped(records):
    records.data["clipped"]["t1c"] = 0.05


@disease("problem", "normalization", "t2w: the brain has mean 4 and deviation 1.3")
def off_centre(records):
    records.data["mean"]["t2w"] = 4.0


@disease("problem", "normalization", "t1n: the brain has mean 0.5 and deviation 0.005 in network")
def flat(records):
    records.config = VARIANTS["published units"]
    records.data["mean"] = dict.fromkeys(records.data["mean"], 0.5)
    records.data["deviation"] = {**dict.fromkeys(records.data["mean"], 0.15), "t1n": 0.005}


@disease("problem", "cases", "4 cases")
def a_handful_of_cases(records):
    records.data["cases"] = records.data["sources"][0]["cases"] = 4


@disease("hint", "cases", "20 cases")
def few_cases(records):
    records.data["cases"] = records.data["sources"][0]["cases"] = 20


@disease("hint", "cases", "simulated")
def simulated_cases_alone(records):
    records.data |= {"cases": 0, "sources": [{"name": "simulate", "cases": None, "weight": 1.0}]}


@disease("hint", "records", "No case is held out")
def nothing_held_out(records):
    records.data["held_out"] = 0
    for validation in records.validations:
        validation |= {"held_out": None, "scores": []}


@disease("hint", "records", "no validation")
def no_validation(records):
    records.validations = None


@disease("hint", "records", "no data.json")
def no_data_record(records):
    records.data = None


@disease("problem", "rate", "learning rate is 0")
def no_learning_rate(records):
    records.config = training(CONFIG, learning_rate=0.0)


@disease("problem", "rate", "rises for 750 steps of 1000")
def endless_warm_up(records):
    records.config = training(CONFIG, warmup=750)


@disease("problem", "divergence", "from step 751 on (250 steps)")
def not_a_number(records):
    for step in records.steps[750:]:
        step |= {"loss": math.nan, "errors": [math.nan] * len(step["errors"]), "norm": math.nan}


@disease("problem", "divergence", "times its lowest")
def rising(records):
    scale(records, np.where(np.arange(1000) < 900, 1, 5))


@disease("problem", "divergence", "In 20 steps, the last of them 21, the error was more than 10")
def blown_up_at_first(records):
    scale(records, np.where((np.arange(1000) > 0) & (np.arange(1000) < 21), 1e4, 1))


@disease("hint", "divergence", "5 of 900 steps")
def spikes(records):
    for step in records.steps[200::170]:
        step["norm"] *= 1000


@disease("problem", "steps", "still fell by")
def still_falling(records):
    scale(records, np.exp(-3 * np.arange(1000) / 1000))


@disease("hint", "steps", "training.iterations = 2000")
def still_falling_a_little(records):
    scale(records, np.exp(-0.7 * np.arange(1000) / 1000))


@disease("problem", "steps", "100 steps", training(CONFIG, iterations=100, warmup=10))
def hardly_trained(records):
    pass


@disease("hint", "steps", "at step 450 of 1000")
def under_way(records):
    del records.steps[450:], records.validations[1:]


@disease("problem", "average", "3.00 times the error", training(CONFIG, ema=0.9999))
def average_that_lags(records):
    records.last["raw"] = [error / 3 for error in records.last["held_out"]]


@disease("hint", "average", "2.00 times the error")
def jumpy_weights(records):
    records.last["raw"] = [error * 2 for error in records.last["held_out"]]


@disease("problem", "times", "20 times, 19 of them", training(CONFIG, noise_share=1.0))
def trained_on_noise_alone(records):
    assert all(step["times"] == [1000] for step in records.steps)


@disease("problem", "times", "At t = 1000, where the conditions are all there is")
def conditions_not_used(records):
    for name in ("held_out", "fitted", "raw"):
        records.last[name][0] = 0.499


@disease("problem", "times", "At t = 251, 1 the image shows through")
def blind_at_small_times(records):
    for name in ("held_out", "fitted", "raw"):
        records.last[name][-2:] = [0.499, 0.499]


@disease("problem", "energy", "they are noisy")
def noisy(records):
    records.last["energy"]["samples"][1:] = [3 * e for e in records.last["energy"]["data"][1:]]


@disease("problem", "energy", "3 times the energy of the data in band hll: stripes")
def striped(records):
    records.last["energy"]["samples"][4] = 3 * records.last["energy"]["data"][4]


@disease("problem", "energy", "blurred, though")
def blurred(records):
    records.last["energy"]["samples"][1:] = [e / 3 for e in records.last["energy"]["data"][1:]]


@disease("hint", "energy", "blurred, as the estimate of one step has to be", VARIANTS["one step"])
def blurred_by_one_step(records):
    blurred(records)


@disease("problem", "energy", "brightness or contrast")
def too_bright(records):
    records.last["energy"]["samples"][0] *= 2


@disease("problem", "overfit", "best at step 500 and has risen by 40% since; take best.safetensors")
def memorizing(records):
    gap(records, held_out=[1.1, 1.0, 1.2, 1.4], fitted=[1.0, 0.9, 0.7, 0.5])


@disease("hint", "overfit", "Held out it still improves")
def memorizing_but_improving(records):
    gap(records, held_out=[1.1, 1.0, 0.95, 0.9], fitted=[1.0, 0.8, 0.6, 0.4])


@disease("problem", "floors", "4.0 dB worse than a copy of another sequence (2 of 2 are worse)")
def worse_than_a_copy(records):
    records.last["scores"] = [score(17.5), score(18.5)]


@disease("problem", "floors", "1.0 dB worse", VARIANTS["one step"])
def worse_than_a_copy_in_one_step(records):
    records.last["scores"] = [score(21.0)]


@disease("hint", "floors", "loses up to 3 dB")
def as_a_sample_may_be(records):
    records.last["scores"] = [score(21.0)]


@disease("hint", "floors", "lose in SSIM, by 0.100")
def without_structure(records):
    records.last["scores"] = [score(24.0, ssim=0.6)]


def scale(records: Records, factors: Any) -> None:
    """Multiply the errors of each step."""
    for step, factor in zip(records.steps or (), factors.tolist(), strict=True):
        step["errors"] = [factor * error for error in step["errors"]]
        step["loss"] *= factor


def gap(records: Records, **factors: list[float]) -> None:
    """Held-out and fitted errors as factors of the usual one, raw weights like the average."""
    level = usual_error(np.array(TIMES), 1000)
    for i, validation in enumerate(records.validations or ()):
        for name, factor in factors.items():
            validation[name] = (factor[i] * level).tolist()
        validation["raw"] = validation["held_out"]


@pytest.mark.parametrize("name", DISEASES)
def test_a_run_with_one_disease_has_exactly_that_finding(name: str, tmp_path: Path) -> None:
    config, spoil, expected, words = DISEASES[name]
    records = healthy(config)
    spoil(records)
    found = findings(records, tmp_path)
    assert ill(found) == [expected]
    assert words in found[0].message
    assert ("good" in [each.severity for each in found]) is (expected[0] == "hint")


def test_nothing_else_changes_with_the_seed(tmp_path: Path) -> None:
    for seed in range(20):
        records = healthy(training(CONFIG, iterations=600, warmup=50), seed)
        assert ill(findings(records, tmp_path)) == []


def test_an_average_is_judged_by_its_decay_where_nothing_was_validated(tmp_path: Path) -> None:
    records = healthy(training(CONFIG, ema=0.999))
    records.validations = None
    average, rest = findings(records, tmp_path)[:2]
    assert average[:2] == ("problem", "average")
    assert f"{0.999**999:.0%} of those it began with" in average.message
    assert rest.about == "records"


@pytest.mark.parametrize("name", ["robust", "published", "published-wdm"])
def test_real_brains_lie_where_they_are_expected(name: NormalizationName, shared: Path) -> None:
    normalization = NORMALIZATIONS[name]
    (lowest, highest), (narrow, wide) = _expected(name)
    for case in find_cases(shared / "data" / "val"):
        for volume in read_volumes(case, SEQUENCES).values():
            mask = brain_mask(volume)
            scale = normalization.measure(volume.voxels, mask)
            inside = normalization.normalize(volume.voxels, mask, scale)[mask]
            assert lowest <= inside.mean() <= highest
            assert narrow <= inside.std() <= wide
            ends = (inside <= normalization.low) | (inside >= normalization.high)
            assert ends.mean() <= _CLIPPED


def test_endless_simulation_makes_up_for_few_cases(tmp_path: Path) -> None:
    records = healthy()
    assert records.data
    records.data["cases"] = 4
    records.data["sources"].append({"name": "simulate", "cases": None, "weight": 1.0})
    assert ill(findings(records, tmp_path)) == []


@pytest.mark.parametrize(
    ("psnr", "expected"), [(36.0, ("good", "overfit")), (25.0, ("problem", "overfit"))]
)
def test_a_run_that_is_to_overfit_is_judged_by_whether_it_did(
    psnr: float, expected: tuple[str, str], tmp_path: Path
) -> None:
    records = healthy(training(CONFIG, iterations=300, warmup=0, ema=0.9))
    assert records.data
    records.data |= {"overfit": True, "cases": 1, "held_out": 0}
    plain = {"case": "fitted block", "modality": "t2f", "psnr": psnr, "ssim": 0.9, "mae": 0.01}
    for validation in records.validations or ():
        validation |= {"held_out": None, "scores": [plain]}
    (finding,) = findings(records, tmp_path)
    assert finding[:2] == expected
    assert f"{psnr:.1f} dB" in finding.message


def test_problems_come_first_and_causes_before_their_effects(tmp_path: Path) -> None:
    records = healthy()
    for spoil in (few_cases, worse_than_a_copy, noisy, still_falling, clipped):
        spoil(records)
    assert ill(findings(records, tmp_path)) == [
        ("problem", "normalization"),
        ("problem", "steps"),
        ("problem", "energy"),
        ("problem", "floors"),
        ("hint", "cases"),
    ]


def test_a_loss_that_depends_on_the_times_drawn_does_not_fall(tmp_path: Path) -> None:
    """The late steps happen to draw small times, where every error is small."""
    records = healthy()
    rng = np.random.default_rng(1)
    for step in records.steps[750:]:  # type: ignore[index]
        time = int(rng.integers(1, 400))
        error = float(usual_error(time, 1000) * rng.lognormal(sigma=0.4))
        step |= {"times": [time], "errors": [error], "loss": error}
    assert ill(findings(records, tmp_path)) == []


def test_a_line_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    folder = healthy().write(tmp_path)
    before = diagnose(read_run(folder))
    for name in ("steps.jsonl", "validation.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text + text.splitlines()[0][:40])
    assert diagnose(read_run(folder)) == before


def test_a_run_that_has_hardly_begun_is_no_error(tmp_path: Path) -> None:
    records = Records(CONFIG, None, None, None)
    found = findings(records, tmp_path)
    assert ill(found) == [("hint", "records")] * 2
    assert [each.severity for each in found] == ["hint", "hint"]
    run = read_run(tmp_path)
    assert (errors_by_time(run), energies(run)) == ([], [])


def test_a_gradient_whose_norm_is_not_known_is_no_problem(tmp_path: Path) -> None:
    records = healthy()
    for step in records.steps or ():
        step["norm"] = None
    assert ill(findings(records, tmp_path)) == []


def test_errors_are_gathered_by_time(tmp_path: Path) -> None:
    run = read_run(healthy().write(tmp_path))
    rows = errors_by_time(run)
    ranges = [(1000, 1000), (751, 999), (501, 750), (251, 500), (1, 250)]
    assert [row[:2] for row in rows] == ranges
    late = run.steps.step > 750
    for first, last, trained, _, _ in rows:
        inside = late & (run.steps.times >= first) & (run.steps.times <= last)
        assert trained == pytest.approx(run.steps.errors[inside].mean())
    assert run.validations[-1].held_out is not None
    a, b, c, d, e = run.validations[-1].held_out
    assert [row.held_out for row in rows] == [a, None, b, pytest.approx((c + d) / 2), e]
    assert {row.trivial for row in rows if row.held_out} == {TRIVIAL}


def test_errors_of_a_velocity_become_those_of_the_image(tmp_path: Path) -> None:
    config = VARIANTS["flow"]
    records = healthy(config)
    run = read_run(records.write(tmp_path))
    times = np.array([step["times"][0] for step in records.steps or ()])
    velocity = np.array([step["errors"][0] for step in records.steps or ()])
    assert_allclose(run.steps.errors, velocity * (times / 1000) ** 2)


def test_bands_have_names_and_energies(tmp_path: Path) -> None:
    run = read_run(healthy().write(tmp_path / "haar"))
    assert [row.band for row in energies(run)][:3] == ["lll", "llh", "lhl"]
    assert energies(run)[0].samples == pytest.approx(0.9 * energies(run)[0].data)
    packet = healthy(VARIANTS["wavelet packet"])
    packet.validations = None
    rows = energies(read_run(packet.write(tmp_path / "packet")))
    assert (len(rows), rows[1].band, rows[8].band) == (64, "lll-llh", "llh-lll")
    assert rows[0].samples is None
    voxels = read_run(healthy(VARIANTS["voxels"]).write(tmp_path / "voxels"))
    assert [row.band for row in energies(voxels)] == ["voxels"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", '{"name": "x"}', "config.json: target: Field required"),
        ("data.json", "[]", "data.json: "),
        ("data.json", '{"cases": 3}', "data.json: "),
        ("steps.jsonl", '{"stride": 1}\n', "steps.jsonl: not the steps of a training run"),
        ("steps.jsonl", "[1, 2]\n", "steps.jsonl: not the steps of a training run"),
        ("validation.jsonl", '{"step": "one"}\n', "validation.jsonl: "),
    ],
)
def test_records_of_something_else_are_refused_by_name(
    file: str, text: str, message: str, tmp_path: Path
) -> None:
    folder = healthy().write(tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(InputError) as error:
        read_run(folder)
    assert message in str(error.value)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: found no config\.json"):
        read_run(tmp_path / "nowhere")


def test_the_command_prints_findings_and_tables_and_exits_with_zero(tmp_path: Path) -> None:
    folder = healthy().write(tmp_path)
    result = CliRunner().invoke(cwdm, ["doctor", str(folder)])
    assert result.exit_code == 0
    assert result.stdout.startswith("Good\n  run            No problem found after 1000 steps")
    (row,) = [line for line in result.stdout.splitlines() if line.strip().startswith("1000 ")]
    assert row.split()[2:] == [f"{1.1 * 0.302:.3g}", f"{TRIVIAL:.3g}"]
    (row,) = [line for line in result.stdout.splitlines() if line.strip().startswith("lll ")]
    lowest = energies(read_run(folder))[0].data
    assert row.split() == ["lll", f"{lowest:.3g}", f"{0.9 * lowest:.3g}", "0.9"]


def test_the_command_exits_with_one_if_there_is_a_problem(tmp_path: Path) -> None:
    records = healthy()
    clipped(records)
    few_cases(records)
    result = CliRunner().invoke(cwdm, ["doctor", str(records.write(tmp_path))])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "Problems"
    assert lines.index("Hints") > 1
    assert "Good" not in lines
    assert max(map(len, lines)) <= 100


def test_the_command_exits_with_two_for_what_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(cwdm, ["doctor", str(tmp_path)])
    assert result.exit_code == 2
    assert "expected the folder of a training run" in result.stderr


@pytest.mark.parametrize("spoil", [few_cases, clipped])
def test_json_holds_the_findings(spoil: Spoil, tmp_path: Path) -> None:
    records = healthy()
    spoil(records)
    folder = records.write(tmp_path)
    result = CliRunner().invoke(cwdm, ["doctor", "--json", str(folder)])
    found = diagnose(read_run(folder))
    assert json.loads(result.stdout) == [each._asdict() for each in found]
    assert result.exit_code == (1 if found[0].severity == "problem" else 0)


def test_a_run_that_is_one_step_long_can_be_told(tmp_path: Path) -> None:
    records = healthy(training(CONFIG, iterations=4, warmup=0))
    records.steps = (records.steps or [])[:1]
    records.validations = None
    folder = records.write(tmp_path)
    assert CliRunner().invoke(cwdm, ["doctor", str(folder)]).exit_code == 0
