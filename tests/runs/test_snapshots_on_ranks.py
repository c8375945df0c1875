"""A snapshot taken under one strategy is gone on from under another, and the run is still what its log says."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError
from mezo_scale.optim.mezo import MeZO
from mezo_scale.recipe import load
from mezo_scale.runs import session
from mezo_scale.runs.verify import verify
from mezo_scale.sharding import discover
from tests.runs.test_session import same, weights
from tests.support.pool import Ranks


def go_on(recipe: str, overrides: list[str], done: int = 0) -> str:
    """A session on the ranks of this world; what it says, on rank 0."""
    shown, size = io.StringIO(), dist.get_world_size()
    world = World(dist.get_rank(), dist.get_rank(), size, size, torch.device("cpu"))
    with contextlib.redirect_stdout(shown):
        asked, kind = session.prepare(load(recipe, ["snapshot_every=2", "eval_every=0", *overrides]))
        splits = session.EncodedSplits.read(asked, kind)
        session.Trainer(asked, world, session.RunDirectory(asked.directory), kind, splits).go(done)
    return shown.getvalue()


def test_a_run_moves_from_strategy_to_strategy_by_its_snapshots(
    ranks: Ranks, recipe_file: Path, tmp_path: Path
) -> None:
    shared, ds_config = ["rounding=master", "model.dtype=bfloat16"], "ds_configs/zero3_bf16.json"
    sessions = [
        (2, ["strategy=fsdp2", "steps=3"]),
        (2, ["strategy=zero3", f"ds_config={ds_config}", "steps=5"]),
        (3, ["strategy=single", "steps=7"]),
        (1, ["strategy=single", "steps=9"]),
        (2, ["strategy=fsdp2", "steps=10"]),
    ]
    for number, (size, overrides) in enumerate(sessions):
        done = 2 * number + 1 if number else 0
        shown = ranks(size, go_on, recipe=str(recipe_file), overrides=[*shared, *overrides], done=done)[0]
        assert not number or f"snapshot step-{done - 1}, 1 steps are replayed" in shown
        assert "passed over" not in shown
    lines = list(verify(load(tmp_path / "run")))
    assert len(lines) == 5
    assert all("bit for bit" in line for line in lines[2:])


def test_without_snapshots_the_log_is_enough(ranks: Ranks, recipe_file: Path, tmp_path: Path) -> None:
    sessions = [(2, "fsdp2"), (3, "single"), (2, "zero3"), (4, "hsdp")]
    for number, (size, strategy) in enumerate(sessions):
        overrides = [f"strategy={strategy}", f"steps={2 * number + 2}", "snapshot_every=0", "train.batch_size=7"]
        if strategy == "hsdp":
            overrides.append("replicate=2")
        shown = ranks(size, go_on, recipe=str(recipe_file), overrides=overrides, done=2 * number)[0]
        assert not number or f"continuing {tmp_path / 'run'}: {2 * number} steps are replayed, 2 are left" in shown
    assert len(list(verify(load(tmp_path / "run")))) == 3


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_sharded_a_run_that_goes_on_from_a_snapshot_has_the_bits_of_one_that_never_stopped(
    ranks: Ranks, recipe_file: Path, tmp_path: Path, strategy: str
) -> None:
    options = {"recipe": str(recipe_file)}
    rest = [f"strategy={strategy}"]
    ranks(2, go_on, **options, overrides=[*rest, "steps=6", f"output.dir={tmp_path / 'whole'}"])
    ranks(2, go_on, **options, overrides=[*rest, "steps=3", f"output.dir={tmp_path / 'parts'}"])
    flip_bit(tmp_path / "parts" / "snapshots" / "step-2")  # so that a second model is loaded where one was
    shown = ranks(2, go_on, **options, overrides=[*rest, "steps=6", f"output.dir={tmp_path / 'parts'}"], done=3)[0]
    assert "its weights have digest" in shown
    assert "parts: 3 steps are replayed" in shown
    assert same(weights(tmp_path / "whole" / "checkpoint"), weights(tmp_path / "parts" / "checkpoint"))


def flip_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def flipped_session(recipe: str, at: int) -> str:
    """A run in which a bit of a weight of the last rank flips before the step after `at`."""
    step = MeZO.step

    def flipping(self: MeZO, *args: object, **kwargs: object) -> float:
        if self.step_count == at and dist.get_rank() == dist.get_world_size() - 1:
            discover(self.model).shards[2].local.data.view(torch.int32)[7] ^= (
                1 << 16
            )  # past torch's count of writes; high enough that no update rounds it away
        return step(self, *args, **kwargs)

    MeZO.step = flipping  # type: ignore[method-assign]
    try:
        go_on(recipe, ["snapshot_every=0", "check_every=2", "steps=6"])
    except MezoError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        MeZO.step = step  # type: ignore[method-assign]
    return "no error"


@pytest.mark.parametrize("size", [2, 3])
def test_a_flipped_bit_of_a_replica_stops_the_run_before_anything_is_saved(
    ranks: Ranks, recipe_file: Path, tmp_path: Path, size: int
) -> None:
    said = ranks(size, flipped_session, recipe=str(recipe_file), at=2)
    named = {2: "ranks 0 and 1 had different weights", 3: "rank 2 had other weights than the other ranks"}[size]
    assert len(set(said)) == 1
    assert said[0].startswith(f"RankError: {named} after 4 steps, in ")
    assert not (tmp_path / "run" / "checkpoint").exists()
