"""The rows of a tall batch: a unit's arguments divided among the branches, and its results joined again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from mezo_scale.errors import ViewError
from mezo_scale.perturbation import local, pairing


def split(
    module: nn.Module, kinds: pairing.Kinds, args: Any, kwargs: Any, count: int, tall: int
) -> list[tuple[Any, Any]]:
    """The arguments of each branch.

    Args:
        module: the unit, for messages.
        kinds: what dim 0 of each of its arguments is.
        count: branches.
        tall: rows of the whole batch.

    Raises:
        ViewError: rows that do not divide, or arguments that are not known.
    """
    if not args and not kwargs:
        return [(args, kwargs)] * count
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # nearly every call, without the bookkeeping
        if not _is_batched(module, next(iter(kinds.values()), None), args[0], tall):
            return [(args, kwargs)] * count
        return [((part,), kwargs) for part in _blocks(module, args[0], count)]
    if pairing.has_cache((args, kwargs)):
        raise ViewError(
            f"{type(module).__name__} needs its rows divided among the branches but keeps a cache of all of them: "
            "call the model with use_cache=False, or evaluate one branch at a time (paired=False)"
        )
    leaves, spec = tree_flatten_with_path((args, kwargs))
    parts = [
        _blocks(module, leaf, count)
        if isinstance(leaf, Tensor) and _is_batched(module, kinds.get(keystr(path)), leaf, tall)
        else [leaf] * count
        for path, leaf in leaves
    ]
    return [tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def merge(results: list[Any], rows: int) -> Any:
    """The branches' results as one tall result; a shared single row becomes each branch's own rows."""
    if isinstance(results[0], Tensor):
        return _join(results, rows)
    flat = [tree_flatten(result) for result in results]
    joined = [
        _join(list(leaves), rows) if isinstance(leaves[0], Tensor) else leaves[0]
        for leaves in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(joined, flat[0][1])


def _join(parts: list[Tensor], rows: int) -> Tensor:
    if parts[0].shape[0] == 1 and rows > 1:
        parts = [part.expand(rows, *part.shape[1:]) for part in parts]
    return local.join(parts)


def _is_batched(module: nn.Module, kind: str | None, leaf: Tensor, tall: int) -> bool:
    """Whether a unit's argument is divided. One row made to broadcast may have become each branch's rows upstream."""
    if kind == pairing.ONE or (kind is None and leaf.dim() > 0 and leaf.shape[0] in (1, tall)):
        return leaf.shape[0] != 1
    if kind is None and leaf.dim() > 0:
        raise ViewError(
            f"{type(module).__name__} got an argument of shape {tuple(leaf.shape)} that was not there when the "
            "model was first looked at. Evaluate one branch at a time (paired=False)"
        )
    return kind == pairing.BATCHED


def _blocks(module: nn.Module, tensor: Tensor, count: int) -> list[Tensor]:
    """Equal blocks of dim 0, one per branch."""
    size, rest = divmod(int(tensor.shape[0]), count)
    if rest:
        raise ViewError(
            f"{type(module).__name__} got {tensor.shape[0]} rows for {count} branches, which do not divide: its rows "
            "depend on the data. Evaluate one branch at a time (paired=False)"
        )
    return local.split(tensor, size)
