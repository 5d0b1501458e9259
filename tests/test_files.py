import errno
import gzip
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from cwdm.errors import InputError
from cwdm.files import (
    atomic_write,
    check_target,
    gzip_copy,
    link_or_copy,
    lock,
    move_new,
    sha256,
)


def write(path: Path, text: str, **options: bool) -> None:
    with atomic_write(path, **options) as temporary:
        temporary.write_text(text)


def test_the_file_appears_whole_when_the_body_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.nii.gz"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a.nii.gz"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_when_the_body_fails(
    tmp_path: Path, failure: type[BaseException], overwrite: bool
) -> None:
    def fail(path: Path) -> None:
        with atomic_write(path, overwrite) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(InputError, match="already exists"):
        write(path, "new")
    assert path.read_text() == "old"
    write(path, "new", overwrite=True)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    path = tmp_path / "a"

    def race() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("slow")
            path.write_text("quick")

    with pytest.raises(InputError, match="already exists"):
        race()
    assert path.read_text() == "quick"
    assert os.listdir(tmp_path) == ["a"]


def test_file_systems_without_hard_links_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    write(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert os.listdir(tmp_path) == ["a"]


def test_no_placeholder_is_left_if_the_fallback_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(type(tmp_path), "replace", refuse(errno.EIO))
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(InputError) as refusal:
        write(tmp_path / "a", "text")
    assert str(refusal.value) == f"{tmp_path / 'a'}: cannot be written, No space left on device"
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written, File too large"):
            write(tmp_path / "a", "text" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_target_without_permission_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by monkeypatch, since root may write everywhere
    monkeypatch.setattr(type(tmp_path), "touch", refuse(errno.EACCES))
    with pytest.raises(InputError, match="a: cannot be written, Permission denied"):
        check_target(tmp_path / "a")


def test_a_target_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file, expected a folder"):
        check_target(tmp_path / "file" / "a")


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="a: cannot be written, Is a directory"):
        write(tmp_path / "a", "text", overwrite=True)
    assert os.listdir(tmp_path) == ["a"]


def test_check_target_leaves_no_trace(tmp_path: Path) -> None:
    check_target(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(InputError, match="absent: cannot be read, No such file"):
        sha256(tmp_path / "absent")


def refuse(code: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    code = f"import pathlib, cwdm.files; cwdm.files.lock(pathlib.Path({str(path)!r}))"
    mine = lock(path)
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "folder: another process is at work in it" in other.stderr
    mine.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    lock(path).close()


def test_a_file_is_handed_on_as_the_same_or_as_a_copy(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("same")
    link_or_copy(source, tmp_path / "link")
    link_or_copy(source, tmp_path / "copy", copy=True)
    gzip_copy(source, tmp_path / "packed.gz")
    assert (tmp_path / "link").samefile(source)
    assert not (tmp_path / "copy").samefile(source)
    assert (tmp_path / "copy").read_text() == "same"
    assert gzip.decompress((tmp_path / "packed.gz").read_bytes()) == b"same"
    (tmp_path / "symbolic").symlink_to(source)
    link_or_copy(tmp_path / "symbolic", tmp_path / "real")  # the file, not the link to it
    assert not (tmp_path / "real").is_symlink()


def test_where_links_are_not_possible_there_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> NoReturn:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("same")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "same"


@pytest.mark.parametrize("move", [move_new, link_or_copy, gzip_copy])
def test_nothing_that_is_there_is_replaced(
    move: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    with pytest.raises(InputError, match="already exists"):
        move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


def test_packing_twice_makes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("same")
    for name, now in (("b", 1e9), ("c", 2e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        gzip_copy(tmp_path / "a", tmp_path / name)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert gzip.decompress((tmp_path / "b").read_bytes()) == b"same"


def test_a_file_moves_and_is_gone_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    move_new(tmp_path / "a", tmp_path / "new" / "b")
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "new" / "b").read_text() == "x"
