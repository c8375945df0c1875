"""How well eps suits a model and its rows: what rounding and curvature add to the slopes that an estimator sees.

Along a few directions z the loss of each row is looked at in six places, L(s) = L(theta + s eps z) for s = +-2, +-1.2,
+-0.4: as far as 2, or rounding would pass for curvature. Their odd part (L(s) - L(-s)) / 2 is a s + b s^3 and what is
left over, which is rounding; their even part is L(0) + c s^2. A two-sided slope has the error b / eps. A one-sided one
has (b + c) / eps, as far as it differs from direction to direction: the baseline takes the rest away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mezo_scale import collectives
from mezo_scale.noise import direction_seed
from mezo_scale.optim.batch import Batch, rows, take
from mezo_scale.optim.estimators import group_size
from mezo_scale.optim.losses import Objective
from mezo_scale.perturbation import Branch

if TYPE_CHECKING:
    from mezo_scale.optim.mezo import MeZO

Losses = npt.NDArray[np.float64]

DIRECTIONS = 4
TOO_MUCH = 0.3  # of the slope
_PLACES = np.array([2.0, 1.2, 0.4])
_ODD = np.stack([_PLACES, _PLACES**3], axis=1)
_EVEN = np.stack([np.ones(3), _PLACES**2], axis=1)
_REST = np.array([1.0, -5.0, 10.0]) / math.sqrt(126)  # at right angles to both columns of _ODD


@dataclass(frozen=True, slots=True)
class Shares:
    """Root mean squares over directions, for as many rows as share a direction.

    Attributes:
        eps: where.
        slope: as the estimator would see it; NaN where a loss is not finite.
        rounding, curvature: what they add to it, as shares of it; NaN where there is none.
    """

    eps: float
    slope: float
    rounding: float
    curvature: float

    def __str__(self) -> str:
        if not self.slope > 0:
            what = "have no slope" if self.slope == 0 else "are not finite"
            return f"eps {self.eps:g}: warning: the losses of the first rows {what}"
        found = f"eps {self.eps:g}: rounding {self.rounding:.0%}, curvature {self.curvature:.0%} of the slope"
        if self.rounding > TOO_MUCH:
            return found + "; warning: it drowns in rounding: take a larger eps, or compute in float32"
        if self.curvature > TOO_MUCH:
            return found + "; warning: it is bent by curvature: take a smaller eps"
        return found


def check(optimizer: MeZO, batch: Batch, objective: Objective, micro_batch: int | None = None) -> Shares:
    """The shares at an optimizer's eps, the same on all ranks, each of which calls this. No step is taken.

    Takes twelve forwards of a quarter of the batch in two branches each. Arguments as for `MeZO.step`.
    """
    total, evaluator, estimator = rows(batch), optimizer._evaluator, optimizer._estimator
    some = take(batch, 0, min(-(-total // 4), micro_batch or total))

    def look(branches: list[Branch]) -> Losses:
        found: Losses = evaluator.per_row(some, objective, branches).cpu().numpy()
        return found

    with optimizer._heartbeat.inside(optimizer.step_count):
        seeds = [direction_seed(optimizer.seed, optimizer.step_count, k) for k in range(DIRECTIONS)]
        looked = np.stack([_along(seed, optimizer.eps, look) for seed in seeds])
        one_sided = all(scale > 0 for _, scale in estimator.branches(range(estimator.num_directions or 1), 1.0))
        return _shares(looked, optimizer.eps, group_size(estimator), total, one_sided=one_sided)


def _shares(looked: Losses, eps: float, size: int | None, total: int, *, one_sided: bool) -> Shares:
    """From this rank's losses [directions, places, 2 sides, rows]; `size`: rows that share a direction, None: all."""
    looked = np.where(np.isfinite(looked), looked, np.nan)
    odd, even = (looked[:, :, 0] - looked[:, :, 1]) / 2, (looked[:, :, 0] + looked[:, :, 1]) / 2
    cubic, square = np.linalg.pinv(_ODD)[1], np.linalg.pinv(_EVEN)[1] * one_sided
    error = np.einsum("p,kpr->kr", cubic, odd) + np.einsum("p,kpr->kr", square, even)
    seen = np.linalg.pinv(_ODD).sum(0)  # a + b
    numbers = np.stack([np.einsum("p,kpr->kr", seen, odd), np.einsum("p,kpr->kr", _REST, odd), error])
    mine = np.stack([numbers.sum(2), (numbers**2).sum(2)], axis=1)
    *sums, count, everyone = collectives.sum_scalars([*mine.ravel().tolist(), float(looked.shape[3]), float(total)])
    each = np.array(sums).reshape(mine.shape)
    wanted = everyone if size is None else float(size)
    slope, rest = (_mean_square(part, count, wanted) for part in each[:2])
    slope = max(slope - rest * float(seen @ seen), 0.0) + rest
    bent = _mean_square(each[2], count, wanted, centred=one_sided) - rest * float(cubic @ cubic + square @ square)
    if one_sided:
        rest *= 2  # of one loss, not of half the difference of two
    if not (slope > 0 and math.isfinite(rest + bent)):
        return Shares(eps, 0.0 if slope == 0 else math.nan, math.nan, math.nan)
    root = math.sqrt(slope)
    return Shares(eps, root / eps, math.sqrt(rest) / root, math.sqrt(max(bent, 0.0)) / root)


def _along(seed: int, eps: float, look: Callable[[list[Branch]], Losses]) -> Losses:
    """Losses along one direction, [places, 2 sides, rows]."""
    return np.stack([look([(seed, place * eps), (seed, -place * eps)]) for place in _PLACES])


def _mean_square(sums: Losses, count: float, size: float, *, centred: bool = False) -> float:
    """The mean over directions of the squared mean over `size` rows, from `count` rows along each direction.

    Args:
        sums: over rows, of a number and of its square, [2, directions].
        centred: about the mean over directions.
    """
    means, squares = sums[0] / count, sums[1] / count
    within = float(np.mean(squares - means**2)) * count / (count - 1) if count > 1 else 0.0
    among = float(np.var(means, ddof=1)) if centred else float(np.mean(means**2))
    return max(among - within / count, 0.0) + within / size
