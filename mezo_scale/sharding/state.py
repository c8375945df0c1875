"""A rank's elements of a parameter as torch's checkpoints want them in an optimizer's state."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from mezo_scale.sharding import schemes


def as_state(param: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """A view of ``stored`` (1-D) in the parameter's shape and placements; as it is where the parameter has neither
    (FSDP1's flat ones, ZeRO-3's partitions)."""
    adapter = schemes.find(param)
    return stored if adapter is None else adapter.as_state(param, stored)


def fits(value: torch.Tensor, state: torch.Tensor) -> bool:
    """Whether a saved value can be copied into a state that `as_state` made."""
    if isinstance(state, DTensor):
        if not isinstance(value, DTensor) or value.placements != state.placements:
            return False
        return fits(value._local_tensor, state._local_tensor)
    return not isinstance(value, DTensor) and (value.shape, value.dtype) == (state.shape, state.dtype)


def copy_(state: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a saved value that fits."""
    if isinstance(state, DTensor) and isinstance(value, DTensor):
        state, value = state._local_tensor, value._local_tensor
    state.copy_(value)
