"""How much memory a network will take, found without computing anything.

The network is run on tensors that have a shape, a device and a type but no numbers, and the bytes
of those alive at the same time are counted.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cwdm.wavelet import filters

__all__ = ["Footprint", "footprint"]

_SAMPLER = 2
"""Tensors of the size of x_t that samplers keep while the network computes: x_t, and the estimate
of x_0 before."""

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
        bf16: with autocast to bfloat16. Weights stay float32. A network that is made for inference
            knows its own arithmetic and device: for that one neither counts.
        training: forward and backward, with the gradients.
        device: where it would run.
    """
    filters("haar")  # kept from now on: not the ones without numbers
    if not training:
        with torch.device("meta"), _Alive():
            network = build()
        if hasattr(network, "joining"):  # it knows what its operations return
            return _measured(network, shape, channels, torch.device("meta"))
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second at its first use

    device = torch.device(device)
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        return _measured(build(), shape, channels, device, bf16=bf16, training=training)


def _measured(
    network: nn.Module,
    shape: Sequence[int],
    channels: int,
    device: torch.device,
    *,
    bf16: bool = False,
    training: bool = False,
) -> Footprint:
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    with torch.inference_mode(not training), device:
        x = torch.empty(*shape)
        t = torch.zeros(shape[0], dtype=torch.long)
        label = (t,) if hasattr(network, "label_emb") else ()
        with _Alive() as alive, autocast:
            alive.add(x, counts=not hasattr(network, "joining"))  # which takes parts as they are
            output = network(x, t, *label)
            if training:
                output.float().square().mean().backward()
    if training:
        return Footprint((1 + _OPTIMIZER) * weights, alive.peak)
    return Footprint(weights, alive.peak, _SAMPLER * x.nbytes * channels // shape[1])


def _outlined(func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """What an operation returns on tensors without numbers; None where torch has to find out.

    Of most it does so by its compiler, which takes a second and 140 MB to load.
    """
    name = func._schema.name.removeprefix("aten::")
    if "out" in kwargs:
        return kwargs["out"]
    if name.endswith("_"):
        return args[0]
    if name == "arange":
        dtype = kwargs.get("dtype") or torch.long
        return torch.empty(len(range(*map(int, args))), dtype=dtype, device="meta")
    if name == "cat":
        shape = list(args[0][0].shape)
        axis = args[1] if len(args) > 1 else 0
        shape[axis] = sum(each.shape[axis] for each in args[0])
        return args[0][0].new_empty(shape)
    if name == "mean":
        return args[0].sum(*args[1:])
    if name == "linear":
        return args[0].new_empty(*args[0].shape[:-1], len(args[1]))
    if name in ("mm", "addmm"):
        return args[-1].new_empty(len(args[-2]), args[-1].shape[1])
    if torch.Tag.pointwise in func.tags:
        tensors = [each for each in args if isinstance(each, Tensor)]
        dtype = reduce(torch.promote_types, [each.dtype for each in tensors])
        if not dtype.is_floating_point and any(isinstance(each, float) for each in args):
            dtype = torch.get_default_dtype()
        shape = torch.broadcast_shapes(*(each.shape for each in tensors))
        return tensors[0].new_empty(shape, dtype=dtype)
    return None


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it, until nothing refers to them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the compiler is imported, which takes a second

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
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        devices = {each.device for each in tensors} or {kwargs.get("device")}
        outlined = devices == {torch.device("meta")} and not func.is_view
        result = _outlined(func, args, kwargs) if outlined else None
        if result is None:
            result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.add(each)
        return result
