"""Data by its name on the hub: all its splits, as a folder of them would be."""

from typing import Any

import pytest

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection


def rows(first: int, last: int, label: int | None = None) -> list[dict[str, Any]]:
    return [{"sentence": f"it is {n}", "label": n % 2 if label is None else label} for n in range(first, last)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the hub has of every dataset, by split."""
    splits: dict[str, Any] = {}
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset: splits)
    return splits


def load(**fields: Any) -> Any:
    return tasks.load(TaskSection(name="sst2", data="glue", subset="sst2", **fields))


def numbers(part: Any) -> set[int]:
    return {int(example.prompt.split()[2]) for example in part}


def test_a_dataset_with_three_splits_is_used_as_it_is_split(hub: dict[str, Any]) -> None:
    hub.update(train=rows(0, 20), validation=rows(20, 30), test=rows(30, 40))
    found = load()
    assert [numbers(part) for part in (found.train, found.dev, found.test)] == [
        set(range(20)),
        set(range(20, 30)),
        set(range(30, 40)),
    ]


@pytest.mark.parametrize("other", ["validation", "test"])
def test_of_a_dataset_with_two_the_other_is_the_test_and_dev_is_dealt_out_of_train(
    hub: dict[str, Any], other: str
) -> None:
    hub.update({"train": rows(0, 20), other: rows(20, 30), "unsupervised": rows(40, 50, -1)})
    found = load(train=12, dev=8)
    assert numbers(found.train) | numbers(found.dev) == set(range(20))
    assert (len(found.train), len(found.dev), numbers(found.test)) == (12, 8, set(range(20, 30)))
    assert load(train=5, dev=5).test == found.test


def test_a_test_split_whose_labels_are_kept_back_is_none(hub: dict[str, Any]) -> None:
    hub.update(train=rows(0, 20), validation=rows(20, 30), test=rows(30, 40, -1))
    assert numbers(load(train=12, dev=8).test) == set(range(20, 30))
    hub.update(test=rows(30, 39, -1) + rows(39, 40))
    with pytest.raises(RecipeError, match="row 1 of test of glue, sst2 has the label -1, expected 0 to 1"):
        load()


def test_a_dataset_with_train_alone_is_dealt_out(hub: dict[str, Any]) -> None:
    hub.update(train=rows(0, 20))
    found = load(train=10, dev=5, test=5)
    assert numbers(found.train) | numbers(found.dev) | numbers(found.test) == set(range(20))


def test_a_dataset_without_train_is_refused_with_the_splits_it_has(hub: dict[str, Any]) -> None:
    hub.update(validation_matched=rows(0, 9))
    with pytest.raises(RecipeError, match="'glue, sst2' has the splits validation_matched, expected train, and"):
        load()


def test_where_there_is_no_way_to_the_hub_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, subset: str | None) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(RecipeError) as error:
        load()
    assert "(Couldn't reach the hub): where there is no way to the hub, save it elsewhere as a file (" in str(
        error.value
    )
    assert "\n" not in str(error.value)
