"""Files that appear whole or not at all, and their digests."""

import errno
import fcntl
import gzip
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cwdm.errors import InputError

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_UNFIT = re.compile(r'^\.|[%/\\:*?"<>|\x00-\x1f]')
"""What no file name may have in it, and what stands for it."""


def check_target(path: Path, overwrite: bool = False) -> None:
    """Fail now rather than after minutes of work if `atomic_write` could not write `path`.

    Raises:
        InputError: `path` exists and `overwrite` is false, or its folder (made if missing) cannot
            be written to.
    """
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    probe = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path}: {error.filename} is a file, expected a folder") from error
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def atomic_write(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write `path` through a hidden temporary file beside it, which the body has to fill.

        with atomic_write(path) as temporary:
            temporary.write_bytes(data)

    The file moves into place when the body ends. If anything fails before that, a keyboard
    interrupt included, the temporary file is removed and `path` is as it was. A file that already
    exists is only replaced with `overwrite`, even if it appeared meanwhile.

    Raises:
        InputError: see `check_target`; or the system refuses to write (full disk, ...), which every
            OSError of the body is taken to mean.
    """
    check_target(path, overwrite)
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _move_to_new(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read, {error.strerror or error}") from error


def safe_name(text: str) -> str:
    """What no file name may have in it, path separators first of all, written as %2F and the like.

    Different texts have different names.
    """
    return _UNFIT.sub(lambda unfit: f"%{ord(unfit[0]):02X}", text)


def lock(path: Path) -> IO[str]:
    """An open file that no other process can lock; the system unlocks it when this one ends.

    Raises:
        InputError: another process has it, so it is at work in the folder.
    """
    check_target(path, overwrite=True)
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise InputError(f"{path.parent}: another process is at work in it") from error
    except OSError as error:
        file.close()
        raise InputError(f"{path}: cannot be locked, {error.strerror or error}") from error
    return file


def move_new(source: Path, path: Path) -> None:
    """Move a file to another place on the same disk, where nothing may be.

    Raises:
        InputError: something is there, or the system refuses.
    """
    check_target(path)
    try:
        _move_to_new(source, path)
        source.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def link_or_copy(source: Path, path: Path, *, copy: bool = False) -> None:
    """Have the same file at another place: a hard link where the disk allows it, else a copy.

    Raises:
        InputError: something is there, the source cannot be read, or the system refuses.
    """
    check_target(path)
    try:
        if not copy:
            with suppress(OSError):
                os.link(source.resolve(), path)
                return
        shutil.copyfile(source, path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error


def gzip_copy(source: Path, path: Path) -> None:
    """The same bytes, packed, and always to the same file; InputError as `link_or_copy`."""
    check_target(path)
    try:
        with (
            source.open("rb") as file,
            path.open("xb") as target,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=target, mtime=0) as packed,
        ):
            shutil.copyfileobj(file, packed)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error


def _temporary(path: Path) -> Path:
    """A hidden, unused name beside `path` with the same ending, which may choose the format."""
    suffix = "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix
    return path.with_name(f".cwdm-{secrets.token_hex(8)}{suffix}")


def _move_to_new(temporary: Path, path: Path) -> None:
    """Rename unless `path` exists, without a moment in between.

    `os.link` does both at once; `temporary` is left for the caller to remove. File systems without
    hard links (exFAT, some network shares) get the name reserved by an empty file first.
    """
    try:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            path.touch(exist_ok=False)
            try:
                temporary.replace(path)
            except BaseException:
                path.unlink()
                raise
    except FileExistsError as error:
        raise _exists(path) from error


def _exists(path: Path) -> InputError:
    return InputError(f"{path}: already exists, expected a new name or permission to overwrite")


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written, {error.strerror or error}")
