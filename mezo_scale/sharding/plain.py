"""Plain tensors: each rank holds the whole parameter; several ranks hold replicas of it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.parallel import DistributedDataParallel

from mezo_scale.errors import ShardingError
from mezo_scale.sharding.adapter import Adapter, Stored
from mezo_scale.sharding.shard import run


class Plain(Adapter):
    gathers = False

    def owns(self, param: torch.Tensor) -> bool:
        """A whole, ordinary tensor. Subclasses and parameters that another library has marked as its own are not.

        A fake tensor is ordinary here: a run for its allocations alone takes every step that a real one takes.
        """
        marked = getattr(param, "tensor_model_parallel", False)
        ordinary = (nn.Parameter, torch.Tensor, FakeTensor)
        return type(param) in ordinary and type(param.data) in (torch.Tensor, FakeTensor) and not marked

    def stored(self, name: str, param: torch.Tensor) -> Stored:
        if not param.is_contiguous():
            raise ShardingError(f"{name} is not contiguous in memory: call .contiguous() on it before tuning")
        replica = dist.get_rank() if dist.is_initialized() else 0
        return Stored(tuple(param.shape), param.detach().view(-1), run(0, 0, param.numel()), replica)

    def unwrap(self, module: nn.Module) -> nn.Module | None:
        if isinstance(module, DistributedDataParallel):
            return module.module  # type: ignore[no-any-return]
        if isinstance(module, CheckpointWrapper):
            return module._checkpoint_wrapped_module  # type: ignore[no-any-return]
        compiled = sys.modules.get("torch._dynamo.eval_frame")  # there if something was compiled; importing it is slow
        if compiled is not None and isinstance(module, compiled.OptimizedModule):
            return module._orig_mod  # type: ignore[no-any-return]
        return None

    def as_state(self, param: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
        return elements.view(param.shape)
