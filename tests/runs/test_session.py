"""Runs in one process: what is left behind, how a run goes on, and that its weights can be had again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mezo_scale.errors import RecipeError, TrajectoryError
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.learning import rate_of
from mezo_scale.runs.publish import rebuild
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.tasks.kinds.candidates import OBJECTIVES, candidates_loss
from mezo_scale.trajectory import Trajectory
from mezo_scale.trajectory.codec import slot

MakeRecipe = Callable[..., Recipe]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_behind_all_that_it_promises(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe()
    train(recipe)
    run = Path(recipe.output.dir)

    assert load(run) == make_recipe("objective=candidates")  # written out
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "dev_accuracy" in line] == [2, 4]
    records = Trajectory.open(run / "trajectory.mezo").records
    assert [record.loss for record in records] == [line["loss"] for line in lines if "loss" in line]

    results = json.loads((run / "evaluation.json").read_text())
    assert results.keys() == {"zero_shot", "majority", "tuned", "ended", "best"}
    assert results.pop("ended") == {"step": 4}
    dev = {line["step"]: line["dev_accuracy"] for line in lines if "dev_accuracy" in line}
    best = results.pop("best")
    assert best == {"step": max(dev, key=dev.__getitem__), "metric": "accuracy", "value": max(dev.values())}
    for found in results.values():
        low, high = found["interval_95"]
        assert found["count"] == 32
        assert found["main"] == "accuracy"
        assert low <= found["accuracy"] <= high
    assert results["tuned"]["step"] == 4

    (session,) = json.loads((run / "environment.json").read_text())
    assert session["versions"]["torch"] == torch.__version__
    assert (run / "loss_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    report = (run / "report.md").read_text()
    assert f"| zero-shot | {results['zero_shot']['accuracy']:.1%} |" in report
    assert f"On dev the accuracy was best after step {best['step']}: {best['value']:.1%}." in report
    assert f"trajectory.mezo --until {best['step']} --out {run / 'best'}" in report
    assert not list(run.rglob("*.partial"))

    shown = capsys.readouterr().out
    assert "step 4/4  loss" in shown
    commands = dict(line.split(": ", 1) for line in shown.splitlines() if line.startswith(("continue", "rebuild")))
    assert commands["continue this run"].endswith(f"mezo-scale train {run} train.steps=8")
    assert f"--trajectory {run / 'trajectory.mezo'} --out {run / 'replayed'}" in shown


def test_the_checkpoint_is_an_ordinary_one(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    tuned = AutoModelForCausalLM.from_pretrained(Path(recipe.output.dir) / "checkpoint")
    assert type(tuned) is type(base)
    assert tuned.config.to_dict() | {"_name_or_path": ""} == base.config.to_dict() | {"_name_or_path": ""}
    before, after = base.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("objective", ["candidates", "language_modeling"])
def test_a_run_learns(make_recipe: MakeRecipe, objective: str) -> None:
    options = ("steps=120", "batch_size=24", "lr=2e-3", "num_directions=2", "eval_every=0", "checkpoint=false")
    recipe = make_recipe(*options, f"objective={objective}")
    train(recipe)
    losses = [line["loss"] for line in metrics(Path(recipe.output.dir))]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_a_run_in_two_sessions_is_the_run_in_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for schedule, warmup in (("constant", 0), ("linear", 0), ("cosine", 2)):
        whole, parts = tmp_path / f"whole-{schedule}", tmp_path / f"parts-{schedule}"
        options = (f"schedule={schedule}", f"warmup={warmup}", "eval_every=0", "weight_decay=0.1", "num_directions=2")
        train(make_recipe(*options, "steps=6", f"output.dir={whole}"))
        train(make_recipe(*options, "steps=6", f"output.dir={parts}"))
        # As if killed during the third step: the records of two are on disk, what follows from them is not.
        log = parts / "trajectory.mezo"
        length = slot(Trajectory.open(log).header).itemsize
        log.write_bytes(log.read_bytes()[: -5 * length + 7])
        for name in ("evaluation.json", "report.md", "metrics.jsonl"):
            (parts / name).unlink()
        with pytest.warns(UserWarning, match="2 steps are whole"):
            train(load(parts))
        assert Trajectory.open(log).records == Trajectory.open(whole / "trajectory.mezo").records
        assert same(weights(parts / "checkpoint"), weights(whole / "checkpoint"))
        one, other = (json.loads((run / "evaluation.json").read_text()) for run in (parts, whole))
        assert one == other


def test_the_rate_rises_and_falls_as_the_recipe_says(make_recipe: MakeRecipe) -> None:
    for schedule, shares in {
        "constant": [0, 0.5, 1, 1, 1, 1],
        "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
        "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    }.items():
        rate = rate_of(make_recipe(f"schedule={schedule}", "warmup=2", "steps=6", "lr=2e-3"))
        assert [rate(step) for step in range(6)] == pytest.approx([2e-3 * share for share in shares], rel=1e-5)
    with pytest.raises(RecipeError, match=r"method\.warmup is 6, but train\.steps is 6: warm up for fewer"):
        train(make_recipe("warmup=6", "steps=6"))


def test_the_steps_of_a_run_take_that_rate(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("schedule=linear", "warmup=1", "steps=4", "lr=2e-3")
    train(recipe)
    records = Trajectory.open(recipe.directory / "trajectory.mezo").records
    rates = [-record.alphas[0] / record.projected_grads[0] for record in records]
    assert rates == pytest.approx([2e-3 * share for share in (0, 1, 2 / 3, 1 / 3)], rel=1e-5)


def test_a_finished_run_goes_on_when_asked_for_more_steps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe("steps=3", f"output.dir={tmp_path / 'more'}"))
    train(load(tmp_path / "more", ["steps=5"]))
    train(make_recipe("steps=5", f"output.dir={tmp_path / 'once'}"))
    assert same(weights(tmp_path / "more" / "checkpoint"), weights(tmp_path / "once" / "checkpoint"))
    assert [line["step"] for line in metrics(tmp_path / "more") if "loss" in line] == [1, 2, 3, 4, 5]
    assert load(tmp_path / "more").train.steps == 5
    assert len(json.loads((tmp_path / "more" / "environment.json").read_text())) == 2


def test_a_run_is_not_continued_with_another_recipe(make_recipe: MakeRecipe) -> None:
    train(make_recipe("steps=2", "checkpoint=false"))
    with pytest.raises(
        RecipeError, match=r"holds a run with optimizer\.lr: 0\.01, now 0\.02: give another output\.dir"
    ):
        train(make_recipe("steps=3", "lr=0.02"))
    with pytest.raises(RecipeError, match=r"train\.steps is 1, but the run in .* has 2 already"):
        train(make_recipe("steps=1"))


def test_micro_batches_change_no_loss(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    losses = []
    for micro_batch in ("null", "4"):
        run = tmp_path / f"by-{micro_batch}"
        train(make_recipe(f"micro_batch={micro_batch}", "checkpoint=false", f"output.dir={run}"))
        losses.append([line["loss"] for line in metrics(run) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_candidates_of_several_tokens_train_too(make_recipe: MakeRecipe) -> None:
    train(make_recipe("candidates=[' a mess', ' a delight indeed']", "checkpoint=false"))


def test_autocast_computes_in_bfloat16_and_keeps_the_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("compute_dtype=bfloat16")
    train(recipe)
    run = Path(recipe.output.dir)
    assert {tensor.dtype for tensor in weights(run / "checkpoint").values()} == {torch.float32}
    plain = make_recipe(f"output.dir={tmp_path / 'plain'}")
    train(plain)
    mixed, full = ([line["loss"] for line in metrics(path) if "loss" in line] for path in (run, tmp_path / "plain"))
    assert mixed != full
    assert mixed[0] == pytest.approx(full[0], rel=0.05)


def test_a_replay_gives_the_checkpoint(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    train(recipe)
    run = Path(recipe.output.dir)
    assert rebuild(recipe.model.name, run / "trajectory.mezo", tmp_path / "again", None) == 4
    assert same(weights(tmp_path / "again"), weights(run / "checkpoint"))
    rebuild(recipe.model.name, run / "trajectory.mezo", tmp_path / "base", 0)
    assert same(weights(tmp_path / "base"), weights(Path(recipe.model.name)))


def test_evaluate_finds_what_the_run_found(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    zero_shot, steps = evaluate_recipe(recipe, "test", None)
    assert steps == 0
    assert not Path(recipe.output.dir).exists()
    train(recipe)
    tuned, steps = evaluate_recipe(recipe, "test", None)
    assert steps == 4
    results = json.loads((Path(recipe.output.dir) / "evaluation.json").read_text())
    assert results["zero_shot"] == zero_shot.as_dict()
    assert results["tuned"] == {**tuned.as_dict(), "step": 4, "skipped": 0}
    assert evaluate_recipe(recipe, "test", 0) == (zero_shot, 0)


def test_verify_accepts_a_run_and_finds_a_changed_weight(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe)
    checkpoint = Path(recipe.output.dir) / "checkpoint"
    lines = list(verify(recipe))
    assert "4 steps (0 skipped)" in lines[0]
    assert lines[2].endswith("bit for bit what 4 replayed steps give")
    changed = weights(checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    changed[name][3, 4] += 1e-3
    save_file(changed, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrajectoryError, match=f"after 4 steps: 1 of .* weights differ, {name} for one"):
        list(verify(recipe))


def test_verify_finds_a_damaged_record(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("checkpoint=false")
    train(recipe)
    log = Path(recipe.output.dir) / "trajectory.mezo"
    data = bytearray(log.read_bytes())
    length = slot(Trajectory.open(log).header).itemsize
    data[-2 * length - 20] ^= 1
    log.write_bytes(data)
    with pytest.raises(TrajectoryError, match="damaged at record"):
        list(verify(recipe))


def test_a_loss_that_is_not_finite_skips_the_step_and_is_null_in_the_metrics(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "candidates", lambda model, batch: candidates_loss(model, batch) * float("nan"))
    recipe = make_recipe("eval_every=0")
    train(recipe)
    run = Path(recipe.output.dir)
    assert [(line["loss"], line["projected_grads"]) for line in metrics(run)] == [(None, [None])] * 4
    assert "4 steps (4 skipped)" in next(verify(recipe))
    assert same(weights(run / "checkpoint"), weights(Path(recipe.model.name)))


@pytest.mark.parametrize("option", ["rounding=master", "rounding=stochastic", "distribution=rademacher"])
def test_a_recipe_says_how_updates_are_drawn_and_stored(make_recipe: MakeRecipe, option: str) -> None:
    recipe = make_recipe("model.dtype=bfloat16", option)
    train(recipe)
    header = Trajectory.open(recipe.directory / "trajectory.mezo").header
    name, value = option.split("=")
    assert getattr(header, name) == value
    assert len(list(verify(recipe))) == 3


def test_a_float32_master_of_float16_weights_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="model.dtype is float16"):
        train(make_recipe("model.dtype=float16", "rounding=master"))
