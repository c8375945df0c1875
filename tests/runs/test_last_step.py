"""Ranks that part in the last step of a run, after which no step would tell."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError
from mezo_scale.recipe import load
from mezo_scale.runs import session
from tests.support.pool import Ranks


def train_apart(recipe: str, last: int) -> str:
    """A session in which rank 1 takes its last step with another learning rate."""
    step = session.Trainer._step
    world = World(dist.get_rank(), dist.get_rank(), 2, 2, torch.device("cpu"))

    def apart(self: session.Trainer, optimizer: Any, *rest: Any) -> None:
        if world.rank == 1 and optimizer.step_count == last - 1:
            rate = self.rate
            self.rate = lambda number: 2 * rate(number)
        step(self, optimizer, *rest)

    session.Trainer._step = apart  # type: ignore[method-assign]
    try:
        asked, kind = session.prepare(load(recipe))
        splits = session.EncodedSplits.read(asked, kind)
        session.Trainer(asked, world, session.RunDirectory(asked.directory), kind, splits).go(0)
    except MezoError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        session.Trainer._step = step  # type: ignore[method-assign]
    return "no error"


def test_a_run_whose_ranks_differ_in_its_last_step_ends_with_an_error_and_no_checkpoint(
    ranks: Ranks, recipe_file: Path, tmp_path: Path
) -> None:
    assert (
        ranks(2, train_apart, recipe=str(recipe_file), last=4)
        == [
            "RankError: rank 1 recorded another step 3 than the other ranks: give all ranks the same seed, eps, "
            "learning rate and schedule"
        ]
        * 2
    )
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run" / "report.md").exists()
