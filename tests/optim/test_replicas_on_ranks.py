"""Ranks that hold the same weights are compared bit for bit: a bit that flips on one of them is found and named."""

import re

import pytest
import torch
import torch.distributed as dist

import mezo_scale as ms
from mezo_scale.errors import RankError
from mezo_scale.optim.replay import Replay
from mezo_scale.sharding import discover, replicas
from tests.support import layouts, models
from tests.support.pool import Ranks

NAME = "llama"


def flip(model: torch.nn.Module, number: int = 5) -> None:
    """One bit of one weight that this rank stores, as bad memory would."""
    shard = discover(model).shards[number]
    words = shard.local.view({4: torch.int32, 2: torch.int16}[shard.local.element_size()])
    words[3] ^= 1


def flipped_run(layout: str, odd: int, rounding: str = "nearest") -> tuple[str, str, str]:
    """What the ranks say before and after a bit of rank `odd` flips between two steps."""
    dtype = torch.bfloat16 if rounding == "master" else torch.float32
    sharded = layouts.shard(layout, models.build(NAME, dtype=dtype))
    optimizer = ms.MeZO(sharded.model, lr=1e-3, rounding=rounding)
    said = []
    for step in range(3):
        if step == 2 and dist.get_rank() == odd:
            if rounding == "master":
                optimizer.low_bits()[5].local[3] ^= 1
            else:
                flip(sharded.model)
        try:
            optimizer.check_ranks()
            said.append("")
        except RankError as error:
            said.append(str(error))
        batch = models.batch(NAME, 1, seed=dist.get_rank())
        optimizer.step(batch=batch, objective=models.objective(NAME))
    sharded.close()
    return said[0], said[1], said[2]


def test_a_flipped_bit_on_one_of_three_ranks_is_named(ranks: Ranks) -> None:
    name = list(dict(models.build(NAME).named_parameters()))[5]
    for before, between, after in ranks(3, flipped_run, layout="plain", odd=1):
        assert (before, between) == ("", "")
        assert after.startswith(f"rank 1 had other weights than the other ranks after 2 steps, in {name} for one: ")


def test_of_two_ranks_both_are_named_with_the_way_to_decide(ranks: Ranks) -> None:
    everyone = ranks(2, flipped_run, layout="plain", odd=1)
    assert everyone[0] == everyone[1]
    before, between, after = everyone[0]
    assert (before, between) == ("", "")
    assert after.startswith("ranks 0 and 1 had different weights after 2 steps")
    assert "mezo-scale verify" in after
    first, second = re.findall(r"digest ([0-9a-f]{16})", after)
    assert first != second


def test_a_flipped_low_bit_of_a_master_is_found(ranks: Ranks) -> None:
    for before, between, after in ranks(3, flipped_run, layout="plain", odd=2, rounding="master"):
        assert (before, between) == ("", "")
        assert re.match(r"rank 2 had other weights .*\.low_bits for one", after)


@pytest.mark.parametrize("odd", [1, 2])
def test_of_copies_that_are_sharded_the_ranks_with_that_shard_are_named(ranks: Ranks, odd: int) -> None:
    for before, between, after in ranks(4, flipped_run, layout="hsdp", odd=odd):
        assert (before, between) == ("", "")
        assert after.startswith(f"ranks {odd % 2} and {odd % 2 + 2} had different weights after 2 steps")


def hashes_taken(layout: str) -> int:
    """How many shards are hashed in a comparison."""
    sharded = layouts.shard(layout, models.build(NAME))
    optimizer = ms.MeZO(sharded.model)
    taken, count = replicas.shard_hash, []
    replicas.shard_hash = lambda shard: count.append(shard) or taken(shard)  # type: ignore[func-returns-value]
    try:
        optimizer.check_ranks()
    finally:
        replicas.shard_hash = taken
    sharded.close()
    return len(count)


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
def test_where_no_rank_has_a_second_copy_nothing_is_hashed(ranks: Ranks, layout: str) -> None:
    assert ranks(2, hashes_taken, layout=layout) == [0, 0]


def other_base() -> str:
    """Rank 1 has another frozen base under the same adapter."""
    model = models.build("llama-lora")
    if dist.get_rank() == 1:
        frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
        frozen.data.view(-1)[0] += 1
    try:
        ms.MeZO(model).check_ranks()
    except RankError as error:
        return str(error)
    return ""


def test_another_frozen_base_on_one_rank_is_found(ranks: Ranks) -> None:
    for said in ranks(2, other_base):
        assert said.startswith("ranks 0 and 1 had different weights after 0 steps, in base_model.")


def digests(path: str) -> tuple[str, str]:
    """Of a copy on two ranks as an error gives it, and of the same model as a replay gives it."""
    model = models.build(NAME)
    optimizer = ms.MeZO(model, lr=1e-3, trajectory=path)
    optimizer.step(batch=models.batch(NAME, 2), objective=models.objective(NAME))
    if dist.get_rank() == 1:
        flip(model)
    try:
        optimizer.check_ranks()
    except RankError as error:
        said = str(error)
    assert optimizer.trajectory is not None
    replay = Replay(models.build(NAME), optimizer.trajectory)
    replay.to(1)
    optimizer.trajectory.close()
    return re.findall(r"rank 0 is in a copy with digest ([0-9a-f]{16})", said)[0], replay.digest()


def test_the_digest_of_the_right_copy_is_the_one_of_a_replay(ranks: Ranks, tmp_path: object) -> None:
    for copy, replayed in ranks(2, digests, path=f"{tmp_path}/run.mezo"):
        assert copy == replayed
