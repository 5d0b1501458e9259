"""Every case of a cohort is done once, whatever dies meanwhile, and nothing else is touched."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cwdm import executors
from cwdm.case import Case
from cwdm.cohort import Tally, due, run
from cwdm.errors import InputError
from cwdm.executors import Local, Ray, Slurm
from cwdm.layouts import Found, Problem, find
from cwdm.ledger import Ledger
from cwdm.modality import Modality
from tests.copying import Copying

SCRIPT = Path(__file__).with_name("copying.py")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Six cases of two images, which hold their names."""
    for number in range(6):
        for ending in ("t1n", "t2w"):
            path = tmp_path / f"cohort/c{number}/c{number}-{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
    return tmp_path / "cohort"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begun(output: Path) -> Counter[str]:
    log = Path(f"{output}.log")
    return Counter(log.read_text().split() if log.exists() else [])


def copy(cohort: Path, output: Path, **values: Any) -> dict[str, Any]:
    """Run the job here; state and message by case."""
    table = run(Copying(log=f"{output}.log", **values), find(cohort), output, Local(1, "cpu"))
    return dict(zip(table["case"], zip(table["state"], table["message"], strict=True), strict=True))


def states(cohort: Path, output: Path, **values: Any) -> Counter[str]:
    return Counter(state for state, _ in copy(cohort, output, **values).values())


def start(cohort: Path, output: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), str(cohort), str(output), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
    )


def script(cohort: Path, output: Path, *words: str) -> list[dict[str, Any]]:
    process = start(cohort, output, *words)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    rows: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return rows


def finished(output: Path) -> set[str]:
    """The cases that count as done, whether the one who waits for them knows it or not."""
    place = output / ".cwdm"
    names = {
        path.stem
        for path in place.glob("copy/outcomes/*.json")
        if not path.name.startswith(".") and '"done"' in path.read_text()
    }
    if (place / "ledger.sqlite").exists():
        ledger = Ledger(place / "ledger.sqlite", "copy")
        names |= {entry.case for entry in ledger.entries() if entry.state == "done"}
        ledger.close()
    return names


def files(folder: Path) -> dict[str, str]:
    """Everything in a folder but what runs keep there for themselves."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cwdm" not in path.parts
    }


# --- what is due


def test_every_case_is_done_and_then_left_alone(cohort: Path, output: Path) -> None:
    assert states(cohort, output) == {"done": 6}
    made = files(output)
    assert made.pop("copy.csv").count("\n") == 7
    assert made == {name: f"{Path(name).name} 0" for name in files(cohort)}
    before = {path: path.stat() for path in output.glob("c?/*")}
    assert states(cohort, output) == {"unchanged": 6}
    assert {path: path.stat() for path in output.glob("c?/*")} == before
    assert set(begun(output).values()) == {1}
    assert not list((output / ".cwdm/copy/staging").glob("*/*"))
    assert not list((output / ".cwdm/copy/outcomes").glob("*"))


def test_what_a_killed_run_had_begun_to_write_is_cleared_away(cohort: Path, output: Path) -> None:
    copy(cohort, output)
    places = (output, output / ".cwdm", output / ".cwdm/copy", output / ".cwdm/copy/outcomes")
    for place in places:
        (place / ".cwdm-0123456789abcdef").touch()
    assert states(cohort, output) == {"unchanged": 6}
    assert not [path for path in output.rglob("*") if path.name.startswith(".cwdm-")]


def test_what_changed_is_done_again(cohort: Path, output: Path) -> None:
    copy(cohort, output)
    (cohort / "c0/c0-t1n.nii.gz").write_text("new")  # another content
    os.utime(cohort / "c1/c1-t1n.nii.gz", (1, 1))  # another time, the same content
    (output / "c2/c2-t2w.nii.gz").unlink()  # a result that is gone
    (cohort / "c3/c3-t1c.nii.gz").write_text("one more")
    (output / "c4/c4-t2w.nii.gz").unlink()
    os.link(output / "c4/c4-t1n.nii.gz", output / "c4/c4-t2w.nii.gz")  # a link to something else
    job = Copying(log="")
    assert [case.id for case in due(job, find(cohort).cases, output)] == ["c0", "c2", "c3", "c4"]
    assert states(cohort, output) == {"done": 4, "unchanged": 2}
    assert begun(output) == {"c0": 2, "c1": 1, "c2": 2, "c3": 2, "c4": 2, "c5": 1}
    assert (output / "c0/c0-t1n.nii.gz").read_text() == "new 0"
    assert (output / "c4/c4-t2w.nii.gz").read_text() == "c4-t2w.nii.gz 0"
    assert states(cohort, output, setting=1) == {"done": 6}
    assert (output / "c4/c4-t2w.nii.gz").read_text() == "c4-t2w.nii.gz 1"


def test_what_is_no_longer_in_the_input_stays_in_the_output(cohort: Path, output: Path) -> None:
    """It may be the last copy of a patient's image."""
    copy(cohort, output)
    (cohort / "c0/c0-t1n.nii.gz").unlink()
    assert states(cohort, output) == {"done": 1, "unchanged": 5}
    assert len(list((output / "c0").iterdir())) == 2
    (cohort / "c0/c0-t2w.nii.gz").write_text("new")
    told = copy(cohort, output)
    assert told["c0"] == ("done", "")  # nothing of it is lost any more
    for path in (cohort / "c1").iterdir():
        path.unlink()
    (cohort / "c1").rmdir()
    states(cohort, output)
    assert len(list((output / "c1").iterdir())) == 2


