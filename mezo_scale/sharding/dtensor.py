"""DTensor: FSDP2 (1-D and HSDP meshes), tensor parallelism, and both together.

A DTensor's placements say, mesh axis by mesh axis, how a tensor dim is cut. Following them on the list of a dim's
indices, rather than on (offset, size), covers FSDP2's strided shards as well: what is left is the product of one index
list per dim, and its row-major neighbours merge into runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from mezo_scale.errors import ShardingError
from mezo_scale.sharding.adapter import Adapter, Stored
from mezo_scale.sharding.shard import Runs

Indices = npt.NDArray[np.int64]


class DTensors(Adapter):
    movers = ("torch.distributed.",)

    def owns(self, param: torch.Tensor) -> bool:
        return isinstance(param, DTensor)

    def stored(self, name: str, param: Any) -> Stored:
        stored = param._local_tensor.detach()
        mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
        if coordinate is None:
            raise ShardingError(f"this rank is not part of the mesh {mesh}: start one process per mesh position")
        runs = runs_of(tuple(param.shape), tuple(mesh.shape), tuple(coordinate), param.placements)
        if not stored.is_contiguous() or int(runs[:, 2].sum()) != stored.numel():
            raise ShardingError(
                f"{name} is a DTensor of shape {tuple(param.shape)} with placements {param.placements} that stores "
                f"{tuple(stored.shape)} here, but its placements say {int(runs[:, 2].sum())} contiguous elements: this "
                "layout is not supported"
            )
        return Stored(tuple(param.shape), stored.view(-1), runs, _replica(mesh, coordinate, param.placements))

    def storage(self, param: Any) -> torch.Tensor:
        return param._local_tensor  # type: ignore[no-any-return]

    def shares_rows(self, model: nn.Module) -> bool:
        """Not where all that is a DTensor is so by FSDP2, on the mesh whose ranks have rows of their own."""
        units = [group for module in model.modules() if isinstance(module, FSDPModule) for group in _groups(module)]
        own = {
            param.sharded_param
            for group in units
            for param in group.fsdp_params
            if param.sharded_param.device_mesh == group.mesh_info.mesh
        }
        self.reshard(model)
        return any(isinstance(param, DTensor) and param not in own for param in model.parameters())

    def as_state(self, param: Any, elements: torch.Tensor) -> torch.Tensor:
        """A DTensor that is placed as the parameter is."""
        return DTensor.from_local(
            elements.view(param._local_tensor.shape),
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )

    def prepare(self, model: nn.Module) -> None:
        """FSDP2's parameters get the storage that its first forward would give them.

        Raises:
            ShardingError: two units keep a weight, each in a padded storage of its own, of which one would get stale.
        """
        self.reshard(model)
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # Modules that were given as one unit have one group.
        kept = dict.fromkeys(param for unit in units for group in _groups(unit) for param in group.fsdp_params)
        for param in kept:
            param.reset_sharded_param()  # pads what was loaded later; else the first forward moves it
        for weight in {param.sharded_param for param in kept if _is_padded(param.sharded_param)}:
            if sum(param.sharded_param is weight for param in kept) > 1:
                raise ShardingError(
                    f"{tuple(weight.shape)} is a tied weight in two units of FSDP2, and does not divide by the ranks: "
                    "each unit pads a copy of its own. Give fully_shard the modules that share it as one unit, or take "
                    "a number of ranks that divides its rows"
                )

    def reshard(self, model: nn.Module) -> None:
        """The root, and units that keep their gathered weights after a forward, would not see a write."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def runs_of(shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Any) -> Runs:
    """The runs that the rank at ``coordinate`` of a mesh of that shape stores. Pure integer arithmetic."""
    indices: list[Indices] = [np.arange(size, dtype=np.int64) for size in shape]
    for size, position, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise ShardingError(f"a parameter has the placement {placement}: expected Shard or Replicate")
        dim = placement.dim
        pieces = (
            _chunk(indices[dim], int(placement.split_factor))
            if isinstance(placement, _StridedShard)
            else [indices[dim]]
        )
        indices[dim] = np.concatenate([_chunk(piece, size)[position] for piece in pieces])
    starts: Indices = np.zeros(1, dtype=np.int64)
    width = stride = 1  # width: the elements, from the last dim on, that hang together
    for size, index in zip(reversed(shape), reversed(indices), strict=True):
        if width == stride and len(index) == size:
            width *= size
        else:
            starts = (index[:, None] * stride + starts[None, :]).reshape(-1)
        stride *= size
    return _merge(starts, width)


def _merge(starts: Indices, width: int) -> Runs:
    """Equal blocks of ``width`` elements at ``starts``, stored one after the other, as the fewest runs."""
    if len(starts) == 0 or width == 0:
        return np.empty((0, 3), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(starts) != width) + 1
    first = np.concatenate([[0], breaks])
    count = np.diff(np.concatenate([first, [len(starts)]]))
    return np.stack([first * width, starts[first], count * width], axis=1).astype(np.int64)


def _chunk(index: Indices, pieces: int) -> list[Indices]:
    """torch.chunk's cut, with empty pieces at the end so that there are always ``pieces``."""
    size = -(-len(index) // pieces) if len(index) else 0
    return [index[i * size : (i + 1) * size] for i in range(pieces)]


def _replica(mesh: DeviceMesh, coordinate: Sequence[int], placements: Any) -> int:
    """The position among the copies: row-major over the axes that replicate.

    Those are axes of the parameter's own mesh, and axes of the mesh that it is a slice of: under FSDP2 with tensor
    parallelism, what is not parallelised is on the first axis alone, once for each position on the second.
    """
    number = 0
    whole = mesh._get_root_mesh()
    members = set(mesh.mesh.flatten().tolist())
    place = whole.get_coordinate()
    for axis, position in enumerate(place or ()):
        others = [slice(None) if other == axis else index for other, index in enumerate(place or ())]
        if not members.issuperset(whole.mesh[tuple(others)].tolist()):
            number = number * whole.size(axis) + position
    for size, position, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if isinstance(placement, Replicate):
            number = number * int(size) + position
    return number


def _is_padded(weight: DTensor) -> bool:
    """Whether the ranks' parts are of unequal sizes: asked of the whole, so that all ranks say the same."""
    cuts = zip(weight.placements, weight.device_mesh.shape, strict=True)
    return any(isinstance(placement, Shard) and weight.shape[placement.dim] % size for placement, size in cuts)


def _groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
