"""Tasks: examples from files, and splits that share nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, TaskSection
from mezo_scale.tasks.order import permutation
from tests.support import material


def section(path: Path, **fields: object) -> TaskSection:
    return TaskSection.model_validate({"data": str(path), "train": 48, "dev": 16, "test": 32, **fields})


def test_sentiment_is_posed_as_mezo_poses_sst2(reviews_file: Path) -> None:
    splits = tasks.load(section(reviews_file))
    positive = {text for text, label in material.reviews() if label == 1}
    for example in splits.train + splits.dev + splits.test:
        text = example.prompt.removesuffix(" It was")
        assert text != example.prompt
        assert example.candidates[example.label] == (" great" if text in positive else " terrible")


def test_splits_have_the_sizes_asked_for_and_share_no_prompt(reviews_file: Path) -> None:
    splits = tasks.load(section(reviews_file))
    prompts = [{example.prompt for example in part} for part in (splits.train, splits.dev, splits.test)]
    assert [len(part) for part in prompts] == [48, 16, 32]
    assert len(set.union(*prompts)) == 96


def test_the_test_split_depends_on_its_seed_and_size_alone(reviews_file: Path) -> None:
    one = tasks.load(section(reviews_file))
    assert tasks.load(section(reviews_file, train=10, dev=3)).test == one.test
    assert tasks.load(section(reviews_file, split_seed=1)).test != one.test


def test_rows_with_one_text_count_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    path.write_text("text,label\n" + "good,1\nbad,0\nfine,1\n" * 2)
    with pytest.raises(RecipeError, match="but the data has 3 different examples"):
        tasks.load(section(path, train=2, dev=1, test=1))
    assert len(tasks.load(section(path, train=1, dev=1, test=1)).train) == 1


def test_a_subset_is_the_rows_of_one_source(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    path.write_text("text,label,source\n" + "".join(f"t{n},{n % 2},{'ab'[n % 3 > 0]}\n" for n in range(30)))
    splits = tasks.load(section(path, train=4, dev=3, test=3, subset="a"))
    numbers = [int(example.prompt[1:].split()[0]) for example in splits.train + splits.dev + splits.test]
    assert all(number % 3 == 0 for number in numbers)
    with pytest.raises(RecipeError, match="has no rows with the source 'c'"):
        tasks.load(section(path, subset="c"))


def test_template_and_candidates_can_be_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "topics.csv"
    path.write_text("text,label\n" + "".join(f"t{n},{n % 3}\n" for n in range(9)))
    fields = {"template": "Q: {text}\nA:", "candidates": (" a", " b", " c")}
    (example,) = tasks.load(section(path, train=7, dev=1, test=1, **fields)).test
    assert example.prompt.startswith("Q: t")
    assert example.candidates[example.label] == " abc"[0] + "abc"[int(example.prompt[4]) % 3]


@pytest.mark.parametrize(
    ("text", "fields", "said"),
    [
        ("text,label\na,0\nb,2\n", {}, "row 2 of .* has the label '2', expected 0 to 1"),
        ("text,label\na,good\n", {}, "row 1 of .* has the label 'good'"),
        ("text\na\n", {}, "has the label 'None'"),
        ("text,label\na,0\n", {"template": "{sentence}"}, "found 'sentence', the data has text, label"),
        ("text,label\na,0\n", {"template": "{text"}, "task.template"),
        ("text,label\n", {}, "has no rows"),
        ("text,label\na,0\n", {"subset": "x"}, "has no column `source`: leave it out"),
        ("text,label\na,0\n", {"name": "sentimnt"}, "found 'sentimnt'; did you mean sentiment"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, text: str, fields: dict[str, str], said: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        tasks.load(section(path, **fields))


def test_missing_data_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"task\.data: there is no file absent\.csv"):
        tasks.load(make_recipe("task.data=absent.csv").task)


def test_permutations_never_change() -> None:
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert sorted(permutation(7, 3, 1000).tolist()) == list(range(1000))
    assert not np.array_equal(permutation(7, 3, 1000), permutation(7, 4, 1000))
