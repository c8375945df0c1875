"""What evaluations on dev decide: when a run ends before its last step, and which step's weights are kept."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs import session, trainer
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.methods import adamw
from mezo_scale.runs.methods.session import is_finished
from mezo_scale.runs.on_dev import OnDev
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.slurm.status import status
from mezo_scale.tasks.score import Metric, Score
from mezo_scale.trajectory import Trajectory
from mezo_scale.trajectory.codec import CLOSE, slot
from tests.runs.test_session import metrics, same, weights
from tests.support.pool import Ranks

MakeRecipe = Callable[..., Recipe]
VALUES = (
    0.5,
    0.7,
    0.6,
    0.7,
    0.9,
    0.9,
)  # of dev, one evaluation after the other: no better than the second, then better
OPTIONS = ("steps=12", "eval_every=2", "snapshot_every=0")


class Killed(Exception):
    pass


class Scripted:
    """Evaluations of dev that come to given values by their steps; those of test are computed."""

    def __init__(self, patch: pytest.MonkeyPatch, values: Sequence[float] = VALUES, every: int = 2) -> None:
        self.values, self.every, self.rows = values, every, 16
        self.seen: list[int] = []
        self.killed_at: int | None = None
        self.look = trainer.Trainer._look_at_dev
        patch.setattr(trainer, "evaluate", self.around(trainer.evaluate))
        patch.setattr(adamw, "evaluate", self.around(adamw.evaluate))
        patch.setattr(trainer.Trainer, "_look_at_dev", self.looking)
        self.step = 0

    def around(self, evaluate: Callable[..., Score]) -> Callable[..., Score]:
        def found(loaded: Any, kind: Any, rows: Sequence[Any], *rest: Any) -> Score:
            if len(rows) != self.rows:
                return evaluate(loaded, kind, rows, *rest)
            if self.step == 0:  # adamw does not say
                self.seen.append(self.every * (len(self.seen) + 1))
            else:
                self.seen.append(self.step)
            if self.killed_at == self.seen[-1]:
                raise Killed
            return Score({"accuracy": Metric(20 * self.values[self.seen[-1] // self.every - 1], 20)}, "accuracy")

        return found

    @property
    def looking(self) -> Callable[..., None]:
        def look(self_: trainer.Trainer, done: int, *rest: Any) -> None:
            self.step = done
            self.look(self_, done, *rest)

        return look


def ended(recipe: Recipe) -> dict[str, Any]:
    found = json.loads((recipe.directory / "evaluation.json").read_text())
    return {name: found[name] for name in ("ended", "best") if name in found} | {"graded": found["tuned"]["step"]}


def score(value: float | None, more_is_better: bool = True) -> Score:
    return Score({"m": Metric(value or 0.0, int(value is not None), 0, False, more_is_better)}, "m")


class OneMetric:
    """A kind of which only the direction of its metric counts."""

    def __init__(self, more_is_better: bool = True) -> None:
        self.more_is_better = more_is_better

    def score(self, predictions: Any, rows: Any) -> Score:
        return score(None, self.more_is_better)


@pytest.mark.parametrize(
    ("values", "more_is_better", "best", "waited"),
    [
        ([], True, None, 0),
        ([0.5, 0.7, 0.6], True, (2, 0.7), 1),
        ([0.5, 0.7, 0.7], True, (2, 0.7), 1),
        ([3.0, 2.0, 2.5, 2.0], False, (2, 2.0), 2),
        ([None, None], True, None, 2),
        ([None, 0.1, None], True, (2, 0.1), 1),
    ],
)
def test_the_best_is_the_first_of_equals_in_the_direction_of_the_metric(
    values: list[float | None], more_is_better: bool, best: tuple[int, float] | None, waited: int
) -> None:
    kind: Any = OneMetric(more_is_better)
    dev = OnDev(kind, 2)
    for number, value in enumerate(values, 1):
        dev.add(number, score(value, more_is_better))
    assert (dev.best, dev.waited, dev.says_stop) == (best, waited, waited >= 2)
    assert not OnDev(kind, None, [(1, 1.0), (2, 0.0), (3, 3.0), (4, 0.0)]).says_stop


def test_a_run_whose_patience_is_over_ends_in_order_and_stays_as_it_is(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(*OPTIONS, "patience=2")
    dev = Scripted(monkeypatch)
    train(recipe)
    assert dev.seen == [2, 4, 6, 8]
    log = recipe.directory / "trajectory.mezo"
    assert len(Trajectory.open(log)) == 8
    assert int.from_bytes(log.read_bytes()[-slot(Trajectory.open(log).header).itemsize :][8:12], "little") == CLOSE
    best = {"step": 4, "metric": "accuracy", "value": 0.7}
    assert ended(recipe) == {"ended": {"step": 8, "patience": 2}, "best": best, "graded": 8}
    assert is_finished(recipe, session.RunDirectory(recipe.directory))
    said = "Ended early, after step 8: 2 evaluation(s) on dev were no better than the accuracy of step 4."
    assert said in (recipe.directory / "report.md").read_text()
    shown = capsys.readouterr().out
    assert "step 8: no better on dev for 2 evaluation(s): the run ends here" in shown
    assert f"train {recipe.directory} train.patience=null" in shown
    assert status(recipe.directory)[0]["state"] == "finished"

    before = log.read_bytes(), ended(recipe), weights(recipe.directory / "checkpoint"), metrics(recipe.directory)
    train(recipe)
    assert dev.seen == [2, 4, 6, 8]
    after = log.read_bytes(), ended(recipe), weights(recipe.directory / "checkpoint"), metrics(recipe.directory)
    assert before[:2] == after[:2]
    assert same(before[2], after[2])
    assert before[3] == after[3]
    assert "8 steps are replayed, 0 are left" in capsys.readouterr().out


def test_with_more_patience_the_run_goes_on(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(*OPTIONS, "patience=2")
    dev = Scripted(monkeypatch)
    train(recipe)
    train(load(recipe.directory, ["train.patience=3"]))
    assert dev.seen == [2, 4, 6, 8, 10, 12]
    best = {"step": 10, "metric": "accuracy", "value": 0.9}
    assert ended(recipe) == {"ended": {"step": 12}, "best": best, "graded": 12}


@pytest.mark.parametrize("at", [6, 8])
def test_a_session_that_was_killed_in_an_evaluation_is_gone_on_with_to_the_same_end(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int
) -> None:
    whole, recipe = make_recipe(*OPTIONS, "patience=2", f"output.dir={tmp_path / 'whole'}"), make_recipe(*OPTIONS)
    dev = Scripted(monkeypatch)
    train(whole)
    recipe = make_recipe(*OPTIONS, "patience=2")
    dev.killed_at = at
    with pytest.raises(Killed):
        train(recipe)
    assert [line["step"] for line in metrics(recipe.directory) if "dev_accuracy" in line] == list(range(2, at, 2))
    dev.killed_at = None
    train(recipe)
    assert ended(recipe) == ended(whole)
    assert [line["step"] for line in metrics(recipe.directory) if "dev_accuracy" in line] == [2, 4, 6, 8]
    assert Trajectory.open(recipe.directory / "trajectory.mezo").records == (
        Trajectory.open(whole.directory / "trajectory.mezo").records
    )


def test_a_session_that_was_killed_behind_the_last_evaluation_takes_no_further_step(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(*OPTIONS, "patience=2")
    dev = Scripted(monkeypatch)
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise Killed

        patch.setattr(trainer.Trainer, "_grade", killed)
        with pytest.raises(Killed):
            train(recipe)
    train(recipe)
    assert dev.seen == [2, 4, 6, 8]
    assert ended(recipe)["ended"] == {"step": 8, "patience": 2}


@pytest.mark.parametrize("overrides", [(), ("snapshot_every=2", "keep_snapshots=9"), ("tune.what=lora",)])
def test_the_best_step_is_kept_and_graded_where_a_recipe_says_so(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    recipe = make_recipe(*OPTIONS, "patience=2", "output.checkpoint=best", *overrides)
    Scripted(monkeypatch)
    train(recipe)
    assert ended(recipe) == {
        "ended": {"step": 8, "patience": 2},
        "best": {"step": 4, "metric": "accuracy", "value": 0.7},
        "graded": 4,
    }
    results = json.loads((recipe.directory / "evaluation.json").read_text())
    assert "| tuned, 4 steps |" in (recipe.directory / "report.md").read_text()
    found, steps = evaluate_recipe(load(recipe.directory), "test", 4)
    assert (steps, found.metrics["accuracy"].value) == (4, results["tuned"]["accuracy"])
    assert any("bit for bit what 4 replayed steps give" in line for line in verify(load(recipe.directory)))
    if not overrides:
        short = make_recipe("steps=4", "eval_every=2", "snapshot_every=0", f"output.dir={tmp_path / 'short'}")
        train(short)
        assert same(weights(short.directory / "checkpoint"), weights(recipe.directory / "checkpoint"))
        shutil.rmtree(recipe.directory / "checkpoint")
        train(recipe)  # once more
        assert same(weights(short.directory / "checkpoint"), weights(recipe.directory / "checkpoint"))
        train(load(recipe.directory, ["output.checkpoint=true"]))
        assert ended(recipe)["graded"] == 8


def test_adamw_has_patience_too(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("method.name=adamw", "steps=12", "eval_every=2", "patience=2", "lr=1e-3")
    Scripted(monkeypatch)
    train(recipe)
    best = {"step": 4, "metric": "accuracy", "value": 0.7}
    assert ended(recipe) == {"ended": {"step": 8, "patience": 2}, "best": best, "graded": 8}
    assert is_finished(recipe, session.RunDirectory(recipe.directory))
    assert "Ended early, after step 8" in (recipe.directory / "report.md").read_text()
    assert not is_finished(make_recipe("method.name=adamw", "steps=12"), session.RunDirectory(recipe.directory))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["patience=2", "eval_every=0"], "train.patience is 2, but train.eval_every is 0 and train.steps 4"),
        (["patience=2", "eval_every=5"], "so that dev is never looked at: give an eval_every of 1 to 4"),
        (["output.checkpoint=best", "eval_every=0"], "output.checkpoint is best, but train.eval_every is 0"),
        (["patience=0"], "train.patience"),
        (["method.name=zero_shot", "patience=2"], "method.name is zero_shot, which has no use for it"),
        (
            ["method.name=adamw", "output.checkpoint=best"],
            "which keeps no log to rebuild a step from: take true, which saves the last step's weights",
        ),
    ],
)
def test_what_dev_can_not_decide_is_refused_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    plain = ["optimizer.lr=1e-6", "train.steps=20000", "train.batch_size=16", "train.log_every=10"]
    plain = plain if "method.name=zero_shot" in overrides else []
    with pytest.raises(RecipeError) as refused:
        train(load(recipe_file, [*plain, *overrides]))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_task_without_dev_has_nothing_to_decide_by(make_recipe: MakeRecipe) -> None:
    splits = session.EncodedSplits([1], [], [1])
    with pytest.raises(RecipeError, match="task.name=sentiment has no dev split to decide by: leave it out"):
        session.on_dev.check(make_recipe("patience=1"), splits)


def go(recipe: str, overrides: list[str], apart: bool) -> list[int]:
    """A session on the ranks of this world; with `apart` ranks besides the first see other values than it does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, size, size, torch.device("cpu"))
    values = VALUES if rank == 0 or not apart else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        dev = Scripted(patch, values)
        asked, kind = session.prepare(load(recipe, overrides))
        splits = session.EncodedSplits.read(asked, kind)
        session.Trainer(asked, world, session.RunDirectory(asked.directory), kind, splits).go(0)
    return dev.seen


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_ranks_end_together_by_what_rank_0_found_and_keep_the_best(
    ranks: Ranks, recipe_file: Path, tmp_path: Path, strategy: str
) -> None:
    overrides = [*OPTIONS, "patience=2", "output.checkpoint=best", f"strategy={strategy}"]
    assert ranks(2, go, recipe=str(recipe_file), overrides=overrides, apart=True) == [[2, 4, 6, 8]] * 2
    recipe = load(tmp_path / "run")
    assert ended(recipe)["ended"] == {"step": 8, "patience": 2}
    assert any("bit for bit what 4 replayed steps give" in line for line in verify(recipe))
