"""What this machine can compile: kernels for its GPU, and loops in C++ for its processor.

Both are found out by trying, once in a process; where they do not work there is always a way
without.
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

__all__ = ["kernels", "loops", "loops_work"]

T = TypeVar("T")


@cache
def kernels() -> ModuleType | None:
    """`cwdm.kernels`, or None where Triton is absent or cannot compile for the GPU there is."""
    if not torch.cuda.is_available():
        return None

    def attempt() -> ModuleType:
        found = importlib.import_module("cwdm.kernels")
        numbers = torch.zeros(3, 4, 4, 4, device="cuda")
        found.activate_(numbers[0].view(8, 8), *numbers[1].view(8, 8)[:2])
        found.inverse_haar(found.haar(numbers, 1.0, 1.0), 1.0, 1.0)
        return found

    return _tried("kernels", attempt)


@cache
def loops(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one loop over them, for every size at once."""
    return torch.compile(function, dynamic=True)


@cache
def loops_work() -> bool:
    """Whether there is a C++ compiler that works. What it made is kept in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "cwdm" / "compiled"))

    def attempt() -> bool:
        with torch.inference_mode():
            loops(torch.square)(torch.zeros(2, 8))
        return True

    return _tried("compiled loops", attempt) is not None


def _tried(what: str, attempt: Callable[[], T]) -> T | None:
    """None if it fails, whatever a compiler that is absent or broken makes it raise."""
    try:
        return attempt()
    except Exception as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        logging.getLogger(__name__).info("without %s: %s", what, reason[0])
        return None
