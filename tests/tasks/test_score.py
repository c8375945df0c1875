"""Scores: means that add up, and how sure one can be of them."""

import math
import random

import pytest

from mezo_scale import collectives
from mezo_scale.tasks import Metric, Score
from mezo_scale.tasks.score import ByClass, best_of, most_frequent, wilson
from tests.support.pool import Ranks


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_the_interval_is_wilsons(correct: int, count: int, low: float, high: float) -> None:
    assert wilson(correct, count) == pytest.approx((low, high), abs=1e-4)


def test_a_mean_of_shares_has_the_interval_of_a_proportion() -> None:
    metric = Metric.of([0.5, 0.0, 1.0, 0.5])
    assert (metric.value, metric.low, metric.high) == (0.5, *wilson(2, 4))


def test_the_interval_of_balanced_accuracy_covers_what_it_should() -> None:
    """Drawn from known recalls, with a class of few rows: the 95% interval holds the true mean about as often."""
    draw, recalls, rows = random.Random(0), (0.95, 0.7), (200, 25)
    inside = 0
    for _ in range(2000):
        right = tuple(sum(draw.random() < p for _ in range(n)) for p, n in zip(recalls, rows, strict=True))
        metric = ByClass("balanced_accuracy", right, rows, rows)
        assert metric.low is not None
        assert metric.high is not None
        assert metric.value is not None
        assert 0 <= metric.low <= metric.value <= metric.high <= 1
        inside += metric.low <= 0.825 <= metric.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_macro_f1_has_no_interval_and_no_rows_have_none() -> None:
    assert ByClass("macro_f1", (1, 2), (2, 2), (2, 2)).low is None
    assert (
        ByClass("balanced_accuracy", (0, 0), (0, 0), (0, 0)).value,
        ByClass.of("balanced_accuracy", [], [], 2).low,
    ) == (
        None,
        None,
    )


def test_what_is_not_finite_counts_apart() -> None:
    bounded = Metric.of([1.0, math.nan, 1.0, math.inf])
    assert (bounded.value, bounded.n, bounded.not_finite) == (0.5, 4, 2)
    loss = Metric.of([1.0, math.nan], bounded=False)
    assert (loss.value, loss.low, loss.high, loss.not_finite) == (None, None, None, 1)
    assert (Metric.of([]).value, Metric.of([]).low) == (None, None)


def test_scores_of_parts_add_up_to_the_score_of_all() -> None:
    values = [0.25, 1.0, math.nan, 0.5]
    parts = [Score({"f1": Metric.of(part)}, "f1") for part in (values[:1], [], values[1:])]
    assert parts[0] + parts[1] + parts[2] == Score({"f1": Metric.of(values)}, "f1")


def test_a_score_is_written_under_its_metrics_names() -> None:
    metrics = {
        "f1": Metric.of([1.0, 0.0]),
        "exact_match": Metric.of([0.0, 0.0]),
        "loss": Metric.of([2.0, 3.0], bounded=False),
    }
    found = Score(metrics, "f1")
    assert found.as_dict() == {
        "main": "f1",
        "more_is_better": True,
        "bounded": True,
        "count": 2,
        "not_finite": 0,
        "f1": 0.5,
        "interval_95": list(wilson(1, 2)),
        "exact_match": 0.0,
        "exact_match_interval_95": list(wilson(0, 2)),
        "loss": 2.5,
    }
    assert str(found) == "50.0%, exact_match 0.0%, loss 2.5000, 2 examples"


def test_a_main_metric_must_be_one_of_them() -> None:
    with pytest.raises(ValueError, match=r"main is 'f2': expected one of the metrics \(f1\)"):
        Score({"f1": Metric.of([1.0])}, "f2")


def score_over_ranks() -> Score:
    mine = [[1.0, math.nan], [], [0.5]][collectives.rank()]
    return Score({"f1": Metric.of(mine), "loss": Metric.of(mine, bounded=False)}, "f1").over_ranks()


def test_every_rank_gets_the_score_of_all_rows(ranks: Ranks) -> None:
    values = [1.0, math.nan, 0.5]
    whole = Score({"f1": Metric.of(values), "loss": Metric.of(values, bounded=False)}, "f1")
    assert ranks(3, score_over_ranks) == [whole] * 3


def test_where_several_labels_are_the_most_frequent_the_best_of_them_counts() -> None:
    assert most_frequent([2, 0, 2]) == [2]
    assert most_frequent([0, 1, 1, 0, 2]) == [0, 1]
    worse, better = (Score({"accuracy": Metric.of(values)}, "accuracy") for values in ([0, 1], [1, 1]))
    assert best_of([worse, better]) is better
