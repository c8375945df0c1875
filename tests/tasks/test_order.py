"""Which examples make up which step: every epoch whole, labels in equal number, rows of like length together."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezo_scale.errors import RecipeError
from mezo_scale.tasks.order import Order, labels_of, step_indices

LENGTHS = [(7 * n) % 31 for n in range(60)]
LABELS = [n % 3 for n in range(48)] + [0] * 12


@pytest.mark.parametrize("window", [0, 1])
def test_an_order_that_asks_for_nothing_is_the_one_of_epochs(window: int) -> None:
    order = Order(3, 8, LENGTHS, window=window)
    for step in range(20):
        assert order.step(step).tolist() == step_indices(3, step, 60, 8).tolist()


@given(st.integers(0, 2**63 - 1), st.integers(1, 4), st.integers(0, 9))
def test_every_group_has_each_label_as_often(seed: int, each: int, window: int) -> None:
    order = Order(seed, 12 * each, LENGTHS, LABELS, 3 * each, window)
    for step in (0, 1, 7, 1000):
        groups = np.asarray(LABELS)[order.step(step)].reshape(4, 3 * each)
        assert all(np.bincount(group, minlength=3).tolist() == [each] * 3 for group in groups)


@pytest.mark.parametrize("window", [0, 4])
def test_the_rows_of_a_label_come_once_per_epoch_of_that_label(window: int) -> None:
    order = Order(5, 12, LENGTHS, LABELS, window=window)
    taken = np.concatenate([order.step(step) for step in range(4)])  # 16 rows of each label; two labels have 16
    for label in (1, 2):
        own = [row for row in taken if LABELS[row] == label]
        assert sorted(own) == [row for row in range(60) if LABELS[row] == label]


@given(st.integers(0, 2**63 - 1), st.integers(2, 9), st.booleans())
def test_a_window_exchanges_the_rows_of_its_steps_and_no_others(seed: int, window: int, balanced: bool) -> None:
    labels = LABELS if balanced else None
    drawn = Order(seed, 6, LENGTHS, labels)
    sorted_ = Order(seed, 6, LENGTHS, labels, window=window)
    for first in (0, 5 * window):
        steps = range(first, first + window)
        before = np.concatenate([drawn.step(step) for step in steps])
        after = np.concatenate([sorted_.step(step) for step in steps])
        assert sorted(before) == sorted(after)


def test_rows_of_like_length_share_a_step_and_long_steps_come_at_any_time() -> None:
    order = Order(1, 5, LENGTHS, window=6)
    places = set()
    for first in range(0, 60, 6):
        spans = [np.asarray(LENGTHS)[order.step(step)] for step in range(first, first + 6)]
        by_length = sorted(range(6), key=lambda step: spans[step].min())
        for shorter, longer in itertools.pairwise(by_length):
            assert spans[shorter].max() <= spans[longer].min()
        places.add(by_length.index(0))
    assert len(places) > 3


def test_the_order_depends_on_seed_and_step_alone() -> None:
    def rows(seed: int, steps: list[int]) -> list[list[int]]:
        order = Order(seed, 6, LENGTHS, LABELS, 3, 4)
        return [order.step(step).tolist() for step in steps]

    assert rows(3, [9, 2]) == [rows(3, list(range(10)))[9], rows(3, [2])[0]]
    assert rows(4, [9]) != rows(3, [9])


def row(label: int, candidates: int = 2) -> Any:
    return SimpleNamespace(label=label, candidates=("x",) * candidates)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SimpleNamespace(prompt="p")], "which are none in this task"),
        ([row(0), row(1, 3)], "which differ from row to row"),
        ([row(0), row(0)], "none of the 2 rows of the train split has the label 1"),
    ],
)
def test_labels_that_can_not_be_balanced_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        labels_of(rows)


@pytest.mark.parametrize(
    ("batch_size", "group_size", "name"),
    [(12, 4, "optimizer.group_size is 4"), (8, None, "train.batch_size is 8"), (2, 1, "optimizer.group_size is 1")],
)
def test_groups_that_labels_do_not_divide_are_refused(batch_size: int, group_size: int | None, name: str) -> None:
    with pytest.raises(RecipeError, match=f"of which there are 3, but {name}: take a multiple of 3"):
        Order(0, batch_size, LENGTHS, LABELS, group_size)


def test_labels_are_those_of_the_rows() -> None:
    assert labels_of([row(1), row(0), row(1)]) == [1, 0, 1]
