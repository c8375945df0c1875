"""What a baseline is given, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mezo_scale.distributed.world import World
from mezo_scale.models import Loaded
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import Screen
from mezo_scale.runs.evaluate import evaluate
from mezo_scale.runs.memory import EVALUATION, PhaseMemory
from mezo_scale.runs.metrics import Metrics
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks import Kind, Score


@dataclass(frozen=True)
class Setting:
    """A run of a baseline under way, on one rank."""

    recipe: Recipe
    world: World
    kind: Kind[Any, Any]
    splits: EncodedSplits
    loaded: Loaded
    screen: Screen
    memory: PhaseMemory
    metrics: Metrics

    def evaluate(self, rows: Sequence[Any], what: str) -> Score:
        """The model's score on these rows; every rank calls it."""
        with self.screen.counting(f"evaluating ({what})") as progress, self.memory.phase(EVALUATION):
            return evaluate(self.loaded, self.kind, rows, self.recipe.train.eval_batch, progress)


@dataclass(frozen=True)
class Outcome:
    """What a baseline came to.

    Attributes:
        result: on the test split, as `Score.as_dict` has it, and what else evaluation.json is to say of it.
        about: sentences for the report.
        beside: what else evaluation.json is to hold, by its keys.
    """

    result: dict[str, Any]
    about: list[str] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)


Fit = Callable[[Setting], Outcome]
"""Carries out a baseline that was checked before; every rank calls it."""
