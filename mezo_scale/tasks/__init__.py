"""Tasks. A task reads its data and names the kind it is of; what follows (training, evaluation, reports) knows kinds.

A new task is one module with a function `load(section) -> Splits` and one line in _TASKS; one from outside the package
is `register`ed. A new kind is one module in `kinds/`.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, TaskSection
from mezo_scale.tasks import sentiment, squad
from mezo_scale.tasks.example import Example, Question
from mezo_scale.tasks.kinds.candidates import Candidates
from mezo_scale.tasks.kinds.generation import Generation
from mezo_scale.tasks.kinds.kind import Kind
from mezo_scale.tasks.score import Metric, Score
from mezo_scale.tasks.splits import Splits, split

__all__ = [
    "Example",
    "Kind",
    "Metric",
    "Question",
    "Score",
    "Splits",
    "Task",
    "kind_of",
    "load",
    "objective_of",
    "register",
    "split",
]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        load: its examples, from the recipe's section.
        kind: makes its kind for a run, from the model's tokenizer and the recipe's section.
    """

    load: Callable[[TaskSection], Splits[Any]]
    kind: Callable[[Any, TaskSection], Kind[Any, Any]]


_TASKS: dict[str, Task] = {"sentiment": Task(sentiment.load, Candidates), "squad": Task(squad.load, Generation)}


def register(name: str, task: Task) -> None:
    """Adds a task that recipes of this process can then name. Raises ValueError if there is one of that name."""
    if name in _TASKS:
        raise ValueError(f"there is a task {name!r} already: give another name")
    _TASKS[name] = task


def load(section: TaskSection) -> Splits[Any]:
    """The examples of the task that the recipe names. Raises RecipeError if there is none, or its data is wrong."""
    return _find(section).load(section)


def kind_of(section: TaskSection, tokenizer: Any) -> Kind[Any, Any]:
    """The kind of the recipe's task, for a run. Raises RecipeError if there is no such task, or it does not fit."""
    return _find(section).kind(tokenizer, section)


def objective_of(recipe: Recipe, kind: Kind[Any, Any]) -> str:
    """The name of what the recipe minimises: the kind's default where it says nothing.

    Raises:
        RecipeError: the kind has no such objective.
    """
    name = recipe.train.objective
    if name is None:
        return next(iter(kind.objectives))
    if name not in kind.objectives:
        raise RecipeError(
            f"train.objective: found {name!r} for task.name={recipe.task.name}; {_nearest(name, kind.objectives)}"
        )
    return name


def _find(section: TaskSection) -> Task:
    if section.name not in _TASKS:
        raise RecipeError(f"task.name: found {section.name!r}; {_nearest(section.name, _TASKS)}")
    return _TASKS[section.name]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"expected {' or '.join(known)}"
