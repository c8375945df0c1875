"""AQuA-RAT (Ling et al., 2017): a sum in words with lettered options; `correct` is the right one's letter."""

from dataclasses import replace

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.posing import prompt_of, refuse_candidates
from mezo_scale.tasks.rows import text_of, texts_of
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import CHOOSING, Task

TEMPLATE = "Question: {question}\nOptions: {options}\nAnswer:"


def pose(section: TaskSection, row: Row) -> Example:
    """The letters are the candidates; the options stand in the prompt."""
    refuse_candidates(section)
    options = texts_of(row, "options", "option")
    letters = [option.strip()[:1] for option in options]
    right = text_of(row, "correct").strip()
    if right not in letters or len(set(letters)) < len(letters):
        raise RecipeError(
            f"task.data: {row.place} has {right!r:.20} as correct, expected the letter of one of its options"
        )
    row = replace(row, fields={**row.fields, "options": " ".join(options)})
    return Example(prompt_of(section, TEMPLATE, row), tuple(f" {letter}" for letter in letters), letters.index(right))


TASK = Task.of_rows(
    pose, CHOOSING, "a sum in words, answered by the letter of an option", ("question", "options", "correct")
)
