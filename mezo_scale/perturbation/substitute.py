"""Putting other weights in a module's place while its forward runs: a tensor by name, or single rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mezo_scale import noise
from mezo_scale.sharding import Site


class RowsOf(TorchFunctionMode):
    """While open, ``F.embedding`` on one table returns perturbed rows of it."""

    def __init__(
        self, table: Tensor, param_id: int, branch: tuple[int, float], dtype: torch.dtype, distribution: str
    ) -> None:
        super().__init__()
        self.table, self.param_id, self.branch, self.dtype, self.distribution = (
            table,
            param_id,
            branch,
            dtype,
            distribution,
        )
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding or len(args) < 2 or args[1] is not self.table or kwargs.get("max_norm") is not None:
            return func(*args, **kwargs)
        self.used = True
        ids = args[0]
        flat = ids.reshape(1, -1).long()
        out = torch.empty(1, flat.shape[1], *self.table.shape[1:], dtype=self.dtype, device=self.table.device)
        noise.rows(self.table.detach(), self.param_id, [self.branch], flat, out, distribution=self.distribution)
        return out.view(*ids.shape, *self.table.shape[1:])


@contextmanager
def shadowed(weights: dict[Site, Tensor]) -> Iterator[None]:
    """``module.attr`` is the given tensor inside."""
    missing = object()
    saved = [(site, site.module.__dict__.get(site.attr, missing)) for site in weights]
    try:
        for site, weight in weights.items():
            site.module.__dict__[site.attr] = weight
        yield
    finally:
        for site, value in saved:
            if value is missing:
                site.module.__dict__.pop(site.attr, None)
            else:
                site.module.__dict__[site.attr] = value


def in_float32(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward on float32 copies of its 16-bit inputs, its results in their dtype again."""
    halves = [leaf.dtype for leaf in tree_leaves((args, kwargs)) if is_half(leaf)]
    if not halves:
        return forward(*args, **kwargs)
    args, kwargs = tree_map(lambda leaf: leaf.float() if is_half(leaf) else leaf, (args, kwargs))
    result = forward(*args, **kwargs)
    return tree_map(lambda leaf: leaf.to(halves[0]) if _is_single(leaf) else leaf, result)


def is_half(leaf: Any) -> bool:
    """Whether something is a tensor of 16-bit floating point numbers."""
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)


def _is_single(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float32
