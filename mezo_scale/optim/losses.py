"""The losses of a step's branches on one rank: per branch its rows' losses, added up in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.errors import RankError
from mezo_scale.optim import signal
from mezo_scale.optim.batch import Batch, rows, take
from mezo_scale.optim.company import Company
from mezo_scale.optim.pieces import Forward, Piece, check_micro_batch
from mezo_scale.perturbation import Branch, PairingError, View
from mezo_scale.perturbation.pairing import in_words
from mezo_scale.sharding import schemes

Objective = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> losses of the batch's rows, [rows]. One that jumps, as the score of a text does, may have a
``smooth``, another of the same batch: by it the start-up check tells two ways of computing a forward apart."""

PROBES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""The start-up check perturbs this many eps, the first of them by which branches are `_APART`. Far beyond that a model
is noise, and rounding as large as what it is told from."""

_APART = 0.1  # of 1 + the largest loss
_FINE, _ROUGH = 1e-3, 3e-2  # shares of 1 + a loss that two ways of computing it may differ by, in 32 and in 16 bits
_UNKNOWN = [math.nan] * signal.PARTS
_ALIKE, _NOT_FINITE, _FAILED = 1, 2, 3  # what a rank says of a probe: branches are too much alike, or overflow, or it
# met an error


@dataclass(frozen=True, slots=True)
class Sums:
    """One rank's losses: summed over its rows, one sum per branch, and how many rows that was.

    Attributes:
        sums: per branch.
        counts: rows per group of rows: one number where all rows are in all branches, else one per direction.
        squares: the sum over directions and rows of the squared slope of a row, as `signal.split` gives it; NaN where
            rows have none.
    """

    sums: list[float]
    counts: list[float]
    squares: list[float]

    @classmethod
    def nothing(cls, branches: int, groups: int) -> Sums:
        return cls([0.0] * branches, [0.0] * groups, [0.0] * signal.PARTS)

    @classmethod
    def parse(cls, values: Sequence[float], branches: int) -> Sums:
        """From what `values` gives."""
        return cls(list(values[:branches]), list(values[branches : -signal.PARTS]), list(values[-signal.PARTS :]))

    def __add__(self, more: Sums) -> Sums:
        """With those of more rows: in the same branches, and in those of groups that come after."""
        sums, counts = (
            [one + other for one, other in zip_longest(mine, theirs, fillvalue=0.0)]
            for mine, theirs in ((self.sums, more.sums), (self.counts, more.counts))
        )
        return Sums(sums, counts, [one + other for one, other in zip(self.squares, more.squares, strict=True)])

    @property
    def values(self) -> list[float]:
        """All of it, to be added to that of other ranks."""
        return [*self.sums, *self.counts, *self.squares]

    @property
    def means(self) -> list[float]:
        """Over the rows of each branch."""
        each = len(self.sums) // len(self.counts)
        return [value / self.counts[branch // each] for branch, value in enumerate(self.sums)]

    @property
    def mean(self) -> float:
        """Over rows and branches."""
        return sum(self.sums) * len(self.counts) / (len(self.sums) * sum(self.counts))


@dataclass(frozen=True, slots=True)
class Work:
    """What `MeZO.step` and `MeZO.measure` are given: a closure, or a batch with its objective."""

    closure: Callable[[], Any] | None
    batch: Batch | None
    objective: Objective | None
    micro_batch: int | None

    def is_nothing(self) -> bool:
        """Whether nothing is to be evaluated."""
        return self.closure is None and self.batch is None and self.objective is None


class Evaluator:
    """Evaluates branches of one model, all in one forward where the model can be paired, else one at a time."""

    def __init__(self, model: nn.Module, view: View, *, paired: bool | None = None) -> None:
        self.model = model
        self.view = view
        self.paired = paired  # None until the start-up check has decided
        self.company = Company(model, view)
        self.has_own_rows = not schemes.share_rows(model)  # and not those of a tensor-parallel rank
        self._last: list[Branch] = []  # of the latest forward

    def losses(
        self,
        work: Work,
        branches: Sequence[Branch],
        forwards: Sequence[Forward] | None = None,
        num_groups: int = 1,
    ) -> Sums:
        """The losses in each branch, with the model in evaluation mode.

        Args:
            forwards: which rows of the batch are in the branches of which group; None: all in all.
            num_groups: groups of rows that the branches are for, equally many for each.

        Raises:
            ValueError: neither a closure nor a batch with its objective, or both; or they can't be evaluated.
        """
        with self.company.counted(), evaluating(self.model):
            match work:
                case Work(None, batch, objective, micro_batch) if batch is not None and objective is not None:
                    if forwards is None:
                        pieces = self._pieces(batch, len(branches), micro_batch)
                    else:
                        each = len(branches) // num_groups
                        pieces = [Piece.of_blocks(batch, forward, each) for forward in forwards]
                    return self._of_pieces(pieces, objective, branches, num_groups)
                case Work(closure, None, None) if closure is not None and forwards is None:
                    with torch.no_grad():
                        return self.of_closure(closure, branches)
        raise ValueError("step and measure take either a closure, or both batch and objective")

    def _of_pieces(
        self, pieces: Sequence[Piece], objective: Objective, branches: Sequence[Branch], num_groups: int
    ) -> Sums:
        """Losses of a batch: ``objective`` sees each piece's rows once per branch that they are in."""
        if self.paired is None:
            self.paired = self._check(pieces[0].two_branches(), objective, branches)
            self.company.forget()
        total = Sums.nothing(len(branches), num_groups)
        compares = self.has_own_rows and signal.is_two_sided(branches)
        for piece in pieces:
            losses = self._evaluate(piece, objective, branches).cpu()  # the step's one wait for the device
            losses = losses * torch.tensor(piece.weights, dtype=losses.dtype)
            for branch, part in zip(piece.branches, losses.sum(dim=1).tolist(), strict=True):
                total.sums[branch] += part
            for group, count in piece.counts:
                total.counts[group] += count
            found = _squares(losses, [branches[branch][1] for branch in piece.branches]) if compares else _UNKNOWN
            total.squares[:] = [one + more for one, more in zip(total.squares, found, strict=True)]
        return total

    def per_row(self, batch: Batch, objective: Objective, branches: Sequence[Branch]) -> Tensor:
        """Losses of a batch in each branch, float64 [branches, rows], outside of any step."""
        piece = Piece.whole(batch, len(branches))
        with evaluating(self.model):
            if self.paired is None:
                self.paired = self._check(piece.two_branches(), objective, branches)
            return self._evaluate(piece, objective, branches)

    def of_closure(self, closure: Callable[[], Any], branches: Sequence[Branch]) -> Sums:
        """Losses of a closure, evaluated once per branch; a scalar counts as one row."""
        sums, count = [], 0.0
        for branch in branches:
            with self.view.opened([branch]):
                losses = torch.as_tensor(closure()).detach().double().reshape(-1)
            if losses.numel() == 0:
                raise ValueError("the closure returned an empty tensor: expected a scalar loss or per-row losses")
            if count not in (0.0, losses.numel()):
                raise ValueError(
                    f"the closure returned {losses.numel()} losses in one branch and {count:g} in another: "
                    "expected those of the same rows"
                )
            sums.append(float(losses.sum()))
            count = float(losses.numel())
        return Sums(sums, [count], _UNKNOWN)

    def keep_company(self) -> None:
        """After a failure of this rank alone: gather with the others until they have their losses."""
        while self.view.gathers and self.company.left():
            with self.company.counted(), self.view.opened(self._last):
                self.company.call()

    def _pieces(self, batch: Batch, branches: int, micro_batch: int | None) -> list[Piece]:
        """The forwards of a batch whose rows are all in all branches. Ranks with fewer rows repeat one at weight 0: all
        must gather equally often."""
        total = rows(batch)
        if micro_batch is None:
            return [Piece.whole(batch, branches)]
        check_micro_batch(micro_batch)
        count = -(-collectives.max_integer(total) // micro_batch)
        starts = range(0, total, micro_batch)
        pieces = [Piece.whole(take(batch, start, start + micro_batch), branches) for start in starts]
        return pieces + [Piece.whole(take(batch, 0, 1), branches, counts=False)] * (count - len(pieces))

    def _evaluate(self, piece: Piece, objective: Objective, branches: Sequence[Branch]) -> Tensor:
        """Per-row losses, float64 [the piece's branches, rows]."""
        if not self.paired:
            return self._apart(piece, objective, branches)
        try:
            return self._together(piece, objective, branches)
        except PairingError as error:
            reason = str(error)
        except Exception as error:
            if self.view.gathers:  # ranks in the middle of a forward need each other: one can't begin another alone
                raise
            reason = in_words(error)
        losses = self._apart(piece, objective, branches)  # an error that is the model's own comes again here
        self._fall_back(reason)
        return losses

    def _together(self, piece: Piece, objective: Objective, branches: Sequence[Branch]) -> Tensor:
        """All the piece's branches in one forward, their rows one below the other."""
        self._last, tall = [branches[branch] for branch in piece.branches], piece.tall()
        with self.view.opened(self._last):
            losses = objective(self.model, tall)
        return _per_row(losses, len(self._last) * piece.rows).view(len(self._last), piece.rows)

    def _apart(self, piece: Piece, objective: Objective, branches: Sequence[Branch]) -> Tensor:
        """One forward per branch."""
        parts = []
        for part, where in piece.parts():
            for branch in where:
                self._last = [branches[branch]]
                with self.view.opened(self._last):
                    parts.append(_per_row(objective(self.model, part), piece.rows))
        return torch.stack(parts)

    def _check(self, piece: Piece, objective: Objective, branches: Sequence[Branch]) -> bool:
        """Whether pairing gives what one branch at a time gives, at perturbations large enough to tell rows apart.

        Whatever the tall batch raises and single branches do not is a reason not to pair. All ranks decide together; an
        error of single branches is raised there, and a RankError on the others.
        """
        compared = getattr(objective, "smooth", objective)
        tolerance = _FINE if _widest(self.view) == torch.float32 else _ROUGH
        probe, apart, reason = list(branches), torch.empty(0), ""
        for size in PROBES:
            larger = [(seed, size * scale) for seed, scale in branches]
            try:
                found = self._apart(piece, compared, larger)
            except Exception:
                collectives.max_integer(_FAILED)
                raise
            overflows = size > PROBES[0] and not found.isfinite().all()
            state = _NOT_FINITE if overflows else 0 if _apartness(found) > _APART else _ALIKE
            state = collectives.max_integer(state)
            if state == _FAILED:
                raise RankError("another rank failed while it evaluated the first losses, and says why itself")
            if state != _NOT_FINITE:
                probe, apart = larger, found
            if state != _ALIKE:
                break
        try:
            together = self._together(piece, compared, probe)
            if compared is not objective:
                self._together(piece, objective, probe)  # it may take paths that the other does not
            # What moves losses far moves how 16 bits round them, too: a fifth of that is no mix of branches.
            allowed = tolerance if tolerance < _ROUGH else max(tolerance, _apartness(apart) / 5)
            same = torch.allclose(together, apart, rtol=allowed, atol=allowed, equal_nan=True)
            if not same or (_apartness(apart) > tolerance / 3 and _strays(together, apart)):
                reason = f"its losses differ by up to {float((together - apart).abs().max()):.3g}"
        except Exception as error:
            reason = in_words(error)
        worst = collectives.max_integer(int(bool(reason)))
        if worst == _FAILED:
            raise RankError("another rank failed while it evaluated the first losses, and says why itself")
        if worst:
            self._fall_back(reason or "another rank found so")
            return False
        return True

    def _fall_back(self, reason: str) -> None:
        self.paired = False
        warnings.warn(
            "the model can't evaluate several branches in one batch, so they run one at a time and every weight "
            f"is gathered once per branch: {reason}",
            stacklevel=2,
        )


def _squares(losses: Tensor, scales: Sequence[float]) -> list[float]:
    """Of the slopes of rows between the two sides of each direction. losses: float64 [branches, rows]."""
    widths = 2 * torch.tensor(scales[::2], dtype=losses.dtype)
    return signal.split(((losses[::2] - losses[1::2]) / widths[:, None]).square())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside: dropout would make the two signs differ by chance."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _apartness(losses: Tensor) -> float:
    """How far the first branch is from the last, beside what tolerances are relative to. losses: [branches, rows]."""
    return float((losses[0] - losses[-1]).abs().max() / (1 + losses.abs().max()))


def _strays(together: Tensor, apart: Tensor) -> bool:
    """Whether the first branch is above the last one by other amounts: by half of the largest, or more."""
    amounts = apart[0] - apart[-1]
    return bool((together[0] - together[-1] - amounts).abs().max() > amounts.abs().max() / 2)


def _widest(view: View) -> torch.dtype:
    """The dtype that decides how closely two ways of computing one loss agree."""
    dtypes = {shard.local.dtype for shard in view.layout.shards} | ({view.weights.dtype} - {None})
    return torch.float32 if dtypes == {torch.float32} else torch.bfloat16


def _per_row(losses: Tensor, rows: int) -> Tensor:
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (rows,):
        found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        scalar = isinstance(losses, Tensor) and losses.numel() == 1
        hint = "; for a Hugging Face batch with labels, whose .loss is a mean, use mezo_scale.objectives.labels"
        raise ValueError(
            f"the objective returned {found}: expected one loss per row, a tensor of shape ({rows},)"
            + (hint if scalar else "")
        )
    return losses.detach().double()
