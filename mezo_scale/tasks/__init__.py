"""Tasks. A task reads its data and returns examples; what follows (scoring, training, metrics) knows examples only.

A new task is one module with a function `load(section) -> Splits` and one line in TASKS.
"""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks import sentiment
from mezo_scale.tasks.example import Example, Splits, split

__all__ = ["Example", "Splits", "TASKS", "load", "split"]

TASKS: Mapping[str, Callable[[TaskSection], Splits]] = MappingProxyType({"sentiment": sentiment.load})


def load(section: TaskSection) -> Splits:
    """The examples of the task that the recipe names. Raises RecipeError if there is none, or its data is wrong."""
    if section.name not in TASKS:
        close = difflib.get_close_matches(section.name, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected {' or '.join(TASKS)}"
        raise RecipeError(f"task.name: found {section.name!r}; {hint}")
    return TASKS[section.name](section)
