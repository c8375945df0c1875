"""A power loss leaves nothing in a run's directory that speaks of steps that its log has lost."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_scale.distributed.signals import Interrupted
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.metrics import Metrics
from mezo_scale.runs.session import train
from mezo_scale.trajectory import Trajectory
from tests.runs.test_session import metrics, same, weights
from tests.support.disk import LazyDisk

MakeRecipe = Callable[..., Recipe]
OPTIONS = ("steps=5", "snapshot_every=2", "eval_every=3")


class Watched(LazyDisk):
    """Looks at what is beside the log.

    Attributes:
        seen: what came into its place, or was said of a step in metrics.jsonl; with the steps that the log then had,
            and those of them that a power loss would have left.
        then: called with its name.
    """

    def __init__(self, patch: pytest.MonkeyPatch, run: Path) -> None:
        super().__init__(patch)
        self.run, self.log = run, run / "trajectory.mezo"
        self.on_disk, self.seen = 0, list[tuple[str, int, int]]()
        self.then: Callable[[str], None] = lambda name: None
        for name in ("replace", "rename"):
            patch.setattr(os, name, self.moving(getattr(os, name)))
        patch.setattr(Metrics, "log", self.logging(Metrics.log))

    def fsync(self, number: int) -> None:
        super().fsync(number)
        if os.readlink(f"/proc/self/fd/{number}") == str(self.log):
            self.on_disk = os.fstat(number).st_size

    def moving(self, original: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any) -> None:
            original(source, target)
            if str(target).startswith(str(self.run)) and self.on_disk:
                self.look(Path(target).name)

        return move

    def logging(self, original: Callable[..., None]) -> Callable[..., None]:
        def log(written: Metrics, step: int, **values: Any) -> None:
            original(written, step, **values)
            self.look(f"line {step}")

        return log

    def look(self, name: str) -> None:
        """The log that would be left has to fit to all that is beside it."""
        left, whole = self.run.parent / "left", RunDirectory(self.run).read_log()
        left.mkdir(exist_ok=True)
        for file in ("metrics.jsonl", "evaluation.json"):
            if (self.run / file).exists():
                shutil.copy(self.run / file, left)
        (left / "trajectory.mezo").write_bytes(self.log.read_bytes()[: self.on_disk])
        self.seen.append((name, len(whole), len(RunDirectory(left).read_log())))
        self.then(name)


def test_what_speaks_of_a_step_comes_into_its_place_when_the_step_is_on_the_disk(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(*OPTIONS)
    disk = Watched(monkeypatch, recipe.directory)
    train(recipe)
    files = {name: (steps, left) for name, steps, left in disk.seen if not name.startswith("line ")}
    assert {"step-2", "step-4", "checkpoint", "evaluation.json", "report.md"} <= files.keys()
    assert [(name, steps) for name, (steps, left) in files.items() if left != steps] == []
    lines = {name: (steps, left) for name, steps, left in disk.seen if name.startswith("line ")}
    assert [lines[f"line {step}"] for step in (1, 2, 3, 4, 5)] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4)]
    assert [line["synced"] for line in metrics(recipe.directory)] == [0, 0, 2, 2, 2, 4]


def test_a_run_that_is_stopped_says_so_when_its_steps_are_on_the_disk(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("steps=6", "snapshot_every=0", "eval_every=0")
    disk = Watched(monkeypatch, recipe.directory)
    disk.then = lambda name: signal.raise_signal(signal.SIGTERM) if name == "line 3" else None
    with pytest.raises(Interrupted):
        train(recipe)
    assert ("interrupted.json", 3, 3) in disk.seen
    assert json.loads((recipe.directory / "interrupted.json").read_text())["step"] == 3


class PowerLostError(Exception):
    pass


def test_after_a_power_loss_a_run_ends_with_the_bits_that_it_would_have_had(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, recipe = tmp_path / "whole", make_recipe(*OPTIONS)
    train(make_recipe(*OPTIONS, f"output.dir={whole}"))
    copy = tmp_path / "copy"

    with monkeypatch.context() as patch:
        disk = Watched(patch, recipe.directory)

        def lose_power(name: str) -> None:
            if name == "line 4":
                shutil.copytree(recipe.directory, copy, ignore=shutil.ignore_patterns("*.lock"))
                os.truncate(copy / "trajectory.mezo", disk.on_disk + 7)
                raise PowerLostError

        disk.then = lose_power
        with pytest.raises(PowerLostError):
            train(recipe)
    shutil.rmtree(recipe.directory)
    shutil.copytree(copy, recipe.directory)
    with pytest.warns(UserWarning, match="2 steps are whole"):
        train(load(recipe.directory))
    assert same(weights(recipe.directory / "checkpoint"), weights(whole / "checkpoint"))
    logs = [Trajectory.open(run / "trajectory.mezo").records for run in (recipe.directory, whole)]
    assert logs[0] == logs[1]
    assert [line["step"] for line in metrics(recipe.directory) if "loss" in line] == [1, 2, 3, 4, 5]


def test_lines_of_releases_that_synced_before_each_step_count_as_before(tmp_path: Path) -> None:
    lines = [{"step": 7, "loss": 1.0}, {"step": 9, "loss": 1.0, "synced": 5}, {"step": 8, "synced": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert RunDirectory(tmp_path).steps_said() == 7
