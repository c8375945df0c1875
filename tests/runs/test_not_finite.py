"""Scores and losses that are not finite: no grade is made of them, and a run that only skips comes to an end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import MezoError, NotFiniteError
from mezo_scale.models import Loaded
from mezo_scale.recipe import Recipe, TaskSection, load
from mezo_scale.runs.evaluate import evaluate, evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.tasks.encoding import Batch
from mezo_scale.tasks.kinds.candidates import OBJECTIVES, Candidates, Encoded, candidate_scores, candidates_loss
from mezo_scale.trajectory import Trajectory
from tests.support import material

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]

NOTHING_TO_GRADE = r"all of 32 examples have scores that are not finite, .* take another model\.dtype"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def change(folder: Path, alter: Callable[[str, Tensor], Tensor]) -> None:
    weights = {name: alter(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoilt(name: str, tensor: Tensor) -> Tensor:
    if name == "model.layers.1.mlp.up_proj.weight":
        tensor[3, 4] = float("nan")
    return tensor


def test_a_checkpoint_with_a_nan_is_not_graded(make_recipe: MakeRecipe, tmp_path: Path, run: Run) -> None:
    folder = material.write_model("llama", tmp_path / "spoilt")
    change(folder, spoilt)
    recipe = make_recipe(f"model.name={folder}")
    with pytest.raises(NotFiniteError, match=NOTHING_TO_GRADE):
        train(recipe)
    assert not Path(recipe.output.dir).exists()
    for command in ("train", "evaluate"):
        code, out, err = run(command, tmp_path / "recipe.yaml", f"model.name={folder}")
        assert code == 2
        assert err.startswith("error: all of 32 examples")
        assert err.count("\n") == 1
        assert "accuracy" not in out


def test_overflow_in_float16_is_not_graded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = material.write_model("llama", tmp_path / "large")
    change(folder, lambda name, tensor: tensor * 1e4)
    for part in ("test", "dev"):
        with pytest.raises(NotFiniteError, match="float16 overflows"):
            evaluate_recipe(make_recipe("model.dtype=float16", f"model.name={folder}"), part, None)
    found, _ = evaluate_recipe(make_recipe(f"model.name={folder}"), "test", None)
    assert found.not_finite == 0


def loaded_with_one_token_spoilt() -> Loaded:
    loaded = Loaded(material.build("llama-untied"), material.tokenizer(), torch.device("cpu"), Strategy("single"))
    loaded.processor.pad_token_id = 0
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[50] = float("nan")
    return loaded


@pytest.mark.parametrize("candidates", [((7,), (8,)), ((7,), (8, 9))], ids=["one token", "several tokens"])
def test_an_example_without_finite_scores_counts_as_wrong_and_apart(candidates: tuple[tuple[int, ...], ...]) -> None:
    loaded = loaded_with_one_token_spoilt()
    good = [Encoded((20 + n, 21), candidates, n % 2) for n in range(6)]
    spoilt = [Encoded((50, 21), candidates, 0)]  # argmax of NaN is 0, its label
    kind = Candidates(loaded.processor, TaskSection(data="d"))
    whole = evaluate(loaded, kind, good, 4)
    assert (whole.not_finite, whole.metrics["loss"].value is None) == (0, False)
    for batch_size in (1, 3, 7):
        found = evaluate(loaded, kind, good + spoilt, batch_size)
        assert (found.count, found.not_finite) == (7, 1)
        assert found.metrics["accuracy"].total == whole.metrics["accuracy"].total
        assert found.metrics["loss"].value is None
        assert found.as_dict()["not_finite"] == 1
        assert "1 not finite and counted as wrong" in str(found)
    with pytest.raises(NotFiniteError, match="all of 1 examples"):
        evaluate(loaded, kind, spoilt, 4)


@pytest.mark.parametrize("longer", [(9,), (9, 9)], ids=["one token", "several tokens"])
def test_what_only_fills_up_a_row_is_no_candidate(longer: tuple[int, ...]) -> None:
    loaded = loaded_with_one_token_spoilt()
    examples = [Encoded((20,), ((7,), (8,), longer), 2), Encoded((21,), ((7,), (8,)), 1)]
    kind = Candidates(loaded.processor, TaskSection(data="d"))
    found, alone = evaluate(loaded, kind, examples, 2), evaluate(loaded, kind, examples, 1)
    assert found.not_finite == 0
    assert found.metrics["loss"].value == pytest.approx(alone.metrics["loss"].value, rel=1e-4)


def test_steps_that_only_skip_end_the_run_and_leave_it_whole(make_recipe: MakeRecipe, tmp_path: Path, run: Run) -> None:
    options = ("optimizer.lr=1e18", "train.steps=12", "train.max_skipped=3", "train.eval_every=0")
    code, _, err = run("train", tmp_path / "recipe.yaml", *options)
    folder = tmp_path / "run"
    records = Trajectory.open(folder / "trajectory.mezo").records
    assert code == 2
    assert 4 <= len(records) < 12
    assert [record.skipped for record in records] == [False] * (len(records) - 3) + [True] * 3
    assert err.startswith(f"error: step {len(records)} is skipped like the 2 before it")
    assert "smaller optimizer.lr" in err
    assert err.count("\n") == 1
    assert [line["skipped"] for line in metrics(folder)] == [record.skipped for record in records]
    assert not (folder / "evaluation.json").read_text().count("tuned")

    with pytest.raises(NotFiniteError, match=rf"step {len(records) + 4} is skipped like the 3 before it"):
        train(load(folder, ["train.max_skipped=4"]))
    assert len(metrics(folder)) == len(records) + 4
    assert f"{len(records) + 4} steps ({7} skipped)" in next(verify(load(folder)))


class Failing:
    """The candidates' loss, but NaN in the evaluations of some steps; the first step's probes come before."""

    def __init__(self, steps: set[int], optimizer_step: Callable[[], int]) -> None:
        self.steps, self.now = steps, optimizer_step

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return candidates_loss(model, batch) * (float("nan") if self.now() in self.steps else 1.0)


def test_skipped_steps_are_counted_wherever_a_run_is_told_of(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("eval_every=0", "steps=6", "max_skipped=2")
    run = Path(recipe.output.dir)
    failing = Failing({1, 3, 4}, lambda: len(metrics(run)))
    monkeypatch.setitem(OBJECTIVES, "candidates", failing)
    with pytest.raises(NotFiniteError, match="step 5 is skipped like the 1 before it"):
        train(recipe)
    train(load(run, ["max_skipped=3"]))  # the earlier sessions' are counted on
    assert [line["skipped"] for line in metrics(run)] == [False, True, False, True, True, False]
    shown = capsys.readouterr().out
    assert "step 2/6  loss nan  1 skipped" in shown
    assert "3 skipped" in next(line for line in shown.splitlines() if line.startswith("step 6/6"))
    assert "tuned, 6 steps (3 skipped)" in shown
    assert json.loads((run / "evaluation.json").read_text())["tuned"]["skipped"] == 3
    report = (run / "report.md").read_text()
    assert "MeZO, 6 steps (3 skipped) of 6 examples" in report
    assert "A step is skipped when a loss is not finite" in report


def test_a_dev_split_without_finite_scores_ends_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("eval_every=2", "steps=4")
    metrics_file = Path(recipe.output.dir) / "metrics.jsonl"

    def spoilt_later(model: nn.Module, batch: Batch) -> Tensor:
        return candidate_scores(model, batch) * (float("nan") if metrics_file.exists() else 1.0)

    monkeypatch.setattr("mezo_scale.tasks.kinds.candidates.candidate_scores", spoilt_later)
    with pytest.raises(MezoError, match="all of 16 examples have scores that are not finite"):
        train(recipe)
    assert [line["step"] for line in metrics(metrics_file.parent)] == [1, 2]