def test_what_somebody_changed_in_the_output_stays(cohort: Path, output: Path) -> None:
    copy(cohort, output)
    touched = output / "c4/c4-t2w.nii.gz"
    touched.write_text("touched")
    told = copy(cohort, output)
    assert told["c4"][1].startswith(f"{touched}: found what cwdm cannot make again")
    assert touched.read_text() == "touched"


@pytest.mark.parametrize("name", ["c4/c4-t1n.nii.gz", "c4/c4.json"])
def test_what_lies_beside_a_changed_result_stays_too(
    cohort: Path, output: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changed one needs the others; who wrote it first counts less."""
    monkeypatch.setattr("cwdm.cohort.is_result", lambda path: True)
    (cohort / "c4/c4.json").write_text("a record")
    images = {Modality.T1N: cohort / "c4/c4-t1n.nii.gz", Modality.T2W: cohort / "c4/c4.json"}
    found = Found([Case("c4", images)], [])

    def again(**values: Any) -> Any:
        job = Copying(f"{output}.log", **values)
        (row,) = run(job, found, output, Local(1, "cpu")).to_dict("records")
        return row

    assert again()["state"] == "done"
    (output / name).write_text("by hand")
    before = files(output / "c4")
    told = again(setting=1)
    assert told["state"] == "failed"
    assert "cannot make again" in told["message"]
    assert files(output / "c4") == before


def test_moving_the_cohort_changes_nothing(cohort: Path, output: Path, tmp_path: Path) -> None:
    copy(cohort, output)
    assert states(cohort.rename(tmp_path / "moved"), output) == {"unchanged": 6}


def test_a_copy_of_the_output_is_as_good(cohort: Path, output: Path) -> None:
    copy(cohort, output)
    for path in output.glob("c?/*"):
        os.utime(path, (1, 1))  # as a copy program may leave it
    assert states(cohort, output) == {"unchanged": 6}


def test_a_cohort_that_grows_goes_on(cohort: Path, output: Path) -> None:
    copy(cohort, output)
    path = cohort / "c9/c9-t1n.nii.gz"
    path.parent.mkdir()
    path.write_text("late")
    assert states(cohort, output) == {"unchanged": 6, "done": 1}


def test_the_table_keeps_the_cases_of_earlier_runs(cohort: Path, output: Path) -> None:
    assert states(cohort / "c1", output) == {"done": 1}
    assert states(cohort / "c2", output) == {"done": 1}
    assert [line[:3] for line in (output / "copy.csv").read_text().splitlines()[1:]] == [
        "c1,",
        "c2,",
    ]


def test_other_work_on_the_same_output_keeps_to_its_own(cohort: Path, output: Path) -> None:
    """Also if it finds what the first has left when it was killed."""
    copy(cohort, output)
    ledger = Ledger(output / ".cwdm/ledger.sqlite", "copy")
    entry = ledger["c0"]
    ledger.close()
    assert entry is not None
    left = output / ".cwdm/copy/outcomes/c0.json"
    left.write_text(entry.as_json())
    told = copy(cohort, output, name="other")
    assert "already exists" in told["c0"][1]
    assert left.exists()
    assert states(cohort, output) == {"unchanged": 6}
    assert len(list(output.glob("c0/*"))) == 2


def test_two_cases_never_share_a_file(cohort: Path, output: Path) -> None:
    told = copy(cohort, output, flat=True)
    assert told["c0"][0] == "done"
    assert "t1n.txt would be that of case c0" in told["c1"][1]
    again = copy(cohort, output, flat=True)
    assert again["c0"][0] == "unchanged"
    assert again["c1"][0] == "failed"


def test_workers_of_an_earlier_run_stop(cohort: Path, output: Path) -> None:
    def begin_anew(tally: Tally) -> None:
        if tally.done:
            (output / ".cwdm/copy/run").write_text("another run")

    cases = find(cohort)
    job = Copying(log=f"{output}.log", seconds=1)
    with pytest.raises(InputError, match="workers die before they begin"):
        run(job, cases, output, Local(1, "cpu"), begin_anew)
    done = finished(output)
    assert 0 < len(done) < 6
    assert states(cohort, output) == {"unchanged": len(done), "done": 6 - len(done)}


# --- what goes wrong


def test_a_case_that_fails_harms_no_other_and_is_tried_again(cohort: Path, output: Path) -> None:
    bad, odd = cohort / "c1/c1-t1n.nii.gz", cohort / "c2/c2-t2w.nii.gz"
    bad.write_text("corrupt")
    odd.write_text("surprise")
    told = copy(cohort, output)
    assert told.pop("c1") == ("failed", f"{bad}: truncated")
    assert told.pop("c2") == ("failed", "case c2: unexpected RuntimeError: what is this?")
    assert set(told.values()) == {("done", "")}
    assert not list(output.glob("c[12]/*"))
    bad.write_text("mended")
    assert states(cohort, output) == {"done": 1, "failed": 1, "unchanged": 4}


def test_a_result_whose_inputs_broke_does_not_stay(cohort: Path, output: Path) -> None:
    copy(cohort, output)
    (cohort / "c1/c1-t1n.nii.gz").write_text("corrupt")
    assert states(cohort, output) == {"unchanged": 5, "failed": 1}
    assert not list(output.glob("c1/*"))


def test_what_is_no_case_is_told_with_the_others(cohort: Path, output: Path) -> None:
    for name in ("a-t1n.nii.gz", "b-t1n.nii.gz"):
        path = cohort / "two" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    told = copy(cohort, output)
    assert "belong to different cases" in told["two"][1]
    assert Counter(state for state, _ in told.values()) == {"done": 6, "failed": 1}


def test_what_became_unreadable_keeps_its_result(cohort: Path, output: Path) -> None:
    """As when a disk is not there."""
    copy(cohort, output)
    found = find(cohort)
    problem = Problem("c0", "c0: found nothing")
    run(
        Copying(log=f"{output}.log"),
        Found(found.cases[1:], [problem]),
        output,
        Local(1, "cpu"),
    )
    assert len(list(output.glob("c0/*"))) == 2
    assert states(cohort, output) == {"done": 1, "unchanged": 5}


def test_a_problem_with_the_name_of_a_case_is_not_that_case(cohort: Path, output: Path) -> None:
    (cohort / "later" / "c0").mkdir(parents=True)
    assert states(cohort, output) == {"done": 6, "failed": 1}
    assert states(cohort, output) == {"unchanged": 6, "failed": 1}


def test_a_table_of_somebody_else_is_never_replaced(cohort: Path, output: Path) -> None:
    output.mkdir()
    (output / "copy.csv").write_text("mine")
    with pytest.raises(InputError, match=r"copy.csv: already exists"):
        copy(cohort, output)
    assert not begun(output)


def test_a_file_put_there_while_it_was_being_made_is_not_replaced(
    cohort: Path, output: Path
) -> None:
    process = start(cohort, output, "local", "workers=1", "seconds=20")
    while not begun(output):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    mine = output / "c0/c0-t2w.nii.gz"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    told = copy(cohort, output)
    assert told["c0"][0] == "failed"
    assert mine.read_text() == "mine"


def test_a_file_of_somebody_else_is_never_replaced(cohort: Path, output: Path) -> None:
    mine = output / "c0/c0-t2w.nii.gz"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    told = copy(cohort, output)
    assert told["c0"][0] == "failed"
    assert told["c0"][1].startswith(f"{mine}: already exists")
    assert mine.read_text() == "mine"
    assert not (output / "c0/c0-t1n.nii.gz").exists()
    assert states(cohort, output)["failed"] == 1
    assert mine.read_text() == "mine"


def test_a_second_run_on_the_same_output_is_refused(cohort: Path, output: Path) -> None:
    # the lock is per process: another one has to hold it
    script = "from cwdm.files import lock; from pathlib import Path; import time\n"
    script += f"file = lock(Path({str(output)!r}) / '.cwdm' / 'lock'); print('held', flush=True)\n"
    other = subprocess.Popen(
        [sys.executable, "-c", script + "time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is at work in it"):
            copy(cohort, output)
        assert not begun(output)
    finally:
        other.kill()
        other.wait()
    assert states(cohort, output) == {"done": 6}


def test_the_tally_counts_cases(cohort: Path, output: Path) -> None:
    (cohort / "c1/c1-t1n.nii.gz").write_text("corrupt")
    tallies: list[Tally] = []
    job = Copying(log=f"{output}.log")
    run(job, find(cohort), output, Local(1, "cpu"), tallies.append)
    assert tallies[0] == (6, 0, 0)
    assert tallies[-1] == (6, 5, 1)
    assert all(a.done + a.failed <= b.done + b.failed for a, b in pairwise(tallies))


def test_an_interruption_ends_soon_and_the_rest_is_done_later(cohort: Path, output: Path) -> None:
    def interrupt(tally: Tally) -> None:
        if tally.done:
            raise KeyboardInterrupt

    job = Copying(log=f"{output}.log", seconds=1)
    with pytest.raises(KeyboardInterrupt):
        run(job, find(cohort), output, Local(1, "cpu"), interrupt)
    done = finished(output)
    assert 0 < len(done) < 6
    assert states(cohort, output)["done"] >= 6 - len(done)
    assert all(begun(output)[name] == 1 for name in done)


# --- what dies


def test_a_worker_that_dies_takes_nothing_with_it(cohort: Path, output: Path) -> None:
    rows = script(cohort, output, "local", "kills=c3")
    assert Counter(row["state"] for row in rows) == {"done": 6}
    assert begun(output)["c3"] == 2


def test_a_case_that_kills_its_workers_is_given_up_alone(cohort: Path, output: Path) -> None:
    rows = script(cohort, output, "local", "kills=c3", "always=true", "seconds=0.2")
    assert {row["case"]: row["state"] for row in rows if row["state"] != "done"} == {"c3": "failed"}
    assert "died" in next(row["message"] for row in rows if row["case"] == "c3")
    # one worker is this very process; the next run takes those that were in work apart from it
    elsewhere = output.with_name("elsewhere")
    words = ("local", "kills=c3", "always=true", "workers=1")
    process = start(cohort, elsewhere, *words)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    rows = script(cohort, elsewhere, *words)
    failed = [row["case"] for row in rows if row["state"] == "failed"]
    assert failed == ["c3"]


def test_a_job_that_cannot_begin_says_why(cohort: Path, output: Path) -> None:
    for workers in (1, 2):
        process = start(cohort, output, "local", "refuses=true", f"workers={workers}")
        _, err = process.communicate(timeout=120)
        assert "InputError: model.safetensors: no such file" in err


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    cohort, output = tmp_path / "cohort", tmp_path / "out"
    for number in range(40):
        path = cohort / f"c{number:02d}/c{number:02d}-t1n.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
    acquired = files(cohort)
    rng = random.Random(0)
    counted: set[str] = set()
    kills = 0
    while kills < 10:
        before = begun(output)
        process = start(cohort, output, "local", "seconds=0.5")
        # until some case was begun, and then a little
        while process.poll() is None and begun(output) == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.8))
        os.killpg(process.pid, signal.SIGKILL) if rng.random() < 0.5 else process.kill()
        process.communicate()
        time.sleep(0.3)  # workers end with their parent
        kills += 1
        again = begun(output) - before
        assert not counted & set(again), "a case was begun again after it was done"
        counted |= finished(output)
    assert {row["state"] for row in script(cohort, output, "local")} <= {"done", "unchanged"}
    made = files(output)
    del made["copy.csv"]
    assert made == {name: f"{text} 0" for name, text in acquired.items()}
    assert files(cohort) == acquired
    assert not [path for path in output.rglob("*") if path.name.startswith(".cwdm-")]
    assert not list((output / ".cwdm/copy/staging").glob("*/*"))


def test_workers_end_with_their_parent(cohort: Path, output: Path) -> None:
    process = start(cohort, output, "local", "seconds=30")
    while not begun(output):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
        if not left.stdout.split():
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {left.stdout.split()}")


# --- elsewhere


@pytest.mark.slow
def test_ray_goes_on_when_a_worker_dies(cohort: Path, output: Path) -> None:
    pytest.importorskip("ray")
    rows = script(cohort, output, "ray", "kills=c3")
    assert Counter(row["state"] for row in rows) == {"done": 6}
    assert begun(output)["c3"] == 2


@pytest.mark.slow
def test_ray_tells_why_it_cannot_begin(cohort: Path, output: Path) -> None:
    pytest.importorskip("ray")
    _, err = start(cohort, output, "ray", "refuses=true").communicate(timeout=180)
    assert "InputError: model.safetensors: no such file" in err


@pytest.mark.slow
def test_an_array_job_does_all_cases(cohort: Path, output: Path) -> None:
    pytest.importorskip("submitit")
    (cohort / "c1/c1-t1n.nii.gz").write_text("corrupt")
    rows = script(cohort, output, "slurm")
    assert Counter(row["state"] for row in rows) == {"done": 5, "failed": 1}
    assert set(begun(output).values()) == {1}
    _, err = start(cohort, output, "slurm", "refuses=true").communicate(timeout=180)
    assert "InputError: model.safetensors: no such file" in err


@pytest.mark.parametrize(
    ("cores", "gib", "tasks", "processes"),
    [(2, 24, 20, 2), (2, 24, 7, 1), (64, 256, 1000, 32), (64, 256, 40, 10), (4, 4, 100, 1)],
)
def test_a_processor_is_shared_out_if_there_is_enough_to_do(
    monkeypatch: pytest.MonkeyPatch, cores: int, gib: int, tasks: int, processes: int
) -> None:
    monkeypatch.setattr(executors, "capacity", lambda: gib * 2**30)
    monkeypatch.setattr(executors, "cores", lambda: cores)
    for device in ("cpu", "auto"):
        assert max(1, Local(bytes_each=8 * 2**30)._spread([device], tasks)) == processes
        assert Local()._spread([device], tasks) == 1
    assert Local(bytes_each=8 * 2**30)._spread(["cuda:0", "cuda:1"], tasks) == 1


def test_a_cluster_says_before_how_many_will_work(tmp_path: Path) -> None:
    for executor, expected in (
        (Slurm(tmp_path), 7),
        (Slurm(tmp_path, 3), 3),
        (Slurm(tmp_path, 300), 100),
        (Ray(4), 4),
        (Ray(), 1),  # what a cluster has is seen when it is joined
    ):
        assert executor.processes(100) == expected
