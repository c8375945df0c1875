"""Putting other weights in a module's place while its forward runs, and running it in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mezo_scale.sharding import Site


@contextmanager
def shadowed(weights: dict[Site, Tensor]) -> Iterator[None]:
    """``module.attr`` is the given tensor inside.

    A name in an instance's ``__dict__`` is found before one in ``_parameters``, whatever FSDP, DeepSpeed or a tied
    module keep there; taking it out restores everything.
    """
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
