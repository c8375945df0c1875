"""`mezo-scale tasks`: what there is, and what a task makes of one's data."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_scale import tasks
from tests.support import masked, material
from tests.support.fixtures import ROOT
from tests.support.suite import GOLDEN, ROWS, write

Run = Callable[..., tuple[int, str, str]]


def folder(path: Path, task: str, **parts: list[dict[str, Any]]) -> Path:
    """A folder of splits, with the task's row as a part that is not given."""
    path.mkdir()
    for name in ("train", "validation", "test"):
        write(path / f"{name}.jsonl", *parts.get(name, [ROWS[task] | {"hypothesis": f"In {name}."}]))
    return path


def test_every_task_is_listed_with_its_kind_metric_and_columns(run: Run) -> None:
    code, out, _ = run("tasks")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert lines[0] == "name kind metric what it is columns"
    assert [line.split(" ")[0] for line in lines[1:]] == list(tasks.known())
    assert any(line.startswith("drop generation f1 ") and line.endswith("answers_spans.spans") for line in lines)
    assert any(line.startswith("boolq candidates accuracy ") and line.endswith("label (or answer)") for line in lines)


@pytest.mark.parametrize(("name", "row", "prompt", "answers", "gold"), GOLDEN)
def test_json_has_what_the_task_makes_of_each_row(
    run: Run, tmp_path: Path, name: str, row: dict[str, Any], prompt: str, answers: list[str], gold: str | None
) -> None:
    path = write(tmp_path / "data.jsonl", row)
    code, out, _ = run("tasks", "show", name, "--data", path, "--json")
    expected = {"candidates": answers, "gold": gold} if gold else {"candidates": [], "gold": answers}
    assert code == 0
    assert json.loads(out) == [{"prompt": prompt, **expected}]


def test_the_first_examples_of_a_split_are_shown_in_the_order_of_the_data(run: Run, tmp_path: Path) -> None:
    rows = [ROWS["rte"] | {"hypothesis": f"Number {n}."} for n in range(5)]
    data = folder(tmp_path / "rte", "rte", test=rows)
    _, out, _ = run("tasks", "show", "rte", "--data", data, "--split", "test", "-n", "3", "--json")
    assert [one["prompt"].split('"')[1] for one in json.loads(out)] == ["Number 0.", "Number 1.", "Number 2."]
    write(data / "validation.jsonl", *rows[3:])
    code, _, err = run("tasks", "show", "rte", "--data", data, "--split", "dev")
    assert (code, err.count("\n")) == (2, 1)
    assert "has no example in validation that is not in another part" in err
    write(data / "validation.jsonl", ROWS["rte"] | {"hypothesis": "Another."})
    for split in ("dev", "validation"):
        _, out, _ = run("tasks", "show", "rte", "--data", data, "--split", split)
        assert out.startswith("--- example 1 of 1 ---\nOrla keeps the lamp.\n")
        assert "\"Another.\" is true? Yes or No?\n\n\n  * 'Yes'\n    'No'\n" in out


def test_with_a_model_the_tokens_are_shown_that_are_scored(run: Run, tmp_path: Path, model_folder: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "the plot is a mess", "label": 0})
    _, out, _ = run("tasks", "show", "sentiment", "--data", path, "--model", model_folder, "--json")
    (one,) = json.loads(out)
    assert one["gold"] == " terrible"
    assert ["".join(tokens).replace("Ġ", " ") for tokens in one["tokens"]] == [" terrible", " great"]
    assert one["length"] > len(one["tokens"][0])
    _, out, _ = run("tasks", "show", "sentiment", "--data", path, "--model", model_folder)
    assert f"  * ' terrible'   scored: {' '.join(one['tokens'][0])}\n" in out
    path = write(tmp_path / "questions.jsonl", ROWS["squad"])
    _, out, _ = run("tasks", "show", "squad", "--data", path, "--model", model_folder, "--json")
    (one,) = json.loads(out)
    assert one["gold"] == ["Orla", "she"]
    assert "".join(one["tokens"][0]).replace("Ġ", " ").replace("Ċ", "\n") == " Orla\n"


