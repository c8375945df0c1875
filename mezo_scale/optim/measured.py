"""From losses to the record of a step: summed over ranks, and the slopes between each direction's two branches."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mezo_scale import collectives
from mezo_scale.errors import RankError
from mezo_scale.optim.losses import Sums
from mezo_scale.perturbation import Branch
from mezo_scale.trajectory import StepRecord


@dataclass(frozen=True, slots=True)
class Measured:
    """A step under way: its branches, two per direction, and this rank's losses under them."""

    branches: list[Branch]
    sums: Sums

    def __add__(self, more: Sums) -> Measured:
        """With the losses of more rows under the same branches."""
        sums = [one + other for one, other in zip(self.sums.sums, more.sums, strict=True)]
        return Measured(self.branches, Sums(sums, self.sums.count + more.count))

    def record(self, step: int, groups: Iterable[dict[str, Any]], last: StepRecord | None) -> StepRecord:
        """The step's record, the same on all ranks. Every rank must call it: the step's one all-reduce.

        Raises:
            RankError: a rank's ``last`` record is another one; it is named.
        """
        seeds, eps = tuple(seed for seed, _ in self.branches[::2]), self.branches[0][1]
        losses = self._mean_losses(step, last)
        grads = tuple((plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True))
        loss = sum(losses) / len(losses)
        finite = all(math.isfinite(value) for value in (loss, *grads))
        alphas, decays = [], []
        for group in groups:
            lr = float(group["lr"])
            alphas += [float(np.float32(-lr * grad / len(grads))) if finite else 0.0 for grad in grads]
            decays.append(float(np.float32(1.0 - lr * group["weight_decay"])) if finite else 1.0)
        return StepRecord(step, seeds, grads, tuple(alphas), tuple(decays), loss)

    def _mean_losses(self, step: int, last: StepRecord | None) -> list[float]:
        """Mean loss per branch over all ranks' rows."""
        digest = _digest(last)
        *total, count, digests, squares = collectives.sum_scalars([*self.sums.sums, self.sums.count, digest, digest**2])
        if squares * collectives.world_size() != digests**2:  # equality in Cauchy-Schwarz: all digests are the same
            _name_odd_ranks(digest, step - 1)
        return [value / count for value in total]


def _name_odd_ranks(digest: int, step: int) -> None:
    everyone = collectives.gather_integers(digest)
    usual = max(set(everyone), key=everyone.count)
    odd = ", ".join(str(rank) for rank, other in enumerate(everyone) if other != usual)
    raise RankError(
        f"rank {odd} recorded another step {step} than the other ranks: give all ranks the same seed, eps, learning "
        "rate and schedule"
    )


def _digest(record: StepRecord | None) -> int:
    """16 bits of a record, so that its square is exact in the float64 all-reduce."""
    return zlib.crc32(repr(record).encode()) & 0xFFFF
