"""What is wrong with a training run, in words: from the records in its folder, without the model.

A check looks for one disease and says what it found, with the numbers, and what to do. Checks are
asked in the order of cause and effect: bad data make bad errors, and those bad samples. So the
first problem is the one to mend first.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as record

from cwdm.config import Config, in_words
from cwdm.errors import InputError
from cwdm.intensity import NORMALIZATIONS, NormalizationName
from cwdm.modality import Modality
from cwdm.run import BEST, CONFIG, DATA, STEPS, VALIDATION, read_lines
from cwdm.wavelet import BANDS

__all__ = [
    "BandEnergy",
    "Finding",
    "Run",
    "Severity",
    "TimeError",
    "diagnose",
    "energies",
    "errors_by_time",
    "read_run",
]

Floats = NDArray[np.float64]
Row = TypeVar("Row")
Severity = Literal["problem", "hint", "good"]
_ORDER: tuple[Severity, ...] = ("problem", "hint", "good")

_CLIPPED = 0.01
"""Share of the brain beyond the range. Thirteen BraTS cases lose 0.7 % at most, under every
normalization."""
_ROBUST = ((-1.0, 1.0), (0.5, 3.0))
"""Mean and deviation of a brain after the robust normalization; thirteen BraTS cases lie within
-0.5..0.6 and 0.9..2.1, outliers included."""
_BOUNDED = ((0.05, 0.95), (0.02, 0.4))
"""The same for a normalization with two ends, as shares of its range: 0.28..0.79 and 0.09..0.21."""
_FEW, _MODEST = 10, 40
"""Cases. The models that ship saw 21 to 41, the published ones about a thousand."""
_FEWEST_STEPS = 500
"""The shortest stage behind a model that ships, and that one began with trained weights."""
_CLEARLY = 4.0
"""Standard errors that a difference of means is taken seriously from."""
_STILL_FALLING, _FALLING_FAST = 0.05, 0.2
"""Fall of the error in the last quarter of a run."""
_STARTING_WEIGHTS = 0.05
"""Share of the moving average. It is 5 % after three times the steps that an average spans."""
_AVERAGE_WORSE, _RAW_WORSE = 1.1, 1.5
"""Error of the one over that of the other. An average is there to be better, by up to a third."""
_FAR_OFF = 10.0
"""Error over the energy of the data. A network starts near 1: its last layer begins with zeros."""
_SPIKE, _SPIKES = 10.0, 1e-3
"""Norm of a gradient over the 95 % quantile, and the share of the steps that is too much."""
_NEAR = 0.02
"""Share of T within which a network knows a time from its neighbours."""
_NO_BETTER = 0.95
"""Error over that of the trivial estimate."""
_WITHIN_REACH = 0.75
"""The same of the trivial estimate together with the noisy image, from where on that one counts."""
_BLURRED, _NOISY = 0.5, 2.0
"""Energy of samples over that of data, fine bands. One-step models that ship have 0.3 to 0.7."""
_BRIGHTNESS = (2 / 3, 3 / 2)
"""The same of the lowest band: a brightness or contrast that is off by a fifth. Models that ship
have 0.97 to 1.0."""
_GAP, _RISEN = 1.25, 1.05
"""Growth of held-out over fitted error, and held-out error over its best."""
_SAMPLED = 3.0
"""dB that a sample of the posterior has less than its mean, exactly: twice the squared error (Blau
& Michaeli 2018, arXiv 1711.06077, section 3)."""
_LEARNT = 35.0
"""PSNR in dB of a block that was learnt by heart."""


@record(frozen=True)
class SourceRecord:
    """Where cases came from."""

    name: str
    cases: int | None
    """None for a simulator, which has no end."""
    weight: float


@record(frozen=True)
class DataRecord:
    """What a run is trained on, and how it looks to the network."""

    sources: list[SourceRecord]
    cases: int
    """Of all sources with an end."""
    clipped: dict[Modality, float]
    """Share of the brain's voxels beyond the range of the normalization."""
    mean: dict[Modality, float]
    """In the brain, network units."""
    deviation: dict[Modality, float]
    energy: list[float]
    """(channels,) mean square of each sub-band of the target."""
    held_out: int
    """Cases to validate on."""
    overfit: bool
    """Whether the run is to learn a few blocks by heart, and nothing else."""

    @property
    def endless(self) -> bool:
        """Whether a simulator is among the sources."""
        return any(source.cases is None for source in self.sources)


