"""How much memory a network will take, found without computing anything.

The network is run on tensors that have a shape, a device and a type but no numbers, and the bytes
of those alive at the same time are counted.
"""

import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cwdm.wavelet import filters

__all__ = ["Footprint", "footprint", "give_back"]

_SAMPLER = 6
"""Tensors of the size of x_t that samplers keep beside the network: x_t, the estimate of x_0 and
the one before, its image while it is clamped, noise, and the sum of them."""


_OPTIMIZER = 3
"""Copies of the weights that training keeps beside them: Adam's two moments and the average."""


@dataclass(frozen=True)
class Footprint:
    """Bytes at the moment when the most is needed."""

    weights: int
    """In training with what the optimizer and the average keep for each."""
    network: int
    """Features of one evaluation, and the input where it has to be made; in training gradients as
    well."""
    sampler: int = 0

    @property
    def total(self) -> int:
        """All of it, without Python, torch, the workspace of convolutions and fragmentation."""
        return self.weights + self.network + self.sampler


def footprint(
    build: Callable[[], nn.Module],
    shape: Sequence[int],
    *,
    channels: int = 8,
    bf16: bool = False,
    training: bool = False,
    device: torch.device | str = "cpu",
) -> Footprint:
    """What sampling at a size takes, in inference; or a step of training.

    Args:
        build: makes the network, which maps (B, C, X, Y, Z) and times (B,) to
            (B, channels, X, Y, Z).
        shape: (B, C, X, Y, Z), that of its input, conditions included.
        channels: those of x_t.
        bf16: with autocast to bfloat16. Weights stay float32.
        training: forward and backward, with the gradients.
        device: where it would run.
    """
    device = torch.device(device)
    filters("haar")  # kept from now on: not the ones without numbers
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.inference_mode(not training),
        device,
    ):
        network = build()
        weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        x = torch.empty(*shape)
        t = torch.zeros(shape[0], dtype=torch.long)
        label = (t,) if hasattr(network, "label_emb") else ()
        with _Alive() as alive, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            alive.add(x, counts=not hasattr(network, "joining"))  # which takes parts as they are
            output = network(x, t, *label)
            if training:
                output.float().square().mean().backward()
    if training:
        return Footprint((1 + _OPTIMIZER) * weights, alive.peak)
    return Footprint(weights, alive.peak, _SAMPLER * x.nbytes * channels // shape[1])


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor, *, counts: bool = True) -> None:
        """Count a tensor from now on, or know that it does not count; views of it add nothing."""
        storage = tensor.untyped_storage()
        if (key := id(storage)) not in self._known:
            self._known.add(key)
            size = storage.nbytes() if counts else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.add(each)
        return result


def give_back() -> None:
    """Let the system have what was freed: the C library of Linux keeps some of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
