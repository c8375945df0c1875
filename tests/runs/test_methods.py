"""Baselines in one process: each from its recipe to its report, and what each of them computes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mezo_scale import tasks
from mezo_scale.errors import MezoError, RecipeError
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs import listing
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.learning import order_of
from mezo_scale.runs.methods import setting
from mezo_scale.runs.methods.icl import demonstrated, mean_of
from mezo_scale.runs.methods.linear_probe import regress
from mezo_scale.runs.methods.session import is_finished
from mezo_scale.runs.session import train
from mezo_scale.runs.splits import EncodedSplits, prepare
from mezo_scale.tasks import Score
from mezo_scale.tasks.score import ByClass
from mezo_scale.trajectory.lock import Lock
from tests.support import questions

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path, model_folder: Path, reviews_file: Path) -> Make:
    """The recipe of a method: make("icl", "draws=2")."""
    tree = {
        "model": {"name": str(model_folder)},
        "task": {"data": str(reviews_file), "train": 48, "dev": 16, "test": 32, "max_length": 40},
    }

    def made(method: str, *overrides: str) -> Recipe:
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load(path, [f"output.dir={tmp_path / 'runs' / method}", f"method.name={method}", *overrides])

    return made


ADAMW = ("lr=1e-3", "steps=6", "batch_size=6", "eval_every=3")
EACH = {
    "zero_shot": ((), "zero_shot"),
    "icl": (("draws=2", "demonstrations=2", "max_length=80"), "icl"),
    "linear_probe": ((), "linear_probe"),
    "adamw": (ADAMW, "tuned"),
}


def results(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.directory / "evaluation.json").read_text())
    return found


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", EACH)
def test_every_method_leaves_the_files_of_a_run_and_is_listed(make: Make, method: str) -> None:
    overrides, key = EACH[method]
    recipe = make(method, *overrides)
    train(recipe)
    found = results(recipe)
    assert set(found) == {"majority", "zero_shot", key} | ({"ended", "best"} if method == "adamw" else set())
    assert found[key]["main"] == "accuracy"
    assert found[key]["count"] == 32
    report = (recipe.directory / "report.md").read_text()
    assert f"{found[key]['accuracy']:.1%}" in report
    assert any(line.get("seconds", 0) > 0 for line in lines(recipe))
    assert any(line.get("memory_gib", 0) > 0 for line in lines(recipe))
    (entry,) = listing.compare(listing.find(recipe.directory.parent))
    assert entry["tuned"] == found[key]["accuracy"]
    assert entry["zero_shot"] == found["zero_shot"]["accuracy"]
    assert (entry["steps"], entry["of"]) == ((6, 6) if method == "adamw" else (None, None))


def test_what_another_process_carries_out_is_left_to_it(make: Make) -> None:
    recipe = make("adamw", *ADAMW)
    run = RunDirectory(recipe.directory)
    run.create()
    lock = Lock(run.metrics)
    with pytest.raises(MezoError, match=rf"metrics\.jsonl is being written by process {os.getpid()} on "):
        train(recipe)
    assert [path.name for path in recipe.directory.iterdir()] == ["metrics.jsonl.lock"]
    lock.release()
    train(recipe)


def test_a_finished_run_stays_as_it_is_and_a_stopped_one_begins_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("adamw", *ADAMW)
    stop = iter([None, KeyboardInterrupt()])

    def step(self: Any, *_: Any) -> None:
        if error := next(stop):
            raise error
        return original(self)

    original = torch.optim.AdamW.step
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert [line["step"] for line in lines(recipe)] == [1]
    assert not is_finished(recipe, RunDirectory(recipe.directory))
    train(recipe)
    assert "adamw keeps nothing to go on from: it begins again" in capsys.readouterr().out
    assert [line["step"] for line in lines(recipe) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert not list(recipe.directory.glob("*.lock"))
    before = (recipe.directory / "report.md").stat().st_mtime_ns
    train(recipe)
    assert "has its result already" in capsys.readouterr().out
    assert (recipe.directory / "report.md").stat().st_mtime_ns == before


def test_a_directory_of_another_run_is_refused(make: Make) -> None:
    recipe = make("zero_shot")
    train(recipe)
    other = make("linear_probe", f"output.dir={recipe.directory}")
    with pytest.raises(RecipeError, match=r"holds a run with method\.name: 'zero_shot', now 'linear_probe'"):
        train(other)
    with pytest.raises(RecipeError, match=r"holds .*evaluation.json.*, but no trajectory.mezo"):
        train(make("mezo", f"output.dir={recipe.directory}"))


@pytest.mark.parametrize(
    ("method", "override", "said"),
    [
        ("zero_shot", "train.steps=5", "train.steps is 5, but method.name is zero_shot, which has no use for it"),
        ("icl", "optimizer.lr=1e-3", "optimizer.lr is 0.001, but method.name is icl"),
        ("adamw", "optimizer.eps=1e-2", "optimizer.eps is 0.01, but method.name is adamw"),
        ("adamw", "train.snapshot_every=7", "train.snapshot_every is 7, but method.name is adamw"),
        ("linear_probe", "tune.what=lora", "tune.what is 'lora', but method.name is linear_probe"),
        ("mezo", "method.draws=2", "expected draws only where name is icl"),
        ("zero_shot", "method.warmup=2", "expected warmup only where name is mezo or adamw"),
        ("icl", "method.demonstrations=49", "method.demonstrations is 49, but the train split has 48"),
        ("icl", "task.max_length=12", "which leaves no room for one demonstration before any prompt"),
        ("adamw", "sharding.strategy=hsdp", "take single on one, or fsdp2"),
        ("adamw", "sharding.strategy=ddp", "take single on one, or fsdp2"),
        ("adamw", "model.dtype=float16", "whose gradients underflow"),
        ("adamw", "train.objective=accuracy", "which jumps and has no gradient: take candidates"),
        ("adamw", "method.warmup=20000", "but train.steps is 20000: warm up for fewer"),
    ],
)
def test_what_a_method_has_no_use_for_or_cannot_do_is_refused(
    make: Make, method: str, override: str, said: str
) -> None:
    with pytest.raises(MezoError) as refused:
        train(make(method, override))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (make("zero_shot").directory.parent / method).exists()


def test_a_result_that_no_steps_lead_to_is_not_evaluated_as_if_it_were_the_base(make: Make) -> None:
    with pytest.raises(RecipeError, match="method.name is icl, whose result is in"):
        evaluate_recipe(make("icl"), "test", None)


def test_the_dry_run_is_for_mezo(make: Make) -> None:
    with pytest.raises(RecipeError, match="--dry-run is for MeZO's steps"):
        train(make("zero_shot"), dry_run=True)


def test_a_prompt_with_demonstrations_is_the_one_made_by_hand() -> None:
    shown = tasks.Example("a joy It was", (" terrible", " great"), 1)
    other = tasks.Example("dull It was", (" terrible", " great"), 0)
    asked = tasks.Example("a mess It was", (" terrible", " great"), 0)
    found = demonstrated(asked, [shown, other])
    assert found.prompt == "a joy It was great\n\ndull It was terrible\n\na mess It was"
    assert (found.candidates, found.label) == (asked.candidates, 0)
    question = tasks.Question("Q: who?\nA:", (" Brem", " the Brem"))
    assert demonstrated(question, [question]).prompt == "Q: who?\nA: Brem\n\nQ: who?\nA:"


def test_icl_scores_prompts_that_hold_as_many_whole_demonstrations_as_fit(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    original = setting.Setting.evaluate

    def evaluate(self: setting.Setting, rows: Any, what: str) -> Any:
        seen.append(rows)
        return original(self, rows, what)

    monkeypatch.setattr(setting.Setting, "evaluate", evaluate)
    recipe = make("icl", "demonstrations=4", "max_length=60")
    train(recipe)
    _, rows = seen
    shown = [row.example.prompt.split("\n\n") for row in rows]
    assert {len(parts) for parts in shown} <= {1, 2, 3, 4, 5}
    assert any(len(parts) < 5 for parts in shown)
    longest = max(shown, key=len)
    for row, parts in zip(rows, shown, strict=True):
        assert row.length <= 60
        if len(parts) > 1:  # the last ones drawn stay, whole
            assert parts[:-1] == longest[-len(parts) : -1]
        assert all(part.endswith((" great", " terrible")) for part in parts[:-1])
    assert "and whole demonstrations were left out" in capsys.readouterr().out


def test_draws_differ_and_their_mean_and_deviation_are_reported(make: Make) -> None:
    recipe = make("icl", "draws=3", "demonstrations=2", "max_length=80")
    train(recipe)
    found = results(recipe)["icl"]
    assert found["accuracy"] == pytest.approx(np.mean(found["draws"]))
    assert found["deviation"] == pytest.approx(np.std(found["draws"], ddof=1))
    assert len({line["test_loss"] for line in lines(recipe)}) == 3
    low, high = found["interval_95"]
    assert high - low > 0.25  # of 32 rows, not of 96


def test_the_mean_of_draws_is_that_of_their_values_whatever_the_metric() -> None:
    """Of two draws that give one class to all each, a macro F1 over the rows of both would be better than either."""
    labels = [0, 1] * 50
    draws = [Score({"macro_f1": ByClass.of("macro_f1", [each] * 100, labels, 2)}, "macro_f1") for each in (0, 1)]
    assert mean_of(draws)["macro_f1"] == pytest.approx(1 / 3)
    recalls = [ByClass.of("balanced_accuracy", chosen, [0] * 970 + [1] * 30, 2) for chosen in ([0] * 980 + [1] * 20,)]
    one = Score({"balanced_accuracy": recalls[0]}, "balanced_accuracy")
    assert mean_of([one, one])["interval_95"] == pytest.approx(one.as_dict()["interval_95"])


def test_a_baseline_that_begins_again_leaves_nothing_of_the_result_before(make: Make) -> None:
    recipe = make("adamw", *ADAMW)
    train(recipe)
    longer = make("adamw", *ADAMW, "steps=12", "eval_every=0")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(longer)
    assert not is_finished(recipe, RunDirectory(recipe.directory))
    assert not (recipe.directory / "report.md").exists()
    train(longer)
    assert "best" not in results(longer)
    assert "was best after step" not in (recipe.directory / "report.md").read_text()


def test_icl_poses_written_answers_too(make: Make, tmp_path: Path) -> None:
    folder = questions.write(tmp_path / "squad")
    override = ("task.name=squad", f"task.data={folder}", "train=24", "dev=8", "test=10", "max_length=250")
    recipe = make("icl", *override, "demonstrations=2", "task.max_new_tokens=4")
    train(recipe)
    assert results(recipe)["icl"]["main"] == "f1"
    with pytest.raises(RecipeError, match="do not all choose among the same answers"):
        train(make("linear_probe", *override))


def test_a_linear_probe_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 5, generator=generator, dtype=torch.float64)
    labels = (features[:, :3]).argmax(1)
    weights, intercepts = regress(features, labels, 3, strength=1e4)
    assert ((features @ weights + intercepts).argmax(1) == labels).all()


def test_a_probes_solution_is_the_minimum_of_the_penalised_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (40,), generator=generator)
    weights, intercepts = (part.requires_grad_() for part in regress(features, labels, 2, strength=0.5))
    loss = torch.nn.functional.cross_entropy(features @ weights + intercepts, labels, reduction="sum")
    (0.5 * loss + weights.square().sum() / 2).backward()
    assert weights.grad.abs().max() < 1e-4
    assert intercepts.grad.abs().max() < 1e-4


def test_the_probe_reads_the_last_hidden_state_of_the_prompts_last_token(make: Make) -> None:
    recipe = make("linear_probe", "strengths=[0.1]")
    train(recipe)
    prepared, kind = prepare(recipe)
    splits = EncodedSplits.read(prepared, kind)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name).eval()

    def states(rows: Any) -> torch.Tensor:
        with torch.no_grad():
            all_of = [model(torch.tensor([row.prompt]), output_hidden_states=True).hidden_states for row in rows]
        return torch.stack([layers[-1][0, -1] for layers in all_of]).double()

    train_states, test_states = states(splits.train), states(splits.test)
    mean, deviation = train_states.mean(0), train_states.std(0, correction=0)
    solution = regress((train_states - mean) / deviation, torch.tensor([row.label for row in splits.train]), 2, 0.1)
    chosen = ((test_states - mean) / deviation @ solution[0] + solution[1]).argmax(1)
    right = [row.label == int(found) for row, found in zip(splits.test, chosen, strict=True)]
    assert results(recipe)["linear_probe"]["accuracy"] == np.mean(right)


def by_hand(recipe: Recipe, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and losses of torch's AdamW on whole batches, without decay of biases and normalisation."""
    prepared, kind = prepare(recipe)
    splits = EncodedSplits.read(prepared, kind)
    order = order_of(prepared, kind, splits.train)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name).eval()
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    free = [p for name, p in model.named_parameters() if "norm" in name]
    options = recipe.optimizer
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=options.lr), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (step if step < 1 else (steps - step) / (steps - 1))  # one step of warmup
        batch = kind.collate([splits.train[row] for row in order.step(step)])
        loss = kind.objectives["candidates"](model, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def test_adamw_is_torchs_and_a_micro_batch_changes_nothing(make: Make) -> None:
    fields = ("lr=1e-3", "steps=5", "batch_size=7", "weight_decay=0.1", "schedule=linear", "warmup=1", "eval_every=0")
    recipe = make("adamw", *fields)
    expected, losses = by_hand(recipe, 5)
    train(recipe)
    assert [line["loss"] for line in lines(recipe) if "loss" in line] == pytest.approx(losses, rel=1e-5)
    saved = load_file(recipe.directory / "checkpoint" / "model.safetensors")
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=2e-5)
    small = make("adamw", *fields, "micro_batch=3", f"output.dir={recipe.directory}-small")
    train(small)
    assert [line["loss"] for line in lines(small) if "loss" in line] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    "tune",
    [("what=full",), ("what=lora",), ("what=prefix",), ("what=names", "names=[model.layers.1.*]")],
    ids=lambda tune: tune[0],
)
def test_adamw_lowers_the_loss_of_whatever_is_tuned(make: Make, tune: tuple[str, ...]) -> None:
    recipe = make("adamw", *(f"tune.{field}" for field in tune), "lr=1e-2", "steps=30", "batch_size=16", "eval_every=0")
    train(recipe)
    losses = [line["loss"] for line in lines(recipe) if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
