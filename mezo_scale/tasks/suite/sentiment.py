"""Sentiment of a text of one's own, posed as MeZO's authors pose SST-2."""

from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.posing import cloze_of, own_candidates
from mezo_scale.tasks.rows import fill, has_mask, label_of
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import CHOOSING, Task

TEMPLATE = "{text} It was"
CLOZE = "{text} It was {mask}."
CANDIDATES = (" terrible", " great")


def pose(section: TaskSection, row: Row) -> Example:
    """The text exactly as it is, white space included."""
    candidates = CANDIDATES if section.candidates is None else own_candidates(section)
    if has_mask(section.template):
        return cloze_of(section, row, candidates, label_of(row, len(candidates)))
    prompt = fill(TEMPLATE if section.template is None else section.template, row)
    return Example(prompt, candidates, label_of(row, len(candidates)))


TASK = Task.of_rows(
    pose,
    CHOOSING,
    "the sentiment of a text; or any labels, with your own template",
    ("text", "label"),
    cloze=CLOZE,
)
