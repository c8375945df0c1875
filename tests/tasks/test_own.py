"""Data of one's own becomes a task by lines of a recipe: a choice, a written answer."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection, parse
from mezo_scale.tasks import Example, Question
from tests.support import material

MOODS = (" angry", " calm", " happy")
CHOICE = {"name": "choice", "template": "{subject}: {body}\nThe customer is", "candidates": MOODS}
ANSWER = {"name": "answer", "template": "Q: {question}\nA:"}


def write_csv(path: Path, *rows: dict[str, Any], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tickets(*labels: Any, column: str = "label") -> list[dict[str, Any]]:
    return [{"subject": f"ticket {n}", "body": "it broke", column: label} for n, label in enumerate(labels)]


def posed(path: Path, **fields: Any) -> list[Any]:
    section = parse({"model": {"name": "m"}, "task": {"data": str(path), **fields}}).task
    return list(tasks.examples(section)["all"])


def refusal(path: Path, **fields: Any) -> str:
    with pytest.raises(RecipeError) as error:
        posed(path, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("labels", "fields"),
    [
        ((2, 0, 1), {}),
        (("happy", "angry", "calm"), {}),
        (("2", "angry", "1"), {}),
        (("good", "bad", "so so"), {"labels": ["bad", "so so", "good"]}),
        ((5, 1, 3), {"labels": [1, 3, 5]}),
        ((1, 2, 0), {"labels": [2, 0, 1]}),
    ],
)
def test_a_label_is_a_candidates_number_or_its_text_or_what_the_recipe_says(
    tmp_path: Path, labels: tuple[Any, ...], fields: dict[str, Any]
) -> None:
    for path in (write_csv(tmp_path / "t.csv", *tickets(*labels)), write_json(tmp_path / "t.jsonl", *tickets(*labels))):
        found = posed(path, **CHOICE, **fields)
        assert [example.candidates[example.label] for example in found] == [" happy", " angry", " calm"]
        assert found[0] == Example("ticket 0: it broke\nThe customer is", MOODS, 2)


def test_true_and_false_of_json_are_labels_too(tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.jsonl", *tickets(True, False))
    found = posed(path, **CHOICE | {"candidates": [" no", " yes"], "labels": ["false", "true"]})
    assert [example.label for example in found] == [1, 0]


def test_the_columns_have_the_names_that_the_recipe_gives_them(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.tsv", *tickets("calm", "angry", column="mood"), delimiter="\t")
    assert [example.label for example in posed(path, **CHOICE, label_column="mood")] == [1, 0]
    path = write_json(tmp_path / "q.jsonl", {"question": "Who?", "who": "Orla"})
    assert posed(path, **ANSWER, answer_column="who") == [Question("Q: Who?\nA:", (" Orla",))]


@pytest.mark.parametrize(
    ("value", "template", "answers"),
    [
        ("Orla", "Q: {question}\nA:", (" Orla",)),
        (" Orla\n", "Q: {question}\nA: ", ("Orla",)),
        (["Orla", "she", "Orla "], "Q: {question}\nA:\n", ("Orla", "she")),
        (42, "Q: {question}\nA:", (" 42",)),
        ([1, 2], "Q: {question}\nA:", (" 1", " 2")),
    ],
)
def test_an_answer_is_a_text_or_a_list_of_them_with_a_space_before_where_there_is_none(
    tmp_path: Path, value: Any, template: str, answers: tuple[str, ...]
) -> None:
    path = write_json(tmp_path / "q.jsonl", {"question": "Who?", "answer": value})
    (found,) = posed(path, name="answer", template=template)
    assert found == Question(template.format(question="Who?"), answers)


def test_the_answers_of_all_rows_that_ask_the_same_are_right(tmp_path: Path) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in (("Who?", "Orla"), ("Where?", "Brem"))]
    more = [{"question": "Who?", "answer": ["the keeper", "Orla"]}, {"question": "Who?", "answer": "she"}]
    path = write_json(tmp_path / "q.jsonl", *rows, *more)
    assert posed(path, name="answer", template="{question}") == [
        Question("Who?", (" Orla", " the keeper", " she")),
        Question("Where?", (" Brem",)),
    ]


@pytest.mark.parametrize(
    ("label", "changes", "said"),
    [
        ("sad", {}, "line 3 of t.csv has the label 'sad' in label, expected one of 0, 1, 2, angry, calm, happy: mend"),
        ("3", {}, "line 3 of t.csv has the label '3' in label, expected one of 0, 1, 2, angry, calm, happy"),
        ("1.0", {}, "line 3 of t.csv has the label '1.0' in label"),
        ("Calm", {}, "line 3 of t.csv has the label 'Calm' in label"),
        ("", {}, "line 3 of t.csv has the label '' in label"),
        ("2", {"labels": [0, 1, "x"]}, "line 3 of t.csv has the label '2' in label, expected one of 0, 1, x"),
        ("1", {"labels": [0, 1]}, "task.labels: found ['0', '1'], expected 3 that differ, one for each of"),
        ("1", {"labels": [0, 1, "1"]}, "task.labels: found ['0', '1', '1'], expected 3 that differ"),
        ("1", {"labels": [True, False, 1]}, "expected"),
        ("1", {"candidates": [" a", " a"]}, "task.candidates: found [' a', ' a'], expected texts that differ"),
        ("1", {"candidates": [" a", " "]}, "expected texts that differ, none of them empty: change those"),
        ("1", {"candidates": [" a"]}, "task.candidates: found [' a'] (a list), expected"),
        (
            "1",
            {"candidates": [" a", "a"]},
            "two of them differ in white space only, which labels don't have: change one",
        ),
        ("1", {"candidates": [" 1", " 0"]}, "say in task.labels what the column holds"),
        (
            "1",
            {"candidates": None},
            "task.candidates is missing, and task.name is choice: give the answers, as in task.",
        ),
        (
            "1",
            {"template": None},
            "task.template is missing, and task.name is choice: give the prompt, with columns in",
        ),
        ("1", {"template": "It was"}, "task.template 'It was' names no column, expected one in braces"),
        (
            "1",
            {"template": "{bdy}"},
            "line 2 of t.csv has no column 'bdy' (did you mean 'body'?); it has subject, body",
        ),
        (
            "1",
            {"label_column": "labl"},
            "has no column 'labl' (did you mean 'label'?); it has subject, body, label: name",
        ),
        (
            "1",
            {"answer_column": "label"},
            "task.answer_column is given, but task.name is choice, which has no use for it",
        ),
    ],
)
def test_a_choice_that_is_not_clear_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(Path("t.csv"), *tickets("0", label, "1"))
    assert said in refusal(Path("t.csv"), **CHOICE | changes)


def test_a_text_that_is_empty_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", *tickets("0"), {"subject": "a", "body": " ", "label": 1})
    assert "has no text in body, expected text: fill it in, or leave the row out" in refusal(path, **CHOICE)


@pytest.mark.parametrize(
    ("value", "changes", "said"),
    [
        ("", {}, "line 1 of q.jsonl has no text in answer, expected a text or a list of texts: fill it in, or leave"),
        (None, {}, "has no text in answer"),
        (["a", " "], {}, "has no text in answer"),
        ({"text": "a"}, {}, "has a dict in answer, expected a text or a list of texts"),
        ([], {}, "has no answer in answer, expected at least one: leave the row out"),
        ("two\nlines", {}, "has the answer 'two\\nlines', but an answer ends with its line: write it in one line, or"),
        (
            "a",
            {"answer_column": "reply"},
            "has no column 'reply'; it has question, answer: name the one that is meant in",
        ),
        ("a", {"label_column": "answer"}, "task.label_column is given, but task.name is answer"),
        ("a", {"template": None}, "task.template is missing, and task.name is answer"),
    ],
)
def test_an_answer_that_is_not_clear_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(Path("q.jsonl"), {"question": "Who?", "answer": value})
    assert said in refusal(Path("q.jsonl"), **ANSWER | changes)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "sst2", "labels": [0, 1]}, "task.labels is given, but task.name is sst2, which has no use for it"),
        ({"name": "squad", "label_column": "x"}, "task.label_column is given, but task.name is squad"),
    ],
)
def test_a_field_that_a_task_has_no_use_for_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path / "none.csv", **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"name": "sst2", "metric": "f1"},
            "task.metric: found 'f1' for task.name=sst2; expected accuracy or macro_f1 or",
        ),
        (
            {"name": "squad", "metric": "accuracy"},
            "task.metric: found 'accuracy' for task.name=squad; expected f1 or exact",
        ),
        ({"name": "copa", "metric": "macro_f1"}, "task.metric is macro_f1, which needs classes that all rows share"),
    ],
)
def test_a_metric_that_a_task_has_not_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        tasks.kind_of(TaskSection(data="d", **fields), material.tokenizer())
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["choice", "sentiment"])
def test_data_in_which_all_labels_are_the_same_is_refused(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"t{n}", "label": 1} for n in range(9)]
    own = {"template": "{text}", "candidates": (" a", " b")}
    section = TaskSection(name=name, data=str(write_csv(tmp_path / "t.csv", *rows)), train=3, dev=3, test=3, **own)
    with pytest.raises(RecipeError, match="all 9 examples for training have the label of ' b', expected several of"):
        tasks.load(section)
