"""Where a Trainer with a trajectory begins: the log says which step is next, and gives the base model its weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from mezo_scale import collectives
from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import Trajectory

STATE = "trainer_state.json"


def steps_in(log: str | os.PathLike[str]) -> int:
    """How many steps a log holds, as rank 0 reads it; 0 if there is none. Every rank calls it. Raises
    TrajectoryError."""

    def count() -> bytes:
        return str(len(Trajectory.open(log)) if os.path.lexists(log) else 0).encode()

    return int(collectives.from_first_rank(count))


def found(checkpoint: str | bool | None, output_dir: str) -> Path | None:
    """The folder that a Trainer's ``resume_from_checkpoint`` means. Raises ValueError if it holds no checkpoint."""
    if not checkpoint:
        return None
    folder = get_last_checkpoint(output_dir) if checkpoint is True else checkpoint
    if folder is None or not (Path(folder) / STATE).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder or output_dir} holds no {STATE}: give a folder that a Trainer saved, or "
            "leave it out, the trajectory suffices"
        )
    return Path(folder)


@contextmanager
def at(
    steps: int, log: str | os.PathLike[str], checkpoint: Path | None, callbacks: Iterable[Any] = ()
) -> Iterator[str | None]:
    """A folder to give to a Trainer, which takes its counts up from there: it is at the log's last step.

    Args:
        steps: that the log holds.
        log: its path, for messages.
        checkpoint: of the run, at that step or before it: it gives what was logged, the best step, the states of random
            generators.
        callbacks: of the Trainer, and its control: those with a state are named in it, as its checkpoints expect.

    Raises:
        TrajectoryError: the checkpoint is of a later step than the log's last.
    """
    if checkpoint is None:
        stateful = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        state = TrainerState(stateful_callbacks=stateful)
    else:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
    if state.global_step > steps:
        raise TrajectoryError(
            f"{checkpoint} was saved after step {state.global_step}, but the trajectory {log} holds {steps} steps: "
            "give the trajectory of that run, or leave out one of the two"
        )
    if steps == 0:
        yield None
    elif checkpoint is not None and state.global_step == steps:
        yield str(checkpoint)
    else:
        state.global_step = steps
        state.train_batch_size = state.train_batch_size or 0  # it is compared with the arguments' as a number
        with TemporaryDirectory() as folder:
            state.save_to_json(str(Path(folder) / STATE))
            yield folder
