"""Which examples go where: permutations, splits of a step, a rank's share; all pure functions of their arguments."""

from functools import lru_cache

import numpy as np


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """A permutation of range(count), int64, as a pure function of its arguments.

    Sorts the raw words of Philox, which NumPy promises to keep (unlike its `permutation`).
    """
    return np.argsort(np.random.Philox(key=[seed, stream]).random_raw(count), kind="stable")


def step_indices(seed: int, step: int, count: int, batch_size: int) -> np.ndarray:
    """Which of `count` examples make up a step: int64 [batch_size], a pure function of its arguments.

    Epoch after epoch, each a permutation of its own, cut into steps; a step may span two epochs.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch(seed, int(p // count), count)[p % count] for p in positions])


def share(indices: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The part of a step's examples that a rank evaluates; the parts differ by one row at most."""
    return np.array_split(indices, size)[rank]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(seed, epoch + 1, count)
