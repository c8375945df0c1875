"""Strategies and axes: what a recipe's section becomes on a number of ranks, and what each of them evaluates."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from mezo_scale.distributed.layout import STRATEGIES, Axes, Strategy
from mezo_scale.errors import RecipeError, ShardingError


def asked(strategy: str, replicate: int | None = None, *, cpu_offload: bool = False) -> Any:
    return SimpleNamespace(strategy=strategy, replicate=replicate, cpu_offload=cpu_offload)


@pytest.mark.parametrize(
    ("section", "world_size", "nodes", "expected"),
    [
        (asked("single"), 1, 1, Strategy("single")),
        (asked("ddp"), 1, 1, Strategy("single")),
        (asked("single"), 4, 1, Strategy("ddp", replicate=4)),
        (asked("ddp"), 4, 2, Strategy("ddp", replicate=4)),
        (asked("fsdp2"), 6, 1, Strategy("fsdp2", shard=6)),
        (asked("fsdp2", cpu_offload=True), 6, 1, Strategy("fsdp2", shard=6, offload="cpu")),
        (asked("hsdp", 2), 8, 1, Strategy("hsdp", replicate=2, shard=4)),
        (asked("hsdp"), 8, 2, Strategy("hsdp", replicate=2, shard=4)),
        (asked("zero3"), 8, 2, Strategy("zero3", shard=8)),
    ],
)
def test_a_section_on_a_number_of_ranks_is_one_strategy(
    section: Any, world_size: int, nodes: int, expected: Strategy
) -> None:
    found = Strategy.of(section, world_size, nodes)
    assert found == expected
    assert found.world_size == found.axes.world_size == world_size


def test_a_whole_model_is_single_on_one_rank_and_ddp_on_several() -> None:
    assert Strategy("ddp").layout == "single"
    assert Strategy("single", replicate=3).layout == "ddp"


def test_a_layout_says_its_copies_and_where_its_shards_lie() -> None:
    assert Strategy("hsdp", replicate=2, shard=8).layout == "hsdp 2 x 8"
    assert Strategy("zero3", shard=8, offload="cpu").layout == "zero3 + cpu"


def test_what_follows_from_a_name() -> None:
    follows = {
        name: (one.needs_group, one.is_sharded, one.autocasts, one.is_deepspeed, one.can_dry_run)
        for name in STRATEGIES
        for one in [Strategy(name)]
    }
    assert follows == {
        "single": (False, False, True, False, True),
        "ddp": (False, False, True, False, True),
        "fsdp2": (True, True, False, False, True),
        "hsdp": (True, True, False, False, True),
        "zero3": (True, True, True, True, False),
    }
    assert not Strategy("fsdp2", offload="cpu").can_dry_run


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero3"])
def test_only_hsdp_is_told_how_many_copies(name: str) -> None:
    with pytest.raises(RecipeError) as error:
        Strategy.of(asked(name, 2), 4)
    assert str(error.value) == (
        f"sharding.replicate is 2, but sharding.strategy is {name}: copies are what hsdp has; leave replicate out or "
        "take hsdp"
    )


@pytest.mark.parametrize("name", ["single", "ddp", "zero3"])
def test_only_fsdp2_and_hsdp_are_told_to_offload(name: str) -> None:
    with pytest.raises(RecipeError) as error:
        Strategy.of(asked(name, cpu_offload=True), 4)
    assert str(error.value) == (
        f"sharding.cpu_offload is for fsdp2 and hsdp, but sharding.strategy is {name}: leave it out; zero3 offloads as "
        "its ds_config says"
    )


def test_copies_that_do_not_divide_the_ranks_are_told_what_would() -> None:
    with pytest.raises(ShardingError) as error:
        Strategy.of(asked("hsdp", 3), 8)
    assert str(error.value) == (
        "sharding.replicate is 3, but WORLD_SIZE is 8, which 3 does not divide: set sharding.replicate to 1 or 2 or 4 "
        "or 8, or start 9 processes"
    )


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("fsdp3", {}, RecipeError, "'fsdp3': expected single, ddp, fsdp2, hsdp or zero3"),
        ("fsdp2", {"offload": "nvme"}, RecipeError, "fsdp2 can't offload to nvme"),
        ("fsdp2", {"shard": 0}, ShardingError, "1 copies over 0 ranks each"),
        ("fsdp2", {"replicate": 2}, ShardingError, "fsdp2 has one copy of the model, found 2: take hsdp"),
        ("zero3", {"replicate": 2, "shard": 4}, ShardingError, "zero3 has one copy of the model, found 2"),
        ("single", {"shard": 2}, ShardingError, "single spreads no copy over 2 ranks: take fsdp2, hsdp or zero3"),
        ("ddp", {"replicate": 2, "shard": 2}, ShardingError, "ddp spreads no copy over 2 ranks"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(
    name: str, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Strategy(name, **options)


def test_copies_and_shards_have_rows_of_their_own() -> None:
    axes = Strategy("hsdp", replicate=2, shard=3).axes
    assert axes.rows_size == 6
    assert [axes.rows_rank(rank) for rank in range(6)] == [0, 1, 2, 3, 4, 5]
    assert {axes.direction_rank(rank) for rank in range(6)} == {0}


def test_tensor_parallel_neighbours_share_rows() -> None:
    axes = Axes(replicate=1, shard=2, tensor=2)
    assert axes.rows_size == 2
    assert [axes.rows_rank(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_direction_parallel_copies_share_rows_and_split_the_directions() -> None:
    axes = Axes(replicate=1, shard=2, direction=2)
    assert [axes.rows_rank(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [axes.direction_rank(rank) for rank in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("degrees", list(itertools.product((1, 2, 3), repeat=4)))
def test_every_pair_of_rows_and_directions_is_evaluated_by_one_tensor_parallel_group(
    degrees: tuple[int, int, int, int],
) -> None:
    axes = Axes(*degrees)
    parts = [(axes.direction_rank(rank), axes.rows_rank(rank)) for rank in range(axes.world_size)]
    assert sorted(parts) == sorted([*itertools.product(range(axes.direction), range(axes.rows_size))] * axes.tensor)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_is_none_has_no_rows(rank: int) -> None:
    axes = Axes(2, 2)
    for part in (axes.rows_rank, axes.direction_rank):
        with pytest.raises(ValueError, match=f"rank is {rank}: expected 0 to 3"):
            part(rank)


def test_an_axis_has_a_rank_at_least() -> None:
    with pytest.raises(ValueError, match="tensor is 0: expected at least 1"):
        Axes(2, 2, tensor=0)
