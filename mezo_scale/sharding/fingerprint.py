"""Hashes of a model's values that do not depend on how they are sharded: ranks add their parts in any order.

They guard against the wrong base model and against memory that has gone bad, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from mezo_scale import collectives, noise
from mezo_scale.sharding.digest import BITS, digest, signed
from mezo_scale.sharding.frozen import frozen
from mezo_scale.sharding.shard import Shard


def fingerprint(shards: Sequence[Shard]) -> str:
    """The hash of all ranks' shards, 16 hexadecimal digits. Every rank calls it."""
    return _text(*collectives.sum_integers([local_hash(shards)]))


def fingerprints(model: nn.Module, shards: Sequence[Shard]) -> tuple[str, str | None]:
    """The hash of the model's tuned `shards`, and of all else; None if a rank lacks values. Every rank calls it."""
    rest, complete = frozen_hash(model)
    tuned, rest, gaps = collectives.sum_integers([local_hash(shards), rest, int(not complete)])
    return _text(tuned), None if gaps else _text(rest)


def local_hash(shards: Sequence[Shard]) -> int:
    """This rank's contribution, a signed 64-bit integer: replicas beyond the first contribute nothing."""
    return signed(sum(shard_hash(shard) for shard in shards if shard.replica == 0))


def shard_hash(shard: Shard) -> int:
    """The contribution of a shard, whichever replica it is of: a signed 64-bit integer."""
    with shard.storage() as local:
        return digest(local, shard.runs, shard.param_id)


def frozen_hash(model: nn.Module) -> tuple[int, bool]:
    """This rank's contribution for all that is not tuned (see `frozen`), and whether it has all the values.

    Weights that another library keeps on the meta device until they are needed have none to be hashed.
    """
    held, unknown = frozen(model)
    known = [shard for shard in held if shard.local.element_size() in BITS]
    names = unknown + [f"{shard.name} {shard.local.dtype}" for shard in held if shard.local.element_size() not in BITS]
    total = sum(noise.param_id(name) for name in names) if _is_first() else 0
    if any(shard.local.is_meta and shard.paged is None for shard in known):
        return 0, False
    return signed(total + local_hash(known)), True


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _text(value: int) -> str:
    return f"{value % 2**64:016x}"
