"""Whether a model is still the one that was looked at: wrapping, casting, loading and freezing replace what a layout
rests on, and losses would look right while the updates went to storage that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from mezo_scale.sharding import dtensor, flat_param, zero3

Mark = tuple[object, ...]
Parameters = dict[str, nn.Parameter | None]
Getter = Callable[[Any], torch.Tensor]
_LOCAL, _PARTITION = attrgetter("_local_tensor"), attrgetter("ds_tensor")


class Watch:
    """A model's modules, parameters and storages as they are now, to be compared on every step.

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
        self._tuned: list[tuple[Parameters, str, nn.Parameter, Getter | None, Mark]] = []
        self._paged: list[tuple[Parameters, str, nn.Parameter, object]] = []
        self._frozen: list[tuple[Parameters, str]] = []
        for module, attrs in own.items():
            for attr in attrs:
                self._note(module._parameters, attr)

    def _note(self, params: Parameters, attr: str) -> None:
        param: Any = params[attr]
        if not param.requires_grad:
            self._frozen.append((params, attr))
        elif zero3.owns(param) and zero3.paged(param) is not None:
            self._paged.append((params, attr, param, param.ds_tensor))
        else:
            getter = _LOCAL if dtensor.owns(param) else _PARTITION if zero3.owns(param) else None
            self._tuned.append((params, attr, param, getter, _mark(param if getter is None else getter(param))))

    def is_unchanged(self) -> bool:
        """Whether every storage that a layout would list is the one it listed."""
        for children, listed in self._children:
            if tuple(children.values()) != listed:
                return False
        for params, count in self._counts:
            if len(params) != count:
                return False
        for params, attr in self._frozen:  # not their storage, which offloading replaces at every forward
            param = params.get(attr)
            if param is not None and param.requires_grad:
                return False
        for params, attr, tuned, getter, mark in self._tuned:
            if params.get(attr) is not tuned or not tuned.requires_grad:
                return False
            if _mark(tuned if getter is None else getter(tuned)) != mark:
                return False
        for params, attr, tuned, stored in self._paged:
            if params.get(attr) is not tuned or not tuned.requires_grad or _PARTITION(tuned) is not stored:
                return False
        return all(_flat_mark(unit) == mark for unit, mark in self._units)


def _mark(stored: torch.Tensor) -> Mark:
    """Tells a storage from any other while it is kept alive, as layouts do. Fake tensors have no address to compare."""
    return stored.untyped_storage()._cdata, stored.storage_offset(), stored.dtype, stored.shape


def _flat_mark(unit: nn.Module) -> Mark:
    flat, stored, trainable = flat_param.held(unit)
    return id(flat), *_mark(stored), trainable
