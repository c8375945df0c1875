"""The example of a reward of one's own: what it scores, the rows it makes, and a run of it on a tiny model."""

import importlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mezo_scale.recipe import load
from mezo_scale.runs.session import train
from tests.support import material
from tests.support.fixtures import ROOT

PROMPT = "Numbers: 1, 2, 3. Target: 6.\nExpression: 1 + 2 + 3\nNumbers: 3, 5, 8. Target: 19.\nExpression:"


@pytest.fixture
def countdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, in a copy of its folder that is the working directory."""
    shutil.copytree(ROOT / "examples" / "countdown", tmp_path / "countdown")
    monkeypatch.chdir(tmp_path / "countdown")
    monkeypatch.syspath_prepend(tmp_path / "countdown")
    yield importlib.import_module("countdown")
    sys.modules.pop("countdown")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("3 * 8 - 5", 1.0),
        (" (8*3)-5 = 19", 1.0),
        ("8 / (5 - 3) + 5", 0.1),
        ("3 + 8", 0.1),
        ("20 - 1", 0.1),  # of other numbers
        ("3 * 3 + 5 + 5", 0.1),  # one twice
        ("19", 0.1),
        ("8 / (3 + 5 - 8)", 0.0),
        ("3 ** 8", 0.0),
        ("8 // 3", 0.0),
        ("-5 + 24", 0.0),
        ("3(8)", 0.0),
        ("3 * 8 -", 0.0),
        ("__import__('os')", 0.0),
        ("9" * 400, 0.0),
        ("(" * 80, 0.0),
        ("the answer is 3 * 8 - 5", 0.0),
        ("", 0.0),
    ],
)
def test_a_text_has_this_score(countdown: Any, text: str, score: float) -> None:
    assert countdown.reward([{"prompt": PROMPT, "text": text, "gold": []}]) == [score]


def test_every_row_has_a_solution_and_asks_something_else(countdown: Any) -> None:
    rows = list(countdown.rows(200))
    template = load("recipe.yaml").task.template
    assert template is not None
    prompts = [template.format(**row) for row in rows]
    assert len(set(prompts)) == 200
    found = [{"prompt": prompt, "text": row["solution"]} for prompt, row in zip(prompts, rows, strict=True)]
    assert countdown.reward(found) == [1.0] * 200
    assert rows[:9] == list(itertools.islice(countdown.rows(50), 9))
    assert rows[:9] != list(countdown.rows(9, seed=1))


def test_its_recipe_runs_on_a_tiny_model(countdown: Any, tmp_path: Path) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in countdown.rows(24)))
    material.write_model("llama", tmp_path / "model")
    small = ("task.train=16", "dev=4", "test=4", "steps=3", "batch_size=4", "max_length=128", "eval_every=3")
    recipe = load("recipe.yaml", [f"model.name={tmp_path / 'model'}", *small, "output.checkpoint=false"])
    train(recipe)
    found = json.loads((recipe.directory / "evaluation.json").read_text())
    assert found["tuned"]["main"] == "reward"
    assert 0 <= found["tuned"]["reward"] <= 1
    lines = [json.loads(line) for line in (recipe.directory / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "dev_reward" in line] == [3]
    assert all(-1 <= line["loss"] <= 0 for line in lines if "loss" in line)
