"""Every way to shard a model that is supported, done by the scheme's own API; and back again without mezo_scale.

`shard(layout, model)` shards (in place where the scheme does) and `gather(sharded)` returns every parameter, whole, by
its canonical name. What the ranks store is what is gathered: copies that a scheme keeps beside its shards are not
looked at.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.models import blocks


@dataclass(frozen=True)
class Sharded:
    model: nn.Module  # what the user would hold and call
    names: tuple[str, ...]  # canonical names, in the model's order
    gather: Callable[[], dict[str, Tensor]]  # collective
    close: Callable[[], object] = lambda: None


def shard(layout: str, model: nn.Module) -> Sharded:
    return LAYOUTS[layout](model)


def plain(model: nn.Module) -> Sharded:
    return Sharded(model, _names(model), lambda: {name: p.detach().clone() for name, p in model.named_parameters()})


def fsdp2(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = True,
    offload: bool = False,
    mixed: torch.dtype | None = None,
) -> Sharded:
    """`fully_shard` on every block, then on the root."""
    names = _names(model)
    options: dict[str, Any] = {
        "mesh": mesh or init_device_mesh("cpu", (dist.get_world_size(),)),
        "reshard_after_forward": reshard_after_forward,
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if mixed is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=mixed)
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return Sharded(model, names, lambda: _whole_dtensors(model))


def hsdp(model: nn.Module) -> Sharded:
    """Replicated over axis 0, sharded over axis 1: 2 ranks as 2 x 1, 4 as 2 x 2."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return fsdp2(model, mesh=mesh)


def fsdp1(model: nn.Module, *, use_orig_params: bool) -> Sharded:
    names = _names(model)
    policy = ModuleWrapPolicy({type(block) for block in blocks(model)})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )

    def gather() -> dict[str, Tensor]:
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
            whole = wrapped.state_dict()
        return {name: whole[name].clone() for name in names}

    return Sharded(wrapped, names, gather)


def zero3(model: nn.Module, *, persistence_threshold: int = 0, offload: bool = False) -> Sharded:
    names = _names(model)
    parameters = dict(model.named_parameters())
    stage3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": persistence_threshold}
    if offload:
        stage3["offload_param"] = {"device": "cpu", "pin_memory": False}
    dtypes = {parameter.dtype for parameter in parameters.values()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": stage3,
        "bf16": {"enabled": torch.bfloat16 in dtypes},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=None, config=config)
    engine.eval()

    def gather() -> dict[str, Tensor]:
        return {name: _whole_partitions(parameter) for name, parameter in parameters.items()}

    return Sharded(engine, names, gather, engine.destroy)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh | None = None) -> Sharded:
    """Llama's attention and MLP, columns then rows, over one axis of the mesh."""
    names = _names(model)
    plan = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    plan |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
    plan |= dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
    for block in blocks(model):
        parallelize_module(block, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return Sharded(model, names, lambda: _whole_dtensors(model))


def fsdp2_tensor_parallel(model: nn.Module) -> Sharded:
    """FSDP2 over axis 0, tensor parallelism over axis 1: strided shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("shard", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    return fsdp2(model, mesh=mesh["shard"])


def _names(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_parameters())


def _whole_dtensors(model: nn.Module) -> dict[str, Tensor]:
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()  # or a unit that kept its gathered weights would show those
    with torch.no_grad():
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def _whole_partitions(parameter: Any) -> Tensor:
    mine = parameter.ds_tensor.detach().clone()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(parameter.ds_process_group))]
    dist.all_gather(parts, mine, group=parameter.ds_process_group)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


LAYOUTS: dict[str, Callable[[nn.Module], Sharded]] = {
    "plain": plain,
    "fsdp2": fsdp2,
    "fsdp2-kept": functools.partial(fsdp2, reshard_after_forward=False),
    "fsdp2-default": functools.partial(fsdp2, reshard_after_forward=None),
    "fsdp2-two": functools.partial(fsdp2, reshard_after_forward=2),
    "fsdp2-offload": functools.partial(fsdp2, offload=True),
    "fsdp2-mixed": functools.partial(fsdp2, mixed=torch.bfloat16),
    "hsdp": hsdp,
    "fsdp1": functools.partial(fsdp1, use_orig_params=True),
    "fsdp1-flat": functools.partial(fsdp1, use_orig_params=False),
    "zero3": zero3,
    "zero3-persisted": functools.partial(zero3, persistence_threshold=100),
    "zero3-offload": functools.partial(zero3, offload=True),
    "tp": tensor_parallel,
    "fsdp2-tp": fsdp2_tensor_parallel,
}
