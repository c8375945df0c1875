"""Whether ranks that store the same elements have the same values of them: what no exchange of scalars can show."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mezo_scale import collectives
from mezo_scale.errors import RankError
from mezo_scale.sharding.digest import BITS, signed
from mezo_scale.sharding.fingerprint import shard_hash
from mezo_scale.sharding.shard import Shard

_Table = npt.NDArray[np.int64]
"""int64 [ranks, shards, 3]: which elements a rank stores of a shard, as a number; which copy that is; their hash."""


def compare(shards: Sequence[Shard], frozen: Iterable[Shard], step: int) -> None:
    """Compare the values of all elements that more than one rank stores. Every rank calls it, with the same names.

    Where no rank holds a second copy of anything (all of it is sharded), nothing is hashed.

    Args:
        shards: what is tuned.
        frozen: what is not; a kind of storage that can't be hashed is left out.
        step: steps done, for the message.

    Raises:
        RankError: values differ; on all ranks alike, naming those whose values few others have, or all of them where
            it can't be said which are right.
    """
    every = [*shards, *(shard for shard in frozen if _can_be_hashed(shard))]
    if not collectives.max_integer(max((shard.replica for shard in every), default=0)):
        return
    mine = [(_place(shard), shard.replica, shard_hash(shard)) for shard in every]
    everyone = collectives.gather_table(np.array(mine, np.int64))
    odd, certain = set(), True
    first = None
    for number, shard in enumerate(every):
        ranks, sure = _odd(everyone[:, number])
        first = first or (shard.name if ranks else None)
        odd |= ranks
        certain &= sure
    if odd:
        raise RankError(_message(sorted(odd), certain, f"{first}", step, everyone[:, : len(shards)]))


def _can_be_hashed(shard: Shard) -> bool:
    return shard.local.element_size() in BITS and not (shard.local.is_meta and shard.paged is None)


def _place(shard: Shard) -> int:
    """Which elements they are: the same number on ranks that store the same ones."""
    return signed(shard.param_id ^ zlib.crc32(np.sort(shard.runs[:, 1:], axis=0).tobytes()))


def _odd(rows: _Table) -> tuple[set[int], bool]:
    """The ranks whose values of one parameter are not those of most, and whether there are such most."""
    groups: dict[int, list[int]] = defaultdict(list)
    for rank, place in enumerate(rows[:, 0].tolist()):
        groups[place].append(rank)
    odd: set[int] = set()
    certain = True
    for ranks in groups.values():
        counts = Counter(rows[ranks, 2].tolist())
        if len(counts) == 1:
            continue
        (usual, most), *_ = counts.most_common(1)
        is_certain = 2 * most > len(ranks)
        certain &= is_certain
        odd |= {rank for rank in ranks if not is_certain or rows[rank, 2] != usual}
    return odd, certain


def _message(odd: list[int], certain: bool, name: str, step: int, tuned: _Table) -> str:
    named = f"rank {odd[0]}" if len(odd) == 1 else f"ranks {', '.join(map(str, odd[:-1]))} and {odd[-1]}"
    if certain:
        return (
            f"{named} had other weights than the other ranks after {step} steps, in {name} for one: memory there or "
            "its copy of the base model is bad; look at that machine, and start the run again: it goes on from its log"
        )
    return (
        f"{named} had different weights after {step} steps, in {name} for one, and which are right can't be seen from "
        f"here ({_digests(odd, tuned)}): `mezo-scale verify RUN_DIR` gives the digest that a replay has; look at the "
        "machine of the other, and start the run again: it goes on from its log"
    )


def _digests(odd: list[int], tuned: _Table) -> str:
    """Of the copies of the tuned weights that these ranks are in: comparable with one of a whole model."""
    copies = sorted({int(copy) for rank in odd for copy in tuned[rank, :, 1]})
    sums = {copy: sum(tuned[:, :, 2][tuned[:, :, 1] == copy].tolist()) % 2**64 for copy in copies}
    return ", ".join(f"rank {rank} is in a copy with digest {sums[int(tuned[rank, 0, 1])]:016x}" for rank in odd[:8])
