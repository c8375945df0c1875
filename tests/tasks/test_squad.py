"""Extractive question answering: what is read, and how it is posed."""

import json
from pathlib import Path
from typing import Any

import pytest

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from tests.support import questions

ROW = questions.rows(1)[0]


def section(path: Path, **fields: Any) -> TaskSection:
    return TaskSection.model_validate({"name": "squad", "data": str(path), "train": 9, "dev": 4, "test": 5, **fields})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_question_is_posed_after_its_title_and_context(tmp_path: Path) -> None:
    splits = tasks.load(section(questions.write(tmp_path)))
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [9, 4, 5]
    by_prompt = {
        f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question']}\nAnswer:": row
        for row in questions.rows(42)
    }
    for example in splits.train + splits.dev + splits.test:
        texts = by_prompt[example.prompt]["answers"]["text"]
        assert example.answers == tuple(dict.fromkeys(f" {text}" for text in texts))


def test_one_question_asked_twice_counts_once_whatever_its_answers(tmp_path: Path) -> None:
    rows = questions.rows(18)
    again = {**rows[0], "answers": {"text": ["somebody else"]}}
    path = write(tmp_path / "twice.jsonl", [*rows, again])
    assert len(tasks.load(section(path)).train) == 9
    with pytest.raises(RecipeError, match="but the data has 18 different examples"):
        tasks.load(section(path, train=10))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"answers": {"text": []}},
            r"line 2 of .*data\.jsonl has no answer, expected at least one: leave",
        ),
        ({"answers": {"text": ["Brem", " "]}}, "line 2 of .* has the answer ' ', expected text"),
        ({"answers": {"text": [None]}}, "line 2 of .* has the answer None, expected text"),
        ({"answers": {"text": "Brem"}}, "line 2 of .* expected a struct whose `text` is a list of texts"),
        ({"answers": "Brem"}, "line 2 of .* has the answers 'Brem', expected a struct"),
        ({"answers": {}}, "line 2 of .* expected a struct"),
        ({"context": ""}, "line 2 of .* has no text in context"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "data.jsonl", [questions.rows(1, 1)[0], {**ROW, **changes}])
    with pytest.raises(RecipeError, match=said):
        tasks.load(section(path, train=1, dev=1, test=1))


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for lacking, said in (("answers", "has no column 'answers'"), ("question", "has no column 'question'")):
        path = write(tmp_path / f"{lacking}.jsonl", [{key: ROW[key] for key in ROW if key != lacking}])
        with pytest.raises(RecipeError, match=said):
            tasks.load(section(path))


def test_a_part_without_a_row_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = questions.write(tmp_path)
    (folder / "validation.jsonl.gz").unlink()
    write(folder / "validation.jsonl", questions.rows(10, 32))
    with pytest.raises(RecipeError, match="has no example in validation that is not in another part"):
        tasks.load(section(folder))
    write(folder / "validation.jsonl", [])
    with pytest.raises(RecipeError, match="has no rows in validation"):
        tasks.load(section(folder))
