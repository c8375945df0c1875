"""Candidates scored by how much likelier the prompt makes them than a neutral one does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mezo_scale import tasks
from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import RecipeError
from mezo_scale.models import Loaded
from mezo_scale.recipe import Recipe, TaskSection, load
from mezo_scale.runs.evaluate import evaluate, evaluate_recipe
from mezo_scale.runs.methods.icl import demonstrated
from mezo_scale.runs.session import train
from mezo_scale.tasks import Example
from mezo_scale.tasks.kinds.candidates import Candidates
from tests.support import masked, material
from tests.support.suite import ROWS, write

MakeRecipe = Callable[..., Recipe]
WORDS = (" superb", " a bore", " dull and stale")
TEXTS = ("the plot is moving", "this film , and i left early", "every scene is a mess", "its cast", "a remake")
EXAMPLES = {
    "several tokens": [
        Example(f"{text} It was", WORDS[: 2 + n % 2], n % 2, neutral=" It was" if n % 3 else "is it")
        for n, text in enumerate(TEXTS)
    ],
    "single tokens": [
        Example(f"{text} It was", (" terrible", " great"), n % 2, neutral=" It was") for n, text in enumerate(TEXTS)
    ],
}


@pytest.fixture
def make(tmp_path: Path, model_folder: Path, reviews_file: Path) -> MakeRecipe:
    """A recipe of the reviews: make("calibrate=true")."""
    task = {"data": str(reviews_file), "train": 48, "dev": 16, "test": 32, "max_length": 40}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": str(model_folder)}, "task": task}))
    return lambda *overrides: load(path, [f"output.dir={tmp_path / 'run'}", *overrides])


def neutral_of(folder: Path, name: str, row: dict[str, Any], **fields: Any) -> str | None:
    data = str(write(folder / "data.jsonl", row))
    section = TaskSection.model_validate({"name": name, "data": data, "calibrate": True, **fields})
    (example,) = tasks.examples(section)["all"]
    neutral: str | None = example.neutral
    return neutral


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("sst2", "It was"),
        ("copa", "because"),
        ("record", "-"),
        ("rte", 'Does this mean that "" is true? Yes or No?\n'),
        ("cb", 'Suppose  Can we infer that ""? Yes, No, or Maybe?\n'),
        ("piqa", "Goal: \nSolution:"),
        ("aqua", "Question: \nOptions: \nAnswer:"),
    ],
)
def test_a_neutral_prompt_is_the_task_s_with_the_columns_left_empty(tmp_path: Path, name: str, neutral: str) -> None:
    assert neutral_of(tmp_path, name, ROWS[name]) == neutral


def test_a_column_s_other_name_is_left_empty_as_well(tmp_path: Path) -> None:
    assert neutral_of(tmp_path, "sst2", {"text": "a lamp", "label": 0}) == "It was"


def test_a_template_of_one_s_own_stays_as_it_is_written(tmp_path: Path) -> None:
    row = {"text": "a lamp", "n": 3, "label": 0}
    own = {"name": "choice", "row": row, "candidates": (" bad", " good")}
    assert neutral_of(tmp_path, **own, template="{n:>5}, {text!r}: it was") == ", : it was"
    assert neutral_of(tmp_path, **own, template="{text} was", neutral_prompt="All was") == "All was"
    (plain,) = tasks.examples(
        TaskSection(name="choice", data=str(tmp_path / "data.jsonl"), template="{n:>5}", candidates=(" bad", " good"))
    )["all"]
    assert (plain.prompt, plain.neutral) == ("    3", None)


def made(**fields: Any) -> Candidates:
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    return Candidates(tokenizer, TaskSection(data="d", calibrate=True, **fields))


def log_prob(model: nn.Module, tokenizer: Any, prompt: str, candidate: str) -> float:
    """Of all the candidate's tokens after the prompt, one sequence at a time, in float64."""
    start, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + candidate))
    logs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, whole[place]]) for place in range(len(start), len(whole)))


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("shares", [False, True], ids=["plain", "shared"])
@torch.no_grad()
def test_choices_are_those_of_a_plain_loop(examples: list[Example], shares: bool) -> None:
    model, kind = material.build("llama", seed=3), made()
    kind.sharing.refused = not shares
    right, loss, moved = 0, 0.0, 0
    for example in examples:
        asked, neutral = (
            [log_prob(model, material.tokenizer(), prompt, text) for text in example.candidates]
            for prompt in (example.prompt, example.neutral or "")
        )
        leads = torch.tensor(asked).double() - torch.tensor(neutral).double()
        right += int(leads.argmax()) == example.label
        moved += int(leads.argmax()) != int(torch.tensor(asked).argmax())
        loss += float(-leads.log_softmax(0)[example.label]) / len(examples)
    assert moved  # or this would show nothing
    rows = [kind.encode(example) for example in examples]
    loaded = Loaded(model, material.tokenizer(), torch.device("cpu"), Strategy("single"))
    for batch in (2, 5):
        found = evaluate(loaded, kind, rows, batch).metrics
        assert found["accuracy"].value == right / len(examples)
        assert found["loss"].value == pytest.approx(loss, abs=1e-4)
    assert kind.sharing.covers(rows) == (shares and any(len(tokens) > 1 for row in rows for tokens in row.candidates))


