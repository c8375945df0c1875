"""A run directory in which something is damaged, missing, somebody else's, or in use by another process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_scale.errors import RecipeError, TrajectoryError
from mezo_scale.recipe import Recipe, dump, load
from mezo_scale.runs import session
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.publish import rebuild
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.trajectory import Trajectory
from mezo_scale.trajectory.codec import slot
from tests.runs.test_session import metrics, same, weights

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_whose_log_is_damaged_or_shorter_is_refused_and_left_alone(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe)
    run, log = recipe.directory, recipe.directory / "trajectory.mezo"
    whole, length = log.read_bytes(), slot(Trajectory.open(log).header).itemsize
    flipped = bytearray(whole)
    flipped[-length - 20] ^= 1
    cases = [(bytes(flipped), "damaged at record 3")]
    cases += [(whole[: -count * length], f"holds {5 - count} steps, but 4 were taken") for count in (2, 3)]
    for data, message in cases:
        log.write_bytes(data)
        before = state(run)
        for command in (train, lambda recipe: list(verify(recipe))):
            with pytest.raises(TrajectoryError, match=message):
                command(recipe)
        assert state(run) == before
    log.write_bytes(whole)
    train(recipe)
    assert log.read_bytes() == whole


def test_a_run_whose_trajectory_is_gone_is_refused_with_the_way_out(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe)
    (recipe.directory / "trajectory.mezo").unlink()
    before = state(recipe.directory)
    with pytest.raises(RecipeError, match="but no trajectory.mezo: give another output.dir; if they are a run's, put"):
        train(recipe)
    assert state(recipe.directory) == before


@pytest.mark.parametrize("name", ["checkpoint/thesis.txt", "recipe.yaml", "report.md"])
def test_what_is_somebody_else_s_is_not_written_over(make_recipe: MakeRecipe, recipe_file: Path, name: str) -> None:
    recipe = make_recipe()
    theirs = recipe.directory / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(recipe_file.read_bytes())
    with pytest.raises(RecipeError, match=rf"output.dir: .* holds {name.split('/')[0]}, but no trajectory.mezo"):
        train(recipe)
    assert state(recipe.directory) == {name: recipe_file.read_bytes()}


@pytest.mark.parametrize("damage", [b"", b"\0" * 40 + b"\n", b"[[]"], ids=["empty", "zeros", "cut"])
def test_damaged_side_files_are_kept_beside_and_stop_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, recwarn: pytest.WarningsRecorder, damage: bytes
) -> None:
    train(make_recipe())
    folder = tmp_path / "run"
    for name in ("evaluation.json", "environment.json"):
        (folder / name).write_bytes(damage)
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(lines + damage)
    train(load(folder, ["train.steps=6"]))
    said = [str(one.message) for one in recwarn if "is damaged and is begun anew" in str(one.message)]
    names = ["evaluation.json", "environment.json", *(["metrics.jsonl"] if damage.endswith(b"\n") else [])]
    assert sorted(line.split(" is damaged")[0] for line in said) == sorted(str(folder / name) for name in names)
    for name in names:
        assert (folder / f"{name}.damaged").read_bytes() == (lines if name == "metrics.jsonl" else b"") + damage
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "evaluation.json").read_text())["tuned"]["step"] == 6
    assert len(list(verify(load(folder)))) == 3


HOLD = """
import sys
from mezo_scale.trajectory import Trajectory
trajectory = Trajectory.open(sys.argv[1], append=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_on_a_run_ends_with_2_and_names_the_first(
    make_recipe: MakeRecipe, tmp_path: Path, run: Run
) -> None:
    train(make_recipe())
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, folder / "trajectory.mezo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = state(folder)
        code, _, err = run("train", folder, "train.steps=6")
        assert code == 2
        name = f"process {holder.pid} on {socket.gethostname()}"
        log = folder / "trajectory.mezo"
        assert err == f"error: {log} is being written by {name}: let it finish, or end it first\n"
        assert state(folder) == before
        holder.kill()
    assert run("train", folder, "train.steps=6")[0] == 0
    assert not (folder / "trajectory.mezo.lock").exists()


def test_steps_that_another_process_took_while_this_one_was_beginning_are_seen(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    train(recipe)
    before = state(recipe.directory)
    monkeypatch.setattr(session, "_steps_done", lambda recipe, run: 2)
    with pytest.raises(TrajectoryError, match="another process took the run from 2 steps to 4 while this one was beg"):
        train(load(recipe.directory, ["train.steps=6"]))
    assert state(recipe.directory) == before
    monkeypatch.undo()
    train(load(recipe.directory, ["train.steps=6"]))
    assert len(Trajectory.open(recipe.directory / "trajectory.mezo")) == 6


def test_other_examples_under_the_same_names_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(f"task.data={_copy(make_recipe(), tmp_path)}"))
    data = tmp_path / "copy.csv"
    data.write_text(data.read_text().replace("superb", "grand"))
    before = state(tmp_path / "run")
    with pytest.raises(TrajectoryError, match="was made with other data"):
        train(load(tmp_path / "run", ["train.steps=6"]))
    assert state(tmp_path / "run") == before


def _copy(recipe: Recipe, folder: Path) -> Path:
    (folder / "copy.csv").write_bytes(Path(str(recipe.task.data)).read_bytes())
    return folder / "copy.csv"


def test_an_export_is_small_and_replays_to_the_checkpoint(make_recipe: MakeRecipe, tmp_path: Path, run: Run) -> None:
    recipe = make_recipe("num_directions=2", "weight_decay=0.1")
    train(recipe)
    code, out, _ = run("export", recipe.directory, tmp_path / "small.mezo")
    assert code == 0
    assert out.endswith(f"{tmp_path / 'small.mezo'}: 4 steps, {os.path.getsize(tmp_path / 'small.mezo'):,} bytes\n")
    assert rebuild(recipe.model.name, tmp_path / "small.mezo", tmp_path / "again", None) == 4
    assert same(weights(tmp_path / "again"), weights(recipe.directory / "checkpoint"))
    code, _, err = run("export", recipe.directory, tmp_path / "small.mezo")
    assert (code, err.count("\n")) == (2, 1)


def test_a_recipe_that_a_job_s_submission_left_is_no_obstacle(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.steps=9")
    run = RunDirectory(recipe.directory)
    run.create()
    run.recipe.write_text(dump(recipe), encoding="utf-8")
    run.check_unclaimed()
    run.recipe.write_text("# mine\n" + dump(recipe), encoding="utf-8")
    with pytest.raises(RecipeError, match="holds recipe.yaml"):
        run.check_unclaimed()
