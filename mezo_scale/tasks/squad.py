"""Extractive question answering in the schema of SQuAD (Rajpurkar et al., 2016), posed as MeZO's authors pose it.

The data has the columns `title`, `context`, `question` and `answers`, a struct whose `text` lists the right answers.
"""

from collections.abc import Mapping
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Question
from mezo_scale.tasks.rows import column, fill
from mezo_scale.tasks.splits import Splits, read_splits
from mezo_scale.tasks.tables import Row

TEMPLATE = "Title: {title}\n\nContext: {context}\n\nQuestion: {question}\nAnswer:"


def load(section: TaskSection) -> Splits[Question]:
    """Reads the data and splits it. Raises RecipeError if a row is not what it should be, or there are too few."""
    template = TEMPLATE if section.template is None else section.template
    return read_splits(section, lambda row: Question(fill(template, row), answers_of(row)))


def answers_of(row: Row) -> tuple[str, ...]:
    """The different answers of a row in their order, each after a space. Raises RecipeError if there is none."""
    found = column(row, "answers", "rename the one that is meant")
    texts = found.get("text") if isinstance(found, Mapping) else None
    if not isinstance(texts, list):
        raise RecipeError(
            f"task.data: {row.place} has the answers {found!r:.60}, expected a struct whose `text` is a list of texts"
        )
    if not texts:
        raise RecipeError(f"task.data: {row.place} has no answer, expected at least one: leave such rows out")
    return tuple(dict.fromkeys(f" {_checked(text, row)}" for text in texts))


def _checked(text: Any, row: Row) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"task.data: {row.place} has the answer {text!r:.60}, expected text: leave such answers out")
    return text.strip()
