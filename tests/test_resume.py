"""Runs killed, stopped, short of disk or shared by processes do what one would have done."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cwdm.cache import fill, open_cache
from cwdm.config import Augmentation, Config, Training
from cwdm.dataset import Source
from cwdm.errors import InputError
from cwdm.layouts import find
from cwdm.modality import Modality
from cwdm.model import load_model
from cwdm.run import RunFolder, read_lines
from cwdm.train import train
from cwdm.unet import UNetConfig

CONFIG = Config(
    name="tiny",
    target=Modality.T2F,
    network=UNetConfig(channels=8, multipliers=(1, 1), res_blocks=1, groups=4, dropout=0.1),
    training=Training(
        iterations=10,
        patch=(8, 8, 8),
        batch=2,
        learning_rate=1e-3,
        ema=0.9,
        drop_conditions=0.3,
        checkpoint_every=5,
        augmentation=Augmentation(flip=True, affine=1.0, bias_field=1.0, contrast=1.0),
    ),
)
ALIKE = frozenset({"duplicate"})
"""The four images of a case are the same here."""
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["cwdm.train", "cwdm.cache"])


@pytest.fixture
def cache(make_case, tmp_path):
    for i in range(2):
        folder = make_case(folder=f"data/c{i}", case_id=f"c{i}")
    list(fill(find(folder.parent), tmp_path / "cache", accept=ALIKE))
    return tmp_path / "cache"


def go(config, cache, run, **options):
    """All steps there are to do."""
    torch.set_num_threads(1)
    options = {"device": "cpu", "precision": "fp32", "workers": 0, **options}
    return list(train(config, [Source("cases", open_cache(cache))], run, **options))


def started(config, cache, run):
    """Going in a process of its own, which nothing of this one has touched."""
    process = CLEAN.Process(target=go, args=(config, cache, run))
    process.start()
    return process


def weights(run):
    return load_model(run / "model.safetensors").denoiser.backbone.state_dict()


def assert_same_run(one, other):
    """Weights bit for bit, and every step logged once, with the same loss."""
    ours, theirs = weights(one), weights(other)
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=0, atol=0)
    logs = [list(read_lines(run / "steps.jsonl")) for run in (one, other)]
    first, second = ([(line["step"], line["loss"], line["norm"]) for line in log] for log in logs)
    assert first == second


def test_ten_steps_equal_five_a_kill_and_five(cache, tmp_path):
    go(CONFIG, cache, tmp_path / "whole")
    run = tmp_path / "parts"
    process = started(CONFIG, cache, run)
    while not (run / "steps.jsonl").exists() or len(list(read_lines(run / "steps.jsonl"))) < 6:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    rest = go(CONFIG, cache, run)
    assert rest[-1].step == 10
    assert rest[0].step == 6 or len(rest) < 5  # it may have been fast enough to finish
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_nothing_is_lost(cache, tmp_path):
    settings = replace(CONFIG.training, iterations=120, checkpoint_every=4)
    config, run = replace(CONFIG, training=settings), tmp_path / "killed"
    rng = np.random.default_rng(0)
    done, kills = 0, 0
    while kills < 20 and done < settings.iterations:
        process = started(config, cache, run)
        log = run / "steps.jsonl"
        while process.is_alive() and not log.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.join()
        kills += 1
        checkpoints = sorted((run / "checkpoints").glob("step-*.safetensors"))
        before, done = done, int(checkpoints[-1].stem[5:]) if checkpoints else 0
        logged = [line["step"] for line in read_lines(log)]
        assert logged == list(range(1, len(logged) + 1))
        assert done >= before
        assert len(logged) - done <= settings.checkpoint_every
    go(config, cache, run)
    go(config, cache, tmp_path / "whole")
    assert kills == 20
    assert_same_run(tmp_path / "whole", run)
    assert not list(run.rglob(".cwdm-*"))


def test_a_finished_run_has_nothing_left_to_do(cache, tmp_path):
    go(CONFIG, cache, tmp_path / "run")
    before = weights(tmp_path / "run")
    assert go(CONFIG, cache, tmp_path / "run") == []
    assert len(list(read_lines(tmp_path / "run" / "steps.jsonl"))) == 10
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, before[name])


def test_a_truncated_checkpoint_is_skipped_with_a_warning(cache, tmp_path, caplog):
    go(CONFIG, cache, tmp_path / "whole")
    go(CONFIG, cache, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000010.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    rest = go(CONFIG, cache, tmp_path / "run")
    assert [step.step for step in rest] == [6, 7, 8, 9, 10]
    assert "step-00000010.safetensors: skipped, not a whole checkpoint" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(cache, tmp_path):
    run = tmp_path / "run"
    settings = replace(CONFIG.training, checkpoint_every=2)
    config = replace(CONFIG, training=settings)
    stop_after_two = iter([False, True])
    go(config, cache, run, stop=lambda: next(stop_after_two))
    (checkpoint,) = (run / "checkpoints").iterdir()
    whole = checkpoint.read_bytes()
    said, saying = CLEAN.Pipe(duplex=False)
    process = CLEAN.Process(target=_short_of_disk, args=(config, cache, run, len(whole), saying))
    process.start()
    message = said.recv()
    process.join()
    assert "step-00000004.safetensors: cannot be written" in message
    assert [path.name for path in (run / "checkpoints").iterdir()] == [checkpoint.name]
    assert checkpoint.read_bytes() == whole
    go(config, cache, run)
    go(config, cache, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", run)


def _short_of_disk(config, cache, run, size, saying):
    """No file may grow to the size of a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
    try:
        go(config, cache, run)
    except InputError as error:
        saying.send(str(error))


