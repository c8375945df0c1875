"""Runs that are killed at every point that has a name, and launchers that are killed before their ranks are."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.metrics import Metrics
from mezo_scale.runs.session import train
from tests.support.launch import ENVIRONMENT, ROOT, Launch, Running
from tools import failpoints


def loading(running: Running, timeout_s: float = 60) -> list[psutil.Process]:
    """The two ranks, once both have begun to load torch; the command line is behind them then."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ranks = running.ranks()
        if len(ranks) == 2 and all(any("libtorch_cpu" in part.path for part in one.memory_maps()) for one in ranks):
            return ranks
        time.sleep(0.05)
    pytest.fail(f"no two ranks that load in:\n{running.output}")


def test_ranks_that_load_end_with_a_launcher_that_is_killed(
    launch: Launch, recipe_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "mezo_scale.cli", "train", recipe_file)
    running = launch.start(*command, "sharding.strategy=fsdp2")
    ranks = loading(running)
    running.send(signal.SIGKILL)
    running.wait(5)
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_run_that_is_killed_at_every_turn_leaves_what_an_undisturbed_one_leaves() -> None:
    command = [sys.executable, "-m", "tools.crash_campaign", "--life"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["kills"] >= 20
    assert (found["missed"], found["codes"], found["different"], done.returncode) == ([], [0, 0], [], 0)


@pytest.mark.parametrize("name", failpoints.POINTS)
def test_every_failpoint_is_a_place_in_the_package(name: str) -> None:
    assert callable(failpoints._plain(failpoints._find(failpoints.POINTS[name].target)[2]))


@pytest.mark.parametrize("setting", ["", "log.written", "log.written:kill:x", "nothing:kill"])
def test_a_wrong_failpoint_is_refused(setting: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        failpoints.install(setting)


WRITERS: dict[str, Callable[[RunDirectory, Recipe, World], Any]] = {
    "recipe.yaml": lambda run, recipe, world: run.describe(recipe, world, {}),
    "evaluation.json": lambda run, recipe, world: run.add_evaluation(zero_shot={}),
    "interrupted.json": lambda run, recipe, world: run.mark_interrupted(3, "SIGTERM"),
    "metrics.jsonl": lambda run, recipe, world: Metrics(run, world, 0, recipe, None),
}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", WRITERS)
def test_a_side_file_that_can_not_be_written_is_one_line(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    recipe, world = make_recipe(), World.from_environment()
    run = RunDirectory(recipe.directory)
    run.create()

    def fail(number: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        RecipeError, match=rf"{name} can't be written .{os.strerror(code)}.: make room, and give the sam"
    ):
        WRITERS[name](run, recipe, world)
    assert not (run.path / name).exists()


def test_a_line_of_metrics_that_does_not_fit_is_one_line_and_closing_adds_no_other_error(
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe()
    run = RunDirectory(recipe.directory)
    run.create()
    metrics = Metrics(run, World.from_environment(), 0, recipe, None)
    assert metrics._file is not None
    metrics._file.close()
    metrics._file = pathlib.Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115  metrics.close() does
    with pytest.raises(RecipeError, match="metrics.jsonl can't be written .No space left on device.: make room"):
        metrics.log(1, loss=0.5)
    metrics.close()


def test_an_old_snapshot_that_can_not_be_taken_away_stops_no_run(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if str(target).endswith(".old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    train(make_recipe("train.snapshot_every=2", "train.keep_snapshots=1"))
    assert "older ones stay (Input/output error), and the run goes on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["step-4.partial", "step-2.old"])
def test_what_a_killed_session_left_of_its_last_snapshot_goes_with_the_next_session(
    make_recipe: Callable[..., Recipe], name: str
) -> None:
    recipe = make_recipe()
    train(recipe)
    left = recipe.directory / "snapshots" / name
    left.mkdir(parents=True)
    train(recipe)
    assert not left.exists()
