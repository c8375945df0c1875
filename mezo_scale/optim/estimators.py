"""Where a step evaluates the loss, and what the losses there say of the slope along each of its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from mezo_scale.perturbation import Branch

__all__ = ["Estimator", "Grouped", "OneSided", "Spsa"]


class Estimator(Protocol):
    """A frozen value. The gradient is estimated by the mean over directions k of gradients[k] z(seeds[k]).

    All rows of a step are evaluated in all branches, unless there is an attribute ``group_size``, as in `Grouped`: then
    direction k's branches, equally many for each, see the rows at the positions k * group_size to
    (k + 1) * group_size - 1 of the step, over all ranks, and no others.
    """

    @property
    def name(self) -> str:
        """In a trajectory's header: a run goes on with the estimator of this name only."""

    @property
    def num_directions(self) -> int:
        """How many seeds a step draws."""

    def branches(self, seeds: Sequence[int], eps: float) -> list[Branch]:
        """(seed, scale) of each evaluation: the loss at theta + scale z(seed). Neighbours of one seed, two at a time,
        share one generation of z."""

    def gradients(self, losses: Sequence[float], eps: float) -> list[float]:
        """The slope along each direction, from the mean loss in each branch; not finite if one of those is not."""


@dataclass(frozen=True, slots=True)
class Spsa:
    """Two-sided: (L(theta + eps z) - L(theta - eps z)) / (2 eps), two evaluations per direction (Spall, 1992)."""

    num_directions: int = 1
    name: ClassVar[str] = "spsa"

    def __post_init__(self) -> None:
        if self.num_directions < 1:
            raise ValueError(f"num_directions is {self.num_directions}: expected at least 1")

    def branches(self, seeds: Sequence[int], eps: float) -> list[Branch]:
        return [(seed, scale) for seed in seeds for scale in (eps, -eps)]

    def gradients(self, losses: Sequence[float], eps: float) -> list[float]:
        return [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]


@dataclass(frozen=True, slots=True)
class OneSided:
    """One evaluation per direction: n directions cost n forwards instead of 2 n.

    With l_k = L(theta + eps z_k) and their mean m, the slope along z_k is n (l_k - m) / ((n - 1) eps). No evaluation at
    theta itself: the mean also takes away what curvature adds to all losses alike. The factor n / (n - 1) makes up for
    the part of l_k that is in m, so that the estimate is unbiased up to curvature. It needs a smaller eps than `Spsa`:
    curvature cancels only on average over directions.
    """

    num_directions: int = 2
    name: ClassVar[str] = "one_sided"

    def __post_init__(self) -> None:
        if self.num_directions < 2:
            raise ValueError(f"num_directions is {self.num_directions}: expected 2 or more, whose mean is the baseline")

    def branches(self, seeds: Sequence[int], eps: float) -> list[Branch]:
        return [(seed, eps) for seed in seeds]

    def gradients(self, losses: Sequence[float], eps: float) -> list[float]:
        count = len(losses)
        mean = sum(losses) / count
        return [count * (loss - mean) / ((count - 1) * eps) for loss in losses]


@dataclass(frozen=True, slots=True)
class Grouped:
    """Two-sided, with a direction of its own for every `group_size` rows: two evaluations per row, as for `Spsa`.

    Groups are cut by position in the step. The rows of one `measure` or `step` count in rank order, those of later
    calls of the same step after them; ranks may have different numbers. So a record says nothing of ranks. A group of
    all rows is `Spsa`, one of one row gives every row a direction of its own.

    Attributes:
        group_size: rows that share a direction.
        batch_size: rows of a step over all ranks. None: those of the first step; a trajectory needs the number before.
    """

    group_size: int
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}: expected at least 1 row")
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % self.group_size):
            raise ValueError(
                f"batch_size is {self.batch_size} and group_size {self.group_size}, which does not divide it: take a "
                "multiple, so that all groups are of one size"
            )

    @property
    def name(self) -> str:
        return f"grouped by {self.group_size}"

    @property
    def num_directions(self) -> int:
        """Groups of a step; 0 before the first one has shown how many."""
        return 0 if self.batch_size is None else self.batch_size // self.group_size

    def branches(self, seeds: Sequence[int], eps: float) -> list[Branch]:
        return [(seed, scale) for seed in seeds for scale in (eps, -eps)]

    def gradients(self, losses: Sequence[float], eps: float) -> list[float]:
        return [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]


def group_size(estimator: Estimator) -> int | None:
    """Rows that share a direction; None: all rows of a step are in all branches."""
    return getattr(estimator, "group_size", None)


def settled(estimator: Estimator, num_directions: int) -> Estimator:
    """The estimator, now that a step has shown how many directions there are."""
    if isinstance(estimator, Grouped) and estimator.batch_size is None and num_directions:
        return replace(estimator, batch_size=num_directions * estimator.group_size)
    return estimator


def chosen(estimator: Estimator | None, num_directions: int) -> Estimator:
    """What an optimizer was given; without an estimator the two-sided one. Raises ValueError if they disagree."""
    if estimator is None:
        return Spsa(num_directions)
    if num_directions not in (1, estimator.num_directions):
        raise ValueError(
            f"num_directions is {num_directions}, but the estimator has {estimator.num_directions}: give the number to "
            "the estimator only"
        )
    return estimator
