"""Sentiment of a sentence, posed as MeZO's authors pose SST-2: `{text} It was` terrible/great.

The data has the columns `text` and `label`, labels counted from 0 in the order of the candidates: 0 is negative.
"""

from collections.abc import Mapping
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example, Splits, split
from mezo_scale.tasks.rows import fill, read_rows

TEMPLATE = "{text} It was"
CANDIDATES = (" terrible", " great")


def load(section: TaskSection) -> Splits:
    """Reads and splits the data; rows with the same text count once, so that no split sees another's."""
    template = section.template or TEMPLATE
    candidates = section.candidates or CANDIDATES
    examples = {}
    for number, row in enumerate(read_rows(section)):
        example = Example(fill(template, row).strip(), candidates, _label(section, number, row, len(candidates)))
        examples.setdefault(example.prompt, example)
    return split(list(examples.values()), section.train, section.dev, section.test, section.split_seed)


def _label(section: TaskSection, number: int, row: Mapping[str, Any], count: int) -> int:
    text = str(row.get("label"))
    if not (text.isdecimal() and int(text) < count):
        raise RecipeError(
            f"task.data: row {number + 1} of {section.data} has the label {text!r}, expected 0 to {count - 1}, "
            "the number of a candidate"
        )
    return int(text)
