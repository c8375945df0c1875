"""What the curves of runs that are over, or are not yet, come to in a table and a plot."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_scale.recipe import Recipe
from mezo_scale.runs.session import train
from tools.learning_curves import Learning, learning, plot, table

MakeRecipe = Callable[..., Recipe]


def test_a_run_is_shown_with_what_its_steps_cost(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    grouped = make_recipe(
        "estimator=grouped", "group_size=2", "steps=4", "eval_every=2", f"output.dir={tmp_path / 'one'}"
    )
    adamw = make_recipe("method.name=adamw", "steps=3", "eval_every=3", f"output.dir={tmp_path / 'other'}")
    for recipe in (grouped, adamw):
        train(recipe)
    one, other = (learning(Path(recipe.output.dir)) for recipe in (grouped, adamw))
    assert [step for step, _ in one.curve] == [2, 4]
    assert [step for step, _ in other.curve] == [3]
    assert one.rows == 2 * grouped.train.batch_size, "a row is seen twice, whatever the number of groups"
    assert other.rows == 3 * adamw.train.batch_size
    assert None not in (*one.test, *other.test)
    plot([one, other], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"| one | 4 | {4 * one.rows} |" in table([one, other])


def test_what_has_not_been_measured_is_left_empty() -> None:
    run = Learning("long", "accuracy", [(200, 0.5), (400, 0.62), (600, 0.6)], (0.344, None), 36, 1.5, 1.31)
    line = table([run]).splitlines()[-1]
    assert line == "| long | 600 | 21,600 | 0.25 | 1.31 | 62.0% | 60.0% | 34.4% |  |"


def test_a_run_without_evaluations_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("steps=1", "eval_every=0", "checkpoint=false", f"output.dir={tmp_path / 'run'}")
    train(recipe)
    path = Path(recipe.output.dir) / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "dev_" not in line))
    with pytest.raises(SystemExit, match="run has no accuracy on dev: give a run with train.eval_every"):
        learning(Path(recipe.output.dir))