@record(frozen=True)
class EnergyRecord:
    """Mean square of each sub-band, (channels,)."""

    samples: list[float]
    """Of images that the model made."""
    data: list[float]
    """Of the true ones."""


@record(frozen=True)
class ScoreRecord:
    """One synthetic image against the true one."""

    case: str
    modality: str
    psnr: float
    ssim: float
    mae: float
    floor: str | None = None
    """The best copy of another image; absent in a run that learns by heart."""
    floor_psnr: float | None = None
    floor_ssim: float | None = None


@record(frozen=True)
class ValidationRecord:
    """One validation. Errors are mean squares of the estimate of x_0 at each of ``times``."""

    step: int
    times: list[int]
    """Falling, the first is T."""
    held_out: list[float] | None
    """Of the average weights."""
    fitted: list[float]
    """The same on cases of the training."""
    raw: list[float]
    """Of the weights themselves, held out if there is something."""
    trivial: list[float]
    """Of the mean of the conditions, or of zero."""
    energy: EnergyRecord
    scores: list[ScoreRecord]

    @property
    def errors(self) -> list[float]:
        """Held out if there is something."""
        return self.held_out or self.fitted


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a run, N of them with M samples in all."""

    step: NDArray[np.int64]
    """(N,)."""
    loss: Floats
    """(N,)."""
    norm: Floats
    """(N,) of the gradient; NaN where it is not known or not finite."""
    owner: NDArray[np.int64]
    """(M,) which of the steps a sample belongs to."""
    times: NDArray[np.int64]
    """(M,) in 1..T."""
    errors: Floats
    """(M,) mean squared error over the bands of the estimate of x_0."""


@dataclass(frozen=True, eq=False)
class Run:
    """The records of a training run."""

    config: Config
    data: DataRecord | None
    """None if it was not written yet."""
    steps: Steps
    validations: list[ValidationRecord]

    @property
    def one_step(self) -> bool:
        """Whether the model makes an image from a single estimate."""
        return len(self.asked) == 1

    @property
    def asked(self) -> list[int]:
        """Times that sampling asks the network for."""
        sampling = self.config.sampling
        times = self.config.process.timesteps(sampling.steps, sampling.spacing)[:-1]
        return times[:1] if sampling.sampler == "one-step" else times

    @property
    def done(self) -> int:
        """Steps so far."""
        return int(self.steps.step[-1]) if len(self.steps.step) else 0

    @property
    def finished(self) -> bool:
        return self.done >= self.config.training.iterations

    @property
    def overfit(self) -> bool:
        """Whether it is to learn a few blocks by heart."""
        return self.data is not None and self.data.overfit


class Finding(NamedTuple):
    """One thing a check found."""

    severity: Severity
    about: str
    """A short key: "normalization", "cases", ..."""
    message: str
    """What it is, with the numbers, and what to do."""


class TimeError(NamedTuple):
    """Mean squared errors of the estimate of x_0 over a range of times; None: not known."""

    first: int
    last: int
    trained: float | None
    """In the last quarter of the steps."""
    held_out: float | None
    trivial: float | None


class BandEnergy(NamedTuple):
    """Mean square of one sub-band."""

    band: str
    data: float
    samples: float | None
    """None before the first validation."""


def read_run(folder: Path) -> Run:
    """The records in the folder of a run, however far it is.

    Raises:
        InputError: not the folder of a run, or a record that cwdm did not write.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: found no {CONFIG}, expected the folder of a training run")
    config = Config.parse(_read_json(folder / CONFIG), str(folder / CONFIG))
    data = None
    if (path := folder / DATA).exists():
        data = _parse(_DATA, _read_json(path), path)
    path = folder / VALIDATION
    lines = read_lines(path) if path.exists() else ()
    validations = [_parse(_VALIDATION, line, path) for line in lines]
    return Run(config, data, _read_steps(folder / STEPS, config), validations)


