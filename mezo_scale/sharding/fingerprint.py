"""A hash of a model's values that does not depend on how they are sharded.

Each element contributes a mix of its bits, its index and its parameter's id; contributions add modulo 2^64, so ranks
add their parts in any order. It guards against the wrong base model, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from mezo_scale import noise
from mezo_scale.sharding.frozen import frozen
from mezo_scale.sharding.shard import Shard

_CHUNK = 1 << 20  # elements at a time: bounds the int64 temporaries at a few tens of MB
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15, Weyl's constant, as a signed integer
_MIX = -4658895280553007687  # 0xBF58476D1CE4E5B9, SplitMix64's first multiplier
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def local_hash(shards: Sequence[Shard]) -> int:
    """This rank's contribution, a signed 64-bit integer: replicas beyond the first contribute nothing."""
    total = 0
    for shard in shards:
        if shard.replica == 0:
            total += _hash(shard)
    return (total + 2**63) % 2**64 - 2**63


def frozen_hash(model: nn.Module) -> tuple[int, bool]:
    """This rank's contribution for all that is not tuned (see `frozen`), and whether it has all the values.

    Weights that another library keeps on the meta device until they are needed have none to be hashed.
    """
    held, unknown = frozen(model)
    known = [shard for shard in held if shard.local.element_size() in _BITS]
    names = unknown + [f"{shard.name} {shard.local.dtype}" for shard in held if shard.local.element_size() not in _BITS]
    total = sum(noise.param_id(name) for name in names) if _is_first() else 0
    if any(shard.local.is_meta and shard.paged is None for shard in known):
        return 0, False
    return (total + local_hash(known) + 2**63) % 2**64 - 2**63, True


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _hash(shard: Shard) -> int:
    with shard.storage() as local:
        return _hash_elements(shard, local.view(_BITS[local.element_size()]))


def _hash_elements(shard: Shard, bits: torch.Tensor) -> int:
    salt = (shard.param_id + 2**63) % 2**64 - 2**63
    total = 0
    for offset, start, length in shard.runs.tolist():
        for begin in range(0, length, _CHUNK):
            count = min(_CHUNK, length - begin)
            index = torch.arange(start + begin, start + begin + count, dtype=torch.int64, device=bits.device)
            mixed = bits[offset + begin : offset + begin + count].to(torch.int64) + index.mul_(_ODD).add_(salt)
            mixed ^= mixed >> 29
            mixed *= _MIX
            mixed ^= mixed >> 32
            total += int(mixed.sum().item())
    return total
