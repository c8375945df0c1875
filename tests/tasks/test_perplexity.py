"""Perplexity: the mean over tokens, its interval, and that less of it is better."""

import math
from typing import Any

import numpy as np
import pytest

from mezo_scale.tasks.perplexity import Perplexity
from mezo_scale.tasks.score import Metric, Score


def score(metric: Any) -> Score:
    return Score({"m": metric}, "m")


def test_each_token_counts_alike_whatever_block_it_is_in() -> None:
    found = Perplexity.of([3.0, 40.0], [1, 20])
    assert found.value == pytest.approx(math.exp(43 / 21))
    assert (found.n, found.more_is_better, found.bounded) == (2, False, False)


def test_blocks_of_ranks_add_up_to_those_of_one() -> None:
    generator = np.random.default_rng(0)
    losses, tokens = generator.uniform(50, 300, 40).tolist(), generator.integers(20, 64, 40).tolist()
    parts = score(Perplexity.of(losses[:7], tokens[:7])) + score(Perplexity.of(losses[7:], tokens[7:]))
    whole = Perplexity.of(losses, tokens)
    assert parts.metrics["m"].value == pytest.approx(whole.value)
    assert (parts.metrics["m"].low, parts.metrics["m"].high) == pytest.approx((whole.low, whole.high))
    nothing = score(Perplexity.of([], [])) + score(whole)
    assert nothing.metrics["m"].parts == whole.parts


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, covered, mean = np.random.default_rng(1), 0, 3.0
    for _ in range(400):
        tokens = np.where(generator.random(60) < 0.1, generator.integers(2, 64, 60), 64)
        losses = tokens * mean + np.sqrt(tokens) * 2 * generator.standard_normal(60)
        found = Perplexity.of(losses.tolist(), tokens.tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= math.exp(mean) <= found.high
    assert 0.92 < covered / 400 < 0.975


@pytest.mark.parametrize("losses", [[math.nan, 3.0], [], [1e6, 1e6]])
def test_where_there_is_no_number_there_is_none(losses: list[float]) -> None:
    found = Perplexity.of(losses, [4] * len(losses))
    assert (found.value, found.low, str(found)) == (None, None, "none")
    assert found.not_finite == sum(map(math.isnan, losses))


def test_one_block_has_no_interval() -> None:
    assert Perplexity.of([9.0], [4]).low is None


def test_scores_are_compared_in_the_direction_of_their_metric() -> None:
    better, worse = Perplexity.of([3.0, 3.0], [2, 2]), Perplexity.of([4.0, 4.0], [2, 2])
    assert score(better).merit > score(worse).merit > score(Perplexity.of([math.nan], [2])).merit
    assert score(Metric.of([1.0])).merit > score(Metric.of([0.0])).merit
    assert score(Metric.of([1.0], bounded=False)).merit < score(Metric.of([0.5], bounded=False)).merit
    assert score(better).as_dict()["more_is_better"] is False
    assert "not finite" in str(score(Perplexity.of([math.nan, 1.0], [2, 2])))
    assert "wrong" not in str(score(Perplexity.of([math.nan, 1.0], [2, 2])))
