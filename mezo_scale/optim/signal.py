"""How large the gradient is beside what rows disagree by, from the losses that a two-sided step has anyway.

Along a direction z row i has the slope d_i = (l_i(theta + eps z) - l_i(theta - eps z)) / (2 eps), about grad l_i . z,
and z has the covariance I. So for rows drawn independently, over directions and rows,

    E[d_i d_j] = |E grad l|^2 = S   for two rows of one direction
    E[d_i^2]   = S + s2             with s2 the trace of the covariance of one row's gradient

up to what eps bends, and with the rounding of losses in s2: a squared error of e in l_i+ - l_i- adds e^2 / (4 eps^2).
Where groups are balanced their rows are not independent, and S is smaller by what labels disagree by over b - 1; the
mean square slope of b rows, S + s2 / b, is unbiased all the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mezo_scale.perturbation import Branch

PARTS = 3
"""Numbers that a sum of squares is exchanged in."""

_UNIT = 2.0**30


@dataclass(frozen=True, slots=True)
class Signal:
    """Estimates from one step, unbiased and noisy: look at means over many.

    Attributes:
        gradient: S, the squared length of the gradient; None where no two rows share a direction. Below 0 at times.
        row_variance: s2, the trace of the covariance of one row's gradient; None with it.
    """

    gradient: float | None
    row_variance: float | None

    @classmethod
    def of(cls, parts: Sequence[float], rows: int, slopes: Sequence[float]) -> Signal | None:
        """From a step's sums over all ranks.

        Args:
            parts: the sum over directions and rows of d_i^2, as `split` gives it.
            rows: that share a direction.
            slopes: along each direction, of the mean over its rows.

        Returns:
            None if one of the losses is not finite, or the step is not two-sided.
        """
        whole, middle, low = parts
        each = (whole + (middle + low / _UNIT) / _UNIT) / (rows * len(slopes))
        shared = sum(slope * slope for slope in slopes) / len(slopes)
        if not math.isfinite(each + shared):
            return None
        if rows == 1:
            return cls(None, None)
        gradient = (rows * shared - each) / (rows - 1)
        return cls(gradient, each - gradient)


class Recent:
    """The mean of each estimate over the last steps, of those that have one."""

    def __init__(self, window: int, before: Iterable[Signal] = ()) -> None:
        self._signals = deque(before, window)

    def add(self, signal: Signal) -> Signal:
        """The means with this step's."""
        self._signals.append(signal)
        pairs = [(one.gradient, one.row_variance) for one in self._signals]
        known = [(s, s2) for s, s2 in pairs if s is not None and s2 is not None]
        if not known:
            return Signal(None, None)
        return Signal(*(sum(values) / len(known) for values in zip(*known, strict=True)))


def is_two_sided(branches: Sequence[Branch]) -> bool:
    """Whether branches come in pairs of one seed and opposite scales."""
    pairs = list(zip(branches[::2], branches[1::2], strict=False))
    return len(branches) % 2 == 0 and all(one[0] == other[0] and one[1] == -other[1] for one, other in pairs)


def split(values: Tensor) -> list[float]:
    """The sum of float64 numbers from 0 to 2^40, to 2^-60, as whole numbers of three sizes: their sums over rows and
    ranks are exact, so that it does not matter which rank has which row. NaN where a value is not finite."""
    whole = values.floor()
    rest = (values - whole) * _UNIT
    middle = rest.floor()
    return [float(part.sum()) for part in (whole, middle, ((rest - middle) * _UNIT).round())]
