"""Bytes that a rank receives in a step, by arithmetic. Tests count what the collectives of a real step carry."""

import math
from dataclasses import dataclass

from mezo_scale.distributed.layout import Strategy
from mezo_scale.planner.architecture import Architecture
from mezo_scale.planner.deepspeed import zero3_settings
from mezo_scale.planner.memory import gathered_dtype, shard_numel, shards_numel
from mezo_scale.planner.workload import BYTES, Workload

_FLOAT64 = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes per rank and step.

    Attributes:
        gathered: what all-gathers fill, this rank's own part and padding included: each weight once, whatever the
            number of branches.
        inside_node, between_nodes: what of it comes from other ranks, over which links (a ring: of the ranks of a
            node, one receives from another node). Averages over the ranks of a node.
        host: from host memory, or from disk through it, to the device, where the shards are offloaded.
        scalars: the one all-reduce: the sum of losses of each branch, the row count, three sums of squared slopes
            and two digests of the last record.
    """

    gathered: int
    inside_node: int
    between_nodes: int
    host: int
    scalars: int


def traffic(arch: Architecture, strategy: Strategy, workload: Workload, gpus_per_node: int = 8) -> Traffic:
    """What a step moves when the ranks of one copy fill nodes of `gpus_per_node`, or share one."""
    gathered = _gathered(arch, strategy, workload) if strategy.shard > 1 else 0
    received = gathered * (strategy.shard - 1) // strategy.shard
    between = received // gpus_per_node if strategy.shard > gpus_per_node else 0
    host = 0
    if strategy.offload is not None:
        host = shards_numel(arch, strategy) * BYTES[workload.stored(strategy)]
    # Beside those sums: news of reads, failures; and before a forward that gathers, whether a call is of a new kind.
    scalars = _FLOAT64 * (workload.branches + 8 + int(strategy.is_sharded)) if strategy.world_size > 1 else 0
    return Traffic(gathered, received - between, between, host, scalars)


def _gathered(arch: Architecture, strategy: Strategy, workload: Workload) -> int:
    total = sum(
        unit.count * shard_numel(unit.shapes, strategy) * BYTES[gathered_dtype(unit.kind, strategy, workload)]
        for unit in arch.units
    )
    if strategy.is_deepspeed:
        total += _again(arch, strategy, workload) * BYTES[workload.stored(strategy)]
    return total * strategy.shard


def _again(arch: Architecture, strategy: Strategy, workload: Workload) -> int:
    """Elements of a tied table on a rank, if the head is too far from the embeddings for ZeRO-3 to keep it."""
    placed = sum(owner.count * sum(map(math.prod, owner.shapes)) for owner in arch.owners)
    tied = placed - arch.numel
    settings = zero3_settings(workload.stored(strategy), strategy.offload)
    if tied == 0 or arch.numel - tied < settings["stage3_max_reuse_distance"]:
        return 0
    return shard_numel(((tied,),), strategy)
