"""Which examples go where: permutations, splits of a step, a rank's share; all pure functions of their arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mezo_scale.errors import RecipeError


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """A permutation of range(count), int64, as a pure function of its arguments.

    Sorts the raw words of Philox, which NumPy promises to keep (unlike its `permutation`).
    """
    return np.argsort(np.random.Philox(key=[seed, stream]).random_raw(count), kind="stable")


@dataclass(frozen=True)
class Order:
    """Which examples make up which step: a pure function of these values and the step.

    Attributes:
        seed: of all permutations.
        batch_size: examples of a step.
        lengths: of every example, in tokens.
        labels: of every example, as `labels_of` gives them, if all groups are to have each of them in equal number;
            None: as they come.
        group_size: consecutive examples of a step that make a group; None: the whole step.
        window: steps whose examples are exchanged so that those of like length share a step; 0 or 1: none.
    """

    seed: int
    batch_size: int
    lengths: Sequence[int]
    labels: Sequence[int] | None = None
    group_size: int | None = None
    window: int = 0

    def __post_init__(self) -> None:
        """Raises RecipeError if groups can't have the labels in equal number."""
        if self.labels is None:
            return
        size, count = self.group_size or self.batch_size, self._num_labels
        if size % count:
            name = "optimizer.group_size" if self.group_size else "train.batch_size"
            raise RecipeError(
                f"train.balance is labels, of which there are {count}, but {name} is {size}: take a multiple of "
                f"{count}, so that each label is in it as often"
            )

    def step(self, step: int) -> np.ndarray:
        """The examples of a step, int64 [batch_size]."""
        if self.window < 2:
            return self._drawn(step)
        number, place = divmod(step, self.window)
        rows: np.ndarray = self._window(number)[place]
        return rows

    def _window(self, number: int) -> np.ndarray:
        """The examples of a window's steps, int64 [window, batch_size].

        Those of each label (of all, where labels do not matter) are sorted by length and cut into steps, and the steps
        come in a drawn order.
        """
        drawn = np.stack([self._drawn(step) for step in range(number * self.window, (number + 1) * self.window)])
        by_kind = drawn.reshape(-1, 1 if self.labels is None else self._num_labels).T  # as `_drawn` deals them
        lengths = np.asarray(self.lengths)
        ordered = np.stack([rows[np.argsort(lengths[rows], kind="stable")] for rows in by_kind])
        places = permutation(self.seed, _WINDOWS + number, self.window)
        return np.take(ordered.T.reshape(self.window, self.batch_size), places, axis=0)

    def _drawn(self, step: int) -> np.ndarray:
        """The examples of a step before any are exchanged; the labels, where they are balanced, take turns."""
        if self.labels is None:
            return step_indices(self.seed, step, len(self.lengths), self.batch_size)
        columns = []
        for label in range(self._num_labels):
            own = np.flatnonzero(np.asarray(self.labels) == label)
            each = self.batch_size // self._num_labels
            columns.append(own[step_indices(self.seed, step, len(own), each, stream=_LABELS * (label + 1))])
        return np.stack(columns, axis=1).reshape(-1)

    @property
    def _num_labels(self) -> int:
        return max(self.labels or ()) + 1


_LABELS = 2**32  # where a label's streams of permutations begin, times its number plus 1; those of all examples: at 1
_WINDOWS = 2**62  # and those of windows


def labels_of(rows: Sequence[Any]) -> list[int]:
    """The label of every row of a train split, 0 to the number of candidates - 1.

    Raises:
        RecipeError: rows have no labels, or not the same ones; or no row has one of them.
    """
    counts = {len(row.candidates) if hasattr(row, "label") else 0 for row in rows}
    if len(counts) > 1 or 0 in counts:
        found = "differ from row to row" if len(counts) > 1 else "are none"
        raise RecipeError(
            f"train.balance is labels, which {found} in this task: leave it out, or take a task whose rows have the "
            "same number of candidates"
        )
    labels = [int(row.label) for row in rows]
    missing = sorted(set(range(*counts)) - set(labels))
    if missing:
        raise RecipeError(
            f"train.balance is labels, but none of the {len(labels)} rows of the train split has the label "
            f"{missing[0]}: leave it out, or take more rows by task.train"
        )
    return labels


def step_indices(seed: int, step: int, count: int, batch_size: int, stream: int = 0) -> np.ndarray:
    """Which of `count` examples make up a step: int64 [batch_size], a pure function of its arguments.

    Epoch after epoch, each a permutation of its own, cut into steps; a step may span two epochs.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch(seed, stream + int(p // count), count)[p % count] for p in positions])


def share(indices: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The part of a step's examples that a rank evaluates; the parts differ by one row at most."""
    return np.array_split(indices, size)[rank]


@lru_cache(maxsize=8)  # two epochs of each of a few labels
def _epoch(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(seed, epoch + 1, count)
