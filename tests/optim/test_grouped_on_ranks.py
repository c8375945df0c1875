"""Groups of rows among ranks: a group is a place in the step, so a record says nothing of who evaluated it."""

import contextlib
import pathlib
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mezo_scale as ms
from mezo_scale.errors import MezoError, RankError
from mezo_scale.optim import mezo
from mezo_scale.optim.estimators import Grouped
from tests.support import layouts, models
from tests.support.pool import RankFailed, Ranks

NAME = "llama"
LOSS = models.objective(NAME)
SHARES = {1: [12], 2: [7, 5], 3: [1, 6, 5], 4: [3, 3, 3, 3]}


def share() -> models.Batch:
    """This rank's rows of a step of 12."""
    counts, rank = SHARES[dist.get_world_size()], dist.get_rank()
    start = sum(counts[:rank])
    return {name: rows[start : start + counts[rank]] for name, rows in models.batch(NAME, 12).items()}


def records(layout: str, size: int, micro_batch: int | None = None, **options: Any) -> list[ms.StepRecord]:
    sharded = layouts.shard(layout, models.build(NAME))
    opt = ms.MeZO(sharded.model, lr=1e-4, eps=1e-2, seed=3, estimator=Grouped(size, 12), **options)
    found = []
    for _ in range(2):
        opt.step(batch=share(), objective=LOSS, micro_batch=micro_batch)
        found.append(opt.last_record)
    sharded.close()
    return found


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[int, list[ms.StepRecord]]:
    return {size: ranks(1, records, layout="plain", size=size)[0] for size in (1, 4, 12)}


@pytest.mark.parametrize(
    ("world_size", "layout", "size", "options"),
    [
        (2, "plain", 4, {}),
        (2, "plain", 1, {"paired": False}),
        (3, "plain", 4, {"micro_batch": 2}),
        (2, "fsdp2", 1, {}),
        (3, "fsdp2", 4, {}),
        (3, "fsdp2", 4, {"micro_batch": 2}),
        (3, "fsdp2", 4, {"paired": False}),
        (4, "fsdp2", 12, {}),
        (4, "hsdp", 4, {}),
        (3, "fsdp1", 4, {}),
        (3, "zero3", 4, {"micro_batch": 3}),
        (2, "zero3", 4, {"paired": False}),
    ],
)
def test_records_are_those_of_one_rank(
    ranks: Ranks, alone: dict[int, list[ms.StepRecord]], world_size: int, layout: str, size: int, options: Any
) -> None:
    found = ranks(world_size, records, layout=layout, size=size, **options)
    assert all(other == found[0] for other in found)
    for mine, expected in zip(found[0], alone[size], strict=True):
        assert mine.seeds == expected.seeds
        assert mine.loss == pytest.approx(expected.loss, rel=1e-5)
        assert mine.projected_grads == pytest.approx(expected.projected_grads, rel=1e-3, abs=2e-3)


def evaluated_seeds() -> set[int]:
    model = models.build(NAME)
    opt = ms.MeZO(model, eps=1e-2, estimator=Grouped(3, 12), paired=True)
    opt.step(batch=share(), objective=LOSS)
    return {seed for seed, _ in opt._evaluator._last}


def test_a_rank_runs_the_branches_of_its_own_groups_only(ranks: Ranks) -> None:
    seeds = [ms.noise.direction_seed(0, 0, k) for k in range(4)]
    assert ranks(4, evaluated_seeds) == [{seed} for seed in seeds]


def measured_in_parts() -> ms.StepRecord | None:
    """Rank 0 has rows 0-1, then 4-5; rank 1 rows 2-3, then 6-7."""
    opt = ms.MeZO(models.build(NAME), eps=1e-2, estimator=Grouped(4))
    for part in (0, 4):
        start = part + 2 * dist.get_rank()
        batch = {name: rows[start : start + 2] for name, rows in models.batch(NAME, 8).items()}
        opt.measure(batch=batch, objective=LOSS)
    opt.step()
    return opt.last_record


def test_rows_of_a_later_call_come_after_those_of_all_ranks_in_an_earlier_one(ranks: Ranks) -> None:
    one, other = ranks(2, measured_in_parts)
    opt = ms.MeZO(models.build(NAME), eps=1e-2, estimator=Grouped(4))
    opt.step(batch=models.batch(NAME, 8), objective=LOSS)
    assert one == other
    assert opt.last_record is not None
    assert one.seeds == opt.last_record.seeds
    assert one.projected_grads == pytest.approx(opt.last_record.projected_grads, rel=1e-3, abs=1e-3)


