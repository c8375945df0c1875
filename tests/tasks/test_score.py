"""Scores: means that add up, and how sure one can be of them."""

import math

import pytest

from mezo_scale import collectives
from mezo_scale.tasks import Metric, Score
from mezo_scale.tasks.score import wilson
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