def _read_steps(path: Path, config: Config) -> Steps:
    numbers: list[list[float]] = []
    samples: list[tuple[int, int, float]] = []
    try:
        for line in read_lines(path) if path.exists() else ():
            norm = math.nan if line["norm"] is None else line["norm"]
            numbers.append([line["step"], line["loss"], norm])
            owner = len(numbers) - 1
            samples += [(owner, *each) for each in zip(line["times"], line["errors"], strict=True)]
        step, loss, norms = np.array(numbers, np.float64).reshape(-1, 3).T
        owners, times, errors = np.array(samples, np.float64).reshape(-1, 3).T
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the steps of a training run ({error})") from error
    whole = times.astype(np.int64)
    if config.prediction == "velocity":  # its error times noise_t is that of x_0
        errors = errors * config.process.noises.numpy()[whole] ** 2
    return Steps(
        step.astype(np.int64),
        loss,
        np.where(np.isfinite(norms), norms, np.nan),
        owners.astype(np.int64),
        whole,
        errors,
    )


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error


_DATA, _VALIDATION = TypeAdapter(DataRecord), TypeAdapter(ValidationRecord)


def _parse(adapter: TypeAdapter[Row], values: object, path: Path) -> Row:
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        raise InputError(f"{path}: {in_words(error)}") from None


def diagnose(run: Run) -> list[Finding]:
    """Problems, then hints, each in the order of cause and effect; at the end what is good."""
    found = [finding for check in _CHECKS for finding in check(run)]
    if run.done and not any(finding.severity in ("problem", "good") for finding in found):
        found.append(_healthy(run))
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def errors_by_time(run: Run) -> list[TimeError]:
    """The errors at t = T and in each quarter of the times below it, where there are any."""
    last = run.config.process.steps
    edges = [round(last * quarter / 4) for quarter in range(5)]
    ranges = [(last, last), *((a + 1, min(b, last - 1)) for a, b in list(pairwise(edges))[::-1])]
    late = run.steps.owner >= 0.75 * len(run.steps.step)
    validation = run.validations[-1] if run.validations else None
    rows = []
    for first, final in ranges:
        inside = late & (run.steps.times >= first) & (run.steps.times <= final)
        held_out = trivial = None
        if validation is not None:
            at = [i for i, t in enumerate(validation.times) if first <= t <= final]
            if validation.held_out is not None:
                held_out = _mean([validation.held_out[i] for i in at])
            trivial = _mean([validation.trivial[i] for i in at])
        row = TimeError(first, final, _mean(run.steps.errors[inside]), held_out, trivial)
        if row[2:] != (None, None, None):
            rows.append(row)
    return rows


def energies(run: Run) -> list[BandEnergy]:
    """Of each sub-band, the last validation's where there is one."""
    names = _bands(run.config)
    if run.validations:
        last = run.validations[-1].energy
        return [BandEnergy(*row) for row in zip(names, last.data, last.samples, strict=True)]
    if run.data is None:
        return []
    return [BandEnergy(*row, None) for row in zip(names, run.data.energy, strict=True)]


def _bands(config: Config) -> list[str]:
    """Names of the channels; of a wavelet packet the coarser letters last."""
    levels = round(math.log(config.transform.channels, 8))
    return ["-".join(parts) for parts in product(BANDS, repeat=levels)] if levels else ["voxels"]


def _mean(values: Sequence[float] | Floats) -> float | None:
    return float(np.mean(values)) if len(values) else None


# The checks, in the order they are asked.


def _records(run: Run) -> Iterator[Finding]:
    """What is not there yet cannot be judged."""
    if run.data is None:
        yield Finding("hint", "records", f"There is no {DATA}: nothing is known of the data.")
    elif not run.data.held_out and not run.overfit:
        yield Finding(
            "hint",
            "records",
            "No case is held out, so nothing tells learning from memorizing. Keep a few cases "
            "apart and validate on them (--val).",
        )
    if not run.done:
        yield Finding("hint", "records", f"There is no step in {STEPS}: too early to say more.")
    elif not run.validations:
        yield Finding(
            "hint",
            "records",
            f"There is no validation in {VALIDATION}, so nothing is known of samples. The next "
            f"is due every {run.config.training.validate_every} steps "
            "(training.validate_every), or at the end with held-out cases.",
        )


