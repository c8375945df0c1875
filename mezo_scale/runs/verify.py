"""Whether a finished run agrees with itself: its trajectory, its base model and its checkpoint."""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mezo_scale.distributed.world import World
from mezo_scale.errors import TrajectoryError
from mezo_scale.models import adapters, checkpoints
from mezo_scale.optim.replay import Replay
from mezo_scale.recipe import Recipe
from mezo_scale.runs import snapshots
from mezo_scale.runs.beginning import begun
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.trajectory import Trajectory


def verify(recipe: Recipe) -> Iterator[str]:
    """Checks a run directory against itself and its base model; yields what holds, one line each.

    Raises:
        MezoError: at the first thing that does not.
    """
    run = RunDirectory(recipe.directory)
    records = Trajectory.open(run.trajectory, at_least=run.steps_said())
    skipped = sum(record.skipped for record in records)
    size = os.path.getsize(run.trajectory)
    yield f"{run.trajectory}: {len(records)} steps ({skipped} skipped), {size:,} bytes, every checksum right"
    checkpoints.find(recipe.model.name)
    model = begun(recipe.model.name, records, run.adapter_init if run.adapter_init.is_dir() else None)
    replay = Replay(model, records)
    yield f"{recipe.model.name}: the base model that the run began with (fingerprint {records.header.fingerprint})"
    graded = 0
    if run.checkpoint.is_dir():
        graded = run.read_evaluation().get("tuned", {}).get("step", len(records))
        yield from snapshots.check_all(run, replay, records, range(1, graded + 1))
        yield _check_checkpoint(run, model, replay, graded)
    yield from snapshots.check_all(run, replay, records, range(graded + 1, len(records) + 1))
    if graded < len(records):
        _replay(replay, len(records))
        yield f"the weights have the digest {replay.digest()} after {len(records)} replayed steps"


def _check_checkpoint(run: RunDirectory, model: nn.Module, replay: Replay, step: int) -> str:
    _replay(replay, step)
    saved, rebuilt = _saved_and_rebuilt(run, model)
    different = [name for name in rebuilt if name not in saved or not torch.equal(rebuilt[name], saved[name])]
    if different:
        raise TrajectoryError(
            f"{run.checkpoint} is not what the trajectory gives after {step} steps: {len(different)} of {len(rebuilt)} "
            f"weights differ, {different[0]} for one; replay the trajectory to have the right ones"
        )
    return f"{run.checkpoint}: bit for bit what {step} replayed steps give"


def _replay(replay: Replay, step: int) -> None:
    with Screen(World.from_environment()).counting("replaying", "steps") as progress:
        replay.to(step, progress=progress)


def _saved_and_rebuilt(run: RunDirectory, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What the checkpoint holds, and the same of the model that was replayed."""
    if adapters.config_in(model) is not None:
        return adapters.read(run.checkpoint)[1], adapters.state(model)
    dtype = next(model.parameters()).dtype
    return checkpoints.read(str(run.checkpoint), dtype).state_dict(), model.state_dict()