def steps_until(folder: pathlib.Path, layout: str, steps: int) -> dict[str, torch.Tensor]:
    sharded = layouts.shard(layout, models.build(NAME))
    opt = ms.MeZO(sharded.model, lr=1e-3, eps=1e-2, estimator=Grouped(4, 12), trajectory=folder / "t.mezo")
    while opt.step_count < steps:
        opt.step(batch=share(), objective=LOSS)
    weights = sharded.gather()
    sharded.close()
    return weights


def test_a_run_of_two_sharded_ranks_is_replayed_and_taken_up_bit_by_bit(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    ranks(2, steps_until, folder=tmp_path, layout="fsdp2", steps=2)
    live, _ = ranks(2, steps_until, folder=tmp_path, layout="fsdp2", steps=3)
    model = models.build(NAME)
    assert ms.replay(model, tmp_path / "t.mezo") == 3
    assert [name for name, weight in model.named_parameters() if not torch.equal(weight, live[name])] == []
    again = ranks(3, steps_until, folder=tmp_path, layout="plain", steps=3)[2]
    assert [name for name, weight in live.items() if not torch.equal(weight, again[name])] == []


def fails_once(layout: str, where: str) -> tuple[str, float, bool]:
    """Rank 1 has a bad batch, a closure or a failing objective in its second step; then all take a third."""
    mezo.PATIENCE_S = 2.0
    sharded = layouts.shard(layout, models.build(NAME))
    opt = ms.MeZO(sharded.model, eps=1e-2, estimator=Grouped(4))
    opt.step(batch=share(), objective=LOSS)

    def objective(model: torch.nn.Module, batch: models.Batch) -> torch.Tensor:
        losses = LOSS(model, batch) if where == "after" else None
        if dist.get_rank() == 1:
            raise KeyError("on purpose")
        return LOSS(model, batch) if losses is None else losses

    start, said = time.monotonic(), "nothing"
    odd = dist.get_rank() == 1
    try:
        if where == "batch":
            opt.step(batch={} if odd else share(), objective=LOSS)
        elif where == "closure" and odd:
            opt.step(lambda: torch.zeros(()))
        else:
            opt.step(batch=share(), objective=LOSS if where == "closure" else objective)
    except (KeyError, ValueError, RankError) as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    opt.step(batch=share(), objective=LOSS)
    sharded.close()
    return said, seconds, opt.step_count == 2


@pytest.mark.parametrize("where", ["batch", "closure", "before", "after"])
@pytest.mark.parametrize("layout", ["plain", "fsdp2"])
def test_an_error_of_one_rank_leaves_no_rank_waiting(ranks: Ranks, layout: str, where: str) -> None:
    one, two = ranks(2, fails_once, layout=layout, where=where)
    assert one[0].startswith("RankError: rank 1 failed while it evaluated step 1, and says why itself")
    assert two[0].startswith("KeyError" if where in ("before", "after") else "ValueError")
    assert max(one[1], two[1]) < 20
    assert one[2]
    assert two[2]


def a_rank_loses_its_rows() -> str:
    opt = ms.MeZO(models.build(NAME), eps=1e-2, estimator=Grouped(4), paired=False)

    def objective(model: torch.nn.Module, batch: models.Batch) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise KeyError("on purpose")
        return LOSS(model, batch)

    with contextlib.suppress(KeyError):
        opt.measure(batch=models.batch(NAME, 4), objective=objective)
    opt.measure(batch=models.batch(NAME, 4), objective=LOSS)
    try:
        opt.step()
    except MezoError as error:
        return str(error)
    return "nothing"


def test_a_step_that_lacks_rows_of_a_group_is_taken_on_no_rank(ranks: Ranks) -> None:
    for said in ranks(2, a_rank_loses_its_rows):
        assert said.startswith("step 0 lacks rows of a rank that failed in measure() (a group has 0 rows, expected 4)")


def grouped_on(layout: str) -> None:
    ms.MeZO(layouts.shard(layout, models.build(NAME)).model, estimator=Grouped(4))


@pytest.mark.parametrize("layout", ["tp", "fsdp2-tp"])
def test_ranks_that_share_rows_are_refused(ranks: Ranks, layout: str) -> None:
    with pytest.raises(RankFailed, match="under tensor parallelism ranks share theirs"):
        ranks(2, grouped_on, layout=layout)
