"""Runs of a task whose answers are written, and directories of runs from before there were kinds."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from mezo_scale import models
from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError, RecipeError, SharedError
from mezo_scale.recipe import Recipe, TaskSection, dump, load, parse
from mezo_scale.runs.evaluate import evaluate, evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.tasks import Question, Score
from mezo_scale.tasks.kinds.generation import Generation
from mezo_scale.trajectory import StepRecord, Trajectory
from tests.runs.test_snapshots_on_ranks import go_on
from tests.support import material, questions
from tests.support.fixtures import ROOT
from tests.support.pool import Ranks

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def squad(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe of questions with short answers."""
    folder = questions.write(tmp_path / "squad")
    fixed = ("task.name=squad", f"task.data={folder}", "max_length=96", "max_new_tokens=4")
    return lambda *overrides: make_recipe(*fixed, *overrides)


def results(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.directory / "evaluation.json").read_text())
    return found


@pytest.mark.parametrize("objective", ["null", "f1", "exact_match"])
def test_a_run_on_written_answers_leaves_what_every_run_does(
    squad: MakeRecipe, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = squad(f"objective={objective}")
    train(recipe)
    shown = capsys.readouterr().out
    found = results(recipe)
    best = found.pop("best")
    assert (best["metric"], best["step"] in (2, 4), found.pop("ended")) == ("f1", True, {"step": 4})
    assert found.keys() == {"zero_shot", "tuned"}
    for entry in found.values():
        assert (entry["main"], entry["count"]) == ("f1", 10)
        for name, interval in (("f1", "interval_95"), ("exact_match", "exact_match_interval_95")):
            low, high = entry[interval]
            assert low <= entry[name] <= high
    assert "zero-shot f1 on test: " in shown
    report = (recipe.directory / "report.md").read_text()
    assert "| test split | f1 | 95% interval | exact match | 95% interval | examples |" in report
    assert "![loss and f1]" in report
    lines = [json.loads(line) for line in (recipe.directory / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "dev_f1" in line and "dev_exact_match" in line] == [2, 4]
    assert load(recipe.directory).train.objective == {"null": "language_modeling"}.get(objective, objective)
    assert len(list(verify(recipe))) == 3
    assert evaluate_recipe(recipe, "test", None)[0].as_dict().items() <= found["tuned"].items()


def records(recipe: Recipe) -> list[StepRecord]:
    return Trajectory.open(recipe.directory / "trajectory.mezo").records


@pytest.fixture
def length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An objective that tells any two texts apart: a tiny model writes no answer that is right."""
    (tmp_path / "rewards_of_samples.py").write_text(
        "def length(rows):\n    return [sum(map(ord, row['text'])) / 1000 for row in rows]\n"
    )
    monkeypatch.chdir(tmp_path)
    return "objective=rewards_of_samples:length"


def test_what_a_step_samples_follows_from_the_run_and_the_step(squad: MakeRecipe, tmp_path: Path, length: str) -> None:
    options = (length, "temperature=0.7", "lr=1e-3", "eval_every=0")
    whole, parts, greedy, other = (
        squad(*options, *more, f"output.dir={tmp_path / name}")
        for name, more in {
            "whole": ("steps=4",),
            "parts": ("steps=2",),
            "greedy": ("steps=4", "temperature=0"),
            "other": ("steps=4", "optimizer.seed=1"),
        }.items()
    )
    for recipe in (whole, parts, greedy, other):
        train(recipe)
    train(load(parts.directory, ["steps=4"]))
    assert records(parts) == records(whole)
    assert [record.loss for record in records(whole)] != [record.loss for record in records(greedy)]
    assert results(whole)["zero_shot"] == results(greedy)["zero_shot"]  # graded is what is likeliest


def of_ranks(recipe: str, overrides: list[str]) -> list[float]:
    os.chdir(Path(recipe).parent)  # where the reward's module is
    try:
        go_on(recipe, overrides)
    finally:
        os.chdir(ROOT)
    return [record.loss for record in Trajectory.open(load(recipe, overrides).directory / "trajectory.mezo").records]


def test_two_ranks_sample_what_one_does(squad: MakeRecipe, ranks: Ranks, tmp_path: Path, length: str) -> None:
    recipe = squad(length, "temperature=0.7", "steps=3", "eval_every=0", "strategy=ddp")
    path = tmp_path / "sampled.yaml"
    path.write_text(dump(recipe))
    found = [
        ranks(size, of_ranks, recipe=str(path), overrides=[f"output.dir={tmp_path / str(size)}"])[0] for size in (1, 2)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert len(set(found[0])) == 3


def test_a_run_learns_to_write_the_answers(squad: MakeRecipe) -> None:
    recipe = squad("steps=60", "batch_size=12", "lr=2e-3", "num_directions=2", "eval_every=0", "checkpoint=false")
    train(recipe)
    losses = [json.loads(line)["loss"] for line in (recipe.directory / "metrics.jsonl").open()]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def written(folder: str, strategy: str, batch_size: int) -> Score:
    """The score of seven questions whose answers are what the model writes, but for the last."""
    recipe = parse({"model": {"name": folder}, "task": {"data": "d"}, "sharding": {"strategy": strategy}})
    loaded = models.load(recipe, World.from_environment())
    kind = Generation(loaded.processor, TaskSection(name="squad", data="d", max_length=96, max_new_tokens=4))
    prompts = [row["context"] for row in questions.rows(7)]
    rows = [kind.encode(Question(prompt, (" nothing",))) for prompt in prompts]
    with torch.no_grad():
        texts = [kind.predict(loaded.model, kind.collate([row]))[0] for row in rows]
    right = [replace(row, answers=(str(text),)) for row, text in zip(rows, texts, strict=True)]
    return evaluate(loaded, kind, right[:6] + rows[6:], batch_size)


def test_written_answers_are_graded_alike_on_any_number_of_ranks(ranks: Ranks, model_folder: Path) -> None:
    (alone,) = ranks(1, written, folder=str(model_folder), strategy="single", batch_size=7)
    assert alone.metrics["exact_match"].total == 6
    # 7 questions over 3 ranks in rounds of 6: the last round has a row for one rank only.
    assert ranks(3, written, folder=str(model_folder), strategy="fsdp2", batch_size=2) == [alone] * 3


def test_the_command_line_names_the_metric(squad: MakeRecipe, run: Run, tmp_path: Path) -> None:
    recipe = squad()
    (tmp_path / "squad.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    code, out, _ = run("evaluate", tmp_path / "squad.yaml")
    assert code == 0
    assert "after 0 steps: f1 on test " in out
    assert ", 95% interval " in out


def test_a_masked_language_model_is_not_asked_to_write(squad: MakeRecipe, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("bert", vocab_size=material.VOCABULARY + 1, max_position_embeddings=128, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    material.tokenizer().save_pretrained(tmp_path / "bert")
    recipe = squad(f"model.name={tmp_path / 'bert'}", "objective=f1")
    for start in (train, lambda recipe: evaluate_recipe(recipe, "test", None)):
        with pytest.raises(SharedError, match="bert reads the tokens after a position, as masked language models do"):
            start(recipe)
    assert not recipe.directory.exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective=exact_macth"], "found 'exact_macth' for task.name=squad; did you mean exact_match"),
        (
            ["temperature=0.5"],
            "task.temperature is 0.5, but train.objective is language_modeling, for which nothing is written",
        ),
        (
            ["objective=candidates"],
            "found 'candidates' for task.name=squad; expected language_modeling or f1 or exact_match",
        ),
        (["max_new_tokens=95"], r"max_new_tokens is 95, which leaves no room .* \(96\): expected at most 94"),
        (["candidates=[' a', ' b']"], "task.candidates is given, but task.name is squad"),
        (["task.name=sentiment"], "task.max_new_tokens is 4, but task.name is sentiment"),
    ],
)
def test_a_recipe_that_does_not_fit_its_kind_is_refused(squad: MakeRecipe, overrides: list[str], said: str) -> None:
    recipe = squad(*overrides)
    with pytest.raises(RecipeError, match=said):
        train(recipe)
    assert not recipe.directory.exists()


def test_questions_without_an_answer_are_refused(squad: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    rows = [{**row, "answers": {"text": []}} for row in questions.rows(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MezoError, match=r"line 1 of .*empty\.jsonl has no answer"):
        train(squad(f"task.data={path}", "train=1", "dev=1", "test=1"))


def as_before_kinds(recipe: Recipe) -> None:
    """Makes a run's files what they were before evaluations named their main metric."""
    evaluation = recipe.directory / "evaluation.json"
    found = json.loads(evaluation.read_text())
    del found["best"], found["ended"]
    for entry in found.values():
        del entry["main"], entry["bounded"]
        entry["correct"] = round(entry["accuracy"] * entry["count"])
        entry.setdefault("loss", None)
    evaluation.write_text(json.dumps(found))
    saved = yaml.safe_load((recipe.directory / "recipe.yaml").read_text())
    del saved["task"]["max_new_tokens"]
    (recipe.directory / "recipe.yaml").write_text(yaml.safe_dump(saved))


def test_a_run_from_before_there_were_kinds_goes_on_and_is_reported(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe)
    as_before_kinds(recipe)
    train(make_recipe())  # finished: reported again
    assert "| zero-shot | " in (recipe.directory / "report.md").read_text()
    train(make_recipe("steps=6"))
    assert results(recipe)["tuned"]["step"] == 6
    assert "main" not in results(recipe)["zero_shot"]


def test_a_dry_run_of_graded_answers_says_what_a_step_takes(
    squad: Callable[..., Recipe], run: Run, tmp_path: Path
) -> None:
    recipe = tmp_path / "graded.yaml"
    recipe.write_text(dump(squad("train.objective=f1")))
    code, out, err = run("train", recipe, "--dry-run")
    assert (code, err) == (0, "")
    assert "a step of 2 takes" in out
