"""Trackers get what metrics.jsonl gets; one that is not installed is refused before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.session import train
from mezo_scale.trajectory import Trajectory

MakeRecipe = Callable[..., Recipe]


class Recorder(tracking.GeneralTracker):
    """Stands where W&B does, and writes down what it is told."""

    name = "wandb"
    requires_logging_directory = False
    made: list["Recorder"]

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options, self.logged, self.config, self.finished = run_name, options, [], {}, False
        self.made.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append({"step": step, **values})

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    return Recorder.made


def test_a_tracker_is_told_what_the_metrics_say(make_recipe: MakeRecipe, recorders: list[Recorder]) -> None:
    recipe = make_recipe("output.trackers=[wandb]")
    train(recipe)
    (recorder,) = recorders
    lines = [json.loads(line) for line in (recipe.directory / "metrics.jsonl").read_text().splitlines()]
    kept = [[(name, value) for name, value in line.items() if name != "synced"] for line in lines]
    numbers = [{name: value for name, value in line if isinstance(value, int | float)} for line in kept]
    assert recorder.logged == numbers
    assert recorder.config["optimizer.lr"] == 1e-2
    assert recorder.finished


def test_a_session_that_goes_on_goes_on_in_the_trackers_run(make_recipe: MakeRecipe, recorders: list[Recorder]) -> None:
    train(make_recipe("output.trackers=[wandb]"))
    train(make_recipe("output.trackers=[wandb]", "train.steps=6"))
    first, second = recorders
    run_id = Trajectory.open(make_recipe().directory / "trajectory.mezo").header.run_id
    assert first.options == second.options == {"name": "run", "id": run_id, "resume": "allow"}
    assert [line["step"] for line in second.logged if "loss" in line] == [5, 6]


def test_a_tracker_that_is_not_installed_is_refused_with_its_pip_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="comet_ml is not installed: pip install comet-ml, or leave it out"):
        train(make_recipe("output.trackers=[comet_ml]"))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_there_is_not_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"output\.trackers"):
        make_recipe("output.trackers=[wandbb]")


def test_a_tracker_that_can_t_be_opened_is_one_line(
    make_recipe: MakeRecipe, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Recorder, values: dict[str, Any]) -> None:
        raise ConnectionError("no API key\nconfigured")

    monkeypatch.setattr(Recorder, "store_init_configuration", refuses)
    with pytest.raises(RecipeError, match=r"wandb can't be opened \(no API key configured\): log in to it"):
        train(make_recipe("output.trackers=[wandb]"))
