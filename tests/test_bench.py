"""`cwdm bench`: operations and bytes against closed forms, who runs when, and the command."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cwdm import bench as module
from cwdm import engine as engine_module
from cwdm.bench import (
    PARTS,
    Ground,
    Machine,
    Outcome,
    Part,
    Report,
    Row,
    Setup,
    Way,
    Work,
    bench,
    check_comparable,
    circumstances,
    flops,
    parts_of,
    ratios,
    read_report,
    speedups,
    write_report,
)
from cwdm.cli.main import cwdm
from cwdm.config import Config
from cwdm.errors import InputError
from cwdm.machine import multiplies_bf16, resident
from cwdm.model import build_denoiser

RATES = {"fp32": 1e9, "bf16": 4e9, "copy": 2e9}
TINY = Setup(preset="smoke", size=(16, 16, 16), repeats=2, threads=1, device="cpu")


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """A machine of known rates; memory is measured in this process, which does for most tests."""
    patch.setattr(module, "rates", lambda device: RATES)
    patch.setattr(module, "_alone", lambda work, *arguments: work(*arguments))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def everything() -> Report:
    """All parts of a tiny network, once on each path."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        return bench(replace(TINY, repeats=1, reference=True, precision="bf16"))


def ground(**changes: Any) -> Ground:
    setup = replace(TINY, precision="fp32", **changes)
    return Ground(setup, Config.read(setup.preset), Path(), Path(), Path())


def row(name: str = "network", way: Way = "fast", **values: Any) -> Row:
    return Row(name=name, way=way, **{"times": (1.0,), **values})


def report(*rows: Row, **changes: Any) -> Report:
    machine = Machine(
        system="Linux",
        cpu="one",
        cores=2,
        memory_bytes=2**30,
        gpu=None,
        capabilities=("avx2",),
        python="3.11",
        torch="2.9",
        threads=1,
        load=0.0,
        rates=RATES,
    )
    setup = replace(TINY, steps=1, precision="fp32")
    whole = Report(
        cwdm="0", setup=setup, config=Config.read("smoke").as_dict(), machine=machine, rows=rows
    )
    return replace(whole, **changes)


def by_key(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    return {(each.name, each.way): each for each in rows}


def test_operations_are_those_of_every_convolution_and_matrix() -> None:
    """2 per weight and output voxel; the gradient takes twice that, but for what is put in."""
    config = Config.read("smoke")
    network = build_denoiser(config).backbone
    counted: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, given: Any, output: Tensor) -> None:
            assert isinstance(layer.weight, Tensor)
            counted[name] = 2 * layer.weight.numel() * output[0, 0].numel()

        return hook

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv3d | nn.Linear):
            layer.register_forward_hook(count(name))
    with torch.no_grad():
        network(torch.zeros(1, config.in_channels, 8, 4, 12), torch.zeros(1, dtype=torch.long))
    forward = sum(counted.values())
    first = counted["input_blocks.0.0"] + counted["time_embed.0"]
    assert counted["input_blocks.0.0"] == 2 * 27 * 32 * 8 * (8 * 4 * 12)
    assert flops(config, (16, 8, 24)) == forward
    assert flops(config, (16, 8, 24), backward=True) == 3 * forward - first


def test_operations_of_the_published_network() -> None:
    """As counted in the published implementation itself."""
    config = Config.read("cwdm-t2f")
    assert flops(config, (224, 224, 160)) == pytest.approx(7.169e12, rel=1e-4)
    assert flops(config, (64, 64, 64), backward=True) == pytest.approx(0.699e12, rel=1e-3)
    assert flops(Config.read("wdm-brats-128"), (128,) * 3) == pytest.approx(1.051e12, rel=1e-3)