def _normalization(run: Run) -> Iterator[Finding]:
    """Whether the images lie where the normalization promises; one small block need not."""
    if run.data is None or run.overfit:
        return
    name = run.config.images.normalization
    (lowest, highest), (narrow, wide) = _expected(name)
    for modality, share in run.data.clipped.items():
        if not share <= _CLIPPED:
            normalization = NORMALIZATIONS[name]
            yield Finding(
                "problem",
                "normalization",
                f"{modality}: {share:.1%} of the brain lies beyond {normalization.low:g}.."
                f"{normalization.high:g} and is clipped, expected {_CLIPPED:.0%} at most. Look for "
                "skull, artefacts or a wrong mask, or change images.normalization "
                f"({name}).",
            )
    for modality, mean in run.data.mean.items():
        deviation = run.data.deviation[modality]
        if not (lowest <= mean <= highest and narrow <= deviation <= wide):
            yield Finding(
                "problem",
                "normalization",
                f"{modality}: the brain has mean {mean:.3g} and deviation {deviation:.3g} in "
                f"network units, expected {lowest:.3g}..{highest:.3g} and {narrow:.3g}..{wide:.3g} "
                f"({name}). Check the images with cwdm prepare: background that is not 0, skull, "
                "or an image that is no such sequence.",
            )


