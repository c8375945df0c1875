"""How well eps suits a model and its rows: what rounding and curvature add to the slopes that an estimator sees.

Along a few directions z the loss of each row is looked at on both sides, L(s) = L(theta + s eps z), in six places: s =
0.9, 1, 1.1, 1.2; and 0.4 and 2. What the loss does between the four neighbours is a parabola, near enough, so that
their third difference is rounding and nothing else. It rounds each row and each place anew, whatever eps is.

The odd part (L(s) - L(-s)) / 2 is a s + b s^3; a two-sided slope has the error b / eps. Between 2 and the neighbours b
is seen through least rounding, but as if it were the same out to 2 eps, which takes it for too small where the loss
bends much. Between the neighbours and 0.4 it is seen where it counts: taken where it stands out of the rounding. A
one-sided slope has the error (b + c) / eps, with c s^2 the even part, as far as that differs from direction to
direction: the baseline takes the rest away.
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
ENOUGH = 0.1  # of the slope: `choose` looks no further
LADDER = tuple(1e-3 * 2.0**step for step in range(-4, 6))
START = LADDER.index(1e-3)  # the paper's

_NEAR = np.array([0.9, 1.0, 1.1, 1.2])
_PLACES = np.array([0.4, *_NEAR, 2.0])
_THIRD = np.array([0, 1, -3, 3, -1, 0]) / math.sqrt(20)
_SEEN = np.array([0, *(1 / _NEAR / 4), 0])  # (a + b) near 1
_NEAR_SQUARE = float(np.mean(_NEAR**2))
_WIDE = (np.eye(6)[5] / 2 - _SEEN) / (4 - _NEAR_SQUARE)
_NARROW = (_SEEN - np.eye(6)[0] / 0.4) / (_NEAR_SQUARE - 0.16)
_EVEN = (np.eye(6)[5] - np.array([0, *([0.25] * 4), 0])) / (4 - _NEAR_SQUARE)


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

    @property
    def total(self) -> float:
        """Of both, which are independent; infinite where there is no slope."""
        both = math.hypot(self.rounding, self.curvature)
        return both if math.isfinite(both) else math.inf


def check(
    optimizer: MeZO, batch: Batch, objective: Objective, micro_batch: int | None = None, eps: float | None = None
) -> Shares:
    """The shares at an eps, the same on all ranks, each of which calls this. No step is taken.

    Takes 24 forwards of a quarter of the batch in two branches each. Arguments as for `MeZO.step`; eps: None: the
    optimizer's.
    """
    total, evaluator, estimator = rows(batch), optimizer._evaluator, optimizer._estimator
    some, where = take(batch, 0, min(-(-total // 4), micro_batch or total)), optimizer.eps if eps is None else eps

    def look(branches: list[Branch]) -> Losses:
        found: Losses = evaluator.per_row(some, objective, branches).cpu().numpy()
        return found

    with optimizer._heartbeat.inside(optimizer.step_count):
        seeds = [direction_seed(optimizer.seed, optimizer.step_count, k) for k in range(DIRECTIONS)]
        looked = np.stack([_along(seed, where, look) for seed in seeds])
        one_sided = all(scale > 0 for _, scale in estimator.branches(range(estimator.num_directions or 1), 1.0))
        return _shares(looked, where, group_size(estimator), total, one_sided=one_sided)


def choose(optimizer: MeZO, batch: Batch, objective: Objective, micro_batch: int | None = None) -> list[Shares]:
    """Looks for an eps, from 0.001 by steps of two: up while there is more rounding than curvature, else down, until
    both are little or it gets no better. All ranks find the same. Arguments as for `check`.

    Returns:
        What was found at each eps looked at, the best one last.
    """
    found: list[Shares] = []
    at, way = START, 0
    while 0 <= at < len(LADDER):
        found.append(check(optimizer, batch, objective, micro_batch, LADDER[at]))
        last = found[-1]
        if last.total <= ENOUGH or (len(found) > 1 and last.total >= found[-2].total):
            break
        if not way:
            way = -1 if last.curvature > last.rounding else 1
        at += way
    return sorted(found, key=lambda shares: shares.total, reverse=True)


def _shares(looked: Losses, eps: float, size: int | None, total: int, *, one_sided: bool) -> Shares:
    """From this rank's losses [directions, places, 2 sides, rows]; `size`: rows that share a direction, None: all."""
    looked = np.where(np.isfinite(looked), looked, np.nan)
    odd, even = (looked[:, :, 0] - looked[:, :, 1]) / 2, (looked[:, :, 0] + looked[:, :, 1]) / 2
    square = np.einsum("p,kpr->kr", _EVEN, even) * one_sided
    ways = [np.einsum("p,kpr->kr", way, odd) for way in (_SEEN, _THIRD, _WIDE, _NARROW)]
    numbers = np.stack([*ways[:2], *(bent + square for bent in ways[2:])])
    mine = np.stack([numbers.sum(2), (numbers**2).sum(2)], axis=1)
    *sums, count, everyone = collectives.sum_scalars([*mine.ravel().tolist(), float(looked.shape[3]), float(total)])
    each = np.array(sums).reshape(mine.shape)
    wanted = everyone if size is None else float(size)
    # Rows round independently of each other: so the mean square over directions and rows is all there is to know.
    rest = float(np.mean(each[1, 1])) / count / wanted
    slope = max(_mean_square(each[0], count, wanted) - rest * float(_SEEN @ _SEEN), 0.0) + rest
    noise = [rest * float(way @ way + _EVEN @ _EVEN * one_sided) for way in (_WIDE, _NARROW)]
    wide, narrow = (_mean_square(part, count, wanted, centred=one_sided) for part in each[2:])
    bent = narrow - noise[1] if narrow > 4 * noise[1] * wanted / count else wide - noise[0]
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
    """The mean over directions of the squared mean over `size` rows, from `count` rows along each direction: unbiased,
    so it may be below 0.

    Args:
        sums: over rows, of a number and of its square, [2, directions].
        centred: about the mean over directions.
    """
    means, squares = sums[0] / count, sums[1] / count
    within = float(np.mean(squares - means**2)) * count / (count - 1) if count > 1 else 0.0
    among = float(np.var(means, ddof=1)) if centred else float(np.mean(means**2))
    return among - within / count + within / size
