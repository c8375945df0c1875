"""Normalisations in all branches at once: their weights, one row for each branch, broadcast over the branches' rows.

A module that scales what it has normalised is as happy with a weight [branches, 1, ..., 1, n] and an input whose dim 0
is the branches. Its class does not tell whether it is one of those: each module is tried once, on made-up numbers, and
has to return the bits that it returns branch by branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from mezo_scale.sharding.shard import is_normalisation

Run = Callable[[Mapping[str, Tensor], Tensor], Any]
"""A module's forward of an input, with those tensors in the place of its own parameters."""


class Broadcast:
    """Which modules were seen to take a weight for each branch."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], bool] = {}

    def takes(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        count: int,
        tuned: Mapping[str, torch.dtype],
        x: Tensor,
        run: Run,
    ) -> bool:
        """Whether `module` can be run once on `x`, the rows of `count` branches.

        Args:
            forward: what it runs; libraries of kernels put theirs in the place of a model's.
            tuned: its trainable parameters, with the dtype that each is perturbed in.
            x: [rows of all branches, ..., n].
            run: the same, with other weights.
        """
        key = module, type(module), getattr(forward, "__func__", forward), count, x.dtype, x.dim()
        if key not in self._seen:
            self._seen[key] = _gives_the_same(count, tuned, x, run)
        return self._seen[key]


def is_candidate(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether it is worth trying: a normalisation over the last dim of its only argument, without statistics."""
    if kwargs or len(args) != 1 or not is_normalisation(module) or module._modules or module._buffers:
        return False
    x = args[0]
    if not isinstance(x, Tensor) or isinstance(x, DTensor | FakeTensor) or x.dim() < 2 or not x.is_floating_point():
        return False
    with torch._C.DisableTorchFunction():  # a look at a guarded parameter is a call otherwise
        held = [param for param in module._parameters.values() if param is not None]
        return all(not isinstance(param, DTensor | FakeTensor) and param.shape == x.shape[-1:] for param in held)


def per_branch(weight: Tensor, dims: int) -> Tensor:
    """[branches, n] as [branches, 1, ..., 1, n], for `blocks` of an input of that many dims."""
    return weight.view(len(weight), *[1] * (dims - 1), weight.shape[-1])


def blocks(x: Tensor, count: int) -> Tensor:
    """[rows of all branches, ..., n] as [branches, rows, ..., n]."""
    return x.reshape(count, -1, *x.shape[1:])


def _gives_the_same(count: int, tuned: Mapping[str, torch.dtype], x: Tensor, run: Run) -> bool:
    """Whether all at once has the bits of one by one, on numbers of which no branch has another's."""
    width = x.shape[-1]
    made = {
        name: (_waves((count, width), 0.37 * number, x) + 1.5).to(dtype)
        for number, (name, dtype) in enumerate(tuned.items(), 1)
    }
    rows = blocks(_waves(tuple(x.shape), 0.7, x).to(x.dtype), count)
    one_by_one = [run({name: weight[branch] for name, weight in made.items()}, rows[branch]) for branch in range(count)]
    try:
        at_once = run({name: per_branch(weight, x.dim()) for name, weight in made.items()}, rows)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # a kernel that takes vectors only
    if not all(isinstance(result, Tensor) for result in (at_once, *one_by_one)):
        return False
    return torch.equal(at_once, torch.stack(one_by_one))


def _waves(shape: tuple[int, ...], step: float, like: Tensor) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32, device=like.device) * step).view(shape)
