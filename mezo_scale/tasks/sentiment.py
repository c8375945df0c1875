"""Sentiment of a sentence, posed as MeZO's authors pose SST-2: `{text} It was` terrible/great.

The data has the columns `text` and `label`, labels counted from 0 in the order of the candidates: 0 is negative.
"""

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example, Splits, draw, split
from mezo_scale.tasks.rows import GIVEN, fill, label_of, read_parts
from mezo_scale.tasks.tables import Row

TEMPLATE = "{text} It was"
CANDIDATES = (" terrible", " great")


def load(section: TaskSection) -> Splits:
    """Reads the data and splits it, where it does not come split. Rows with one text count once, so that no split sees
    another's: of a folder the test part keeps them, then the validation part.

    Raises:
        RecipeError: if a row is not what it should be, or there are too few.
    """
    template = TEMPLATE if section.template is None else section.template
    candidates = section.candidates or CANDIDATES
    parts: dict[str, list[Example]] = {}
    seen: dict[str, tuple[Example, Row]] = {}
    for name, rows in read_parts(section).items():
        parts[name] = []
        for row in rows:
            example = Example(fill(template, row), candidates, label_of(row, len(candidates)))
            first, where = seen.setdefault(example.prompt.strip(), (example, row))
            if where is row:
                parts[name].append(example)
            elif first.label != example.label:
                raise RecipeError(
                    f"task.data: {where.place} and {row.place} have one text, but the labels {first.label} and "
                    f"{example.label}: keep one of them, or name a column in task.template that tells them apart"
                )
        if not parts[name]:
            raise RecipeError(f"task.data: {section.data} has no example in {name} that is not in another part")
    if len(parts) == 1:
        return split(parts["all"], section.train, section.dev, section.test, section.split_seed)
    counts = dict(zip(GIVEN, (section.test, section.dev, section.train), strict=True))
    drawn = {name: draw(parts[name], count, section.split_seed) for name, count in counts.items()}
    return Splits(train=drawn["train"], dev=drawn["validation"], test=drawn["test"])
