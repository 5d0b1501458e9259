"""`cwdm models`: the list, what is in a file, conversion, and downloads from a server of ours."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from cwdm.cli.main import cwdm as command
from cwdm.config import Config, presets
from cwdm.files import sha256
from cwdm.hub import PUBLISHED, fetch
from cwdm.modality import Modality
from cwdm.model import build_denoiser, default_model, load_model


def run(*words):
    return CliRunner().invoke(command, ["models", *(str(word) for word in words)])


def checkpoint(path, preset="cwdm-t2f"):
    """A published checkpoint with a small network; returns its weights."""
    torch.manual_seed(0)
    config = Config.read(preset)
    config = replace(
        config, network=replace(config.network, channels=8, groups=4, multipliers=(1, 2))
    )
    weights = build_denoiser(config).backbone.state_dict()
    torch.save(weights, path)
    return weights


def test_the_list_names_everything_there_is():
    result = run("list")
    assert result.exit_code == 0, result.output
    for name in [*presets(), *PUBLISHED, "pfriedri/wdm-3d/brats_unet_128_1200k.pt", "2.9 MB"]:
        assert f" {name} " in result.stdout, name
    assert max(map(len, result.stdout.splitlines())) <= 130


def test_without_a_subcommand_there_is_help_and_with_a_wrong_one_a_line():
    assert "fetch" in run().stdout
    result = run("lst")
    assert result.exit_code == 2
    assert result.stderr.startswith("cwdm: error: No such command 'lst'")
    for name in ("list", "info", "convert", "fetch"):
        assert run(name, "--help").stdout.startswith(f"Usage: cwdm models {name}")


def test_every_published_model_is_a_preset():
    assert set(PUBLISHED) <= set(presets())


def test_info_says_in_words_what_is_in_a_model_that_ships():
    result = run("info", "small-t2f")
    assert result.exit_code == 0, result.output
    path = default_model(Modality.T2F)
    for text in [
        *(str(path), sha256(path), "t2f from the other sequences", "1,436,808 parameters"),
        *("haar", "diffusion, linear schedule, T = 1000", "ddim", "'robust'"),
        "learnt from the training cases",
    ]:
        assert text in result.stdout, text


@pytest.mark.parametrize(
    ("file", "preset", "texts"),
    [
        ("t2f.pt", "cwdm-t2f", ["concatenated skips", "8 channels x 1, 2", "'published' to 0...1"]),
        ("brats_wnet.pt", "wdm-brats-128-wavunet", ["WavU-Net", "t1n from noise, 128x128x128"]),
        ("lidc-idri.pt", "wdm-lidc-128", ["ct from noise", "averaged skips", "'hounsfield'"]),
        ("wfm.pt", "wfm", ["any sequence", "flow from conditions", "euler, 2 step(s)"]),
        ("t1n_sampled_100.pt", "fast-cwdm", ["a subset of 1000 times, T = 100"]),
        ("brats3dimage.pt", "fastwdm-inpainting", ["around a hole", "all bands / 2.828", "T = 2"]),
        ("voxels.pt", "ddpm3d-128", ["none, voxels themselves"]),
    ],
)
def test_info_says_what_a_published_checkpoint_is_and_what_is_assumed(
    file, preset, texts, tmp_path
):
    checkpoint(tmp_path / file, preset)
    result = run("info", tmp_path / file)
    assert result.exit_code == 0, result.output
    for text in [*texts, "assumed (the file has none)", sha256(tmp_path / file)]:
        assert text in result.stdout, text


def test_info_for_machines_is_json_with_the_whole_configuration(tmp_path):
    path = tmp_path / "t2f.pt"
    weights = checkpoint(path)
    record = json.loads(run("info", path, "--json").stdout)
    assert Config.parse(record["config"], "info") == load_model(path).config
    assert record["sha256"] == sha256(path)
    assert record["bytes"] == path.stat().st_size
    assert record["targets"] == ["t2f"]
    assert record["priors_assumed"] is True
    assert record["parameters"] == sum(value.numel() for value in weights.values())
    assert json.loads(run("info", "small-t1n", "--json").stdout)["priors_assumed"] is False


def test_what_info_cannot_read_is_one_line():
    for name, message in [("smal-t2f", "small-t2f"), ("gone.pt", "no such file"), (__file__, "")]:
        result = run("info", name)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("cwdm: error: ")
        assert message in result.stderr


@pytest.mark.parametrize("preset", ["cwdm-t2f", "wdm-brats-128-wavunet"])
def test_a_converted_checkpoint_is_the_same_model(preset, tmp_path):
    source, folder = tmp_path / "brats_1200000.pt", tmp_path / "models"
    weights = checkpoint(source, preset)
    target = ["--target", "flair"] if preset == "cwdm-t2f" else []
    result = run("convert", source, "--output", folder, *target)
    assert result.exit_code == 0, result.output
    path = folder / "brats_1200000.safetensors"
    assert result.stdout.strip() == str(path)
    assert list(folder.iterdir()) == [path]
    ours, theirs = load_model(path), load_model(source, Modality.T2F if target else None)
    assert ours.config == theirs.config
    assert ours.priors == theirs.priors
    for name, value in ours.denoiser.backbone.state_dict().items():
        assert_close(value, weights[name], rtol=0, atol=0)
    assert "assumed" in run("info", path).stdout
    again = run("convert", source, "--output", folder, *target)
    assert again.exit_code == 2
    assert "already exists" in again.stderr
    assert run("convert", source, "--output", folder, "--overwrite", *target).exit_code == 0


def test_what_cannot_be_converted_leaves_nothing(tmp_path):
    source, folder = tmp_path / "t2f.pt", tmp_path / "models"
    weights = checkpoint(source)
    broken = tmp_path / "t2f_broken.pt"
    torch.save(weights | {"out.2.bias": torch.zeros(3)}, broken)
    for words, message in [
        ([source, "--preset", "cwdm-t1n"], "by its name a model for t2f, found one for t1n"),
        ([source, "--preset", "cwdm-t2f"], "channels = 8, expected 64"),
        ([source, "--target", "t1n"], "by its name a model for t2f, expected one for t1n"),
        ([source, "--target", "t9"], "'t9' is not a modality"),
        ([source, "--groups", 3], "groups = 3 does not divide"),
        ([broken], f"{broken}: weights do not fit"),
        ([tmp_path / "gone.pt"], "no such file"),
    ]:
        result = run("convert", *words, "--output", folder)
        assert result.exit_code == 2, message
        assert message in result.stderr
        assert not folder.exists() or not list(folder.iterdir())


def test_groups_can_be_told(tmp_path):
    checkpoint(tmp_path / "t2f.pt")
    assert run("convert", tmp_path / "t2f.pt", "--groups", 8, "--output", tmp_path).exit_code == 0
    assert load_model(tmp_path / "t2f.safetensors").config.network.groups == 8


# Downloads

BYTES = bytes(range(256)) * 4096  # 1 MiB
CHUNK = 10 * 1024 * 1024  # what huggingface_hub writes at once


class Hub(ThreadingHTTPServer):
    """As much of Hugging Face as a download needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        """<owner>/<repository>/<file> -> its bytes."""
        self.published: dict[str, str] = {}
        """The same -> the SHA-256 that is announced, if it is not that of the bytes."""
        self.errors: dict[str, tuple[int, str]] = {}
        """<owner>/<repository> -> status and X-Error-Code."""
        self.stall_at: int | None = None
        """Stop sending after so many bytes of a file."""
        self.ranges: list[str | None] = []
        """Of every download that began."""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if error := self.server.errors.get(repository):
            self.reply(error[0], {"X-Error-Code": error[1]}, b"")
        elif path.startswith("api/models/"):
            names = [f.removeprefix(f"{repository}/") for f in self.server.files if repository in f]
            body = {"id": repository, "siblings": [{"rfilename": name} for name in names]}
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())
        elif (key := f"{repository}/{'/'.join(path.split('/')[4:])}") in self.server.files:
            self.file(key, with_body)
        else:
            self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")

    def file(self, key: str, with_body: bool) -> None:
        data = self.server.files[key]
        digest = self.server.published.get(key, hashlib.sha256(data).hexdigest())
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if not with_body:
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(206 if wanted else 200, headers, data[start:], self.server.stall_at)

    def reply(
        self, status: int, headers: dict[str, str], body: bytes, stall_at: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:stall_at])
        if stall_at is not None and stall_at < len(body):
            self.wfile.flush()
            time.sleep(60)


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Start:
    """Begin `cwdm models fetch`; its environment knows our server only."""
    hidden = ("HF_", "HTTP", "http", "ALL_PROXY", "all_proxy")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    clean |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "",
    }

    def begin(name: str, **extra: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "cwdm.cli", "models", "fetch", name, "--output", "published"],
            cwd=tmp_path,
            env=clean | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, stdout, and the line that says what went wrong."""
    out, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("cwdm: error: ")]
    assert len(lines) == (process.returncode != 0), err
    assert "Traceback" not in err
    return process.returncode, out.strip(), "".join(lines)


def test_a_file_is_downloaded_and_checked_and_not_twice(hub, start, tmp_path):
    hub.files["pfriedri/wdm-3d/brats_unet_128_1200k.pt"] = BYTES
    path = tmp_path / "published" / "brats_unet_128_1200k.pt"
    for _ in range(2):
        assert finish(start("wdm-brats-128"))[:2] == (0, str(path.relative_to(tmp_path)))
        assert path.read_bytes() == BYTES
        assert list(path.parent.iterdir()) == [path]
    assert hub.ranges == [None]
    path.write_bytes(b"something else")
    code, _, line = finish(start("wdm-brats-128"))
    assert code == 2
    assert "is there already, and not pfriedri/wdm-3d/brats_unet_128_1200k.pt" in line
    assert path.read_bytes() == b"something else"


def test_the_file_of_a_target_is_found_by_its_name(hub, start, tmp_path):
    for name in ("README.md", "opt_t1n.txt", "cwdm-t1n.pt", "sub/brats_t1c_1200000.pt"):
        hub.files[f"pfriedri/cwdm/{name}"] = name.encode()
    assert finish(start("cwdm-t1c"))[:2] == (0, "published/brats_t1c_1200000.pt")
    code, _, line = finish(start("cwdm-t2f"))
    assert code == 2
    assert "README.md, opt_t1n.txt, cwdm-t1n.pt, sub/brats_t1c_1200000.pt" in line
    assert line.endswith("expected one .pt file named after t2f")
    hub.files["pfriedri/cwdm/old_t1n.pt"] = b"two"
    assert finish(start("cwdm-t1n"))[0] == 2
    hub.files["AliciaDurrer/fastWDM3D/anything.pt"] = b"one"
    assert finish(start("fastwdm-inpainting"))[:2] == (0, "published/anything.pt")


def test_an_interrupted_download_is_continued(hub, start, tmp_path):
    data = os.urandom(1024) * (2 * CHUNK // 1024 + 512)
    hub.files["pfriedri/wdm-3d/brats_unet_128_1200k.pt"] = data
    hub.stall_at = CHUNK + 1000
    process, folder = start("wdm-brats-128"), tmp_path / "published"
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in folder.glob(".*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.suffix for path in folder.iterdir()] == [".part"]
    hub.stall_at = None
    assert finish(start("wdm-brats-128"))[0] == 0
    assert hub.ranges == [None, f"bytes={CHUNK}-"]
    assert (folder / "brats_unet_128_1200k.pt").read_bytes() == data
    assert len(list(folder.iterdir())) == 1


def test_bytes_that_are_not_what_was_published_are_deleted(hub, start, tmp_path):
    key = "pfriedri/wdm-3d/lidc-idri_unet_128_1200k.pt"
    hub.files[key], hub.published[key] = BYTES, "ab" * 32
    code, _, line = finish(start("wdm-lidc-128"))
    assert code == 2
    assert f"SHA-256 {hashlib.sha256(BYTES).hexdigest()}, expected {'ab' * 32}; deleted" in line
    assert list((tmp_path / "published").iterdir()) == []
    hub.published[key] = "ab" * 20  # a file in git, not in git LFS
    assert "does not tell its SHA-256" in finish(start("wdm-lidc-128"))[2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((404, "RepoNotFound"), "no such repository on Hugging Face, or not without logging in"),
        ((401, "RepoNotFound"), "no such repository on Hugging Face, or not without logging in"),
        ((403, "GatedRepo"), "needs a permission"),
        ((404, "EntryNotFound"), "no such file on Hugging Face"),
        ((418, ""), "418"),
    ],
)
def test_what_the_server_refuses_is_one_line(error, message, hub, start, tmp_path):
    hub.errors["pfriedri/wdm-3d"] = error
    code, _, line = finish(start("wdm-brats-128"))
    assert code == 2
    assert line.startswith("cwdm: error: pfriedri/wdm-3d: ")
    assert message in line
    assert not (tmp_path / "published").exists()


def test_without_a_connection_it_is_one_line(hub, start, tmp_path):
    for name in ("wdm-brats-128", "cwdm-t1n"):
        code, _, line = finish(start(name, HF_ENDPOINT="http://127.0.0.1:9"))
        assert code == 2
        assert "Hugging Face cannot be reached" in line
        code, _, line = finish(start(name, HF_HUB_OFFLINE="1"))
        assert code == 2
        assert "HF_HUB_OFFLINE is set" in line
    assert not (tmp_path / "published").exists()


def test_a_name_it_does_not_know_is_one_line(tmp_path):
    result = run("fetch", "cwdm-flair", "--output", tmp_path)
    assert result.exit_code == 2
    assert "'cwdm-flair' is not a published model, expected one of wdm-brats-128" in result.stderr


def test_without_huggingface_hub_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError):
        fetch("wdm-brats-128", tmp_path)
    result = run("fetch", "wdm-brats-128", "--output", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'cwdm[hub]'" in result.stderr