def test_steps_are_the_same_as_without() -> None:
    kind = made()
    rows = [kind.encode(example) for example in EXAMPLES["several tokens"]]
    assert not any("neutral" in name or name == "unasked" for name in kind.collate(rows, "candidates"))
    assert {"neutral_input_ids", "unasked", "lengths"} <= kind.collate(rows).keys()
    assert len(kind.collate(rows)["neutral_input_ids"]) == 4  # each of them once


def test_the_neutral_prompt_of_in_context_learning_follows_the_demonstrations_too() -> None:
    asked, shown = EXAMPLES["single tokens"][:2]
    found = demonstrated(asked, [shown])
    assert found.prompt == f"{shown.prompt} great\n\n{asked.prompt}"
    assert found.neutral == f"{shown.prompt} great\n\n It was"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["neutral_prompt=It was"], "task.neutral_prompt is given, but task.calibrate is false: set it to true"),
        (["calibrate=true", "objective=accuracy"], "task.calibrate is true, but train.objective is accuracy, which gr"),
        (["calibrate=true", "method.name=linear_probe"], "task.calibrate is true, but method.name is linear_probe"),
        (
            ["calibrate=true", "task.name=answer", "template='{text} It is'", "answer_column=label"],
            "task.calibrate is true, but task.name=answer is a task that scores no candidates after a prompt",
        ),
        (["calibrate=true", "neutral_prompt=''"], "task.calibrate: the neutral prompt '' has no tokens, expected"),
        (
            ["calibrate=true", "neutral_prompt='It was '", "candidates=[great,terrible]", "template='{text} was!'"],
            "is joined with 'great' in another way than",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make: MakeRecipe, fields: list[str], said: str) -> None:
    recipe = make(*fields)
    with pytest.raises(RecipeError, match=re.escape(said)):
        train(recipe)
    assert not recipe.directory.exists()


def test_a_cloze_is_refused(make: MakeRecipe, tmp_path: Path) -> None:
    folder = masked.write_model("roberta", tmp_path / "roberta")
    with pytest.raises(RecipeError, match=r"task.calibrate is true, but task.name=sentiment is a cloze that scores no"):
        train(make(f"model.name={folder}", "calibrate=true"))


def test_a_task_from_elsewhere_without_neutral_prompts_is_refused() -> None:
    with pytest.raises(RecipeError, match="the task's examples have no neutral prompt, expected Example.neutral"):
        made().encode(Example("the plot It was", (" great", " terrible"), 0))


@pytest.mark.parametrize("method", ["mezo", "zero_shot", "icl"])
def test_runs_calibrate_from_the_first_evaluation_to_the_last(make: MakeRecipe, tmp_path: Path, method: str) -> None:
    more = {"mezo": ["steps=4", "lr=1e-2"], "icl": ["demonstrations=1", "max_length=72"]}.get(method, [])
    names = ("calibrated", "plain")
    recipes = {
        name: make(
            f"method.name={method}",
            f"output.dir={tmp_path / name}",
            f"calibrate={str(name == 'calibrated').lower()}",
            *more,
        )
        for name in names
    }
    scores = {}
    for name in names:
        train(recipes[name])
        scores[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    last = {"mezo": "tuned", "zero_shot": "zero_shot", "icl": "icl"}[method]
    for result in ("zero_shot", last):
        assert scores["calibrated"][result]["loss"] != scores["plain"][result]["loss"]
    if method == "mezo":
        logs = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in names]
        assert logs[0] == logs[1]
        again, _ = evaluate_recipe(recipes["calibrated"], "test", None)
        assert again.as_dict()["loss"] == scores["calibrated"]["tuned"]["loss"]
