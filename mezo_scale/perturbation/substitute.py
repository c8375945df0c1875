"""Putting others in the place of what a module has while it runs, and running it in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mezo_scale.sharding import Site


def shadowed(weights: dict[Site, Tensor]) -> AbstractContextManager[None]:
    """``module.attr`` is the given tensor inside."""
    return standing_in([(site.module, site.attr, weight) for site, weight in weights.items()])


@contextmanager
def standing_in(values: Sequence[tuple[nn.Module, str, object]]) -> Iterator[None]:
    """``module.name`` is the given value inside.

    A name in an instance's ``__dict__`` is found before one in ``_parameters`` or in its class, whatever FSDP,
    DeepSpeed or a tied module keep there; taking it out restores everything.
    """
    missing = object()
    saved = [(module, name, module.__dict__.get(name, missing)) for module, name, _ in values]
    try:
        for module, name, value in values:
            module.__dict__[name] = value
        yield
    finally:
        for module, name, value in saved:
            if value is missing:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


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