def _expected(name: NormalizationName) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of mean and deviation in the brain."""
    if name == "robust":
        return _ROBUST
    low, width = NORMALIZATIONS[name].low, NORMALIZATIONS[name].high - NORMALIZATIONS[name].low
    (lowest, highest), (narrow, wide) = _BOUNDED
    return (low + width * lowest, low + width * highest), (width * narrow, width * wide)


def _cases(run: Run) -> Iterator[Finding]:
    """Whether there is enough to learn from."""
    if run.data is None or run.overfit:
        return
    count, advice = run.data.cases, "Add cases, or simulated ones (--data simulate)."
    if run.data.endless:
        if not count:
            yield Finding(
                "hint",
                "cases",
                "All cases are simulated. Expect less on patients than the figures here say.",
            )
    elif count < _FEW:
        yield Finding(
            "problem",
            "cases",
            f"{_count(count, 'case')} cannot show what differs between patients: the model will "
            f"fit these. {advice}",
        )
    elif count < _MODEST:
        yield Finding(
            "hint",
            "cases",
            f"{count} cases are few (published models saw about a thousand). {advice}",
        )


def _rate(run: Run) -> Iterator[Finding]:
    """Whether the learning rate lets anything be learnt."""
    settings = run.config.training
    if settings.learning_rate == 0:
        yield Finding(
            "problem",
            "rate",
            "The learning rate is 0: no weight changes. Set training.learning_rate, 1e-4 to 1e-3 "
            "for a small network, 1e-5 for those as published.",
        )
    elif 2 * settings.warmup >= settings.iterations:
        yield Finding(
            "problem",
            "rate",
            f"The learning rate rises for {settings.warmup} steps of {settings.iterations}: most "
            "of the run learns too slowly. Set training.warmup to a tenth of training.iterations "
            "or less.",
        )


def _divergence(run: Run) -> Iterator[Finding]:
    """Whether the training blew up."""
    steps, settings = run.steps, run.config.training
    advice = (
        f"Lower training.learning_rate ({settings.learning_rate:g}) to a third, or set "
        "training.clip = 1."
    )
    broken = np.flatnonzero(~np.isfinite(steps.loss))
    if len(broken):
        yield Finding(
            "problem",
            "divergence",
            f"The loss is not a number from step {steps.step[broken[0]]} on "
            f"({_count(len(broken), 'step')}): the weights are lost. {advice} With fp16, try bf16.",
        )
        return
    progress = _progress(steps)
    if len(progress) >= 100:  # ten samples in each tenth
        tenths = np.array_split(progress, 10)
        best = min(tenths, key=np.mean)
        rise, error = _difference(best, tenths[-1])
        if rise > math.log(2) and rise > _CLEARLY * error:
            yield Finding(
                "problem",
                "divergence",
                f"The error has risen to {math.exp(rise):.2g} times its lowest: the training "
                f"diverges. {advice}",
            )
            return
    if run.data is not None:
        empty = float(np.mean(run.data.energy))  # the error of an image of zeros
        worse = np.unique(steps.owner[steps.errors > _FAR_OFF * empty])
        if len(worse) > 2:
            yield Finding(
                "problem",
                "divergence",
                f"In {len(worse)} steps, the last of them {steps.step[worse[-1]]}, the error was "
                f"more than {_FAR_OFF:g} times that of an image of zeros: the training blew up, "
                f"and may never recover. {advice}",
            )
            return
    norms = steps.norm[np.isfinite(steps.norm)]
    norms = norms[len(norms) // 10 :]  # the first steps of all may be large
    if len(norms) and settings.clip is None:
        usual = float(np.quantile(norms, 0.95))
        spikes = int((norms > _SPIKE * usual).sum())
        if spikes > max(2, _SPIKES * len(norms)):
            yield Finding(
                "hint",
                "divergence",
                f"The gradient was more than {_SPIKE:g} times its usual norm ({usual:.3g}) in "
                f"{spikes} of {len(norms)} steps: training is close to diverging. {advice}",
            )


def _steps(run: Run) -> Iterator[Finding]:
    """Whether it was trained long enough."""
    planned = run.config.training.iterations
    if not run.done or run.overfit:
        return
    if not run.finished:
        yield Finding(
            "hint",
            "steps",
            f"The run stands at step {run.done} of {planned}. The same command goes on with it.",
        )
        return
    if run.done < _FEWEST_STEPS:
        yield Finding(
            "problem",
            "steps",
            f"{_count(run.done, 'step')} teach a network next to nothing. Set training.iterations "
            "to some thousands.",
        )
        return
    *_, third, fourth = np.array_split(_progress(run.steps), 4)
    rise, error = _difference(third, fourth)
    fall = -math.expm1(rise)
    if fall > _STILL_FALLING and -rise > _CLEARLY * error:
        yield Finding(
            "problem" if fall > _FALLING_FAST else "hint",
            "steps",
            f"The error still fell by {fall:.0%} in the last quarter of {run.done} steps. Train "
            f"longer: a new run with training.iterations = {2 * run.done}, from the weights of "
            "this one (--init).",
        )


def _progress(steps: Steps) -> Floats:
    """(M,) log error of each sample less what is usual at its time, in the order of training.

    Errors differ a hundredfold between times, so that a plain mean tells which times were drawn.
    """
    usable = np.isfinite(steps.errors)
    logs: Floats = np.log(steps.errors[usable].clip(min=1e-12))
    times = steps.times[usable]
    if not len(logs):
        return logs
    edges = np.unique(np.quantile(times, np.linspace(0.05, 0.95, 19)))
    near = np.searchsorted(edges, times)
    usual: Floats = np.bincount(near, logs) / np.bincount(near).clip(min=1)
    progress: Floats = logs - usual[near]
    return progress


def _difference(before: Floats, after: Floats) -> tuple[float, float]:
    """How much the mean rose, and the standard error of that."""
    variance = before.var() / len(before) + after.var() / len(after)
    return float(after.mean() - before.mean()), math.sqrt(variance)


def _average(run: Run) -> Iterator[Finding]:
    """Whether the moving average, which is what is saved, follows the weights."""
    decay = run.config.training.ema
    if not (run.finished and decay):
        return
    starting = decay ** (run.done - 1)  # the first update copies
    better = f"Set training.ema to {max(0.0, 1 - 10 / run.done):.3g} or less, or train longer."
    if not run.validations:
        if starting > _STARTING_WEIGHTS:
            yield Finding(
                "problem",
                "average",
                f"The average of the weights still holds {starting:.0%} of those it began with "
                f"(training.ema = {decay:g}, {run.done} steps), which is noise unless they came "
                f"from a model (--init). {better}",
            )
        return
    last = run.validations[-1]
    ratio = _ratio(last.errors, last.raw)
    if ratio > _AVERAGE_WORSE:
        yield Finding(
            "problem",
            "average",
            f"The average of the weights has {ratio:.2f} times the error of the weights "
            f"themselves at step {last.step}: it holds {starting:.0%} of those it began with and "
            f"lags behind (training.ema = {decay:g}). {better}",
        )
    elif 1 / ratio > _RAW_WORSE:
        yield Finding(
            "hint",
            "average",
            f"The weights have {1 / ratio:.2f} times the error of their average at step "
            f"{last.step}: they jump about. Set training.decay = true, or lower "
            f"training.learning_rate ({run.config.training.learning_rate:g}).",
        )


def _ratio(errors: Sequence[float], others: Sequence[float]) -> float:
    """Geometric mean over times, so that the largest errors do not decide alone."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.exp(np.mean(np.log(np.divide(errors, others)))))


