"""The pool itself: what it promises to the tests that use it."""

import itertools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.pool import RankFailed, Ranks


def world_sum(start: int) -> int:
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return int(total.item())


def process_id() -> int:
    return os.getpid()


def hash_of(text: str) -> int:
    return hash(text)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("the flux is wrong")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_size_of_world_has_exactly_its_ranks(ranks: Ranks, world_size: int) -> None:
    assert ranks(world_size, world_sum, start=10) == [10 * world_size + sum(range(world_size))] * world_size


def test_the_workers_of_a_world_are_kept(ranks: Ranks) -> None:
    assert ranks(2, process_id) == ranks(2, process_id)


def test_a_fresh_world_is_another(ranks: Ranks) -> None:
    assert not set(ranks(2, process_id)) & set(ranks(2, process_id, fresh=True))


def test_no_rank_has_its_neighbours_hash_seed(ranks: Ranks) -> None:
    found = ranks(4, hash_of, text="seed")
    assert all(one != other for one, other in itertools.pairwise(found))


def test_the_same_rank_can_have_another_hash_seed(ranks: Ranks) -> None:
    assert ranks(1, hash_of, text="seed") != ranks(1, hash_of, text="seed", first=1)


def test_an_exception_names_its_rank_and_the_world_recovers(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match="the flux is wrong") as failure:
        ranks(3, fail_on, rank=1)
    assert failure.value.rank == 1
    assert ranks(3, world_sum, start=0) == [3, 3, 3]


def test_a_dead_rank_is_named_and_the_world_recovers(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match="rank 1: the process died"):
        ranks(2, die_on, rank=1)
    assert ranks(2, world_sum, start=0) == [1, 1]


def test_a_hanging_rank_shows_its_stack_and_the_world_recovers(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match="hang_on") as failure:
        ranks(2, hang_on, rank=1, timeout_s=2)
    assert failure.value.rank == 1
    assert ranks(2, world_sum, start=0) == [1, 1]


def test_no_process_outlives_the_pool() -> None:
    pool = Ranks(max_ranks=1)
    pids = pool(1, process_id)
    pool.close()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
