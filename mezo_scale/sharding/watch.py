"""Whether a model is still the one that was looked at: wrapping, casting, loading and freezing replace what a layout
rests on, and losses would look right while the updates went to storage that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mezo_scale.sharding import schemes
from mezo_scale.sharding.place import Place
from mezo_scale.sharding.shard import memory_of

Parameters = dict[str, nn.Parameter | None]
Storage = Callable[[Any], torch.Tensor]


class Watch:
    """A model's modules, parameters and storages as they are now, to be compared on every step.

    Args:
        model: as given to `discover`, in its sharded form.
        places: all of its places.
        paged: the parameters that lie on disk between forwards.
    """

    def __init__(self, model: nn.Module, places: Iterable[Place], paged: set[nn.Parameter]) -> None:
        self._children = [(module._modules, tuple(module._modules.values())) for module in model.modules()]
        own: dict[nn.Module, list[Place]] = {module: [] for module in model.modules()}
        inner = set()
        for place in places:
            if place.inner is None:
                own[place.module].append(place)
            else:
                inner.add(place.module)
        self._counts = [(module._parameters, len(module._parameters)) for module in own if module not in inner]
        self._tuned: list[tuple[Parameters, str, nn.Parameter, Storage, tuple[object, ...]]] = []
        self._paged: list[tuple[Parameters, str, nn.Parameter, Storage, torch.Tensor]] = []
        self._frozen: list[tuple[Parameters, str]] = []
        for module, listed in own.items():
            for place in listed:
                self._note(module._parameters, place, paged)
        watches = [adapter.watch(model) for adapter in schemes.ADAPTERS]
        self._others = [(watch, watch()) for watch in watches]

    def _note(self, params: Parameters, place: Place, paged: set[nn.Parameter]) -> None:
        param = place.param
        if not param.requires_grad:
            self._frozen.append((params, place.attr))
            return
        storage = schemes.adapter_of(place.name, param).storage
        if param in paged:
            self._paged.append((params, place.attr, param, storage, storage(param)))
        else:
            self._tuned.append((params, place.attr, param, storage, memory_of(storage(param))))

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
            if param is None or param.requires_grad:
                return False
        for params, attr, tuned, storage, memory in self._tuned:
            if params.get(attr) is not tuned or not tuned.requires_grad or memory_of(storage(tuned)) != memory:
                return False
        for params, attr, tuned, storage, stored in self._paged:
            if params.get(attr) is not tuned or not tuned.requires_grad or storage(tuned) is not stored:
                return False
        return all(watch() == state for watch, state in self._others)