def _asked(run: Run) -> Iterator[Finding]:
    """Whether the network saw the times that sampling asks for."""
    trained, steps = np.unique(run.steps.times), run.config.process.steps
    if len(run.steps.times) < _FEWEST_STEPS:
        return
    unseen = [t for t in run.asked if np.abs(trained - t).min() > _NEAR * steps]
    if len(unseen) > 0.1 * len(run.asked):
        yield Finding(
            "problem",
            "times",
            f"Sampling asks for {_count(len(run.asked), 'time')}, {len(unseen)} of them (t = "
            f"{unseen[0]}, ...) far from any that was trained: the network guesses there. Lower "
            "training.noise_share, leave out training.timesteps, or set sampling.steps to what "
            "was trained.",
        )


def _times(run: Run) -> Iterator[Finding]:
    """Whether the network is better than the trivial estimates at each time."""
    if not run.validations:
        return
    last, process = run.validations[-1], run.config.process
    rows = list(zip(last.times, last.errors, last.trivial, strict=True))
    _, error, trivial = rows[0]
    if run.config.conditional and not error < _NO_BETTER * trivial:
        yield Finding(
            "problem",
            "times",
            f"At t = {last.times[0]}, where the conditions are all there is, the error is "
            f"{error:.3g} against {trivial:.3g} of their plain mean: the network does not use "
            "them yet. Check that the images of a case are co-registered, then train longer, with "
            "training.noise_share = 0.2.",
        )
    poor = []
    for t, error, trivial in rows[1:]:
        precision = (process.signal(t) / process.noise(t)) ** 2  # of x_t / signal as an estimate
        within_reach = 1 / (1 / trivial + precision)  # of both estimates together
        if within_reach < _WITHIN_REACH * trivial and not error < _NO_BETTER * trivial:
            poor.append(t)
    if poor and not run.one_step:
        yield Finding(
            "problem",
            "times",
            f"At t = {', '.join(map(str, poor))} the image shows through the noise, and the "
            "estimate is no better than one that does not look at it: the last steps of sampling "
            "spoil the image. Train longer; a training.noise_share above 0.5 leaves too little "
            "for these times.",
        )


def _energy(run: Run) -> Iterator[Finding]:
    """Whether samples are as bright, as fine and as noisy as the data."""
    if not run.validations:
        return
    lowest, *fine = energies(run)
    brightness = _relative(lowest)
    if not _BRIGHTNESS[0] <= brightness <= _BRIGHTNESS[1]:
        yield Finding(
            "problem",
            "energy",
            f"Samples have {brightness:.2g} times the energy of the data in the lowest band "
            f"({lowest.band}): brightness or contrast is wrong. Train longer, give that band more "
            "weight (training.band_weights), and look at the normalization.",
        )
    if not fine:
        return
    total = _relative(
        BandEnergy("", sum(b.data for b in fine), sum(b.samples or 0.0 for b in fine))
    )
    loud = [band for band in fine if _relative(band) > _NOISY]
    if len(loud) > len(fine) / 2:
        yield Finding(
            "problem",
            "energy",
            f"Samples have {total:.2g} times the energy of the data in the fine bands: they are "
            "noisy. Train longer, or sample in more steps (sampling.steps = "
            f"{run.config.sampling.steps}).",
        )
    elif loud:
        worst = max(loud, key=_relative)
        yield Finding(
            "problem",
            "energy",
            f"Samples have {_relative(worst):.2g} times the energy of the data in band "
            f"{worst.band}{', among others' * (len(loud) > 1)}: stripes or a checkerboard, along "
            "each axis (x, y, z) that has an h. Look for slices of unequal brightness in the "
            "training images, then train longer.",
        )
    elif total < _BLURRED and run.one_step:
        yield Finding(
            "hint",
            "energy",
            f"Samples have {total:.2g} of the energy of the data in the fine bands: blurred, as "
            "the estimate of one step has to be, the mean of all images that fit. That is best "
            "for PSNR; for texture train on all times and sample with ddpm or heun in 20 steps or "
            "more.",
        )
    elif total < _BLURRED:
        yield Finding(
            "problem",
            "energy",
            f"Samples have {total:.2g} of the energy of the data in the fine bands: blurred, "
            "though they take several steps. Train longer, with less training.noise_share and "
            "more weight for the fine bands (training.band_weights).",
        )


def _relative(band: BandEnergy) -> float:
    """Samples over data."""
    return math.nan if band.samples is None or not band.data else band.samples / band.data


