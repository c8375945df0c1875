"""Whether a model is still the one that was looked at: wrapping, casting, loading and freezing replace what a layout
rests on, and losses would look right while the updates went to storage that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mezo_scale.sharding import dtensor, flat_param, zero3

Mark = tuple[object, ...]


class Watch:
    """A model's modules, parameters and storages as they are now, to be compared on every step in tens of microseconds.

    Args:
        model: as given to `discover`, in its sharded form.
        places: (module, attr) of every parameter that is still its module's own.
    """

    def __init__(self, model: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
        self._children = [(module._modules, tuple(module._modules.values())) for module in model.modules()]
        self._units = [(unit, _flat_mark(unit)) for unit in flat_param.units(model)]
        own: dict[nn.Module, list[str]] = {module: [] for module in model.modules()}
        for module, attr in places:
            own[module].append(attr)
        flattened = {module for part in flat_param.slices(model) for module, _ in part.places}
        self._counts = [(module._parameters, len(module._parameters)) for module in own if module not in flattened]
        self._tuned: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, Mark]] = []
        self._frozen: list[tuple[dict[str, nn.Parameter | None], str]] = []
        for module, attrs in own.items():
            for attr in attrs:
                param = module._parameters[attr]
                if param is not None and param.requires_grad:
                    self._tuned.append((module._parameters, attr, param, _mark(param)))
                else:
                    self._frozen.append((module._parameters, attr))

    def is_unchanged(self) -> bool:
        """Whether every storage that a layout would list is the one it listed."""
        return (
            all(tuple(modules.values()) == children for modules, children in self._children)
            and all(len(params) == count for params, count in self._counts)
            and all(
                params.get(attr) is param and param.requires_grad and _mark(param) == mark
                for params, attr, param, mark in self._tuned
            )
            and not any(
                param is not None and param.requires_grad
                for param in (params.get(attr) for params, attr in self._frozen)  # offloading replaces frozen ones
            )
            and all(_flat_mark(unit) == mark for unit, mark in self._units)
        )


def _mark(param: torch.Tensor) -> Mark:
    """Tells a parameter's storage on this rank from any other while the old one is kept alive, as layouts do."""
    if zero3.owns(param):
        stored = param.ds_tensor  # type: ignore[attr-defined]
        return (id(stored), stored.dtype) if zero3.paged(param) is not None else _storage(stored)
    return _storage(param._local_tensor if dtensor.owns(param) else param)  # type: ignore[attr-defined]


def _storage(tensor: torch.Tensor) -> Mark:
    # Not the address of its elements: fake tensors have none.
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape


def _flat_mark(unit: nn.Module) -> Mark:
    flat, stored, trainable = flat_param.held(unit)
    return id(flat), *_storage(stored), trainable
