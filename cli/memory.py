"""What commands say about memory before they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cwdm.engine import Engine


def memory_line(engine: Engine, size: Sequence[int]) -> str:
    """What a chain for an image of so many voxels will take, and what there is."""
    from cwdm.machine import gigabytes

    where, there = _machine(engine.device)
    arithmetic = "bf16" if engine.bf16 else "fp32"
    needed = engine.peak(size)
    line = (
        f"memory: about {gigabytes(needed)} for {'x'.join(map(str, size))} voxels in "
        f"{arithmetic}; {where} has {gigabytes(there)}"
    )
    if needed <= there:
        return line
    if engine.streamable and not engine.streamed:
        line += ": too little, but --memory-limit keeps it to a few planes at a time"
    elif not engine.bf16 and (half := engine.peak(size, bf16=True)) < there:
        line += f": too little, but --precision bf16 takes about {gigabytes(half)}"
    return line


def _machine(device: torch.device) -> tuple[str, int]:
    """Where the network runs, and the bytes of memory there."""
    if device.type == "cuda":
        import torch

        return "this GPU", torch.cuda.get_device_properties(device).total_memory
    from cwdm.machine import capacity

    return "this machine", capacity()
