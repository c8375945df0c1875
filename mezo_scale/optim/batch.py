"""Rows of a batch: how many there are, some of them, and all of them several times over.

A batch is a mapping, nested at will. Its leaves with rows are tensors and arrays (along dim 0), lists and tuples; all
have the same length. Text, numbers, None and tensors without dims belong to every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = Mapping[str, Any]


def rows(batch: Batch) -> int:
    """How many rows a batch has.

    Raises:
        ValueError: it is no mapping, has no rows, or holds something whose rows are not these; the message names it.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"the batch is a {type(batch).__name__}: expected a mapping of names to tensors or lists")
    leaves = [(key, len(leaf), isinstance(leaf, Tensor)) for key, leaf in _leaves(batch, "batch") if _has_rows(leaf)]
    if not leaves:
        raise ValueError(
            "the batch holds no tensor and no list: expected a mapping of names to tensors with rows along dim 0"
        )
    first, count, _ = next((leaf for leaf in leaves if leaf[2]), leaves[0])
    for key, size, _ in leaves:
        if size != count:
            raise ValueError(
                f"{key} has {size} rows but {first} has {count}: give tensors, arrays, lists and tuples one entry per "
                "row, and pass what belongs to all rows in the objective"
            )
    if count == 0:
        raise ValueError("the batch has no rows on this rank: give every rank at least one")
    return count


def repeat(batch: Batch, count: int) -> Batch:
    """All rows, then all rows again, ``count`` times in all."""
    index = np.tile(np.arange(rows(batch)), count)

    def again(leaf: Any) -> Any:
        if isinstance(leaf, list | tuple):
            return leaf * count
        return torch.cat([leaf] * count) if isinstance(leaf, Tensor) else leaf[index]

    return _map(batch, again)


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop``, views of the batch's own where they are tensors."""
    return _map(batch, lambda leaf: leaf[start:stop])


def pick(batch: Batch, index: Sequence[int]) -> Batch:
    """Rows by their numbers, in that order, each as often as it is named."""

    def picked(leaf: Any) -> Any:
        if isinstance(leaf, list | tuple):
            return type(leaf)(leaf[row] for row in index)
        return leaf[torch.tensor(index, device=leaf.device)] if isinstance(leaf, Tensor) else leaf[list(index)]

    return _map(batch, picked)


def _map(batch: Batch, of_leaf: Callable[[Any], Any]) -> Batch:
    """The batch with other rows, in a mapping of its own type where that can be made from items."""
    items = {
        key: _map(value, of_leaf) if isinstance(value, Mapping) else of_leaf(value) if _has_rows(value) else value
        for key, value in batch.items()
    }
    if type(batch) is dict:
        return items
    try:
        made: Batch = type(batch)(items)  # type: ignore[call-arg]
        same = list(made) == list(items) and all(made[key] is value for key, value in items.items())
    except Exception:  # somebody's own mapping may be made in any other way
        same = False
    return made if same else items


def _leaves(batch: Batch, where: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in nested mappings. Raises ValueError for what may hide rows."""
    for key, value in batch.items():
        name = f"{where}[{key!r}]"
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        elif _is_known(value):
            yield name, value
        else:
            raise ValueError(
                f"{name} is a {type(value).__module__}.{type(value).__qualname__}, whose rows can't be told: give "
                "strided tensors, numpy arrays, lists or tuples"
            )


def _has_rows(leaf: Any) -> bool:
    return type(leaf) in (list, tuple) or (isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0)


def _is_known(leaf: Any) -> bool:
    """Whether a leaf's rows are known, or it can't have any."""
    if isinstance(leaf, Tensor):
        return leaf.layout == torch.strided and not leaf.is_nested
    if _has_rows(leaf) or isinstance(leaf, str | bytes | np.ndarray | np.generic | type):
        return True
    record = dataclasses.is_dataclass(leaf)
    return not record and not any(hasattr(leaf, name) for name in ("__len__", "__iter__", "__getitem__"))
