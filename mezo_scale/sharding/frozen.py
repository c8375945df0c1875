"""What a model computes with besides its tuned weights: frozen parameters and saved buffers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mezo_scale import noise
from mezo_scale.errors import MezoError
from mezo_scale.sharding import schemes
from mezo_scale.sharding.discovery import modules, places, shard_of
from mezo_scale.sharding.shard import Shard


def frozen(model: nn.Module) -> tuple[list[Shard], list[str]]:
    """What this rank stores of a discovered model's frozen weights and saved buffers, of any dtype; and, by name and
    type, those whose storage is not known (quantised weights of other libraries)."""
    held, unknown = [], []
    for name, stored, kind in (*_parameters(model), *buffers(model)):
        if stored is None:
            unknown.append(f"{name} {kind}")
        else:
            held.append(stored)
    return held, unknown


def frozen_parameters(model: nn.Module) -> list[Shard]:
    """What this rank stores of a model's frozen weights, without saved buffers and kinds of storage not known."""
    return [stored for _, stored, _ in _parameters(model) if stored is not None]


def _parameters(model: nn.Module) -> Iterator[tuple[str, Shard | None, str]]:
    """(name, what is stored of it if that is known, type) of every frozen parameter."""
    seen: set[object] = set()
    for place in places(model):
        if place.trainable or place.identity in seen:
            continue
        seen.add(place.identity)
        try:
            stored = shard_of(place)
        except Exception:  # a foreign kind of storage may fail at anything; its name and type still count
            stored = None
        yield place.name, stored, type(place.param).__qualname__


def buffers(model: nn.Module) -> Iterator[tuple[str, Shard | None, str]]:
    """As `_parameters`, of every buffer that a checkpoint holds."""
    for prefix, module in modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, _of_buffer(prefix + name, buffer), type(buffer).__qualname__


def _of_buffer(name: str, buffer: torch.Tensor) -> Shard | None:
    try:
        stored = schemes.adapter_of(name, buffer).stored(name, buffer.contiguous())
    except (MezoError, RuntimeError):
        return None
    return Shard(name, noise.param_id(name), stored.shape, stored.local, stored.runs, stored.replica, decayed=False)
