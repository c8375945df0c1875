"""What a kind of task is. All that is above the tasks (training, evaluation, reports) knows this and `Score` only."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import Batch
from mezo_scale.tasks.kinds.trees import Sharing
from mezo_scale.tasks.reward import Asked, Reward
from mezo_scale.tasks.score import Score

Objective = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> losses of the batch's rows, float32 [rows]. It may jump, for nothing is differentiated; then it
has a ``smooth``, an objective of the same batch that does not (`mezo_scale.optim.losses.Objective`).

The optimizer repeats a batch once per branch along dim 0: what it computes must keep rows apart and in their order. All
ranks must call the model equally often, whatever is in their rows: a sharded forward pass needs them all.
"""


class Within:
    """An objective that is computed in a context: autocast, or nothing."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]], objective: Objective) -> None:
        self._context, self._objective = context, objective
        if hasattr(objective, "smooth"):
            self.smooth = Within(context, objective.smooth)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._context():
            return self._objective(model, batch)


class Rewarded:
    """The objective that is minus a reward of the texts that the model gives; NaN where it gives none.

    A batch for it has "asked": what `Reward.of` takes, one entry per row.
    """

    def __init__(
        self, reward: Reward, texts: Callable[[nn.Module, Batch], list[str | None]], smooth: Objective
    ) -> None:
        self._reward, self._texts, self.smooth = reward, texts, smooth

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        asked: Sequence[Asked] = batch["asked"]
        scores = self._reward.of(self._texts(model, batch), asked)
        return -torch.tensor(scores, dtype=torch.float32, device=batch["input_ids"].device)


Row = TypeVar("Row")
Prediction = TypeVar("Prediction")


class Kind(Protocol[Row, Prediction]):
    """One kind of task, made for a run: it knows the run's tokenizer, or image processor, and its task section.

    A row's `repr` tells it from every other row: ranks compare digests of it.

    Attributes:
        objectives: what can be minimised, by name; the first is the default.
        metrics: what a recipe can have as the main metric of its scores, by `task.metric`; the first is the default.
        reward: what it has learned from; None: nothing of the kind.
        scores_all: whether a loss needs the logits at all positions of a row; else at a few.
        reads_images: whether rows are images, and lengths say nothing; else they are tokens.
        calibrates: whether it takes `task.calibrate`.
        sharing: which of its rows are run with a prompt once for all answers; None: of this kind none can.
    """

    objectives: Mapping[str, Objective]
    metrics: Sequence[str] = ()
    reward: Reward | None = None
    scores_all: bool = False
    reads_images: bool = False
    calibrates: bool = False
    sharing: Sharing | None = None

    def encode_all(self, examples: Sequence[Any]) -> list[Row]:
        """The rows of a split's examples, one each unless a kind cuts them otherwise. Raises RecipeError."""
        return [self.encode(example) for example in examples]

    def encode(self, example: Any) -> Row:
        """An example of the task in tokens. Raises RecipeError if it does not fit."""
        ...

    def length(self, row: Row) -> int:
        """Tokens of its longest sequence: rows of similar length go together."""
        ...

    def is_cut(self, row: Row) -> bool:
        """Whether the prompt lost something to `task.max_length`."""
        return False

    def is_overlong(self, row: Row) -> bool:
        """Whether the model can write no right answer to its end."""
        return False

    def cost(self, row: Row) -> int:
        """What `predict` takes for it, in tokens: rows of similar cost are evaluated together."""
        return self.length(row)

    def shared(self, rows: Sequence[Row], at_least: int = 0) -> Batch:
        """A batch that gives what `collate` gives, in which a prompt stands once for all answers, at least so wide.
        A kind with `sharing` has it."""
        raise NotImplementedError

    def scored(self, row: Row) -> list[tuple[int, ...]]:
        """The tokens whose probabilities count, one entry for each answer that is looked at; none where a kind does not
        say: this is for people who want to see them."""
        return []

    def collate(self, rows: Sequence[Row], objective: str | None = None, max_length: int | None = None) -> Batch:
        """A batch with rows along dim 0, padded on one side.

        Args:
            objective: the one that it is for, which may need less than all; None: `predict` and any objective.
            max_length: tokens to pad to at most; None: `task.max_length`.
        """
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """What the model answers, one entry per row. All ranks call the model equally often."""
        ...

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Score:
        """What the predictions of these rows are worth; of no rows: the same metrics over none."""
        ...

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Numbers [rows, ...] that change little when the weights or the rounding do: ways of computing a forward pass
        are compared by them."""
        ...

    def learn_from(self, reward: Reward) -> bool:
        """Takes a reward: it becomes an objective by its name, and a metric of all scores, the main one unless the
        recipe names another. False where this kind has no texts that could be scored."""
        return False

    def refusal(self, model: nn.Module, batch: Batch) -> str | None:
        """Why this model can't do this kind of task, for a message; None if it can.

        Args:
            batch: one row without padding, the same on all ranks.
        """
        return None

    def baselines(self, train: Sequence[Row], test: Sequence[Row]) -> dict[str, Score]:
        """What answers that need no model are worth on the test split, by name."""
        return {}


def refuse_temperature(section: TaskSection) -> None:
    """For kinds that write nothing. Raises RecipeError."""
    if section.temperature:
        raise RecipeError(
            f"task.temperature is {section.temperature:g}, but task.name is {section.name}, which writes nothing: "
            "leave it out"
        )
