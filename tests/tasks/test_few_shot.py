"""k rows per class: the same ones for a seed, apart from the test, and no fewer than were asked for."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.splits import read_splits
from tests.support.suite import ROWS, write


def section(path: Path, **fields: Any) -> TaskSection:
    return TaskSection(**{"name": "sst2", "data": str(path), "test": 20, **fields})


def sentences(first: int, last: int, positive: int = 3) -> list[dict[str, Any]]:
    """One in `positive` of them is so."""
    return [{"sentence": f"it is {n}", "label": int(n % positive == 0)} for n in range(first, last)]


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", *sentences(0, 90))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, first, last in (("train", 0, 60), ("validation", 60, 90), ("test", 90, 120)):
        write(tmp_path / f"{name}.jsonl", *sentences(first, last))
    return tmp_path


@pytest.mark.parametrize("kind", ["one_file", "folder"])
def test_train_and_dev_have_k_of_each_class_and_share_none(kind: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(kind)
    found = tasks.load(section(data, k_per_class=6))
    for part in (found.train, found.dev):
        assert Counter(example.label for example in part) == {0: 6, 1: 6}
    assert len({example.prompt for example in (*found.train, *found.dev, *found.test)}) == 12 + 12 + 20
    assert found == tasks.load(section(data, k_per_class=6, train=1, dev=1))
    assert found.test == tasks.load(section(data, train=10, dev=10)).test


@pytest.mark.parametrize("kind", ["one_file", "folder"])
def test_another_seed_draws_others(kind: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(kind)
    drawn = {tasks.load(section(data, k_per_class=4, split_seed=seed)).train for seed in range(4)}
    assert len(drawn) == 4


def test_fewer_are_some_of_the_same(one_file: Path) -> None:
    few, more = (set(tasks.load(section(one_file, k_per_class=k)).train) for k in (2, 4))
    assert few < more


def test_an_example_from_outside_has_the_classes_of_its_candidates(one_file: Path) -> None:
    @dataclass(frozen=True)
    class Mine:
        asked: str
        label: int
        candidates: tuple[str, ...] = ("no", "yes")

        def contradicts(self, other: Any) -> None:
            return None

    found = read_splits(section(one_file, k_per_class=4), lambda row: Mine(row.fields["sentence"], row.fields["label"]))
    assert [Counter(mine.label for mine in part) for part in (found.train, found.dev)] == [{0: 4, 1: 4}] * 2


def test_a_class_with_too_few_rows_is_named(one_file: Path, folder: Path) -> None:
    said = "task.k_per_class is 15, which takes 30 rows of each class, but ' great' has .* of 70 outside the test: ask"
    with pytest.raises(RecipeError, match=said):
        tasks.load(section(one_file, k_per_class=15))
    with pytest.raises(RecipeError, match="takes 15 rows of each class, but ' great' has 10 of 30 outside"):
        tasks.load(section(folder, k_per_class=15))
    with pytest.raises(RecipeError, match="task.k_per_class is 1, but none of the 90 examples is outside the test"):
        tasks.load(section(one_file, k_per_class=1, test=90))
    with pytest.raises(RecipeError, match="task.test is 200, but the data has 90 different examples"):
        tasks.load(section(one_file, k_per_class=1, test=200))


@pytest.mark.parametrize("name", ["squad", "copa"])
def test_rows_without_classes_are_refused(tmp_path: Path, name: str) -> None:
    rows = [ROWS[name] | {"question": f"{n}?"} for n in range(4)]
    if name == "copa":
        rows = [ROWS[name] | {"choice1": f"It is {n}.", "label": n % 2} for n in range(4)]
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(
        RecipeError, match=f"k_per_class is 1, but the rows of task.name={name} share no classes: leave"
    ):
        tasks.load(section(path, name=name, k_per_class=1, test=1))
