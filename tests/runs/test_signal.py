"""What the metrics of a run say of its gradient, step by step and in the mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mezo_scale.recipe import Recipe
from mezo_scale.runs import metrics
from mezo_scale.runs.learning import order_of
from mezo_scale.runs.session import train
from mezo_scale.runs.splits import EncodedSplits, prepare

MakeRecipe = Callable[..., Recipe]


def lines_of(recipe: Recipe) -> list[dict[str, Any]]:
    path = Path(recipe.output.dir) / "metrics.jsonl"
    return [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def test_signal_and_row_variance_are_logged_with_their_means_over_sessions(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "WINDOW", 4)
    options = ("batch_size=8", "estimator=grouped", "group_size=4", "eval_every=0", "checkpoint=false")
    train(make_recipe(*options, "steps=3"))
    recipe = make_recipe(*options, "steps=6")
    train(recipe)
    lines = lines_of(recipe)
    for name in ("signal", "row_variance"):
        found = [line[name] for line in lines]
        for step in range(6):
            window = found[max(0, step - 3) : step + 1]
            assert lines[step][f"{name}_mean"] == pytest.approx(sum(window) / len(window))
    for line in lines:  # what a group's slopes were, squared, is S + s2 / 4
        squares = [grad**2 for grad in line["projected_grads"]]
        assert sum(squares) / 2 == pytest.approx(line["signal"] + line["row_variance"] / 4)
    board = EventAccumulator(str(Path(recipe.output.dir) / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("signal_mean")] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_one_side_has_no_line_of_it(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("estimator=one_sided", "num_directions=2", "steps=1", "eval_every=0", "checkpoint=false")
    train(recipe)
    assert "signal" not in lines_of(recipe)[0]


def test_tokens_per_second_and_padding_are_those_of_the_rows_of_the_step(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("batch_size=6", "steps=2", "eval_every=0", "checkpoint=false")
    train(recipe)
    recipe, kind = prepare(recipe)
    rows = EncodedSplits.read(recipe, kind).train
    order = order_of(recipe, kind, rows)
    for step, line in enumerate(lines_of(recipe)):
        lengths = [len(rows[row].prompt) for row in order.step(step)]
        width = kind.collate([rows[row] for row in order.step(step)])["input_ids"].shape[1]
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(sum(lengths))
        assert line["padding"] == pytest.approx(1 - sum(lengths) / (6 * width))
        assert 0 < line["padding"] < 1


def test_of_images_there_are_no_tokens_and_a_whole_text_counts_where_no_prompt_is_run() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert metrics.filling({"pixel_values": torch.zeros(2, 3, 4, 4)}, 2.0) == {}
    assert metrics.filling({"whole_mask": mask}, 2.0) == {"tokens_per_second": 2.5, "padding": pytest.approx(1 / 6)}
