"""Which modules can run all branches of one tall batch, and how their inputs and outputs divide among the branches.

Nothing is guessed from divisibility. Before the first paired evaluation the model runs twice, unperturbed, on two and
on three rows of its batch ([a, b] and [a, b, a]). A tensor whose dim 0 grows as 2 : 3 and whose third block equals its
first carries the batch in contiguous blocks; one whose dim 0 does not grow is shared (position ids, masks made to
broadcast); anything else (tokens sorted by expert) is neither. A module that owns trainable parameters is a *unit* if
its inputs and outputs divide cleanly; else its parent is asked, and so on up: T5's relative bias, a table over
positions without a batch dim, makes its attention module the unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from mezo_scale.errors import ViewError

BATCHED, ONE, SHARED, MIXED = "batched", "one", "shared", "mixed"

Kinds = dict[str, str]
"""Path of a tensor in a call's arguments (or its result) to what its dim 0 is: BATCHED, ONE row made to broadcast,
SHARED (no batch dim), or MIXED (none of these)."""


class PairingError(ViewError):
    """A call can't be evaluated in several branches at once. Raised before it runs, by all ranks that it takes."""


def in_words(error: Exception) -> str:
    """What an error says, in one line; with its type, unless it is one of ours."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ViewError) else f"{type(error).__name__}: {text}"


class Pairing:
    """What the two small runs taught: the units, and per unit how each argument and result divides."""

    def __init__(self, parents: dict[nn.Module, nn.Module]) -> None:
        self.parents = parents
        self.units: set[nn.Module] = set()
        self.inputs: dict[nn.Module, Kinds] = {}
        self.outputs: dict[nn.Module, Kinds] = {}
        self.known: set[tuple[nn.Module, tuple[str, ...]]] = set()

    def knows(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether such a call has been learned."""
        if _signature(entry, args, kwargs) in self.known:
            return True
        # A decoding step of a model whose first call is known: the same modules, one token at a time.
        return has_cache((args, kwargs)) and any(module is entry for module, _ in self.known)

    def run(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> list[Calls]:
        """Run ``entry`` on two and on three rows of its arguments; what went in and out of each module below it."""
        args, kwargs = _without_cache(args, kwargs)
        return [_record(entry, *_take_rows(args, kwargs, rows, count)) for count in (2, 3)]

    def settle(
        self,
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        calls: list[Calls],
        readers: Iterable[nn.Module],
    ) -> None:
        """From those two runs to the units below ``entry``: each reader that ran, or the module around it that divides.

        Raises:
            PairingError: the model's results can't be divided among the branches even as a whole.
        """
        for module, two in calls[0].items():
            three = calls[1].get(module, [])
            self.inputs[module] = _classify([c[0] for c in two], [c[0] for c in three])
            self.outputs[module] = _classify([c[1] for c in two], [c[1] for c in three])
        for reader in readers:
            if reader in calls[0]:
                self.units.add(self._unit_of(reader, entry))
        self.known.add(_signature(entry, args, kwargs))

    def _unit_of(self, owner: nn.Module, entry: nn.Module) -> nn.Module:
        module = owner
        while not self._is_clean(module):
            if module is entry:
                raise PairingError(
                    f"{type(entry).__name__} can't evaluate several branches in one batch: what "
                    f"{type(owner).__name__} takes or returns does not divide along dim 0. Evaluate one branch at a "
                    "time (paired=False), or return per-row results"
                )
            module = self.parents.get(module, entry)
            while module not in self.inputs and module is not entry:  # a container that is never called itself
                module = self.parents.get(module, entry)
        return module

    def _is_clean(self, module: nn.Module) -> bool:
        if module not in self.inputs or MIXED in self.inputs[module].values():
            return False
        return all(kind in (BATCHED, ONE) for kind in self.outputs[module].values())


def tensors(tree: Any) -> list[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in nested arguments."""
    leaves, _ = tree_flatten_with_path(tree)
    return [(keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def has_cache(tree: Any) -> bool:
    """Whether a key-value cache travels in the arguments: by what it can do, for every library has its own class."""
    leaves, _ = tree_flatten_with_path(tree)
    return any(hasattr(leaf, "get_seq_length") for _, leaf in leaves)


def batch_rows(args: tuple[Any, ...], kwargs: dict[str, Any], main_input: str | None) -> int:
    """Rows of the tall batch: dim 0 of the model's main input, else of its first tensor with a batch dim."""
    candidates = [kwargs[main_input]] if main_input is not None and isinstance(kwargs.get(main_input), Tensor) else []
    candidates += [t for _, t in tensors((args, kwargs)) if t.dim() >= 2] + [
        t for _, t in tensors((args, kwargs)) if t.dim() == 1
    ]
    if not candidates:
        raise ViewError(
            "a model was called without any batched tensor under several branches: pass the batch repeated per branch"
        )
    return int(candidates[0].shape[0])


def _take_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rows [a, b] or [a, b, a] of every batched argument."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
            return leaf
        return torch.stack([leaf[0], _other(leaf[0]), leaf[0]][:count])

    one_dimensional = {"cache_position"}  # positions, not rows: their length may equal the batch's by chance
    return tree_map(take, args), {k: v if k in one_dimensional else tree_map(take, v) for k, v in kwargs.items()}


def _other(row: Tensor) -> Tensor:
    """Another row, such that code that looks at the data shows it: one token all along, a mask with a hole."""
    if isinstance(row, FakeTensor):
        return row  # no values, in a run for its allocations alone
    if row.is_floating_point():
        return -row if bool(row.isfinite().all()) else row
    if row.numel() < 2 or int(row.max()) > 1:
        return row[..., :1].expand_as(row) if row.dim() else row
    other = row.clone()
    if bool(row.all()):
        other[..., -1] = 0  # a mask that hides nothing may be left out
    return other


def _without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kept = {key: value for key, value in kwargs.items() if not has_cache(value)}
    if "use_cache" in kept or len(kept) < len(kwargs):
        kept["use_cache"] = False
    return args, kept


def _signature(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    return entry, tuple(path for path, _ in tensors((args, kwargs)))


Call = tuple[dict[str, "Size"], dict[str, "Size"]]
Calls = dict[nn.Module, list[Call]]


def _record(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
    """Run ``entry`` and note, call by call, dim 0 of every tensor that a module below it takes and returns."""
    calls: Calls = defaultdict(list)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module].append((_sizes((args, kwargs)), _sizes(output)))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in entry.modules()]
    try:
        entry(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass(frozen=True, slots=True)
class Size:
    """Dim 0 of a tensor (-1: it has none), whether it is one row of several entries, whether block 3 repeats block
    1."""

    length: int
    one_row: bool
    repeats: bool


def _sizes(tree: Any) -> dict[str, Size]:
    return {path: _size(tensor) for path, tensor in tensors(tree)}


def _size(tensor: Tensor) -> Size:
    if tensor.dim() == 0:
        return Size(-1, False, True)
    # A single vector may as well be the only position of a table without a batch dim: no row to be repeated.
    one_row = tensor.shape[0] == 1 and tensor.numel() > tensor.shape[-1]
    return Size(int(tensor.shape[0]), one_row, _third_is_first(tensor))


def _third_is_first(tensor: Tensor) -> bool:
    """Of three equal blocks along dim 0, whether the third repeats the first (same row, so same values)."""
    if isinstance(tensor, DTensor | FakeTensor) or tensor.dim() == 0 or tensor.shape[0] % 3:
        return True
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    first, _, third = tensor.detach().chunk(3)
    if not tensor.is_floating_point():
        return bool(torch.equal(first, third))
    first, third = first.float(), third.float()
    scale = first.abs().nan_to_num(0, 0, 0).max().item()
    return bool(torch.allclose(first, third, rtol=1e-2, atol=1e-2 * scale, equal_nan=True))


def _classify(two: list[dict[str, Size]], three: list[dict[str, Size]]) -> Kinds:
    """A path's kind over all calls of a module: one that changes from call to call is MIXED."""
    if len(two) != len(three) or any(small.keys() != large.keys() for small, large in zip(two, three, strict=True)):
        return {"": MIXED}
    kinds: Kinds = {}
    for small, large in zip(two, three, strict=True):
        for path, size in small.items():
            kind = _kind(size, large[path])
            if kinds.setdefault(path, kind) != kind:
                kinds[path] = MIXED
    return kinds


def _kind(two: Size, three: Size) -> str:
    if two.length == three.length:
        return MIXED if two.length == 0 else ONE if two.one_row else SHARED
    return BATCHED if two.length * 3 == three.length * 2 and three.repeats else MIXED
