"""A step that is being measured."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from mezo_scale import collectives
from mezo_scale.errors import ShardingError
from mezo_scale.noise import direction_seed
from mezo_scale.optim import exchange, signal
from mezo_scale.optim.batch import rows
from mezo_scale.optim.estimators import Estimator, group_size
from mezo_scale.optim.losses import Evaluator, Sums, Work
from mezo_scale.optim.pieces import check_micro_batch, deal
from mezo_scale.optim.reads import Reads
from mezo_scale.perturbation import Branch
from mezo_scale.sharding import schemes
from mezo_scale.trajectory import StepRecord


class Measurement:
    """Where a step evaluates the losses, and this rank's losses there so far.

    Attributes:
        sums: None as long as nothing is measured.
        eps: of the step.
    """

    def __init__(self, estimator: Estimator, seed: int, step: int, eps: float) -> None:
        """`seed` and `step`: those of the directions follow from them."""
        self._estimator, self._seed, self._step = estimator, seed, step
        self._group_size = group_size(estimator)
        self._rows = 0  # over all ranks; counted only where they have groups
        self.eps = eps
        self.sums: Sums | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per direction; where the number of rows is not fixed yet, of as many as the rows so far need."""
        count = self._estimator.num_directions or max(1, -(-self._rows // (self._group_size or 1)))
        return tuple(direction_seed(self._seed, self._step, k) for k in range(count))

    @property
    def branches(self) -> list[Branch]:
        return self._estimator.branches(self.seeds, self.eps)

    @property
    def numbers(self) -> int:
        """How many values the ranks exchange."""
        return len(self.branches) + (1 if self._group_size is None else len(self.seeds)) + signal.PARTS

    def add(self, evaluator: Evaluator, work: Work) -> float:
        """Evaluate some rows; every rank does, where rows have groups. The mean loss over them and their branches."""
        if self._group_size is None:
            sums = evaluator.losses(work, self.branches)
        else:
            first = self._rows
            counts = self._counted(work)
            forwards = deal(first, counts, collectives.rank(), self._group_size, work.micro_batch)
            sums = evaluator.losses(work, self.branches, forwards, len(self.seeds))
        self.sums = sums if self.sums is None else self.sums + sums
        return sums.mean

    def finish(
        self, last: StepRecord | None, reads: Reads, read: Collection[str]
    ) -> tuple[list[float], list[float], signal.Signal | None]:
        """The mean loss in each branch, the slope along each direction and what rows say of the gradient, the same on
        all ranks; errors, too, as of `exchange.add_up`.

        Raises:
            ValueError: on all ranks, if the rows do not make whole groups, or are not as many as the estimator has.
        """
        assert self.sums is not None
        if self._group_size is not None:
            expected = self._estimator.num_directions * self._group_size
            if expected and self._rows != expected:
                raise ValueError(
                    f"the step has {self._rows} rows over all ranks, but the estimator's batch_size is {expected}: "
                    "measure as many, or give it another batch_size"
                )
            if self._rows % self._group_size:
                raise ValueError(
                    f"the step has {self._rows} rows over all ranks, which the group_size {self._group_size} does not "
                    "divide: measure a multiple"
                )
            self.sums += Sums.nothing(len(self.branches), len(self.seeds))  # of groups that are on other ranks
        totals = exchange.add_up(self._step, last, self.sums, reads, read, self._group_size)
        losses = totals.means
        slopes = self._estimator.gradients(losses, self.eps)
        return losses, slopes, signal.Signal.of(totals.squares, int(totals.counts[0]), slopes)

    def _counted(self, work: Work) -> list[int]:
        """The rows of each rank. An error of one rank is raised there, and a RankError on the others."""
        error: Exception | None = None
        try:
            mine = self._checked(work)
        except Exception as met:
            error, mine = met, None
        counts = exchange.count_rows(self._step, mine)
        if error is not None:
            raise error
        limit = self._estimator.num_directions * (self._group_size or 1)
        if limit and self._rows + sum(counts) > limit:
            raise ValueError(
                f"the step has {self._rows + sum(counts)} rows over all ranks, but the estimator's batch_size is "
                f"{limit}: measure as many, or give it another batch_size"
            )
        self._rows += sum(counts)
        return counts

    def _checked(self, work: Work) -> int:
        if work.closure is not None:
            raise ValueError(
                f"the estimator is {self._estimator.name}, and whose rows a closure's losses are can't be told: give "
                "batch and objective"
            )
        if work.batch is None or work.objective is None:
            raise ValueError("step and measure take either a closure, or both batch and objective")
        check_micro_batch(work.micro_batch)
        return rows(work.batch)


def check_rows(estimator: Estimator, model: nn.Module, *, logged: bool) -> None:
    """Whether an estimator's groups of rows can be told.

    Args:
        logged: whether a trajectory is kept.

    Raises:
        ValueError: a trajectory is, and how many directions its records have is not known.
        ShardingError: several ranks have the same rows.
    """
    if group_size(estimator) is None:
        return
    if logged and not estimator.num_directions:
        raise ValueError(
            "a trajectory's records have one number of directions: give Grouped its batch_size, the rows of a step "
            "over all ranks"
        )
    if schemes.share_rows(model):
        raise ShardingError(
            f"the estimator is {estimator.name}, which takes every rank's rows for others, but under tensor "
            "parallelism ranks share theirs: take Spsa or OneSided"
        )