def test_a_run_is_not_continued_with_other_settings_or_other_data(cache, make_case, tmp_path):
    go(CONFIG, cache, tmp_path / "run")
    other = replace(CONFIG, training=replace(CONFIG.training, seed=1))
    with pytest.raises(InputError, match=r"other settings \(training\)"):
        go(other, cache, tmp_path / "run")
    list(fill(find(make_case(folder="data/c2", case_id="c2").parent), cache, accept=ALIKE))
    with pytest.raises(InputError, match="other data"):
        go(CONFIG, cache, tmp_path / "run")


def test_two_runs_do_not_share_a_folder(cache, tmp_path):
    here, there = CLEAN.Pipe()
    holder = CLEAN.Process(target=_hold, args=(tmp_path / "run", there))
    holder.start()
    here.recv()
    with pytest.raises(InputError, match="another process is at work in it"):
        go(CONFIG, cache, tmp_path / "run")
    here.send("enough")
    holder.join()
    go(CONFIG, cache, tmp_path / "run")


def _hold(run, pipe):
    """Keep a run's folder until told otherwise."""
    folder = RunFolder(run)
    pipe.send("mine")
    pipe.recv()
    folder.close()


def test_a_killed_run_goes_on_at_once_though_it_leaves_workers_behind(cache, tmp_path):
    settings = replace(CONFIG.training, iterations=1000, checkpoint_every=1000)
    run = tmp_path / "run"
    command_line = [sys.executable, *command(replace(CONFIG, training=settings), run)]
    process = subprocess.Popen([*command_line, "--workers", "2"], env=ENVIRONMENT)
    while not (run / "steps.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    RunFolder(run).close()


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(cache, tmp_path):
    settings = replace(CONFIG.training, keep=1, checkpoint_every=2, iterations=6)
    config, run = replace(CONFIG, training=settings), tmp_path / "run"
    go(config, cache, run)
    (newest,) = (run / "checkpoints").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])
    stop_after_two = iter([False, True])
    assert [s.step for s in go(config, cache, run, stop=lambda: next(stop_after_two))] == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir() if "step-00000002" in path.name]
    assert [step.step for step in go(config, cache, run)] == [3, 4, 5, 6]


def test_a_run_can_be_made_longer(cache, tmp_path):
    short = replace(CONFIG, training=replace(CONFIG.training, iterations=6, keep=1))
    go(short, cache, tmp_path / "run")
    assert [step.step for step in go(CONFIG, cache, tmp_path / "run")] == [7, 8, 9, 10]
    go(CONFIG, cache, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    falling = replace(CONFIG, training=replace(CONFIG.training, decay=True, iterations=20))
    with pytest.raises(InputError, match="other settings"):
        go(falling, cache, tmp_path / "run")


def test_the_same_data_elsewhere_are_the_same_data(cache, tmp_path):
    stop_at_once = iter([True])
    go(CONFIG, cache, tmp_path / "run", stop=lambda: next(stop_at_once))
    cache.rename(tmp_path / "moved")
    rest = go(CONFIG, tmp_path / "moved", tmp_path / "run")
    assert [step.step for step in rest] == list(range(2, 11))


def command(config, run, *options):
    """The command line of a run on the cases beside it."""
    toml = run.with_suffix(".toml")
    toml.write_text(as_toml(config))
    data = run.parent / "cache"
    paths = ["--config", toml, "--data", data, "--output", run]
    rest = ["--device", "cpu", "--precision", "fp32", "--tracker", "none", *options]
    return ["-m", "cwdm.cli", "train", *map(str, paths), *rest]


def as_toml(config):
    """Tables of plain values, one level deep but for the augmentation."""

    def line(key, value):
        return f"{key} = {json.dumps(value)}\n"

    def table(name, values):
        inner = {k: v for k, v in values.items() if isinstance(v, dict)}
        flat = {k: v for k, v in values.items() if v is not None and k not in inner}
        text = f"[{name}]\n" + "".join(line(k, v) for k, v in flat.items())
        return text + "".join(table(f"{name}.{k}", v) for k, v in inner.items())

    values = config.as_dict()
    flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
    return "".join(line(k, v) for k, v in flat.items()) + "".join(
        table(k, v) for k, v in values.items() if isinstance(v, dict)
    )


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_two_processes_train_as_one(cache, tmp_path):
    settings = replace(CONFIG.training, batch=4, accumulation=2, structure_weight=0.2)
    network = replace(CONFIG.network, dropout=0.0)  # drawn by each process for itself
    config = replace(CONFIG, training=settings, network=network)
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([sys.executable, *command(config, one)], env=ENVIRONMENT, check=True)
    subprocess.run([*launch, *command(config, two)], env=ENVIRONMENT, check=True)
    ours, theirs = (list(read_lines(run / "steps.jsonl")) for run in (one, two))
    assert len(ours) == len(theirs) == 10
    for first, second in zip(ours, theirs, strict=True):
        assert first["times"] == second["times"]
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["bands"] == pytest.approx(first["bands"], rel=1e-3, abs=1e-6)
        assert second["norm"] == pytest.approx(first["norm"], rel=1e-3)
    for name, value in weights(one).items():
        assert_close(value, weights(two)[name], rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run(number, code, cache, tmp_path):
    settings = replace(CONFIG.training, iterations=400, checkpoint_every=1000)
    config, run = replace(CONFIG, training=settings), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *command(config, run)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (run / "steps.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    (checkpoint,) = (run / "checkpoints").iterdir()
    done = int(checkpoint.stem[5:])
    assert said.strip() == f"Stopped after step {done}, which is saved; the same command continues."
    assert [line["step"] for line in read_lines(run / "steps.jsonl")] == list(range(1, done + 1))
    assert load_model(run / "model.safetensors").config == config
