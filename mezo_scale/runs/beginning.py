"""Where a run begins: the base model, and the adapter that it kept beside its trajectory.

An adapter's first weights come from PEFT's code, torch's generator and, for a prefix, the model's activations. None of
them is promised to give the same bits elsewhere or later, so they are kept, and not made again.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from mezo_scale import collectives
from mezo_scale.errors import TrajectoryError
from mezo_scale.models import adapters, checkpoints, tuning
from mezo_scale.models.save import write
from mezo_scale.optim.mezo import MeZO
from mezo_scale.runs.directory import ADAPTER_INIT, RunDirectory
from mezo_scale.trajectory import Trajectory


def keep_adapter(model: nn.Module, processor: Any, run: RunDirectory) -> None:
    """Saves the adapter that a run begins with, before its trajectory is there. Every rank calls it.

    Raises:
        SharedError: it can't be written.
    """
    if adapters.config_in(model) is not None and not _on_first_rank(run.trajectory):
        write(model, processor, run.adapter_init)


def take_up_adapter_(model: nn.Module, run: RunDirectory) -> None:
    """Gives the adapter in a model the values that a run began with, if it has begun. Every rank calls it.

    Raises:
        RecipeError, ModelError: what was kept can't be read, or is of another adapter.
    """
    if adapters.config_in(model) is None or not _on_first_rank(run.trajectory, run.adapter_init):
        return
    data = collectives.from_first_rank(lambda: save(adapters.read(run.adapter_init)[1]))
    adapters.put_(model, load(data), str(run.adapter_init))


def own_log(optimizer: MeZO, done: int) -> Trajectory:
    """The log of a run, which this process alone writes.

    Args:
        done: how many steps it had when all the rest of the run directory was read.

    Raises:
        TrajectoryError: another process has taken steps since. What was read is no longer so.
    """
    log = optimizer.trajectory
    assert log is not None, "a run keeps a log"
    if len(log) != done:
        log.close()
        raise TrajectoryError(
            f"another process took the run from {done} steps to {len(log)} while this one was beginning: begin again"
        )
    return log


def begun(base: str, records: Trajectory, adapter: Path | None) -> nn.Module:
    """The model that a run began with, in one process, ready to be replayed on.

    Args:
        adapter: the folder of the adapter that it began with; None for a run without one.

    Raises:
        TrajectoryError: the run tunes what this model has not.
        RecipeError, ModelError: the model or the adapter can't be read.
    """
    dtype: torch.dtype = getattr(torch, records.header.manifest[0][2])
    model = checkpoints.read(base, dtype)
    if adapter is not None:
        model.requires_grad_(False)
        tuning.attach_saved_(model, adapter, torch.device("cpu"), dtype)
    tuned = [entry[0] for entry in records.header.manifest]
    here = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if lacking := [name for name in tuned if name not in here]:
        where = f"{base} with the adapter {adapter}" if adapter else base
        raise TrajectoryError(
            f"the trajectory belongs to another model: it tunes {lacking[0]}, which {where} has not: give its base "
            f"model and, if it tunes an adapter, the {ADAPTER_INIT} of its directory"
        )
    tuning.only_(model, tuned)
    return model


def _on_first_rank(*paths: Path) -> bool:
    """Whether rank 0 sees them all: the others may not see the run directory."""
    return bool(collectives.max_integer(int(collectives.rank() == 0 and all(path.exists() for path in paths))))
