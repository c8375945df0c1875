"""Looks at a model and lists its parameters, whatever they are stored in. The adapters know the kinds of storage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mezo_scale import noise
from mezo_scale.errors import ModelError, ShardingError
from mezo_scale.sharding import schemes
from mezo_scale.sharding.place import Place
from mezo_scale.sharding.plain import Plain
from mezo_scale.sharding.shard import Layout, Shard, Site, is_decayed, walk
from mezo_scale.sharding.watch import Watch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shards(model: nn.Module) -> list[Shard]:
    """What this rank stores of every trainable parameter, in the model's own order.

    Args:
        model: plain, or sharded by ``fully_shard``, FSDP1, ``deepspeed.initialize`` (stage 3), tensor parallelism,
            ``accelerate`` or ``from_pretrained(distributed_config=...)``. It is neither wrapped nor copied.

    Raises:
        ShardingError: a wrapper or a parameter type that is not known, or parameters in one memory.
        ModelError: nothing trainable, TorchScript, or parameters that are quantised or on the meta device.
    """
    return discover(model).shards


def discover(model: nn.Module) -> Layout:
    """The model's `Layout`; puts gathered parameters back into their sharded form first. Errors as in `shards`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is a TorchScript module, whose compiled code reads its own weights: build it "
                "from its Python code and load its state_dict"
            )
    prepare(model)
    listed = list(places(model))
    found: dict[object, Shard] = {}
    sites: list[Site] = []
    parameters: dict[str, nn.Parameter] = {}
    for place in listed:
        if not place.trainable:
            continue
        if place.identity not in found:
            shard = found[place.identity] = shard_of(place)
            _check_storage(place.module, shard)
            parameters[shard.name] = place.param
        shard = found[place.identity]
        sites.append(Site(place.module, place.attr, shard.name, shard.param_id))
    if not found:
        raise ModelError("the model has no trainable parameter: set requires_grad on what MeZO is to tune")
    _check_apart(model, listed)
    watch = Watch(model, listed, {parameters[shard.name] for shard in found.values() if shard.paged is not None})

    keep = {place.adapter for place in listed}
    keepers = [adapter for adapter in schemes.ADAPTERS if adapter in keep or any(adapter.inner(model))]

    def refresh() -> None:
        for adapter in keepers:
            adapter.refresh(model)

    def is_current() -> bool:
        if watch.is_unchanged():
            return True
        for adapter in schemes.ADAPTERS:
            adapter.reshard(model)  # what a forward has gathered hides the shards
        return watch.is_unchanged()

    inner = any(place.inner is not None for place in listed)
    gathers = inner or any((adapter := place.adapter) is not None and adapter.gathers for place in listed)
    return Layout(list(found.values()), sites, refresh, parameters, gathers, inner, is_current)


def prepare(model: nn.Module) -> None:
    """Gives the model's parameters the storage that they keep."""
    for adapter in schemes.ADAPTERS:
        adapter.prepare(model)


def check_not_hidden(old: Layout, new: Layout) -> None:
    """Raise ShardingError for a tuned weight that is a plain attribute now, made from something out of sight."""
    seen = {(site.module, site.attr) for site in new.sites}
    for site in old.sites:
        if (site.module, site.attr) not in seen and isinstance(site.module.__dict__.get(site.attr), torch.Tensor):
            raise ShardingError(
                f"{site.name} is no longer a parameter but a tensor that something else makes (an FSDP1 unit around "
                "the given model, a parametrization): make the optimizer from the wrapped model"
            )


def places(model: nn.Module) -> Iterator[Place]:
    """Every place of every parameter, frozen ones too, in the model's own order."""
    inner = {place: part for adapter in schemes.ADAPTERS for part in adapter.inner(model) for place in part.places}
    holders = {part.param for part in inner.values()} - {module._parameters.get(attr) for module, attr in inner}
    for prefix, module in modules(model):
        own = {attr: param for attr, param in module._parameters.items() if param is not None}
        attrs = [attr for attr, param in own.items() if (module, attr) in inner or param not in holders]
        attrs += [attr for owner, attr in inner if owner is module and attr not in attrs]
        for attr in attrs:
            part = inner.get((module, attr))
            yield Place(module, attr, prefix + attr, own[attr] if part is None else part.param, part)


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical prefix, module) of every module, wrappers left out."""
    return walk(model, schemes.unwrap)


def shard_of(place: Place) -> Shard:
    """What this rank stores of a parameter. Raises ShardingError for a kind that is not known."""
    shape, local, runs, replica, paged = (
        schemes.adapter_of(place.name, place.param).stored(place.name, place.param)
        if place.inner is None
        else place.inner.stored
    )
    decayed = is_decayed(place.module, place.attr)
    return Shard(place.name, noise.param_id(place.name), shape, local, runs, replica, decayed, paged)


def _check_apart(model: nn.Module, listed: list[Place]) -> None:
    """Raise ShardingError if a trainable parameter shares memory with another parameter or with a buffer: it would move
    with it, and not be perturbed with it. (A tied weight is one parameter in several places.)"""
    stored: list[tuple[int, int, str, bool]] = []
    own = {id(place.param): place for place in listed if place.inner is None}
    named = [(place.name, place.param, place.trainable) for place in own.values()]
    for name, held, trainable in [*named, *((name, held, False) for name, held in model.named_buffers())]:
        if not isinstance(schemes.find(held), Plain) or not _has_memory(held):
            continue
        start = held.data_ptr()
        stored.append((start, start + held.numel() * held.element_size(), name, trainable))
    end, last, last_trainable = 0, "", False
    for start, stop, name, trainable in sorted(stored):
        if start < end and (trainable or last_trainable):
            raise ShardingError(
                f"{name} and {last} lie in the same memory, but are not one parameter, so that one would move with the "
                "other and not be perturbed with it: tie them by giving both modules the same parameter"
            )
        if stop > end:
            end, last, last_trainable = stop, name, trainable


def _has_memory(held: torch.Tensor) -> bool:
    """Whether a tensor's numbers lie one after the other in memory."""
    if isinstance(held, FakeTensor) or held.is_meta or held.layout != torch.strided or held.numel() == 0:
        return False
    return held.is_contiguous() and held.data_ptr() != 0


def _check_storage(module: nn.Module, shard: Shard) -> None:
    name, local = shard.name, shard.local
    if local.is_meta and shard.paged is None:
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{name} is offloaded by accelerate (device_map or cpu_offload), which copies it in for each forward "
                "and drops what is written to it: load the model without a device_map and shard it with FSDP2 or "
                "ZeRO-3 (both offload), or freeze it"
            )
        raise ModelError(f"{name} is on the meta device and has no values: load or initialise the model first")
    if local.dtype not in DTYPES:
        raise ModelError(
            f"{name} is stored as {local.dtype} (quantised?): trainable weights must be float32, bfloat16 or float16; "
            "load without quantisation, or freeze it"
        )
