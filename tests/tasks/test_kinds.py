"""A kind of task of one's own, with a task of it, from outside the package: it trains, evaluates and is reported."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.tasks import Kind, Metric, Score, Splits, Task
from mezo_scale.tasks.encoding import Batch, pad_left
from mezo_scale.tasks.logits import last_logits
from mezo_scale.trajectory import Trajectory

MakeRecipe = Callable[..., Recipe]


@dataclass(frozen=True)
class Text:
    prompt: str


class LastToken(Kind[tuple[int, ...], float]):
    """How surprised a model is by a text's last token; graded by the mean surprise."""

    def __init__(self, tokenizer: Any, section: Any) -> None:
        self.tokenizer = tokenizer
        self.objectives = {"surprise": lambda model, batch: -self.log_probs(model, batch)}

    def encode(self, example: Text) -> tuple[int, ...]:
        return tuple(self.tokenizer(example.prompt)["input_ids"])

    def length(self, row: tuple[int, ...]) -> int:
        return len(row)

    def collate(self, rows: Any, objective: str | None = None, max_length: int | None = None) -> Batch:
        input_ids, attention_mask = pad_left([row[:-1] for row in rows], 0, max_length)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "last": torch.tensor([row[-1] for row in rows]),
        }

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = last_logits(model, batch["input_ids"], batch["attention_mask"], 1)[:, 0]
        return -F.cross_entropy(logits, batch["last"], reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> list[float]:
        return (-self.log_probs(model, batch)).tolist()

    def score(self, predictions: Sequence[float], rows: Sequence[tuple[int, ...]]) -> Score:
        return Score({"surprise": Metric.of(predictions, bounded=False)}, "surprise")


def load_texts(section: Any) -> Splits[Any]:
    return tasks.split([Text(f"the plot is {n} times dull") for n in range(99)], 48, 16, 32, 0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register("toy", Task(load_texts, LastToken))
    return "toy"


def test_a_kind_from_outside_is_trained_evaluated_and_reported(
    make_recipe: MakeRecipe, toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(f"task.name={toy}", "steps=40", "eval_every=20", "lr=2e-3", "batch_size=16")
    train(recipe)
    shown = capsys.readouterr().out
    results = json.loads((recipe.directory / "evaluation.json").read_text())
    assert results["tuned"]["surprise"] < results["zero_shot"]["surprise"]
    assert results["tuned"]["main"] == "surprise"
    assert results.keys() == {"zero_shot", "tuned", "ended", "best"}
    dev = [
        line["dev_surprise"]
        for line in map(json.loads, (recipe.directory / "metrics.jsonl").open())
        if "dev_surprise" in line
    ]
    assert len(dev) == 2
    assert results["best"]["value"] == min(dev)
    assert f"step 40: surprise on dev {dev[1]:.4f}, 16 examples" in shown
    report = (recipe.directory / "report.md").read_text()
    assert "| test split | surprise | 95% interval | examples |" in report
    assert f"| tuned, 40 steps | {results['tuned']['surprise']:.4f} |" in report
    assert load(recipe.directory).train.objective == "surprise"
    assert evaluate_recipe(recipe, "test", None)[0].as_dict()["surprise"] == results["tuned"]["surprise"]
    assert len(Trajectory.open(recipe.directory / "trajectory.mezo")) == 40


def test_a_name_is_registered_once(toy: str) -> None:
    with pytest.raises(ValueError, match="there is a task 'toy' already"):
        tasks.register("toy", Task(load_texts, LastToken))


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("surprize", "train.objective: found 'surprize' for task.name=toy; did you mean surprise"),
        ("candidates", "train.objective: found 'candidates' for task.name=toy; expected surprise"),
    ],
)
def test_an_objective_that_the_kind_has_not_is_refused_before_anything_is_written(
    make_recipe: MakeRecipe, toy: str, objective: str, said: str
) -> None:
    recipe = make_recipe(f"task.name={toy}", f"objective={objective}")
    for start in (train, lambda recipe: evaluate_recipe(recipe, "test", None)):
        with pytest.raises(RecipeError, match=said):
            start(recipe)
    assert not recipe.directory.exists()