def test_rates_are_of_the_best_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts operations and bytes in place of seconds."""
    seen: list[tuple[int, int]] = []

    class Clock:
        def __init__(self, statement: str, *, globals: dict[str, Tensor], num_threads: int):
            with FlopCounterMode(display=False) as counter:
                result = eval(statement, globals)
            seen.append((counter.get_total_flops(), result.nbytes))
            assert len(globals["a"].unique()) > 1 or globals["b"].ndim == 1

        def blocked_autorange(self, min_run_time: float) -> SimpleNamespace:
            return SimpleNamespace(times=[4.0, 2.0, 3.0])

    monkeypatch.setattr(module, "Timer", Clock)
    monkeypatch.setattr(module, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(module, "_COPY_BYTES", {"cpu": 4096})
    found = module.rates(torch.device("cpu"))
    assert found == {"fp32": 2 * 64**3 / 2, "bf16": 2 * 64**3 / 2, "copy": 2 * 4096 / 2}
    assert seen == [(2 * 64**3, 4 * 64**2), (2 * 64**3, 2 * 64**2), (0, 4096)]


def test_medians_and_quartiles() -> None:
    each = row(times=(5.0, 1.0, 2.0, 4.0, 3.0), cpu_times=(7.0, 9.0, 8.0))
    assert (each.seconds, each.iqr, each.cpu_seconds) == (3.0, 2.0, 8.0)
    assert row().cpu_seconds is None


def test_paths_take_turns_and_the_first_run_does_not_count(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    seconds = {"reference": iter([9.0, 1.0, 3.0, 5.0, 0]), "fast": iter([9.0, 2.0, 2.0, 6.0, 0])}

    def prepare(ground: Ground, way: Way) -> Mapping[str, Work]:
        def run() -> Outcome:
            calls.append(way)
            output = torch.tensor([-8.0, 2.0 if way == "fast" else 1.0])
            took = next(seconds[way])
            return Outcome(output, took, {"inner": took / 4})

        return {"work": Work(run, in_a_run=2, flops=lambda: 10**9, rate="fp32")}

    monkeypatch.setattr(module, "PARTS", {"toy": Part(prepare, ("reference", "fast"))})
    heard: list[tuple[str, int, int]] = []
    found = bench(
        replace(TINY, repeats=3, reference=True),
        progress=lambda name, done, total: heard.append((name, done, total)),
    )
    assert calls[:8] == ["reference", "fast"] * 4  # afterwards once more, for the memory
    rows = by_key(found.rows)
    plain, fast = rows["work", "reference"], rows["work", "fast"]
    assert (plain.times, fast.times) == ((0.5, 1.5, 2.5), (1.0, 1.0, 3.0))
    assert (plain.of_rate, fast.of_rate) == (1e9 / 1.5 / RATES["fp32"], 1e9 / 1.0 / RATES["fp32"])
    assert (plain.error, fast.error) == (None, 1 / 8)
    assert [(each.name, each.wall) for each in ratios(found.rows)] == [("work", 1.5)]
    assert [done for _, done, _ in heard] == list(range(12))
    assert {total for *_, total in heard} == {11}


def test_every_part_has_its_rows(everything: Report) -> None:
    rows = by_key(everything.rows)
    names = {"network", "backward", "synthesis", "training"}
    assert {name for name, way in rows if way == "reference" and ":" not in name} == names
    assert {name for name, way in rows if way == "fast" and ":" not in name} == names | {
        *("python", "import cwdm", "cwdm --help", "encode", "decode", "loading")
    }
    for each in everything.rows:
        assert len(each.times) == 1
        assert min(each.times) > 0
        assert all(seconds >= 0 for seconds in each.cpu_times)
    assert {each.name for each in ratios(everything.rows)} == names


def test_shares_are_of_the_rate_of_their_arithmetic(everything: Report) -> None:
    rows, config = by_key(everything.rows), Config.read("smoke")
    network = "bf16" if multiplies_bf16(torch.device("cpu")) else "fp32"
    for name, fast in (("network", network), ("backward", "bf16"), ("training", "bf16")):
        for way, rate in (("reference", "fp32"), ("fast", fast)):
            each = rows[name, way]
            count = flops(config, (16, 16, 16), backward=name != "network")
            assert (each.flops, each.rate) == (count, rate)
            assert each.of_rate == pytest.approx(count / each.seconds / RATES[rate])
    for name in ("encode", "decode"):
        each = rows[name, "fast"]
        assert each.bytes == 2 * 4 * 16**3  # float32, read and written
        assert each.of_rate == pytest.approx(each.bytes / each.seconds / RATES["copy"])


def test_both_paths_compute_the_same_but_for_their_arithmetic(everything: Report) -> None:
    rows = by_key(everything.rows)
    for name in ("network", "backward", "synthesis"):
        error = rows[name, "fast"].error
        assert error is not None
        assert 1e-5 < error < 0.1, name  # bfloat16 keeps 8 bits
        assert rows[name, "reference"].error is None


def test_a_synthesis_is_measured_where_bfloat16_is_chosen(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(engine_module, "choose_bf16", lambda precision, device: precision != "fp32")
    found = bench(replace(TINY, repeats=1), ["synthesis"])
    assert by_key(found.rows)["synthesis", "fast"].times


def test_stages_add_up_to_the_synthesis(everything: Report) -> None:
    for way in ("reference", "fast"):
        stages = [each for each in everything.rows if each.name.startswith("synthesis: ")]
        stages = [each for each in stages if each.way == way]
        names = [each.name.removeprefix("synthesis: ") for each in stages]
        assert names == ["read", "prepare", "network", "write", "rest"]
        whole = by_key(everything.rows)["synthesis", way]
        assert sum(each.seconds for each in stages) == pytest.approx(whole.seconds)
        assert sum(each.of_whole or 0 for each in stages) == pytest.approx(1)


def test_a_part_works_on_a_case_of_the_user(quick: None, simulated: Path) -> None:
    case = next(simulated.iterdir())
    found = bench(replace(TINY, case=str(case), repeats=1), ["loading", "machine"])
    assert [each.name for each in found.rows] == ["loading"]


def test_another_process_knows_nothing_of_the_memory_of_this_one() -> None:
    ballast = np.ones(400 * 2**20, np.uint8)
    here = resident("VmRSS")
    there = module._alone(resident, "VmHWM")  # type: ignore[arg-type]
    assert here > ballast.nbytes
    assert 50 * 2**20 < there < here - 200 * 2**20  # type: ignore[operator]


def test_peak_memory_is_that_of_the_work() -> None:
    """A transform makes one tensor as large as the image."""
    size = (256, 256, 256)
    before, peak = module._alone(module._memory, "transform", "encode", "fast", ground(size=size))
    assert 4 * 256**3 <= peak - before < 4 * 4 * 256**3


def test_an_old_and_a_new_run() -> None:
    old = report(row(times=(4.0, 6.0), cpu_times=(3.0,)), row("loading"), row(way="reference"))
    new = report(row(times=(2.0,), cpu_times=(1.5,)), row("encode"), row(way="reference"))
    found = [tuple(each) for each in speedups(old, new)]
    assert found == [("network", "fast", 2.5, 2.0), ("network", "reference", 1.0, None)]


def test_what_was_written_is_read(tmp_path: Path, everything: Report) -> None:
    path = tmp_path / "run.json"
    write_report(everything, path)
    assert read_report(path) == everything
    written = json.loads(path.read_text())
    for each, known in zip(written["rows"], everything.rows, strict=True):
        assert (each["seconds"], each["iqr"]) == (known.seconds, known.iqr)
    assert written["machine"]["torch"] == torch.__version__
    assert written["setup"]["precision"] == "bf16"
    with pytest.raises(InputError, match="already exists"):
        write_report(everything, path)


@pytest.mark.parametrize("text", ["", "{}", '{"rows": []}', "[1]"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"other\.json: other contents, expected JSON of cwdm"):
        read_report(path)
    with pytest.raises(InputError, match="No such file"):
        read_report(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (32, 16, 16)}, "size 16,16,16 there, 32,16,16 here"),
        ({"case": "mine"}, "case None there, mine here"),
        ({"steps": 5}, "steps 1 there, 5 here"),
        ({"preset": "small-t2f"}, "preset smoke there, small-t2f with other settings here"),
    ],
)
def test_other_work_is_not_compared(changes: dict[str, Any], words: str) -> None:
    old = report()
    check_comparable(old, Path("old.json"), replace(TINY, repeats=9, reference=True))
    with pytest.raises(InputError, match=rf"^old\.json: measured other work.*: {words}$"):
        check_comparable(old, Path("old.json"), replace(TINY, **changes))


def test_other_circumstances_are_named() -> None:
    old = report()
    new = replace(old, machine=replace(old.machine, cpu="two", load=3.0, rates={"copy": 1.0}))
    new = replace(new, setup=replace(new.setup, precision="bf16", repeats=7))
    assert circumstances(old, old) == []
    found = ["cpu: one there, two here", "precision: fp32 there, bf16 here"]
    assert circumstances(old, new) == found


def test_a_model_has_the_parts_it_can_do() -> None:
    assert parts_of(Config.read("small-any")) == list(PARTS)
    assert set(PARTS) - set(parts_of(Config.read("small-brain"))) == {"synthesis"}
    lacking = {"synthesis", "training", "loading"}
    assert set(PARTS) - set(parts_of(Config.read("wdm-lidc-128"))) == lacking
    with pytest.raises(InputError, match=r"^small-brain has no part 'synthesis', expected"):
        bench(Setup(preset="small-brain"), ["synthesis"])


def test_a_thousand_steps_are_ten() -> None:
    assert module._resolved(Setup(preset="cwdm-t2f")).steps == 10
    assert module._resolved(Setup(preset="cwdm-t2f", steps=20)).steps == 20
    assert module._resolved(Setup(preset="small-t2f")).steps == 1


@pytest.fixture
def run(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--preset", "smoke", "--size", "16", "--repeats", "2", "--threads", "1"]
    return lambda *more: CliRunner().invoke(cwdm, [*words, *more])


def test_the_command_prints_a_table_and_compares(run: Callable[..., Result]) -> None:
    first = run("network", "--reference", "--output", "first.json")
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert lines[0].startswith("smoke, 16 x 16 x 16 voxels, cwdm ")
    assert "matrix product fp32          1.0 GFLOP/s" in lines
    end = lines.index("", lines.index("") + 1)
    head, *table = lines[lines.index("") + 1 : end]
    at = head.index("median s") + len("median s")  # numbers stand below the ends of their heads
    shown = {line.split()[1]: line[:at].split()[-1] for line in table}
    known = read_report(Path("first.json"))
    for way in ("reference", "fast"):
        seconds = by_key(known.rows)["network", way].seconds
        assert float(shown[way]) == pytest.approx(seconds, rel=0.01)
    assert lines[end + 1].startswith("times as fast, fast against reference")
    (expected,) = ratios(known.rows)
    assert lines[end + 2].split()[:3] == ["network", "fast", f"{expected.wall:.2f}"]

    second = run("network", "transform", "--against", "first.json")
    assert second.exit_code == 0, second.output
    head, *table = second.stdout.splitlines()[-2:]
    assert head.startswith("times as fast, this run against first.json")
    assert [line.split()[:2] for line in table] == [["network", "fast"]]


def test_only_the_machine(run: Callable[..., Result]) -> None:
    result = run("machine")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].split() == ["copy", "2.0", "GB/s"]


def test_a_busy_machine_is_named(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 0.0, 0.0))
    assert "note: the machine was busy before (load 1.5)" in run("machine").stderr
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 9.0, 9.0))
    assert run("machine").stderr == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nets"], "smoke has no part 'nets', expected machine, import, transform, network"),
        (["--size", "17"], "size 17,17,17: expected multiples of 4 for smoke"),
        (["--size", "big"], "'big' is not a size"),
        (["--preset", "none"], "none: no such file or preset"),
        (["--case", "nowhere", "loading"], "nowhere"),
        (["--case", "nowhere", "network"], "nowhere: No such file or directory, expected a readab"),
        (["--against", "none.json"], "none.json: No such file or directory, expected JSON"),
        (["--output", "there.json"], "there.json: already exists"),
        (["--device", "cuda:99"], "device cuda:99: found"),
        (["--repeats", "0"], "0 is not in the range"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run: Callable[..., Result], words: list[str], line: str
) -> None:
    Path("there.json").touch()
    result = run(*words)
    assert result.exit_code == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
