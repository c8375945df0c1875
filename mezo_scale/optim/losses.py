"""n-SPSA: losses at theta + eps z_k and theta - eps z_k, summed over rows and ranks, and the slopes between them.

Per branch a rank adds up its per-row losses in float64; per direction 16 bytes cross between ranks, and the row count
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.errors import ViewError
from mezo_scale.optim.batch import Batch, repeat, rows, take
from mezo_scale.perturbation import Branch, View

Objective = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> losses of the batch's rows, [rows]."""

PROBE = 10.0
"""The start-up check perturbs this many eps: branches then differ by far more than two ways of computing one branch."""


@dataclass(frozen=True, slots=True)
class Sums:
    """One rank's losses: summed over its rows, one sum per branch, and how many rows that was."""

    sums: list[float]
    count: float


class Estimator:
    """Evaluates branches of one model, all in one forward where the model can be paired, else one at a time."""

    def __init__(self, model: nn.Module, view: View, *, paired: bool | None = None) -> None:
        self.model = model
        self.view = view
        self.paired = paired  # None until the start-up check has decided

    def of_batch(self, batch: Batch, objective: Objective, branches: Sequence[Branch], micro_batch: int | None) -> Sums:
        """Losses of a batch: ``objective`` sees its rows once per branch, in pieces of ``micro_batch`` rows per
        branch."""
        pieces = self._pieces(batch, rows(batch), micro_batch)
        if self.paired is None:
            self.paired = self._check(pieces[0][0], objective, branches)
        sums, count = [0.0] * len(branches), 0.0
        for piece, weight in pieces:
            losses = self._evaluate(piece, objective, branches) * weight
            sums = [total + float(part) for total, part in zip(sums, losses.sum(dim=1).tolist(), strict=True)]
            count += losses.shape[1] * weight
        return Sums(sums, count)

    def of_closure(self, closure: Callable[[], Any], branches: Sequence[Branch]) -> Sums:
        """Losses of a closure, evaluated once per branch; a scalar counts as one row."""
        sums, count = [], 0.0
        for branch in branches:
            with self.view.branches([branch]):
                losses = torch.as_tensor(closure()).detach().double().reshape(-1)
            if losses.numel() == 0:
                raise ValueError("the closure returned an empty tensor: expected a scalar loss or per-row losses")
            sums.append(float(losses.sum()))
            count = float(losses.numel())
        return Sums(sums, count)

    def _pieces(self, batch: Batch, total: int, micro_batch: int | None) -> list[tuple[Batch, float]]:
        """(rows, weight) of each forward. Ranks with fewer rows repeat one at weight 0: all must gather equally
        often."""
        if micro_batch is None:
            return [(batch, 1.0)]
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}: expected at least 1 row")
        count = -(-collectives.max_integer(total) // micro_batch)
        pieces = [(take(batch, start, start + micro_batch), 1.0) for start in range(0, total, micro_batch)]
        return pieces + [(take(batch, 0, 1), 0.0)] * (count - len(pieces))

    def _evaluate(self, batch: Batch, objective: Objective, branches: Sequence[Branch]) -> Tensor:
        """Per-row losses, float64 [branches, rows]."""
        count = rows(batch)
        if self.paired:
            tall = repeat(batch, len(branches))
            with self.view.branches(branches):
                losses = objective(self.model, tall)
            return _per_row(losses, len(branches) * count).view(len(branches), count)
        parts = []
        for branch in branches:
            with self.view.branches([branch]):
                parts.append(_per_row(objective(self.model, batch), count))
        return torch.stack(parts)

    def _check(self, batch: Batch, objective: Objective, branches: Sequence[Branch]) -> bool:
        """Whether pairing gives what one branch at a time gives, at perturbations large enough to tell rows apart."""
        probe = [(seed, PROBE * scale) for seed, scale in branches[:2]]
        self.paired = False
        apart = self._evaluate(batch, objective, probe)
        self.paired = True
        reason = ""
        try:
            together = self._evaluate(batch, objective, probe)
            tolerance = 1e-3 if _widest(self.view) == torch.float32 else 3e-2
            if not torch.allclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True):
                reason = f"its losses differ by up to {float((together - apart).abs().max()):.3g}"
        except ViewError as error:
            reason = str(error)
        if collectives.max_integer(int(bool(reason))):
            warnings.warn(
                "the model can't evaluate several branches in one batch, so they run one at a time and every weight "
                f"is gathered once per branch: {reason or 'another rank found so'}",
                stacklevel=2,
            )
            return False
        if self.view.never_ran:
            names = self.view.never_ran
            warnings.warn(
                f"{len(names)} trainable parameters belong to modules that the forward never calls "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): perturbing them has no effect, "
                "updating them only adds noise; freeze them",
                stacklevel=2,
            )
        return True


def _widest(view: View) -> torch.dtype:
    """The dtype that decides how closely two ways of computing one loss agree."""
    dtypes = {shard.local.dtype for shard in view.layout.shards} | ({view.dtype} if view.dtype is not None else set())
    return torch.float32 if dtypes == {torch.float32} else torch.bfloat16


def _per_row(losses: Tensor, rows: int) -> Tensor:
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (rows,):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"the objective returned {found}: expected one loss per row, a tensor of shape ({rows},)")
    return losses.detach().double()
