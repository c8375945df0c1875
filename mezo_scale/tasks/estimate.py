"""What all metrics have: ends of an interval, if they have one."""

Z = 1.959964  # of a two-sided 95% interval, by the normal distribution


class Estimate:
    """Something of which one is sure to within an interval."""

    @property
    def low(self) -> float | None:
        """Lower end of the 95% interval; None where there is no value, and of what has none: macro_f1, losses."""
        return self._interval[0] if self._interval else None

    @property
    def high(self) -> float | None:
        """Upper end of the 95% interval; likewise."""
        return self._interval[1] if self._interval else None

    @property
    def _interval(self) -> tuple[float, float] | None:
        raise NotImplementedError
