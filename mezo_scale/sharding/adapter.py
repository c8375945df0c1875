"""What a sharding scheme owes: one adapter, in a file of its own, that alone knows how the scheme stores parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import nn

from mezo_scale.sharding.shard import Runs


class Stored(NamedTuple):
    """What this rank stores of one parameter: `Shard` explains the fields of the same names."""

    shape: tuple[int, ...]
    local: torch.Tensor
    runs: Runs
    replica: int
    paged: Callable[[], AbstractContextManager[torch.Tensor]] | None = None


class Inner(NamedTuple):
    """One original parameter that a scheme keeps inside another tensor."""

    places: list[tuple[nn.Module, str]]  # the owner first, then the modules that share the weight
    param: nn.Parameter  # as the model lists it: the original one, or the one that holds many
    trainable: bool
    stored: Stored


class Adapter(Protocol):
    """A sharding scheme. `owns` and `stored` are every scheme's; the rest has a default that fits where a parameter's
    own storage is the shard and a forward pass leaves nothing gathered.

    Attributes:
        gathers: whether a forward pass gets what is stored from other ranks.
        movers: how the names of the Python modules begin whose code moves shards: what it reads is not computed with.
    """

    gathers: bool = True
    movers: tuple[str, ...] = ()

    def owns(self, param: torch.Tensor) -> bool:
        """Whether the scheme stores this parameter: its own kind and nothing else."""
        ...

    def stored(self, name: str, param: torch.Tensor) -> Stored:
        """What this rank stores of a parameter that it owns; purely local.

        Raises:
            ShardingError: it is stored in a way that is not supported. The message has the `name`.
        """
        ...

    def refresh(self, model: nn.Module) -> None:
        """After a write to the shards: the next forward sees it. Every rank calls it."""
        self.reshard(model)

    def reshard(self, model: nn.Module) -> None:
        """Give parameters that a forward pass left gathered their sharded form; purely local."""
        return

    def prepare(self, model: nn.Module) -> None:
        """Before the model is looked at: parameters get the storage that they keep."""
        self.reshard(model)

    def unwrap(self, module: nn.Module) -> nn.Module | None:
        """What a wrapper of this scheme wraps; None for any other module. Raises ShardingError if it can't be tuned."""
        return None

    def inner(self, model: nn.Module) -> Iterable[Inner]:
        """The parameters that lie inside others, frozen ones too."""
        return ()

    def shares_rows(self, model: nn.Module) -> bool:
        """Whether several ranks compute the losses of the same rows together, as under tensor parallelism."""
        return False

    def storage(self, param: torch.Tensor) -> torch.Tensor:
        """The tensor whose memory holds the shard of a parameter that it owns: replaced, the layout is another."""
        return param

    def watch(self, model: nn.Module) -> Callable[[], object]:
        """A function, cheap enough for every step, whose value changes when an inner parameter lies elsewhere."""
        return lambda: None

    def as_state(self, param: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
        """A rank's elements (1-D, any dtype) as torch's checkpoints want them in the state of an optimizer."""
        return elements
