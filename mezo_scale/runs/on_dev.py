"""The evaluations of a run on dev: which step was the best, and whether it is time to stop.

Both follow from the evaluations in metrics.jsonl alone: a session that goes on with a run decides what the one before
it would have decided.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from mezo_scale import collectives
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks import Kind, Score


def check(recipe: Recipe, splits: EncodedSplits) -> None:
    """Raises RecipeError if evaluations on dev are to decide something, and there are none."""
    every, steps = recipe.train.eval_every, recipe.train.steps
    asked = {
        f"train.patience is {recipe.train.patience}": recipe.train.patience is not None,
        "output.checkpoint is best": recipe.output.checkpoint == "best",
    }
    for said in (said for said, is_asked in asked.items() if is_asked):
        if not splits.dev:
            raise RecipeError(f"{said}, but task.name={recipe.task.name} has no dev split to decide by: leave it out")
        if not 0 < every <= steps:
            raise RecipeError(
                f"{said}, but train.eval_every is {every} and train.steps {steps}, so that dev is never looked at: "
                f"give an eval_every of 1 to {steps}"
            )


class OnDev:
    """The evaluations of a run on dev so far; the same on every rank.

    Args:
        kind: whose main metric counts.
        patience: evaluations in a row without a better one that end the run; None: it is not ended.
        found: (steps done, the metric) of those that there are, in their order.
    """

    def __init__(
        self, kind: Kind[Any, Any], patience: int | None, found: Sequence[tuple[int, float | None]] = ()
    ) -> None:
        score = kind.score([], [])
        self.metric, self._sign = score.main, 1 if score.metrics[score.main].more_is_better else -1
        self._patience = patience
        self._found = list(found)

    @classmethod
    def of_run(cls, kind: Kind[Any, Any], patience: int | None, run: RunDirectory, steps: int) -> "OnDev":
        """With those of a run's first `steps` that rank 0 sees; every rank calls it."""
        key = f"dev_{cls(kind, patience).metric}"

        def read() -> bytes:
            lines = [line for line in run.read_metrics() if key in line and line["step"] <= steps]
            by_step = {line["step"]: line[key] for line in lines}
            return json.dumps(sorted(by_step.items())).encode()

        found = json.loads(collectives.from_first_rank(read))
        return cls(kind, patience, [(step, value) for step, value in found])

    def add(self, step: int, score: Score) -> None:
        """Takes in what the model was worth after so many steps; every rank calls it, and rank 0's value counts."""
        value = score.metrics[self.metric].value
        mine = (math.nan if value is None else value) if collectives.rank() == 0 else 0.0
        (value,) = collectives.sum_scalars([mine])
        self._found.append((step, None if math.isnan(value) else value))

    def has(self, step: int) -> bool:
        """Whether the model was evaluated after so many steps."""
        return any(step == other for other, _ in self._found)

    @property
    def best(self) -> tuple[int, float] | None:
        """(steps done, the metric) of the best evaluation, of several equals the first; None where none has a value."""
        known = [(step, value) for step, value in self._found if value is not None]
        return max(known, key=lambda found: self._sign * found[1]) if known else None

    @property
    def waited(self) -> int:
        """Evaluations since the best one; all where none has a value."""
        best = self.best
        return sum(best is None or step > best[0] for step, _ in self._found)

    @property
    def says_stop(self) -> bool:
        """Whether the run is to end where it is."""
        return self._patience is not None and self.waited >= self._patience

    def told(self, done: int, steps: int) -> dict[str, Any]:
        """For evaluation.json: ended (the last step; the patience, if it was over before all `steps` were taken), and
        best (step, metric, value), if there is one."""
        ended = {"step": done, **({"patience": self._patience} if done < steps else {})}
        found = {} if self.best is None else {"step": self.best[0], "metric": self.metric, "value": self.best[1]}
        return {"ended": ended, **({"best": found} if found else {})}
