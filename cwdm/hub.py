"""Published models that can be downloaded from Hugging Face. The only user of huggingface_hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from cwdm.errors import InputError
from cwdm.files import atomic_write, check_target, sha256
from cwdm.modality import Modality, find_modality

__all__ = ["PUBLISHED", "Published", "fetch"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint that somebody has published."""

    repository: str
    """On Hugging Face."""
    file: str | None = None
    """None where no text of theirs names it: then it is the one .pt there, see ``target``."""
    target: Modality | None = None
    """What the name of the file has to name, where the repository holds several."""
    licence: str = "MIT"
    """Of the repository with their code."""

    @property
    def pattern(self) -> str:
        """The name of the file, as far as it is known."""
        return self.file or (f"*{self.target}*.pt" if self.target else "*.pt")


PUBLISHED: dict[str, Published] = {
    "wdm-brats-128": Published(repository="pfriedri/wdm-3d", file="brats_unet_128_1200k.pt"),
    "wdm-lidc-128": Published(repository="pfriedri/wdm-3d", file="lidc-idri_unet_128_1200k.pt"),
    "cwdm-t1n": Published(repository="pfriedri/cwdm", target=Modality.T1N),
    "cwdm-t1c": Published(repository="pfriedri/cwdm", target=Modality.T1C),
    "cwdm-t2w": Published(repository="pfriedri/cwdm", target=Modality.T2W),
    "cwdm-t2f": Published(repository="pfriedri/cwdm", target=Modality.T2F),
    "fastwdm-inpainting": Published(repository="AliciaDurrer/fastWDM3D"),
}
"""By the name of the preset they belong to."""


def fetch(name: str, folder: Path) -> Path:
    """Download a published checkpoint into a folder; returns its path.

    What an interrupted download left is continued. The file appears only if its SHA-256 is what
    the server says it is; one that is there already is checked and not downloaded again.

    Raises:
        InputError: an unknown name, no connection, nothing there, no permission, another file
            in its place, or bytes that are not what was published.
    """
    if name not in PUBLISHED:
        nearest = get_close_matches(name, PUBLISHED, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InputError(
            f"{name!r} is not a published model, expected one of {', '.join(PUBLISHED)}{hint}"
        )
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    repository = PUBLISHED[name].repository
    with _in_one_line(repository):
        file = _find(PUBLISHED[name])
        found = get_hf_file_metadata(hf_hub_url(repository, file))
    expected, source = found.etag or "", f"{repository}/{file}"
    if not re.fullmatch(r"[0-9a-f]{64}", expected):  # of files in git LFS it is the SHA-256
        raise InputError(f"{source}: the server does not tell its SHA-256, so it cannot be checked")
    path = folder / PurePosixPath(file).name
    if path.exists():
        if sha256(path) == expected:
            return path
        raise InputError(f"{path}: is there already, and not {source}; expected another folder")
    check_target(path)
    # Not hf_hub_download: in huggingface_hub 2 it begins again after an interruption.
    part = folder / f".{path.name}-{expected[:16]}.part"
    if part.exists() and found.size is not None and part.stat().st_size > found.size:
        part.unlink()
    with _in_one_line(source), part.open("ab") as stream:
        http_get(
            hf_hub_url(repository, file, revision=found.commit_hash),
            stream,
            resume_size=part.stat().st_size,
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=found.size,
            displayed_filename=path.name,
        )
    if (digest := sha256(part)) != expected:
        part.unlink()
        raise InputError(
            f"{source}: got a file with SHA-256 {digest}, expected {expected}; deleted, try again"
        )
    with atomic_write(path) as temporary:
        part.replace(temporary)
    return path


def _find(published: Published) -> str:
    """The path of the checkpoint in its repository."""
    if published.file is not None:
        return published.file
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(published.repository, timeout=30).siblings or []
    files = [each.rfilename for each in siblings]
    wanted = [
        file
        for file in files
        if file.endswith(".pt") and (published.target in (None, *_sequences(file)))
    ]
    if len(wanted) != 1:
        about = f" named after {published.target}" if published.target else ""
        raise InputError(
            f"{published.repository}: found {', '.join(files) or 'no files'}; "
            f"expected one .pt file{about}"
        )
    return wanted[0]


def _sequences(file: str) -> set[Modality | None]:
    """What the parts of a file's name stand for."""
    return {
        find_modality(part) for part in re.split(r"[^a-zA-Z0-9]+", PurePosixPath(file).stem)
    } - {None}


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """What can go wrong between here and the server, as InputError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{what}: needs a permission, expected that you ask for it on huggingface.co and log "
            "in (hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: no such repository on Hugging Face, or not without logging in"
        ) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{what}: no such file on Hugging Face") from error
    except errors.OfflineModeIsEnabled as error:
        raise InputError(f"{what}: not downloaded, HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        raise InputError(f"{what}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno is None:  # a connection that ended early
            raise InputError(f"{what}: {_first_line(error)}") from error
        raise InputError(f"{what}: not downloaded, {error.strerror}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the base of all of httpx
        raise InputError(f"{what}: Hugging Face cannot be reached, {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
