"""Tasks: examples from files, and splits that share nothing."""

import gzip
import json
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


def test_one_text_with_two_labels_is_refused_by_both_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "both.csv"
    path.write_text("text,label\ngood,1\nbad,0\n good,0\nfine,1\n")
    with pytest.raises(
        RecipeError, match="line 2 of .*both.csv and line 4 of .*both.csv ask the same, but the labels 1"
    ):
        tasks.load(section(path, train=1, dev=1, test=1))


@pytest.mark.parametrize("template", ["{text}\nAnswer:\n", "{text} Sentiment: ", "\n\n {text}", "{text}"])
def test_a_template_is_used_as_it_is_written(tmp_path: Path, template: str) -> None:
    path = tmp_path / "spaces.csv"
    path.write_text('text,label\n"one \n",0\n two,1\nthree,0\n')
    splits = tasks.load(section(path, train=1, dev=1, test=1, template=template))
    prompts = {example.prompt for example in splits.train + splits.dev + splits.test}
    assert prompts == {template.format(text=text) for text in ("one \n", " two", "three")}


def write_parts(folder: Path, **parts: list[tuple[str, int]]) -> Path:
    for name, rows in parts.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    return folder


def test_a_folder_of_splits_keeps_them_apart(tmp_path: Path) -> None:
    rows = {name: [(f"{name} {n}", n % 2) for n in range(9)] for name in ("train", "validation", "test")}
    rows["train"] += rows["test"][:4] + rows["validation"][:4]  # seen in another part: not trained on
    folder = write_parts(tmp_path, **rows, train_official=[("other", 0)])
    splits = tasks.load(section(folder, train=100, dev=3, test=9))
    assert {example.prompt for example in splits.train} == {f"train {n} It was" for n in range(9)}
    assert {example.prompt.split()[0] for example in splits.dev} == {"validation"}
    assert {example.prompt for example in splits.test} == {f"test {n} It was" for n in range(9)}
    assert len(splits.dev) == 3
    assert tasks.load(section(folder, train=2, dev=9, test=9)).test == splits.test


def test_a_folder_without_every_split_or_with_one_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="is a folder with no test file; expected a file, or a folder with one file for"
    ):
        tasks.load(section(tmp_path))
    write_parts(tmp_path, train=[("a", 0)], validation=[("b", 0)], test=[("a", 1)])
    with pytest.raises(
        RecipeError, match="line 1 of .*test.* and line 1 of .*train.* ask the same, but the labels 1 and"
    ):
        tasks.load(section(tmp_path))
    write_parts(tmp_path, test=[("a", 0)])
    with pytest.raises(RecipeError, match="has no example in train that is not in another part"):
        tasks.load(section(tmp_path))
    (tmp_path / "test.csv").write_text("text,label\nc,0\n")
    with pytest.raises(RecipeError, match=r"is a folder with test\.csv and test\.jsonl\.gz"):
        tasks.load(section(tmp_path))


def test_rows_of_the_hub_are_checked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"text": "good", "label": 1}, {"text": None, "label": 0}]
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset: {"train": found})
    with pytest.raises(RecipeError, match="row 2 of train of owner/reviews has no text in text"):
        tasks.load(TaskSection(data="owner/reviews"))


def test_a_subset_is_the_rows_of_one_source(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    path.write_text("text,label,source\n" + "".join(f"t{n},{n % 2},{'ab'[n % 3 > 0]}\n" for n in range(30)))
    splits = tasks.load(section(path, train=4, dev=3, test=3, subset="a"))
    numbers = [int(example.prompt[1:].split()[0]) for example in splits.train + splits.dev + splits.test]
    assert all(number % 3 == 0 for number in numbers)
    with pytest.raises(RecipeError, match="has no rows with the source 'c'"):
        tasks.load(section(path, subset="c"))
    (tmp_path / "mixed.jsonl").write_text('{"text": "a", "label": 0, "source": "a"}\n{"text": "b", "label": 1}\n')
    with pytest.raises(RecipeError, match="line 2 of .* has no column `source`: leave it out"):
        tasks.load(section(tmp_path / "mixed.jsonl", subset="a"))


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
        ("text,label\na,0\nb,2\n", {}, "line 3 of .* has the label '2', expected 0 to 1"),
        ("text,label\na,good\n", {}, "line 2 of .* has the label 'good'"),
        ("text,label\na,0\n", {"template": "{sentence}"}, "line 2 of .* has no column 'sentence'; it has text, label"),
        ("text,label\na,0\n", {"template": "{text"}, "task.template '{text': line 2 of .* can't fill it"),
        ("text,label\na,0\n", {"template": "{}"}, "task.template '{}': .*braces without a name"),
        ("text,label\na,0\n", {"template": "{text[a]}"}, r"task.template '{text\[a\]}': .*can't fill it"),
        ("text,label\na,0\n", {"template": "It was"}, "names no column, expected one in braces"),
        ("text,label\na,0\n", {"template": ""}, "names no column, expected one in braces"),
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
