"""Sentiment of a sentence, posed as MeZO's authors pose SST-2: `{text} It was` terrible/great.

The data has the columns `text` and `label`, labels counted from 0 in the order of the candidates: 0 is negative.
"""

from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.rows import fill, label_of
from mezo_scale.tasks.splits import Splits, read_splits
from mezo_scale.tasks.tables import Row

TEMPLATE = "{text} It was"
CANDIDATES = (" terrible", " great")


def load(section: TaskSection) -> Splits[Example]:
    """Reads the data and splits it. Raises RecipeError if a row is not what it should be, or there are too few."""
    template = TEMPLATE if section.template is None else section.template
    candidates = section.candidates or CANDIDATES

    def make(row: Row) -> Example:
        return Example(fill(template, row), candidates, label_of(row, len(candidates)))

    return read_splits(section, make)
