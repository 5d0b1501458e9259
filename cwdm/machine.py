"""What there is to compute with: devices, arithmetic, cores, memory."""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from cwdm.errors import InputError

__all__ = [
    "Precision",
    "capacity",
    "choose_bf16",
    "choose_device",
    "cores",
    "gigabytes",
    "give_back",
    "multiplies_bf16",
    "resident",
]

Precision = Literal["auto", "fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU if there is one; InputError if the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: found {torch.cuda.device_count()} CUDA devices")
    return device


def choose_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` takes bfloat16 where the hardware multiplies in it faster than in float32."""
    return multiplies_bf16(device) if precision == "auto" else precision == "bf16"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16 faster than in float32.

    AVX512-BF16 does so on AMD's processors. On Intel's it has half the units of float32 and twice
    the numbers in each, and convolutions are slower: there it has to be AMX.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # since torch 2.9; before, bfloat16 has to be asked for
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if about.get("amx_bf16"):
        return True
    return bool(about.get("avx512_bf16")) and "Intel" not in about.get("cpu_name", "")


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def capacity(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may use: of the machine, or by the limit of a container or a job.

    Args:
        groups: where the control groups of Linux are.
        own: says in which of them this process is.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mine = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    for _, controllers, path in mine:
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (
            (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        )
        group = top / path.strip("/")  # not there in a container, where the top is its own
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no number: no limit
                there = min(there, int((folder / name).read_text()))
    return there


def resident(figure: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM).

    On Linux, getrusage also counts what the process was started from. Elsewhere there is nothing
    but getrusage, and it only knows the most so far.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    values = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(values[figure].split()[0]) * 1024


def give_back() -> None:
    """Let the system have what was freed: the C library of Linux keeps some of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def gigabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.{2 if size < 1e9 else 1 if size < 1e10 else 0}f} GB"
