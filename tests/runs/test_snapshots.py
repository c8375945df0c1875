"""Snapshots: a run goes on from the newest good one to the bits that it would have had, and passes the others over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError, TrajectoryError
from mezo_scale.models import save, stream
from mezo_scale.optim.replay import Start
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs import snapshots
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.trajectory import Trajectory
from tests.models.test_save import NO_SPACE
from tests.runs.test_session import metrics, same, weights
from tests.support import material

MakeRecipe = Callable[..., Recipe]
EVERY_2 = ("snapshot_every=2", "eval_every=0")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "snapshots").iterdir())


def test_a_snapshot_is_an_ordinary_checkpoint_that_says_of_which_run_and_step_it_is(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*EVERY_2, "steps=7", "keep_snapshots=2")
    train(recipe)
    run = recipe.directory
    assert names(run) == ["step-4", "step-6"]
    about = json.loads((run / "snapshots" / "step-6" / "snapshot.json").read_text())
    log = Trajectory.open(run / "trajectory.mezo")
    assert (about["step"], about["run_id"], about["chain"]) == (6, log.header.run_id, log.chain(6))
    assert (about["noise_version"], about["rounding"], about["frozen"]) == (1, "nearest", log.header.frozen)
    lines = list(verify(recipe))
    assert [line.split(": ")[0] for line in lines[2:]] == [
        str(run / "snapshots" / "step-4"),
        str(run / "snapshots" / "step-6"),
        str(run / "checkpoint"),
    ]
    tuned = AutoModelForCausalLM.from_pretrained(run / "snapshots" / "step-6")
    assert same(dict(tuned.state_dict()), dict(AutoModelForCausalLM.from_pretrained(tuned.name_or_path).state_dict()))


@pytest.mark.parametrize("options", [(), ("model.dtype=bfloat16", "rounding=master"), ("num_directions=2",)])
def test_a_run_that_goes_on_from_a_snapshot_has_the_bits_of_one_that_never_stopped(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(*EVERY_2, *options, "steps=8", f"output.dir={whole}"))
    train(make_recipe(*EVERY_2, *options, "steps=5", f"output.dir={parts}"))
    capsys.readouterr()
    train(load(parts, ["steps=8"]))
    shown = capsys.readouterr().out
    assert f"continuing {parts}: snapshot step-4, 1 steps are replayed, 3 are left" in shown
    assert "replaying: 1/1, " in shown
    assert same(weights(parts / "checkpoint"), weights(whole / "checkpoint"))
    records = [Trajectory.open(run / "trajectory.mezo").records for run in (parts, whole)]
    assert records[0] == records[1]
    assert [line["step"] for line in metrics(parts)] == list(range(1, 9))
    assert all("bit for bit" in line for line in list(verify(load(parts)))[2:])


def test_a_damaged_snapshot_takes_the_place_of_no_good_one(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*EVERY_2, "steps=4", "keep_snapshots=2")
    train(recipe)
    assert names(recipe.directory) == ["step-2", "step-4"]
    (recipe.directory / "snapshots" / "step-4" / "config.json").write_text("{}")
    train(load(recipe.directory, ["steps=6"]))
    assert names(recipe.directory) == ["step-2", "step-6"]


@pytest.mark.parametrize("options", [(), ("model.dtype=bfloat16", "rounding=master")])
def test_an_evaluation_begins_at_the_newest_snapshot_that_is_not_too_late(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    recipe = make_recipe(*EVERY_2, *options, "steps=7", "keep_snapshots=3")
    train(recipe)
    bare = shutil.copytree(recipe.directory, tmp_path / "bare")
    shutil.rmtree(bare / "snapshots")
    for until, steps, replayed in ((None, 7, 1), (6, 6, 0), (5, 5, 1), (1, 1, 1)):
        from_base = evaluate_recipe(load(bare), "test", until)
        assert f"replaying: {steps}/{steps}, " in capsys.readouterr().out
        assert evaluate_recipe(load(recipe.directory), "test", until) == from_base
        shown = capsys.readouterr().out
        assert f"replaying: {replayed}/{replayed}, " in shown if replayed else "replaying" not in shown


def test_an_evaluation_on_another_base_model_takes_no_snapshot(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(*EVERY_2, "steps=3")
    train(recipe)
    material.write_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(TrajectoryError, match="fingerprint"):
        evaluate_recipe(load(recipe.directory, [f"model.name={tmp_path / 'other'}"]), "test", None)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def renamed_weight(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    first, second = sorted(found)[1:3]
    found[first], found[second] = found[second], found[first]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_config(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "rms_norm_eps": 0.1}))


def with_more(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def cut_about(folder: Path) -> None:
    path = folder / "snapshot.json"
    path.write_bytes(path.read_bytes()[:40])


def without_about(folder: Path) -> None:
    (folder / "snapshot.json").unlink()


def change(name: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / "snapshot.json").read_text())
        (folder / "snapshot.json").write_text(json.dumps({**tree, name: value}))

    edit.__name__ = f"other_{name}"
    return edit


DAMAGES: dict[Callable[[Path], None], str] = {
    truncated: "model.safetensors is not the file that was written",
    flipped: "its weights have digest ",
    renamed_weight: "model.safetensors is not the file that was written",
    without_config: "config.json is not the file that was written",
    other_config: "config.json is not the file that was written",
    with_more: "adapter_config.json is not the file that was written",
    cut_about: "snapshot.json can't be read: ",
    without_about: "No such file or directory",
    change("run_id", "0" * 32): f"its run_id is {'0' * 32}, the run's is ",
    change("chain", "0" * 16): "it is of another past",
    change("step", 99): "it is of step 99, and the trajectory has 5 steps",
    change("noise_version", 9): "its noise_version is 9, the run's is 1",
    change("rounding", "master"): "its rounding is master, the run's is nearest",
    change("digest", "0" * 16): "its weights have digest ",
    change("frozen", "f" * 16): f"its frozen is {'f' * 16}, the run's is ",
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, reviews_file: Path) -> Path:
    """A run of 5 steps with snapshots of steps 2 and 4, to be copied; beside it "whole", of 6."""
    folder = tmp_path_factory.mktemp("stopped")
    task = [f"task.data={reviews_file}", "train=24", "dev=8", "test=8", "max_length=40"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {{name: '{model_folder}'}}\ntask: {{data: '{reviews_file}'}}\n")
    rest = [*task, *EVERY_2, "lr=1e-2", "batch_size=4"]
    train(load(recipe, [*rest, "steps=5", "checkpoint=false", f"output.dir={folder / 'run'}"]))
    train(load(recipe, [*rest, "steps=6", "snapshot_every=0", f"output.dir={folder / 'whole'}"]))
    return folder / "run"


def opened(run: Path) -> Start | None:
    """Where a session would go on from."""
    world = World.from_environment()
    return snapshots.load(load(run), world, RunDirectory(run), Screen(world))[1]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_snapshot_that_is_not_what_was_written_is_passed_over_in_one_line(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    damage(run / "snapshots" / "step-4")
    start = opened(run)
    assert start is not None
    assert start.step == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{run / 'snapshots' / 'step-4'} is passed over: ")
    assert DAMAGES[damage] in line


def test_a_run_that_passes_a_snapshot_over_has_the_bits_all_the_same(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    flipped(run / "snapshots" / "step-4")
    with pytest.raises(TrajectoryError, match="step-4 has weights with digest .* 4 replayed steps give"):
        list(verify(load(run)))
    capsys.readouterr()
    train(load(run, ["steps=6", "checkpoint=true"]))
    assert "snapshot step-2, 3 steps are replayed, 1 are left" in capsys.readouterr().out
    assert same(weights(run / "checkpoint"), weights(stopped.parent / "whole" / "checkpoint"))
    assert names(run) == ["step-4", "step-6"]


def test_without_a_good_snapshot_the_base_model_is_taken(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    for step in (2, 4):
        flipped(run / "snapshots" / f"step-{step}")
    (run / "snapshots" / "step-4").rename(run / "snapshots" / "step-4.partial")  # half written
    train(load(run, ["steps=6", "checkpoint=true"]))
    shown = capsys.readouterr().out
    assert shown.count("is passed over") == 1
    assert f"continuing {run}: 5 steps are replayed, 1 are left" in shown
    assert same(weights(run / "checkpoint"), weights(stopped.parent / "whole" / "checkpoint"))
    assert names(run) == ["step-2", "step-6"]


def test_the_base_model_is_read_where_its_grade_is_missing(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    assert opened(run) is not None
    (run / "evaluation.json").unlink()
    assert opened(run) is None


@pytest.mark.parametrize("where", ["weights", "room"])
def test_a_full_disk_costs_the_snapshot_and_not_the_run(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    recipe = make_recipe(*EVERY_2, "steps=3", "checkpoint=false")
    full = {
        "weights": mock.patch.object(stream.WeightFiles, "write", side_effect=NO_SPACE),
        "room": mock.patch.object(save.shutil, "disk_usage", return_value=mock.Mock(free=1000)),
    }
    with full[where]:
        train(recipe)
    shown = capsys.readouterr().out.splitlines()
    assert len([line for line in shown if line.startswith("step 2: no snapshot, and the run goes on without: ")]) == 1
    assert names(recipe.directory) == []
    assert len(Trajectory.open(recipe.directory / "trajectory.mezo")) == 3


def test_an_older_snapshot_goes_only_after_the_new_one_is_whole(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*EVERY_2, "steps=3", "keep_snapshots=1", "checkpoint=false")
    train(recipe)
    with mock.patch.object(stream.WeightFiles, "write", side_effect=NO_SPACE):
        train(load(recipe.directory, ["steps=4"]))
    assert names(recipe.directory) == ["step-2"]
    train(load(recipe.directory, ["steps=6"]))
    assert names(recipe.directory) == ["step-6"]


def test_a_low_bit_that_was_lost_is_seen(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(*EVERY_2, "steps=3", "model.dtype=bfloat16", "rounding=master", "checkpoint=false")
    train(recipe)
    folder = recipe.directory / "snapshots" / "step-2"
    assert any(tensor.any() for tensor in load_file(folder / "low_bits" / "model.safetensors").values())
    flipped(folder / "low_bits")
    train(load(recipe.directory, ["steps=4"]))
    assert f"{folder} is passed over: its weights have digest " in capsys.readouterr().out


def test_a_snapshot_without_its_trajectory_is_somebody_s(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*EVERY_2, "steps=2")
    (recipe.directory / "snapshots").mkdir(parents=True)
    with pytest.raises(RecipeError, match="holds snapshots, but no trajectory.mezo"):
        train(recipe)
