"""From what the last steps measured to the multipliers that the next record holds.

A rule of window W writes a linear combination of the directions of W steps: a record of K = W n seeds, the step's own n
first, then those of the step before, and so on. So the last record alone says what the next step's window holds, and a
replay needs to know nothing of rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from mezo_scale.trajectory import StepRecord

__all__ = ["Measured", "Rule", "Sgd"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one step saw: the seeds of its directions, and the slope along each.

    Raises:
        ValueError: there is not one slope per seed.
    """

    seeds: tuple[int, ...]
    projected_grads: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.projected_grads):
            raise ValueError(
                f"the estimator gave {len(self.projected_grads)} gradients for {len(self.seeds)} directions: expected "
                "one each"
            )


class Rule(Protocol):
    """A frozen value: its only state is the window."""

    @property
    def name(self) -> str:
        """In a trajectory's header: a run goes on with the rule of this name and window only."""

    @property
    def window(self) -> int:
        """How many steps it reads, the newest included; 1 or more."""

    def step(self, window: Sequence[Measured], group: Mapping[str, Any]) -> tuple[list[float], float]:
        """The update of one parameter group's weights: theta = theta * decay + sum over alphas[k] z_k.

        Args:
            window: 1 to `window` steps, the newest first: fewer when the run begins. Skipped steps are not in it.
            group: of torch's, with "lr" and "weight_decay".

        Returns:
            alphas, one per direction in the window's order, and the decay; they are rounded to float32.
        """


@dataclass(frozen=True, slots=True)
class Sgd:
    """Down the mean over directions, with decoupled decay."""

    name: ClassVar[str] = "sgd"
    window: ClassVar[int] = 1

    def step(self, window: Sequence[Measured], group: Mapping[str, Any]) -> tuple[list[float], float]:
        lr, grads = float(group["lr"]), window[0].projected_grads
        return [-lr * grad / len(grads) for grad in grads], 1.0 - lr * group["weight_decay"]


def described(rule: Rule) -> str:
    """What a trajectory and a saved state call a rule."""
    return rule.name if rule.window == 1 else f"{rule.name} over {rule.window} steps"


def record(
    step: int,
    rule: Rule,
    window: Sequence[Measured],
    groups: Iterable[Mapping[str, Any]],
    loss: float,
    unread: tuple[int, ...],
) -> StepRecord:
    """A step's record. One whose loss or slopes are not finite moves nothing.

    Args:
        window: the step's own measurement, then those of the steps before.
        loss: mean over rows, ranks and branches.

    Raises:
        ValueError: the rule gave another number of multipliers than there are directions.
    """
    own = window[0]
    known = [slope for measured in window for slope in measured.projected_grads]
    padding = rule.window * len(own.seeds) - len(known)
    seeds = sum((measured.seeds for measured in window), ()) + own.seeds * (rule.window - len(window))
    finite = all(math.isfinite(value) for value in (loss, *own.projected_grads))
    alphas: list[float] = []
    decays: list[float] = []
    for group in groups:
        multipliers, decay = rule.step(window, group) if finite else ([0.0] * len(known), 1.0)
        if len(multipliers) != len(known):
            raise ValueError(f"rule {rule.name} gave {len(multipliers)} multipliers for {len(known)} directions")
        alphas += [float(np.float32(alpha)) for alpha in multipliers] + [0.0] * padding
        decays.append(float(np.float32(decay)))
    return StepRecord(step, seeds, tuple(known) + (0.0,) * padding, tuple(alphas), tuple(decays), loss, unread)


def past(record: StepRecord, rule: Rule, num_directions: int) -> list[Measured]:
    """What the step after a record finds in its window besides its own measurement, the newest first."""
    starts = range(0, len(record.seeds), num_directions)
    ends = [(start, start + num_directions) for start in starts]
    own, *before = [Measured(record.seeds[a:b], record.projected_grads[a:b]) for a, b in ends]
    known = [measured for measured in before if measured.seeds != own.seeds]  # a run's first records repeat their own
    return (known if record.skipped else [own, *known])[: rule.window - 1]
