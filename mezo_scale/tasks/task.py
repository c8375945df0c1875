"""What a task is, for those who list tasks and those who run them. Nothing here imports torch, which kinds need."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.splits import Splits, read_examples, read_splits
from mezo_scale.tasks.tables import Row

if TYPE_CHECKING:
    from mezo_scale.tasks.kinds.kind import Kind

SOME_TAKE = ("label_column", "labels", "answer_column", "text_column", "image_column")

Pose = Callable[[TaskSection, Row], Any]
"""The example of a row, or None where a row has none.

Raises RecipeError if the row is not what it should be, or the section does not fit.
"""


@dataclass(frozen=True)
class NamedKind:
    """A kind of this package, imported when a run makes it.

    Attributes:
        name: of its module in `kinds/`.
        made_by: the class in it.
        metric: the main metric of its scores.
        reads_images: whether it is for image classifiers; else for language models.
    """

    name: str
    made_by: str
    metric: str
    reads_images: bool = False

    def __call__(self, tokenizer: Any, section: TaskSection) -> "Kind[Any, Any]":
        module = importlib.import_module(f"mezo_scale.tasks.kinds.{self.name}")
        kind: Kind[Any, Any] = getattr(module, self.made_by)(tokenizer, section)
        return kind


CHOOSING = NamedKind("candidates", "Candidates", "accuracy")
WRITING = NamedKind("generation", "Generation", "f1")
CHATTING = NamedKind("chat", "Chat", "f1")
FILLING_IN = NamedKind("cloze", "ClozeChoice", "accuracy")
MODELING = NamedKind("modeling", "Modeling", "perplexity")
SEEING = NamedKind("images", "Images", "accuracy", reads_images=True)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        load: its examples, from the recipe's section.
        kind: makes its kind for a run, from the model's tokenizer, or what it reads images with, and the recipe's
            section.
        about: what it is, in a few words.
        columns: what its data must have.
        parts: all its examples in the order of its data, by the parts that the data has; None where that can't be said.
        objective: what is minimised where a recipe does not say; None: the kind's first.
        takes: the fields of the recipe's section that only some tasks read (SOME_TAKE), those of them that it does.
        cloze: its template for masked language models, with {mask}; empty where a recipe has to give one; None where
            it can't be posed so.
    """

    load: Callable[[TaskSection], Splits[Any]]
    kind: "Callable[[Any, TaskSection], Kind[Any, Any]]"
    about: str = ""
    columns: tuple[str, ...] = ()
    parts: Callable[[TaskSection], Mapping[str, Sequence[Any]]] | None = None
    objective: str | None = None
    takes: tuple[str, ...] = ()
    cloze: str | None = None

    @classmethod
    def of_rows(
        cls,
        pose: Pose,
        kind: NamedKind,
        about: str,
        columns: tuple[str, ...],
        objective: str | None = None,
        takes: tuple[str, ...] = (),
        cloze: str | None = None,
    ) -> "Task":
        """A task that makes one example of each row of its data."""

        def posed(section: TaskSection, row: Row) -> Any:
            example = pose(section, row)
            if not section.calibrate or type(example) is not Example:
                return example
            neutral = section.neutral_prompt
            if neutral is None:
                neutral = pose(section, replace(row, blank=frozenset(map(str, row.fields)))).prompt
            return replace(example, neutral=neutral)

        def load(section: TaskSection) -> Splits[Any]:
            return read_splits(section, partial(posed, section))

        def parts(section: TaskSection) -> Mapping[str, Sequence[Any]]:
            return read_examples(section, partial(posed, section))

        return cls(load, kind, about, columns, parts, objective, takes, cloze)
