"""A hash of a model's trainable values that does not depend on how they are sharded.

Each element contributes a mix of its bits, its index and its parameter's id; contributions add modulo 2^64, so ranks
add their parts in any order. It guards against the wrong base model, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mezo_scale.sharding.shard import Shard

_CHUNK = 1 << 20  # elements at a time: bounds the int64 temporaries at a few tens of MB
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15, Weyl's constant, as a signed integer
_MIX = -4658895280553007687  # 0xBF58476D1CE4E5B9, SplitMix64's first multiplier
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def local_hash(shards: Sequence[Shard]) -> int:
    """This rank's contribution, a signed 64-bit integer: replicas beyond the first contribute nothing."""
    total = 0
    for shard in shards:
        if shard.replica == 0:
            total += _hash(shard)
    return (total + 2**63) % 2**64 - 2**63


def _hash(shard: Shard) -> int:
    with shard.storage() as local:
        return _hash_elements(shard, local.view(_BITS[local.dtype]))


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
