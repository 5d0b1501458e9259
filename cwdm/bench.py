"""How fast the parts of cwdm are here, beside the plain path and beside what the machine can do.

Two paths compute the same. ``reference`` is the network as published: eager, float32, contiguous.
``fast`` is what cwdm does unless told otherwise. They take turns in one process, so that whatever
else the machine does meets both, and their ratio means something. Peak memory is measured by
itself, in a new process for each figure.
"""

import inspect
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from cProfile import Profile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError, computed_field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.common import set_torch_threads
from torch.utils.benchmark.utils.timer import timer  # waits for a GPU
from torch.utils.flop_counter import FlopCounterMode

from cwdm import __version__
from cwdm.case import read_case
from cwdm.checkpoints import assumed_priors
from cwdm.config import Augmentation, Config
from cwdm.denoiser import Denoiser
from cwdm.engine import Engine
from cwdm.errors import InputError
from cwdm.files import atomic_write
from cwdm.machine import Precision, capacity, choose_bf16, choose_device, cores, resident
from cwdm.modality import Modality
from cwdm.model import Model, build_denoiser
from cwdm.preparation import prepare
from cwdm.synthesis import Synthesis, Synthesizer
from cwdm.volume import read_volumes

if TYPE_CHECKING:
    from cwdm.dataset import Source

# What trains and simulates is imported where it is used, so that it does not count as memory of
# what does neither.

__all__ = [
    "PARTS",
    "Machine",
    "Ratio",
    "Report",
    "Row",
    "Setup",
    "bench",
    "check_comparable",
    "circumstances",
    "flops",
    "parts_of",
    "ratios",
    "read_report",
    "speedups",
    "write_report",
]

Way = Literal["fast", "reference"]
Size = tuple[int, int, int]

_MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows of the square matrices whose product is timed."""
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Of the copy that is timed: more than caches hold."""
_STEPS = 10
"""Of a synthesis at most, if not told otherwise: a thousand would be timed for hours."""
_SAMPLES = 8
"""Training samples that are timed together, as augmentation makes some of them dearer."""
_HEAD_MM = (160, 190, 160)
"""A simulated brain lies within."""
_ENDLESS = 10**9
"""Steps that no run gets to."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and how."""

    preset: str = "small-t2f"
    """Or a TOML file; the weights are random."""
    size: Size = (96, 96, 96)
    """Voxels: of the network's and the transform's images, of the block that is trained on, and of
    the whole grid of a simulated case."""
    case: str | None = None
    """Folder of a case to synthesize and train on, instead of a simulated one."""
    steps: int | tuple[int, ...] | None = None
    """Of a synthesis; the model's own, if they are not more than ten."""
    device: str = "auto"
    precision: Precision = "auto"
    """Of the fast path; the reference is float32."""
    compiled: bool | None = None
    """Compile what lies between the convolutions of synthesis, by default as for a chain of all
    steps; and the whole network in training, by default not."""
    threads: int = 0
    """0 for as many as torch takes by itself."""
    repeats: int = 5
    reference: bool = False
    """Measure the plain path as well, in turn with the fast one."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured."""

    system: str
    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    gpu: str | None
    capabilities: tuple[str, ...]
    """Of the processor, for matrices and long vectors."""
    python: str
    torch: str
    threads: int
    load: float
    """Processes that wanted to run in the minute before."""
    rates: Mapping[str, float]
    """FLOP/s of a matrix product in fp32, tf32, bf16; bytes/s read and written by a copy."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One piece of work on one path."""

    name: str
    way: Way
    times: tuple[float, ...]
    """Seconds of every run."""
    cpu_times: tuple[float, ...] = ()
    """Seconds of all threads and child processes together."""
    before_bytes: int | None = None
    """Memory held when the work begins, with modules and weights."""
    peak_bytes: int | None = None
    """The most that was held until it had ended."""
    flops: int | None = None
    """Of the network in its published structure, 2 per multiply-add, however it is computed."""
    bytes: int | None = None
    """Read and written at least: every input and output once."""
    of_rate: float | None = None
    """Achieved FLOP/s or bytes/s as a share of the machine's rate."""
    rate: str | None = None
    """Which rate that is, a key of ``Machine.rates``."""
    of_whole: float | None = None
    """Share of the work that this is a stage of."""
    error: float | None = None
    """max |fast - reference| / max |reference| of what both computed."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        """Median."""
        return median(self.times)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def iqr(self) -> float:
        """Between the quartiles of the seconds."""
        low, high = np.quantile(self.times, [0.25, 0.75])
        return float(high - low)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cpu_seconds(self) -> float | None:
        """Median."""
        return median(self.cpu_times) if self.cpu_times else None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that one run measured."""

    cwdm: str
    setup: Setup
    config: Mapping[str, Any]
    """What the preset held."""
    machine: Machine
    rows: tuple[Row, ...]


