"""The sweep's own machinery: it loses no cell to another, goes on where it stopped, and sees what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pool import RankFailed, Ranks
from tools import model_report, model_sweep, tiny_models
from tools.view_against_copy import TOLERANCE, UnusableError, compare, moved_losses

RIGHT = {"one": 0.0, "paired": 0.0, "why_not": "", "unread": 0, "for_example": []}


class Workers(Ranks):
    """In the place of processes: cells of one name kill them, those of another only where others ran before."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, world_size: int, function: Any, **asked: Any) -> list[Any]:
        name, fresh = asked["name"], asked["fresh"]
        self.asked.append(f"{name} alone" if fresh else name)
        if name == "deadly" or (name == "spoiled" and not fresh):
            raise RankFailed(0, "the process died", "a long report")
        return [RIGHT] * world_size


def test_a_cell_that_kills_its_worker_is_tried_once_more_alone_and_costs_no_other(tmp_path: Path) -> None:
    workers = Workers()
    model_sweep.sweep(workers, "fsdp2", ["a", "deadly", "b", "spoiled", "c"], tmp_path / "rows.jsonl")
    rows = model_sweep.latest(tmp_path / "rows.jsonl")
    assert workers.asked == ["a", "deadly", "deadly alone", "b", "spoiled", "spoiled alone", "c"]
    verdicts = {cell: model_report.verdict(row) for (_, cell), row in rows.items()}
    assert verdicts == {"a": "equal", "deadly": "failed", "b": "equal", "spoiled": "equal", "c": "equal"}
    assert rows["fsdp2", "deadly"]["failed"] == "the process died"


def test_a_sweep_that_was_stopped_makes_only_the_rows_that_are_missing(tmp_path: Path) -> None:
    path, workers = tmp_path / "rows.jsonl", Workers()
    model_sweep.append(path, "plain", "a", RIGHT)
    model_sweep.append(path, "zero3", "b", RIGHT)
    with path.open("a") as file:
        file.write('{"layout": "plain", "cell": "c", "on')  # killed while writing
    model_sweep.sweep(workers, "plain", list("abc"), path)
    assert workers.asked == ["b", "c"]
    assert set(model_sweep.latest(path)) == {("plain", "a"), ("zero3", "b"), ("plain", "b"), ("plain", "c")}


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (None, "not run"),
        ({"unusable": "it can't be built"}, "no model"),
        ({"failed": "KeyError"}, "failed"),
        (RIGHT | {"one": None, "paired": None, "why_not": "no"}, "refused"),
        (RIGHT | {"one": 2e-7, "paired": None, "why_not": "no"}, "equal"),
        (RIGHT | {"one": 2e-7, "paired": 3e-3}, "wrong (3e-03)"),
        (RIGHT | {"one": 3e-3, "paired": 2e-7}, "wrong (3e-03)"),
    ],
)
def test_a_row_is_right_only_if_it_is_equal_or_says_why_not(row: model_report.Row | None, verdict: str) -> None:
    assert model_report.verdict(row) == verdict


def test_the_page_counts_every_row_and_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    model_sweep.append(path, "plain", "causal/llama", RIGHT)
    model_sweep.append(path, "zero3", "causal/llama", RIGHT | {"one": 1e-2})
    model_sweep.append(path, "plain", "adapter/CPT", RIGHT | {"one": None, "paired": None, "why_not": "written | so"})
    model_report.write(model_sweep.latest(path), tmp_path / "models.md")
    page = (tmp_path / "models.md").read_text()
    assert "| Causal language models | plain | 1 | 1 | 0 | 0 | 0 |" in page
    assert "| Causal language models | zero3 | 0 | 0 | 0 | 0 | 1 |" in page
    assert "| llama | equal | not run | wrong (1e-02) | paired |  |" in page
    assert "| CPT | refused | not run | not run |  | written \\| so |" in page


@pytest.mark.parametrize("name", ["causal/mamba2", "causal/mixtral"])
def test_any_parameter_that_was_left_out_would_show(name: str) -> None:
    model, batch = tiny_models.families()[name]()
    right = moved_losses(model, batch)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        found = compare(model, batch, right)
        parameter.requires_grad_(True)
        assert found.one is not None, parameter_name
        assert found.one > TOLERANCE, parameter_name


def test_a_model_whose_losses_change_from_call_to_call_is_not_compared() -> None:
    model, batch = tiny_models.families()["causal/llama"]()
    model.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.1 * torch.rand_like(out))
    with pytest.raises(UnusableError, match="from call to call"):
        moved_losses(model, batch)
