"""Steps that a loss which is not finite has skipped: a few are a matter of chance, many in a row the end of a run."""

from itertools import islice
from pathlib import Path

from mezo_scale.errors import NotFiniteError
from mezo_scale.trajectory import StepRecord, Trajectory


class Skips:
    """Counts a run's skipped steps.

    Attributes:
        total: of the whole run, earlier sessions included.
    """

    def __init__(self, limit: int, before: int) -> None:
        """Steps in a row at which `count` raises; how many were skipped in earlier sessions."""
        self.total = before
        self._limit = limit
        self._in_a_row = 0

    def count(self, record: StepRecord) -> None:
        """Takes a step in.

        Raises:
            NotFiniteError: it is the last of too many skipped ones in a row. Records are the same on all ranks.
        """
        self.total += record.skipped
        self._in_a_row = self._in_a_row + 1 if record.skipped else 0
        if self._in_a_row >= self._limit:
            raise NotFiniteError(
                f"step {record.step + 1} is skipped like the {self._limit - 1} before it, because the loss is not "
                "finite: begin anew with a smaller optimizer.lr or optimizer.eps, take model.dtype float32 or bfloat16 "
                f"instead of float16, look at the data, or go on with this run by train.max_skipped={2 * self._limit}"
            )


def count_skipped(trajectory: Path, until: int | None = None) -> int:
    """How many of the first `until` steps of a run's trajectory were skipped, or of all. Raises TrajectoryError if it
    can't be read."""
    return sum(record.skipped for record in islice(Trajectory.open(trajectory), until))
