"""PIQA (Bisk et al., 2020). Labels: 0 is sol1."""

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.posing import prompt_of, refuse_candidates
from mezo_scale.tasks.rows import label_of, text_of
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import CHOOSING, Task

TEMPLATE = "Goal: {goal}\nSolution:"


def pose(section: TaskSection, row: Row) -> Example:
    """Each solution is scored whole."""
    refuse_candidates(section)
    candidates = tuple(f" {text_of(row, name).strip()}" for name in ("sol1", "sol2"))
    if candidates[0] == candidates[1]:
        raise RecipeError(f"task.data: {row.place} has one text as sol1 and sol2: leave the row out")
    return Example(prompt_of(section, TEMPLATE, row), candidates, label_of(row, len(candidates)))


TASK = Task.of_rows(
    pose,
    CHOOSING,
    "which of two ways leads to an everyday goal",
    ("goal", "sol1", "sol2", "label"),
    objective="language_modeling",
)