def _memorizing(run: Run) -> Iterator[Finding]:
    """Whether the model learns its cases by heart: if it should not, and if it should."""
    if run.overfit:
        yield from _by_heart(run)
        return
    known = [
        (validation.step, validation.held_out, validation.fitted)
        for validation in run.validations
        if validation.held_out is not None
    ]
    if len(known) < 2:  # one gap may be that between an easy and a difficult case
        return
    (_, first, fitted_first), (step, last, fitted) = known[0], known[-1]
    growth = _ratio(last, fitted) / _ratio(first, fitted_first)
    best, lowest, _ = min(known, key=lambda each: _ratio(each[1], last))
    risen = _ratio(last, lowest)
    if growth > _GAP:
        worse = risen > _RISEN
        yield Finding(
            "problem" if worse else "hint",
            "overfit",
            f"The held-out error over that of training cases grew by {growth - 1:.0%} up to step "
            f"{step}: the model learns its cases by heart. "
            + (
                f"Held out it was best at step {best} and has risen by {risen - 1:.0%} since; "
                f"take {BEST}. "
                if worse
                else "Held out it still improves. "
            )
            + "Add cases, augmentation or simulated cases (--data simulate), or network.dropout.",
        )


def _by_heart(run: Run) -> Iterator[Finding]:
    scores = run.validations[-1].scores if run.validations else []
    if not scores:
        return
    reached = float(np.mean([score.psnr for score in scores]))
    step = run.validations[-1].step
    if reached >= _LEARNT:
        yield Finding(
            "good",
            "overfit",
            f"The network learnt its blocks by heart: {reached:.1f} dB after {step} steps, "
            f"expected {_LEARNT:g}. Data, network and sampling work together.",
        )
    else:
        yield Finding(
            "problem",
            "overfit",
            f"The network did not learn its blocks by heart: {reached:.1f} dB after {step} "
            f"steps, expected {_LEARNT:g}. Try more steps and a higher learning rate; if that "
            "changes nothing, images or settings are wrong, and more cases will not help.",
        )


def _floors(run: Run) -> Iterator[Finding]:
    """Whether samples beat a copy of another image."""
    scores = run.validations[-1].scores if run.validations else []
    rows = [
        (score.psnr - score.floor_psnr, score.ssim - score.floor_ssim)
        for score in scores
        if score.floor_psnr is not None and score.floor_ssim is not None
    ]
    if not rows:
        return
    psnr, ssim = np.mean(rows, axis=0)
    below = sum(gain < 0 for gain, _ in rows)
    allowed = 0.0 if run.one_step else _SAMPLED
    if not psnr >= -allowed:
        yield Finding(
            "problem",
            "floors",
            f"The held-out images are {-psnr:.1f} dB worse than a copy of another sequence "
            f"({below} of {len(rows)} are worse): the model is of no use yet. The causes are "
            "above; if nothing is, train longer.",
        )
    elif psnr < 0:
        yield Finding(
            "hint",
            "floors",
            f"The held-out images are {-psnr:.1f} dB worse than a copy of another sequence. A "
            f"drawn sample loses up to {_SAMPLED:g} dB against the mean of all that fit: compare "
            "with --sampler one-step.",
        )
    elif ssim < 0:
        yield Finding(
            "hint",
            "floors",
            f"The held-out images beat a copy of another sequence in PSNR, by {psnr:.1f} dB, and "
            f"lose in SSIM, by {-ssim:.3f}: less structure. Try training.structure_weight = 0.2.",
        )


def _healthy(run: Run) -> Finding:
    words = [f"No problem found after {_count(run.done, 'step')}"]
    if run.validations:
        last = run.validations[-1]
        kind = "fitted" if last.held_out is None else "held-out"
        words.append(
            f"{kind} error {last.errors[0]:.3g} at t = {last.times[0]} against "
            f"{last.trivial[0]:.3g} of the trivial estimate"
        )
        if last.scores:
            words.append(f"PSNR {np.mean([score.psnr for score in last.scores]):.1f} dB")
    return Finding("good", "run", ", ".join(words) + ".")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


_CHECKS: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    _records,
    _normalization,
    _cases,
    _rate,
    _divergence,
    _steps,
    _average,
    _asked,
    _times,
    _energy,
    _memorizing,
    _floors,
)
