"""Plain tensors: each rank holds the whole parameter; several ranks hold replicas of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mezo_scale.sharding.shard import Runs, run


def owns(param: torch.Tensor) -> bool:
    """A whole, ordinary tensor. Subclasses and parameters that another library has marked as its own are not.

    A fake tensor is ordinary here: a run for its allocations alone takes every step that a real one takes.
    """
    marked = hasattr(param, "ds_id") or getattr(param, "tensor_model_parallel", False)
    return type(param) in (nn.Parameter, FakeTensor) and type(param.data) in (torch.Tensor, FakeTensor) and not marked


def local(param: torch.Tensor) -> tuple[torch.Tensor, Runs, int]:
    """Local storage (1-D), its runs, the replica's number."""
    replica = dist.get_rank() if dist.is_initialized() else 0
    return param.detach().view(-1), run(0, 0, param.numel()), replica
