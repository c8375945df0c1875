"""The first waist: what a rank stores of a parameter, as data. Nothing above this floor sees a wrapper's internals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Runs = npt.NDArray[np.int64]
"""int64 [n, 3]: rows (local offset, global start, length). Elements ``local[o : o + length]`` are the parameter's
row-major elements ``g : g + length``. Padding belongs to no run."""


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """The part of one trainable parameter that this rank stores. Made once from the sharded model, then frozen.

    Attributes:
        name: canonical name, as the plain, unwrapped model's ``named_parameters()`` has it; a tied weight has one.
        param_id: the noise's 64-bit key of that name.
        shape: the whole parameter's shape.
        local: what is stored here: 1-D, contiguous, the layout's own storage (writing it writes the model). On the meta
            device if it lies on disk between forwards: `storage` brings it into memory.
        runs: which global elements it holds; see `Runs`.
        replica: 0 on the ranks that together hold each element exactly once; other copies count up from 1.
        decayed: whether weight decay applies: not to biases and the weights of normalisation modules.
        paged: for a shard on disk, opens it in memory and keeps what was written to it.
    """

    name: str
    param_id: int
    shape: tuple[int, ...]
    local: torch.Tensor
    runs: Runs
    replica: int
    decayed: bool
    paged: Callable[[], AbstractContextManager[torch.Tensor]] | None = None

    def storage(self) -> AbstractContextManager[torch.Tensor]:
        """`local` in memory, to read and to write inside the context."""
        return nullcontext(self.local) if self.paged is None else self.paged()

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def local_numel(self) -> int:
        """Elements stored here, padding excluded."""
        return int(self.runs[:, 2].sum())


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """A place where a trainable parameter is read: ``getattr(module, attr)`` is its weight while the module runs."""

    module: nn.Module
    attr: str
    name: str
    param_id: int


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """A model as the floors above see it.

    Attributes:
        shards: what this rank stores, in the model's own order.
        sites: where it is read.
        refresh: drops stale gathered copies after a write.
        parameters: per shard name, the parameter as the model lists it; FSDP1's flat parameter may be that of several.
        gathers: whether a forward pass gets parameters, frozen ones too, from other ranks.
        in_attributes: whether parameters are ordinary attributes of their modules while those run, as FSDP1 keeps them.
        is_current: whether the model still stores and reads these shards: not once it was wrapped, cast, loaded by
            assignment, frozen or given other modules. Puts what a forward has gathered back if it must look closer.
    """

    shards: list[Shard]
    sites: list[Site]
    refresh: Callable[[], None]
    parameters: dict[str, nn.Parameter]
    gathers: bool
    in_attributes: bool
    is_current: Callable[[], bool]


def run(local_offset: int, global_start: int, length: int) -> Runs:
    """One contiguous run, or none when ``length`` is not positive."""
    rows = [(local_offset, global_start, length)] if length > 0 else []
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def memory_of(stored: torch.Tensor) -> tuple[object, ...]:
    """Tells a storage from any other while it is kept alive, as layouts do. Fake tensors have no address to compare."""
    return stored.untyped_storage()._cdata, stored.storage_offset(), stored.dtype, stored.shape, stored.stride()


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises. By type: torch's own, or a class that says so (every model family has its own)."""
    return "norm" in type(module).__name__.lower()


def is_decayed(module: nn.Module, attr: str) -> bool:
    """Whether weight decay applies to a module's parameter: not to biases, not to normalisation modules."""
    return "bias" not in attr and not is_normalisation(module)


def walk(model: nn.Module, unwrap: Callable[[nn.Module], nn.Module | None]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once with its canonical prefix ("" or "a.b."): a wrapper's own name never enters it."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        inner = unwrap(module)
        if inner is not None:
            stack.append((prefix, inner))
            continue
        yield prefix, module
        children = [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
        stack.extend(reversed(children))