_REPORT = TypeAdapter(Report)


class Ratio(NamedTuple):
    """How many times as fast."""

    name: str
    way: Way
    wall: float
    cpu: float | None


def ratios(rows: Iterable[Row]) -> list[Ratio]:
    """The fast path against the reference, for all that was measured on both; without stages."""
    rows = [row for row in rows if row.of_whole is None]
    plain = {row.name: row for row in rows if row.way == "reference"}
    return [_ratio(plain[row.name], row) for row in rows if row.way == "fast" and row.name in plain]


def speedups(old: Report, new: Report) -> list[Ratio]:
    """The new run against the old one, for all that was measured in both."""
    before = {(row.name, row.way): row for row in old.rows}
    return [
        _ratio(before[row.name, row.way], row) for row in new.rows if (row.name, row.way) in before
    ]


def _ratio(before: Row, after: Row) -> Ratio:
    cpu = None
    if before.cpu_seconds and after.cpu_seconds:
        cpu = before.cpu_seconds / after.cpu_seconds
    return Ratio(after.name, after.way, before.seconds / after.seconds, cpu)


def read_report(path: Path) -> Report:
    """What ``write_report`` wrote; InputError if it is something else."""
    try:
        return _REPORT.validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "other contents"
        raise InputError(f"{path}: {reason}, expected JSON of cwdm bench") from None


def write_report(report: Report, path: Path, *, overwrite: bool = False) -> None:
    """As JSON; InputError as ``atomic_write``."""
    with atomic_write(path, overwrite) as temporary:
        temporary.write_bytes(_REPORT.dump_json(report, indent=2) + b"\n")


def check_comparable(old: Report, path: Path, setup: Setup) -> None:
    """InputError that names what is to be measured otherwise than in an old report at ``path``."""
    new = _resolved(setup)
    pairs = {key: (getattr(old.setup, key), getattr(new, key)) for key in ("size", "case", "steps")}
    found = [f"{key} {_word(a)} there, {_word(b)} here" for key, (a, b) in pairs.items() if a != b]
    if Config.parse(old.config, str(path)) != Config.read(new.preset):
        found.append(f"preset {old.setup.preset} there, {new.preset} with other settings here")
    if found:
        raise InputError(f"{path}: measured other work, expected the same: {'; '.join(found)}")


def _word(value: object) -> str:
    """As it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def circumstances(old: Report, new: Report) -> list[str]:
    """What else differs between two runs, so that not all of a ratio is due to cwdm."""
    keys = ("system", "cpu", "cores", "gpu", "python", "torch", "threads")
    pairs = {key: (getattr(old.machine, key), getattr(new.machine, key)) for key in keys}
    for key in ("device", "precision"):
        pairs[key] = (getattr(old.setup, key), getattr(new.setup, key))
    return [f"{key}: {a} there, {b} here" for key, (a, b) in pairs.items() if a != b]


class Ground(NamedTuple):
    """What the parts work on; it can be sent to another process."""

    setup: Setup
    config: Config
    folder: Path
    """For files that go when all is done."""
    case: Path
    """Folder of a case, if a part needs it."""
    cache: Path
    """The same case, packed for training, if a part needs that."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.setup.device)


class Outcome(NamedTuple):
    """What a run left behind."""

    output: Tensor | None = None
    """To compare the paths by."""
    seconds: float | None = None
    """Of the work itself, where the run does something else as well."""
    stages: Mapping[str, float] | None = None
    """Seconds of parts of the work."""


class Work(NamedTuple):
    """What is timed."""

    run: Callable[[], Outcome]
    in_a_run: int = 1
    """How many times a run does it."""
    flops: Callable[[], int] | None = None
    """Counted later, as that takes memory."""
    bytes: int | None = None
    rate: str | None = None
    """Of the machine, to compare it with."""
    here: bool = True
    """Whether it computes in this process, so that its memory can be measured."""


