"""Tensor-parallel activations and weights: the local part of a DTensor, and a DTensor around a local part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mezo_scale.errors import ViewError
from mezo_scale.sharding import Runs
from mezo_scale.sharding.dtensor import runs_of


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, unless it is a DTensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(local: Tensor, model: Tensor) -> Tensor:
    """A local part as the kind of tensor that `model` is, of its shape."""
    if not isinstance(model, DTensor):
        return local
    return DTensor.from_local(
        local, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def runs_held(weight: Tensor) -> Runs | None:
    """Which elements of a DTensor this rank holds; None for any other tensor: all."""
    if not isinstance(weight, DTensor):
        return None
    coordinate = weight.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds no shard, and discover() has refused it"
    return runs_of(tuple(weight.shape), tuple(weight.device_mesh.shape), tuple(coordinate), weight.placements)


def split(tensor: Tensor, size: int) -> list[Tensor]:
    """Blocks of `size` rows; of a DTensor locally, where its placements stay as they are.

    Raises:
        ViewError: its rows are spread over ranks.
    """
    if not isinstance(tensor, DTensor):
        return list(torch.split(tensor, size))
    if any(placement.is_shard(0) for placement in tensor.placements):
        raise ViewError("a tensor-parallel plan shards the batch dim of an activation: shard hidden dims instead")
    return [
        DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False)
        for part in torch.split(tensor._local_tensor, size)
    ]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Blocks of rows as one tensor; DTensors locally: their placements, partial sums included, stay as they are."""
    first = parts[0]
    joined = torch.cat([local_of(part) for part in parts])
    if not isinstance(first, DTensor):
        return joined
    return DTensor.from_local(joined, first.device_mesh, first.placements, run_check=False)
