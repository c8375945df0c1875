"""Numbers per step, to a file, to TensorBoard and to trackers."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from mezo_scale.distributed.world import World
from mezo_scale.optim.signal import Recent, Signal
from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory, replace_file, writing
from mezo_scale.runs.trackers import Trackers
from mezo_scale.trajectory import Trajectory

WINDOW = 50  # steps that the means of a step's estimates are over


class Metrics:
    """Numbers per step, to metrics.jsonl, TensorBoard and the recipe's trackers; nothing on ranks that do not write.

    Args:
        first_step: steps that are done; what is there of later ones is left out.
        log: the run's. A line says how many of its steps are on the disk, for a line may come there before its step.
    """

    def __init__(
        self, run: RunDirectory, world: World, first_step: int, recipe: Recipe, log: Trajectory | None
    ) -> None:
        self._path, self._log = run.metrics, log
        self._file: TextIO | None = None
        self._board: Any = None  # TensorBoard's, imported below
        if world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            lines = [line for line in run.read_metrics() if line["step"] <= first_step]
            run.keep_damaged_metrics()
            replace_file(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
            known = [line for line in lines if isinstance(line.get("signal"), float)]
            self._recent = Recent(WINDOW, [Signal(line["signal"], line["row_variance"]) for line in known])
            self._trackers = Trackers(recipe, log.header.run_id if log is not None else None)
            with writing(run.metrics):
                self._file = run.metrics.open("a", encoding="utf-8")
            with writing(run.path / "tensorboard"):
                self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, **values: Any) -> None:
        """Adds one line; `step` counts the steps done. What is not finite is null in the file: JSON has no NaN.

        Raises RecipeError if it can't be written.
        """
        if self._file is None:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        line = {"step": step, **finite} | ({"synced": self._log.synced} if self._log is not None else {})
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
        self._trackers.log(step, finite)

    def sync(self) -> None:
        """Return when every line is on the disk: to be called before anything is decided by one.

        Raises RecipeError if they do not come there.
        """
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def log_step(self, step: int, signal: Signal | None, **values: Any) -> None:
        """Adds a step's line, with what it says of the gradient and the means of that over the last steps."""
        if self._file is not None and signal is not None and signal.gradient is not None:
            mean = self._recent.add(signal)
            values |= {"signal": signal.gradient, "row_variance": signal.row_variance}
            values |= {"signal_mean": mean.gradient, "row_variance_mean": mean.row_variance}
        self.log(step, **values)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # every line was flushed; of one that could not be it was said
                self._file.close()
            self._board.close()
            self._trackers.close()


def filling(batch: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Tokens per second of a rank's rows, each counted once however many directions see it, and which share of a
    batch's places is padding; nothing of a batch without a mask.

    batch: as kinds collate it, on the CPU.
    """
    mask = next((batch[name] for name in ("attention_mask", "whole_mask") if name in batch), None)
    if mask is None:
        return {}
    tokens = int(mask.sum())
    return {"tokens_per_second": tokens / seconds, "padding": 1 - tokens / mask.numel()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
