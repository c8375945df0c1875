"""Tasks whose candidates are in their rows, of different number and length: trained, evaluated and reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_scale.recipe import Recipe
from mezo_scale.runs.session import train
from tests.support.suite import ROWS, write


def stories(number: int) -> dict[str, Any]:
    names = [f"Orla {letter}" for letter in "abcdefg"[: 2 + number % 5]]
    changes = {"passage": f"It is {number}.", "query": "@placeholder is", "entities": names, "answers": names[1:3]}
    return ROWS["record"] | changes


def sentences(number: int) -> dict[str, Any]:
    return ROWS["copa"] | {"premise": f"It is {number}.", "label": number % 2}


@pytest.mark.parametrize(("name", "make"), [("record", stories), ("copa", sentences)])
@pytest.mark.parametrize("objective", ["language_modeling", "candidates"])
def test_rows_with_candidates_of_their_own_are_trained_on_and_evaluated(
    make_recipe: Callable[..., Recipe], tmp_path: Path, name: str, make: Callable[[int], Any], objective: str
) -> None:
    for first, part in ((0, "train"), (10, "validation"), (20, "test")):
        write(tmp_path / f"{part}.jsonl", *(make(number) for number in range(first, first + 10)))
    given = [] if objective == "language_modeling" else [f"objective={objective}"]
    recipe = make_recipe(f"task.name={name}", f"task.data={tmp_path}", *given)
    train(recipe)
    tuned = json.loads((recipe.directory / "evaluation.json").read_text())["tuned"]
    assert (tuned["main"], tuned["count"], tuned["not_finite"]) == ("accuracy", 10, 0)
    assert yaml.safe_load((recipe.directory / "recipe.yaml").read_text())["train"]["objective"] == objective