class Part(NamedTuple):
    """Pieces of work that are measured together."""

    prepare: Callable[[Ground, Way], Mapping[str, Work]]
    ways: tuple[Way, ...] = ("fast",)
    """Paths that differ."""
    needs: Literal["nothing", "case", "cache"] = "nothing"


def bench(
    setup: Setup,
    parts: Sequence[str] = (),
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure the machine's rates, then parts of cwdm, by default all that the preset has.

    Args:
        parts: names in ``PARTS``; "machine" for nothing but its rates.
        progress: called with what comes next, and with how much is done of how much.

    Raises:
        InputError: no such preset, or it does not have that part; a size that the network cannot
            take; a case that cannot be read or lacks an image; too little memory.
    """
    setup = _resolved(setup)
    config = Config.read(setup.preset)
    chosen = _chosen(parts, config)
    if any(n < 1 or n % config.multiple for n in setup.size):
        raise InputError(
            f"size {_word(setup.size)}: expected multiples of {config.multiple} for {config.name}"
        )
    load = os.getloadavg()[0]  # of others: we have not begun
    todo = {
        name: [way for way in PARTS[name].ways if setup.reference or way == "fast"]
        for name in chosen
    }
    total = 1 + sum((setup.repeats + 2) * len(ways) for ways in todo.values())
    done = 0

    def tick(name: str) -> None:
        nonlocal done
        if progress:
            progress(name, done, total)
        done += 1

    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="cwdm-bench-", ignore_cleanup_errors=True) as folder,
        set_torch_threads(setup.threads),
    ):
        tick("machine")
        machine = _machine(setup, load)
        ground = _ground(setup, config, Path(folder), {PARTS[name].needs for name in chosen})
        for name, ways in todo.items():
            rows += _measure(name, ways, ground, machine, tick)
        tick("")
    return Report(
        cwdm=__version__, setup=setup, config=config.as_dict(), machine=machine, rows=tuple(rows)
    )


def parts_of(config: Config) -> list[str]:
    """Names of the parts that a configuration has: not every model synthesizes, or is trained."""
    absent = set() if config.conditional else {"synthesis"}
    if config.conditioning == "inpainting" or Modality.CT in config.targets:
        absent |= {"training", "loading"}
    return [name for name in PARTS if name not in absent]


def flops(config: Config, size: Size, *, backward: bool = False) -> int:
    """Of one evaluation of the network for an image (X, Y, Z); with ``backward`` also of the
    gradient of its weights."""
    nowhere = torch.device("meta")
    with nowhere:
        denoiser = build_denoiser(config)
    with FlopCounterMode(display=False) as counter:
        output: Tensor = denoiser(*_inputs(config, size, nowhere))
        if backward:
            output.square().mean().backward()
    return int(counter.get_total_flops())


def rates(device: torch.device) -> dict[str, float]:
    """The best of a device: FLOP/s of a matrix product by type, bytes/s that a copy reads and
    writes."""

    def seconds(statement: str, a: Tensor, b: Tensor) -> float:
        clock = Timer(statement, globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
        return min(clock.blocked_autorange(min_run_time=0.5).times)

    def product(dtype: torch.dtype) -> float:
        n = _MATRIX[device.type]
        a = torch.randn(n, n, device=device).to(dtype)  # equal numbers are multiplied faster
        return 2 * n**3 / seconds("a @ b", a, a.clone())

    found = {"fp32": product(torch.float32), "bf16": product(torch.bfloat16)}
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32"] = product(torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = before
    a = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    found["copy"] = 2 * a.nbytes / seconds("b.copy_(a)", a, torch.zeros_like(a))
    return found


def _engine(ground: Ground, way: Way) -> Engine:
    """An untrained model on a path. This and ``_trainable`` alone know what the paths are."""
    config = ground.config
    denoiser = _random(config).eval().requires_grad_(False)
    model = Model(config, denoiser, assumed_priors(config), Path(config.name), sha256="")
    setup = ground.setup
    return Engine(
        model,
        device=setup.device,
        precision=setup.precision,
        compiled=setup.compiled,
        reference=way == "reference",
    )


def _trainable(ground: Ground, way: Way) -> tuple[Denoiser, nn.Module, bool]:
    """An untrained network as it is trained on a path: with its gradients, as it is called, and
    whether it computes in bfloat16."""
    from cwdm.train import trainable

    denoiser = _random(ground.config)
    if way == "reference":
        denoiser.to(ground.device)
        return denoiser, denoiser, False
    bf16, compiled = ground.setup.precision == "bf16", bool(ground.setup.compiled)
    dtype = torch.bfloat16 if bf16 else torch.float32
    denoiser = trainable(denoiser, ground.device, dtype, compiled=compiled)
    called = torch.compile(denoiser) if compiled else denoiser
    return denoiser, cast(nn.Module, called), bf16


def _random(config: Config) -> Denoiser:
    """The network with the same random weights each time, and no layer at zero, as new ones have:
    the paths could not be told apart by their outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(config)
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv3d) and not module.weight.any():
                module.reset_parameters()
    return denoiser


