"""What a model is worth on a split: named means over rows, and how sure one can be of them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mezo_scale import collectives
from mezo_scale.tasks.estimate import Estimate, Z
from mezo_scale.tasks.perplexity import Perplexity


def most_frequent(labels: Sequence[int]) -> list[int]:
    """The label that comes most often; all that do, where several come equally often, as in rows drawn per class."""
    counts = Counter(labels)
    return [label for label, count in counts.items() if count == max(counts.values())]


@dataclass(frozen=True)
class Metric(Estimate):
    """The mean of one quantity over rows. Metrics of different rows of a split add up.

    Attributes:
        total: sum of the quantity over the rows whose value is finite.
        n: rows, those without a finite value among them.
        not_finite: rows without a finite value, counted apart.
        bounded: whether the quantity is a share of 1, of which more is better. A row without a finite value then counts
            as 0; otherwise there is no mean as long as there is such a row.
        more_is_better: of two models, whether the one with more of it is the better one.
    """

    total: float
    n: int
    not_finite: int = 0
    bounded: bool = True
    more_is_better: bool = True

    @classmethod
    def of(cls, values: Sequence[float], *, bounded: bool = True, more_is_better: bool | None = None) -> "Metric":
        """The metric of these rows; NaN or infinity where a row has no value.

        Args:
            more_is_better: None: of what is bounded; what has no bound is taken for a loss.
        """
        finite = [float(value) for value in values if math.isfinite(value)]
        more = bounded if more_is_better is None else more_is_better
        return cls(math.fsum(finite), len(values), len(values) - len(finite), bounded, more)

    @property
    def value(self) -> float | None:
        """The mean; None over no rows, and where it is not defined."""
        if self.n == 0 or (self.not_finite and not self.bounded):
            return None
        return self.total / self.n

    @property
    def _interval(self) -> tuple[float, float] | None:
        return wilson(self.total, self.n) if self.bounded and self.n else None

    @property
    def parts(self) -> list[float]:
        """What adds up over ranks."""
        return [self.total, self.n, self.not_finite]

    def of_parts(self, parts: Sequence[float]) -> "Metric":
        """The same metric over the rows that these are the sums of."""
        return replace(self, total=parts[0], n=round(parts[1]), not_finite=round(parts[2]))

    def __str__(self) -> str:
        if self.value is None:
            return "none"
        return f"{self.value:.1%}" if self.bounded else f"{self.value:.4f}"


@dataclass(frozen=True)
class ByClass(Estimate):
    """A mean over classes, each counting alike, however many rows it has. Metrics of different rows of a split add up.

    macro_f1: of the classes' F1, 2 right / (found + there). balanced_accuracy: of the classes' recall, right / there.
    A class that is neither found nor there counts for nothing, as in scikit-learn.

    Attributes:
        name: macro_f1 or balanced_accuracy.
        right, found, there: rows by class: chosen and right; chosen; right.
        not_finite: rows in which none could be chosen: wrong.
    """

    name: str
    right: tuple[int, ...]
    found: tuple[int, ...]
    there: tuple[int, ...]
    not_finite: int = 0

    bounded: ClassVar[bool] = True
    more_is_better: ClassVar[bool] = True

    @classmethod
    def of(cls, name: str, chosen: Sequence[int | None], labels: Sequence[int], classes: int) -> "ByClass":
        """The metric of these rows."""
        pairs = list(zip(chosen, labels, strict=True))
        right = tuple(sum(found == label == number for found, label in pairs) for number in range(classes))
        found = tuple(sum(found == number for found, _ in pairs) for number in range(classes))
        there = tuple(sum(label == number for _, label in pairs) for number in range(classes))
        return cls(name, right, found, there, sum(found is None for found in chosen))

    @property
    def n(self) -> int:
        """Rows."""
        return sum(self.there)

    @property
    def value(self) -> float | None:
        """The mean; None over no rows."""
        counts = zip(self.right, self.found, self.there, strict=True)
        if self.name == "macro_f1":
            values = [2 * right / (found + there) for right, found, there in counts if found + there]
        else:
            values = [right / there for right, _, there in counts if there]
        return math.fsum(values) / len(values) if values else None

    @property
    def _interval(self) -> tuple[float, float] | None:
        """From the classes' own intervals: the distances to their ends add up in squares (Zou and Donner, 2008)."""
        classes = [(right, there) for right, there in zip(self.right, self.there, strict=True) if there]
        if self.name != "balanced_accuracy" or not classes:
            return None
        ends = [(right / there, *wilson(right, there)) for right, there in classes]
        below = math.hypot(*(share - low for share, low, _ in ends)) / len(classes)
        above = math.hypot(*(high - share for share, _, high in ends)) / len(classes)
        mean = math.fsum(share for share, _, _ in ends) / len(classes)
        return mean - below, mean + above

    @property
    def parts(self) -> list[float]:
        """What adds up over ranks."""
        return [*self.right, *self.found, *self.there, self.not_finite]

    def of_parts(self, parts: Sequence[float]) -> "ByClass":
        """The same metric over the rows that these are the sums of."""
        counts, size = [round(part) for part in parts], len(self.right)
        right, found, there = (tuple(counts[start : start + size]) for start in (0, size, 2 * size))
        return ByClass(self.name, right, found, there, counts[-1])

    def __str__(self) -> str:
        return "none" if self.value is None else f"{self.value:.1%}"


