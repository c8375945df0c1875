"""Accuracy of a model on a split, and how sure one can be of it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mezo_scale import collectives, models
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import joined
from mezo_scale.models import Loaded
from mezo_scale.optim.replay import replay
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks.encoding import Encoded, collate
from mezo_scale.tasks.objectives import candidate_scores


@dataclass(frozen=True)
class Evaluation:
    """A model on a split.

    Attributes:
        count: examples.
        correct: how many times the right candidate had the best score.
        loss: mean cross-entropy over the candidates' scores; None where nothing was scored.
    """

    count: int
    correct: int
    loss: float | None

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.count)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: the fields and what follows from them."""
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        return {**asdict(self), "loss": loss, "accuracy": self.accuracy, "interval_95": list(self.interval)}


def evaluate(
    loaded: Loaded,
    examples: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores every example once; every rank calls it and gets the whole result.

    Examples of similar length go together, `batch_size` per rank and forward pass. All ranks run equally often (a
    sharded forward pass needs them all): one without examples left runs one again and does not count it.
    `progress` is called with (forward passes done, forward passes in all).
    """
    order = np.argsort([example.length for example in examples], kind="stable")
    axes = loaded.strategy.axes
    per_round = batch_size * axes.rows_size
    rounds = math.ceil(len(order) / per_round)
    sums = [0.0, 0.0]
    for number in range(rounds):
        mine = order[number * per_round : (number + 1) * per_round][
            axes.rows_rank(collectives.rank()) :: axes.rows_size
        ]
        chosen = mine if len(mine) else order[:1]
        batch = collate([examples[index] for index in chosen], loaded.tokenizer.pad_token_id)
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
        with torch.no_grad(), loaded.compute():
            scores = candidate_scores(loaded.model, batch)
        if len(mine):
            sums[0] += float((scores.argmax(1) == batch["label"]).sum())
            sums[1] += float(F.cross_entropy(scores, batch["label"], reduction="none").double().sum())
        if progress is not None:
            progress(number + 1, rounds)
    correct, loss = collectives.sum_scalars(sums)
    return Evaluation(len(order), round(correct), loss / len(order))


def evaluate_recipe(recipe: Recipe, split: str, until: int | None) -> tuple[Evaluation, int]:
    """The accuracy of a recipe's model; of a run's, after the steps in its directory. Returns it and those steps."""
    run = RunDirectory(Path(recipe.output.dir))
    with joined(always_group=Strategy(recipe.sharding.strategy).needs_group) as world:
        with world.together():
            models.check(recipe, world)
            splits = EncodedSplits.read(recipe)
        splits.check_same(world)
        loaded = models.load(recipe, world)
        screen = Screen(world)
        steps = 0
        if run.trajectory.is_file() and until != 0:
            with screen.counting("replaying") as progress:
                steps = replay(loaded.model, run.trajectory, until, progress=progress)
        with screen.counting(f"evaluating ({split})") as progress:
            found = evaluate(loaded, getattr(splits, split), recipe.train.eval_batch, progress)
    return found, steps


def majority(train: Sequence[Encoded], test: Sequence[Encoded]) -> Evaluation:
    """What always answering with the train split's most frequent label gives on the test split."""
    label, _ = Counter(example.label for example in train).most_common(1)[0]
    return Evaluation(len(test), sum(example.label == label for example in test), None)


def wilson(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927)."""
    share = correct / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale
