"""COPA (Roemmele et al., 2011; SuperGLUE). The choice goes on with the premise's sentence. Labels: 0 is choice1."""

from dataclasses import replace

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.posing import prompt_of, refuse_candidates
from mezo_scale.tasks.rows import label_of, text_of
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import CHOOSING, Task

TEMPLATE = "{premise} {conjunction}"
CONJUNCTIONS = {"cause": "because", "effect": "so"}


def pose(section: TaskSection, row: Row) -> Example:
    """The template may name `conjunction`, too; `premise` comes without its full stop."""
    refuse_candidates(section)
    question = text_of(row, "question")
    if question not in CONJUNCTIONS:
        raise RecipeError(f"task.data: {row.place} has the question {question!r:.60}, expected cause or effect")
    candidates = tuple(f" {_within_a_sentence(text_of(row, name))}" for name in ("choice1", "choice2"))
    if candidates[0] == candidates[1]:
        raise RecipeError(f"task.data: {row.place} has one text as choice1 and choice2: leave the row out")
    premise = text_of(row, "premise").rstrip().removesuffix(".")
    row = replace(row, fields={**row.fields, "premise": premise, "conjunction": CONJUNCTIONS[question]})
    return Example(prompt_of(section, TEMPLATE, row), candidates, label_of(row, len(candidates)))


def _within_a_sentence(choice: str) -> str:
    first, space, rest = choice.rstrip(" ").partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


TASK = Task.of_rows(
    pose,
    CHOOSING,
    "which of two sentences is a premise's cause or effect",
    ("premise", "choice1", "choice2", "question", "label"),
    objective="language_modeling",  # as the authors train it
)
