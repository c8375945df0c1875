"""Tasks whose data is running text: every token of it is predicted from those before it."""

from collections.abc import Mapping, Sequence

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Passage
from mezo_scale.tasks.rows import column, read_parts
from mezo_scale.tasks.splits import Splits
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import MODELING, Task

BETWEEN_ROWS = "\n\n"  # as transformers' guide to perplexity and the literature on quantisation join WikiText's
_TENTHS = (8, 9)  # where a text that does not come split is cut
_REFUSED = ("template", "candidates", "max_new_tokens", "k_per_class")


def running_text(about: str, *, takes: tuple[str, ...] = ()) -> Task:
    """A task of running text, in a column `text`, or the one that `task.text_column` names."""
    return Task(read, MODELING, about, ("text",), parts=parts, takes=takes)


def read(section: TaskSection) -> Splits[Passage]:
    """The texts of the three splits.

    Data that comes in one part is cut into three, of eight tenths, one and one, at the ends of lines: so no split moves
    when a recipe asks for fewer blocks, nor from model to model. Data with train and one other part has that one as the
    test; dev is the last tenth of train.

    Raises:
        RecipeError: the data is not there, a row has no text column, or a part has no text.
    """
    texts = _texts(section)
    first, *others = texts.values() if len(texts) == 1 else (texts.pop("train"), *texts.values())
    if not others:
        train, dev, test = _cut(first, *_TENTHS)
    elif len(others) == 1:
        (train, dev), (test,) = _cut(first, _TENTHS[1]), others
    else:
        train, dev, test = first, texts["validation"], texts["test"]
    for name, text in (("train", train), ("dev", dev), ("test", test)):
        if not text.strip():
            raise RecipeError(f"task.data: {section.data} leaves no text for {name}, expected more lines")
    seed = section.split_seed
    return Splits(
        train=(Passage(train, section.train, seed),),
        dev=(Passage(dev, section.dev, seed),),
        test=(Passage(test, section.test, seed),),
    )


def parts(section: TaskSection) -> Mapping[str, Sequence[Passage]]:
    """The texts as the data has them. Raises RecipeError as `read` does."""
    return {name: (Passage(text),) for name, text in _texts(section).items()}


def _texts(section: TaskSection) -> dict[str, str]:
    for name in _REFUSED:
        if getattr(section, name) is not None:
            raise RecipeError(
                f"task.{name} is given, but task.name is {section.name}, which poses no questions: leave it out"
            )
    name = section.text_column or "text"
    return {part: BETWEEN_ROWS.join(_text(row, name) for row in rows) for part, rows in read_parts(section).items()}


def _text(row: Row, name: str) -> str:
    """A row's text, which may be empty: a line of its own between two others."""
    value = column(row, name, "name the one that is meant in task.text_column")
    if not isinstance(value, str):
        raise RecipeError(f"task.data: {row.place} has {value!r:.60} in {name}, expected text")
    return value


def _cut(text: str, *tenths: int) -> list[str]:
    """The text in parts, each up to the end of the line that so many tenths of it lie in."""
    ends = [0]
    for tenth in tenths:
        at = len(text) * tenth // 10
        ends.append(max(ends[-1], text.find("\n", at) + 1 or at))
    return [text[start:end] for start, end in zip(ends, [*ends[1:], len(text)], strict=True)]