def _inputs(
    config: Config, size: Size, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the network gets for one image (X, Y, Z): x_t, times, conditions, label."""
    factor, channels = config.transform.factor, config.transform.channels
    shape = [n // factor for n in size]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_channels, *shape, generator=generator).to(device)
    t = torch.full((1,), config.process.steps // 2, device=device)
    cond = x[:, channels:] if config.in_channels > channels else None
    return x[:, :channels], t, cond, t * 0 if len(config.targets) > 1 else None


def _arithmetic(bf16: bool, device: torch.device) -> str:
    """The rate that bounds convolutions."""
    if bf16:
        return "bf16"
    return "tf32" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"


def _network(ground: Ground, way: Way) -> dict[str, Work]:
    engine, size = _engine(ground, way), ground.setup.size
    engine.prepare(replace(engine.settings(), steps=ground.config.process.steps))
    inputs = _inputs(ground.config, size, engine.device)

    @torch.inference_mode()
    def forward() -> Outcome:
        return Outcome(engine.denoiser(*inputs))

    rate = _arithmetic(engine.arithmetic is torch.bfloat16, engine.device)
    return {"network": Work(forward, flops=partial(flops, ground.config, size), rate=rate)}


def _backward(ground: Ground, way: Way) -> dict[str, Work]:
    denoiser, network, bf16 = _trainable(ground, way)
    size, device = ground.setup.size, ground.device
    inputs = _inputs(ground.config, size, device)
    weight = next(denoiser.parameters())

    def step() -> Outcome:
        denoiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output: Tensor = network(*inputs)
        output.float().square().mean().backward()
        return Outcome(weight.grad)

    count = partial(flops, ground.config, size, backward=True)
    return {"backward": Work(step, flops=count, rate=_arithmetic(bf16, device))}


def _transform(ground: Ground, way: Way) -> dict[str, Work]:
    transform, device = ground.config.transform, ground.device
    image = torch.rand(1, 1, *ground.setup.size, generator=torch.Generator().manual_seed(0))
    image = image.to(device)
    coefficients = transform.encode(image)
    traffic = image.nbytes + coefficients.nbytes
    return {
        "encode": Work(lambda: Outcome(transform.encode(image)), bytes=traffic, rate="copy"),
        "decode": Work(lambda: Outcome(transform.decode(coefficients)), bytes=traffic, rate="copy"),
    }


def _import(ground: Ground, way: Way) -> dict[str, Work]:
    def work(*words: str) -> Work:
        def run() -> Outcome:
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            return Outcome()

        return Work(run, here=False)

    return {
        "python": work("-c", "pass"),
        "import cwdm": work("-c", "import cwdm"),
        "cwdm --help": work("-m", "cwdm.cli", "--help"),
    }


def _synthesis(ground: Ground, way: Way) -> dict[str, Work]:
    engine = _engine(ground, way)
    synthesizer = Synthesizer(engine.model, engine=engine)
    case, output = read_case(ground.case), ground.folder / way
    stages: dict[str, Callable[..., Any]] = {
        "read": read_volumes,
        "prepare": prepare,
        "network": Engine.run,
        "write": Synthesis.write,
    }

    def run() -> Outcome:
        with Profile(builtins=False) as profile:
            synthesis = synthesizer(case, steps=ground.setup.steps)
            synthesis.write(output, overwrite=True)
        spent = {entry.code: entry.totaltime for entry in profile.getstats()}
        parts = {name: spent[inspect.unwrap(each).__code__] for name, each in stages.items()}
        return Outcome(torch.from_numpy(synthesis.volume.voxels), stages=parts)

    return {"synthesis": Work(run)}


def _training(ground: Ground, way: Way) -> dict[str, Work]:
    from cwdm.train import train

    setup, device = ground.setup, ground.device
    settings = replace(
        ground.config.training,
        iterations=_ENDLESS,
        checkpoint_every=_ENDLESS,
        validate_every=_ENDLESS,
        patch=setup.size,
        batch=1,
        accumulation=1,
        augmentation=Augmentation(),
    )
    precision: Precision = "fp32" if way == "reference" else setup.precision
    steps = train(
        replace(ground.config, training=settings),
        _sources(ground),
        Path(tempfile.mkdtemp(dir=ground.folder)),
        device=setup.device,
        precision=precision,
        compiled=way == "fast" and bool(setup.compiled),
        workers=0,
    )
    count = partial(flops, ground.config, setup.size, backward=True)
    rate = _arithmetic(precision == "bf16", device)
    return {"training": Work(lambda: Outcome(seconds=next(steps).seconds), flops=count, rate=rate)}


def _loading(ground: Ground, way: Way) -> dict[str, Work]:
    from cwdm.dataset import TrainingData

    settings = replace(ground.config.training, patch=ground.setup.size)
    data = TrainingData(_sources(ground), replace(ground.config, training=settings))

    def run() -> Outcome:
        for step in range(_SAMPLES):  # the same ones in every run
            data[step, 0]
        return Outcome()

    return {"loading": Work(run, in_a_run=_SAMPLES)}


BOTH: tuple[Way, ...] = ("reference", "fast")

PARTS = {
    "import": Part(_import),
    "transform": Part(_transform),
    "network": Part(_network, BOTH),
    "backward": Part(_backward, BOTH),
    "synthesis": Part(_synthesis, BOTH, "case"),
    "training": Part(_training, BOTH, "cache"),
    "loading": Part(_loading, needs="cache"),
}
"""Name -> what it measures."""


def _measure(
    name: str, ways: Sequence[Way], ground: Ground, machine: Machine, tick: Callable[[str], None]
) -> list[Row]:
    """The rows of a part: its paths in turn, then the memory of each in a process of its own."""
    works = {way: PARTS[name].prepare(ground, way) for way in ways}
    runs: dict[tuple[Way, str], list[_Run]] = defaultdict(list)
    for _ in range(1 + ground.setup.repeats):
        for way in ways:
            tick(f"{name}, {way}")
            for piece, work in works[way].items():
                so_far = runs[way, piece]
                so_far.append(_run(work, keep=not so_far))
    rows = []
    for way, pieces in works.items():
        tick(f"{name}, {way}, memory")
        for piece, work in pieces.items():
            first, *rest = runs[way, piece]  # in the first, libraries choose their kernels
            row = _row(piece, way, work, rest, machine)
            truth = runs["reference", piece][0].output if "reference" in ways else None
            if way == "fast" and first.output is not None and truth is not None:
                row = replace(row, error=_error(first.output, truth))
            if work.here:
                before, peak = _alone(_memory, name, piece, way, ground)
                row = replace(row, before_bytes=before, peak_bytes=peak)
            rows += [row, *_stages(row, rest)]
    return rows


class _Run(NamedTuple):
    seconds: float
    cpu_seconds: float
    stages: Mapping[str, float]
    output: Tensor | None


def _run(work: Work, *, keep: bool) -> _Run:
    """Do it once. Outputs are only kept where wanted: they may be large."""
    cpu, began = _cpu_seconds(), timer()
    outcome = work.run()
    wall, cpu = timer() - began, _cpu_seconds() - cpu
    seconds = wall if outcome.seconds is None else outcome.seconds
    output = outcome.output if keep else None
    return _Run(seconds / work.in_a_run, cpu / work.in_a_run, outcome.stages or {}, output)


def _row(name: str, way: Way, work: Work, runs: Sequence[_Run], machine: Machine) -> Row:
    row = Row(
        name=name,
        way=way,
        times=tuple(run.seconds for run in runs),
        cpu_times=tuple(run.cpu_seconds for run in runs),
        flops=work.flops and work.flops(),
        bytes=work.bytes,
        rate=work.rate,
    )
    if not row.rate:
        return row
    amount = row.flops or row.bytes or 0
    return replace(row, of_rate=amount / row.seconds / machine.rates[row.rate])


def _stages(whole: Row, runs: Sequence[_Run]) -> list[Row]:
    """A row for each stage of a work, and one for the rest of it."""
    rows = []
    for name in (*runs[0].stages, "rest") if runs[0].stages else ():
        times = tuple(
            run.stages[name] if name != "rest" else run.seconds - sum(run.stages.values())
            for run in runs
        )
        row = Row(name=f"{whole.name}: {name}", way=whole.way, times=times)
        rows.append(replace(row, of_whole=row.seconds / whole.seconds))
    return rows


def _error(output: Tensor, truth: Tensor) -> float:
    """max |output - truth| / max |truth|."""
    return float((output.float() - truth).abs().max() / truth.abs().max())


def _memory(name: str, piece: str, way: Way, ground: Ground) -> tuple[int, int]:
    """Bytes held before a work begins, and at most until it has ended; of a GPU, its own."""
    with set_torch_threads(ground.setup.threads):
        work = PARTS[name].prepare(ground, way)[piece]
        before = resident("VmRSS")
        if ground.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ground.device)
            before = torch.cuda.memory_allocated(ground.device)
        work.run()
    if ground.device.type == "cuda":
        return before, torch.cuda.max_memory_allocated(ground.device)
    return before, resident("VmHWM")


def _alone(work: Callable[..., tuple[int, int]], *arguments: object) -> tuple[int, int]:
    """The result of a function that is called in a new process, which forgets all of this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            raise InputError(
                "a process was killed, perhaps for memory, expected a smaller size"
            ) from None


def _cpu_seconds() -> float:
    """Of all threads so far, and of child processes that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _resolved(setup: Setup) -> Setup:
    """With what will really be used in the place of what was left open."""
    config = Config.read(setup.preset)
    device = choose_device(setup.device)
    steps = setup.steps
    if steps is None:
        times = config.process.timesteps(config.sampling.steps, config.sampling.spacing)
        steps = config.sampling.steps if len(times) <= _STEPS + 1 else _STEPS
    return replace(
        setup,
        steps=steps,
        device=str(device),
        precision="bf16" if choose_bf16(setup.precision, device) else "fp32",
        threads=setup.threads or torch.get_num_threads(),
    )


def _chosen(parts: Sequence[str], config: Config) -> list[str]:
    """Parts in their order; InputError for one that there is not."""
    possible = parts_of(config)
    for name in parts:
        if name not in ("machine", *possible):
            raise InputError(
                f"{config.name} has no part {name!r}, expected machine, {', '.join(possible)}"
            )
    return [name for name in possible if not parts or name in parts]


def _machine(setup: Setup, load: float) -> Machine:
    device = choose_device(setup.device)
    # since torch 2.9; before, only the name of the architecture is known
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    telling = [name for name, there in about.items() if there is True]
    return Machine(
        system=platform.platform(),
        cpu=about.get("cpu_name") or platform.processor() or platform.machine(),
        cores=cores(),
        memory_bytes=capacity(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        capabilities=tuple(sorted(n for n in telling if n.startswith(("amx", "avx", "sve")))),
        python=platform.python_version(),
        torch=torch.__version__,
        threads=setup.threads,
        load=load,
        rates=rates(device),
    )


def _ground(setup: Setup, config: Config, folder: Path, needs: set[str]) -> Ground:
    """With a case and a cache, where they are needed."""
    ground = Ground(setup, config, folder, Path(setup.case or folder), folder / "cache")
    if needs & {"case", "cache"} and not setup.case:
        from cwdm.anatomy import mni152
        from cwdm.simulate import simulate, write_case

        spacing = max(mm / n for mm, n in zip(_HEAD_MM, setup.size, strict=True))
        simulated = simulate(0, 0, mni152(), shape=setup.size, spacing=spacing)
        config = replace(config, images=replace(config.images, spacing_mm=spacing))
        ground = ground._replace(config=config, case=write_case(simulated, folder))
    if "cache" in needs:
        from cwdm.cache import fill
        from cwdm.checks import Kind
        from cwdm.layouts import Found

        case, anything = read_case(ground.case), frozenset(get_args(Kind))
        for report in fill(Found([case], []), ground.cache, accept=anything):
            if report.status == "left out":
                raise InputError(f"{ground.case}: {report.problems[0]}")
    return ground


def _sources(ground: Ground) -> "list[Source]":
    from cwdm.cache import open_cache
    from cwdm.dataset import Source

    return [Source("bench", open_cache(ground.cache))]