AnyMetric = Metric | ByClass | Perplexity


@dataclass(frozen=True)
class Score:
    """A model on some rows of a split. Scores of different rows add up.

    Attributes:
        metrics: by name; all are over the same rows.
        main: the one that decides.
    """

    metrics: Mapping[str, AnyMetric]
    main: str

    def __post_init__(self) -> None:
        if self.main not in self.metrics:
            raise ValueError(f"main is {self.main!r}: expected one of the metrics ({', '.join(self.metrics)})")

    @property
    def count(self) -> int:
        """Rows."""
        return self.metrics[self.main].n

    @property
    def not_finite(self) -> int:
        """Rows without a finite value of the main metric."""
        return self.metrics[self.main].not_finite

    @property
    def merit(self) -> float:
        """By which scores are compared: the main metric, negated where less of it is better; -inf without a value."""
        main = self.metrics[self.main]
        return -math.inf if main.value is None else main.value if main.more_is_better else -main.value

    def __add__(self, other: "Score") -> "Score":
        summed = {name: metric.of_parts(_sum(metric, other.metrics[name])) for name, metric in self.metrics.items()}
        return Score(summed, self.main)

    def over_ranks(self) -> "Score":
        """The score of all ranks' rows; every rank calls it."""
        sums = iter(collectives.sum_scalars([part for metric in self.metrics.values() for part in metric.parts]))
        summed = {name: metric.of_parts([next(sums) for _ in metric.parts]) for name, metric in self.metrics.items()}
        return Score(summed, self.main)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: main, more_is_better and bounded (of it), count, not_finite, and each metric's value by its name. A
        metric that has an interval has it under "interval_95" if it is the main one, else under "NAME_interval_95"."""
        main = self.metrics[self.main]
        found: dict[str, Any] = {"main": self.main, "more_is_better": main.more_is_better, "bounded": main.bounded}
        found |= {"count": self.count, "not_finite": self.not_finite}
        for name, metric in self.metrics.items():
            found[name] = metric.value
            if metric.low is not None:
                found[interval_key(name, self.main)] = [metric.low, metric.high]
        return found

    def __str__(self) -> str:
        known = {name: metric for name, metric in self.metrics.items() if metric.value is not None}
        others = "".join(f", {name} {metric}" for name, metric in known.items() if name != self.main)
        counted = " and counted as wrong" if self.metrics[self.main].bounded else ""
        wrong = f", {self.not_finite} not finite{counted}" if self.not_finite else ""
        return f"{self.metrics[self.main]}{others}, {self.count:,} examples{wrong}"


def _sum(one: AnyMetric, other: AnyMetric) -> list[float]:
    return [mine + theirs for mine, theirs in zip(one.parts, other.parts, strict=True)]


def interval_key(name: str, main: str) -> str:
    """Where `Score.as_dict` has the interval of a metric."""
    return "interval_95" if name == main else f"{name}_interval_95"


def wilson(total: float, count: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927), total / count.

    Of all quantities between 0 and 1 with one mean, the proportion varies most: of any other the interval is no less
    sure than it says.
    """
    share = total / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def best_of(scores: Sequence[Score]) -> Score:
    """The score with the most of the main metric, of which more is better."""
    return max(scores, key=lambda score: score.metrics[score.main].value or 0.0)