def test_fields_of_the_recipes_task_follow_as_key_and_value(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "the plot is a mess", "mood": "sad"})
    fields = (
        "task.template='{text} It was'",
        "candidates=[' bad', ' good']",
        "labels=[sad, glad]",
        "label_column=mood",
    )
    code, out, _ = run("tasks", "show", "choice", "--data", path, "--json", *fields)
    assert code == 0
    assert json.loads(out) == [{"prompt": "the plot is a mess It was", "candidates": [" bad", " good"], "gold": " bad"}]


def test_a_chat_is_shown_as_its_turns_and_with_a_model_as_its_template_has_it(run: Run, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "how is it"}, {"role": "assistant", "content": "dull"}]
    path = write(tmp_path / "chats.jsonl", {"messages": turns})
    _, out, _ = run("tasks", "show", "chat", "--data", path)
    assert "user: how is it\n\n  * 'dull'\n" in out
    material.chat_tokenizer().save_pretrained(tmp_path / "model")
    _, out, _ = run("tasks", "show", "chat", "--data", path, "--model", tmp_path / "model", "--json")
    (one,) = json.loads(out)
    assert one["prompt"] == "<user>how is it</s>\n<assistant>"
    assert one["tokens"][0][-1] == "</s>"


def test_a_cloze_is_shown_when_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"sentence": "a mess", "label": 0})
    _, out, _ = run("tasks", "show", "sst2", "--data", path, "--json", "--cloze")
    prompt = "a mess It was {mask}."
    assert json.loads(out) == [{"prompt": prompt, "candidates": [" terrible", " great"], "gold": " terrible"}]
    masked.roberta_tokenizer().save_pretrained(tmp_path / "model")
    template = "task.template='{mask} it is: {sentence}'"
    for options, prompt, first in (
        (("--cloze",), "a mess It was <mask>.", "Ġterrible"),
        ((template, "task.candidates=[' bad', ' good']"), "<mask> it is: a mess", "Ġbad"),
    ):
        shown = run("tasks", "show", "sst2", "--data", path, "--model", tmp_path / "model", "--json", *options)
        (one,) = json.loads(shown[1])
        assert (one["prompt"], one["tokens"][0]) == (prompt, [first])
    code, _, err = run("tasks", "show", "squad", "--data", path, "--cloze")
    assert (code, err.count("\n")) == (2, 1)
    assert "task.name is squad, which can't be asked so" in err


def test_a_part_that_the_hub_has_not_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROWS["rte"] | {"hypothesis": f"Number {n}."} for n in range(2)]
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset: {"train": rows[:1], "validation": rows[1:]})
    code, out, err = run("tasks", "show", "rte", "--data", "owner/rte", "--split", "test")
    assert (code, out) == (2, "")
    assert err == "error: --split: owner/rte has no test part with labels, expected validation or train\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rtee", "--data", "data.jsonl"), "task.name: found 'rtee'; did you mean rte?"),
        (("rte", "--data", "absent.jsonl"), "task.data: there is no file absent.jsonl"),
        (("rte", "--data", "data.jsonl"), "line 1 of data.jsonl has no column 'premise' (did you mean 'premises'?)"),
        (("rte", "--data", "data.jsonl", "task.tempalte=x"), "unknown key task.tempalte; did you mean task.template?"),
        (("rte", "--data", "data.jsonl", "train.steps=3"), "unknown key train.steps"),
        (("rte", "--data", "data.jsonl", "task.max_length=many"), "task.max_length: found 'many' (text), expected an"),
        (("rte", "--data", "."), "task.data: . is a folder with no test file"),
        (("cb", "--data", "cb.jsonl", "--model", "./nowhere"), "model.name: the tokenizer of ./nowhere can't be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", {"premises": "a", "hypothesis": "b", "label": 0})
    write(tmp_path / "cb.jsonl", ROWS["cb"])
    code, out, err = run("tasks", "show", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err


def test_without_a_model_nothing_waits_for_torch(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", ROWS["squad"])
    program = (
        "import sys; from mezo_scale import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    for arguments in (("tasks",), ("tasks", "show", "squad", "--data", "data.jsonl")):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
