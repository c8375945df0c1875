"""From rows to examples, and from examples to three splits that share none."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.order import permutation
from mezo_scale.tasks.rows import GIVEN, read_parts
from mezo_scale.tasks.tables import Row


class Posed(Protocol):
    """What is known of an example of any kind."""

    @property
    def asked(self) -> Hashable: ...

    def contradicts(self, other: Any) -> str | None: ...


E = TypeVar("E", bound=Posed)


@dataclass(frozen=True)
class Splits(Generic[E]):
    """A task's examples, in three parts that share none."""

    train: tuple[E, ...]
    dev: tuple[E, ...]
    test: tuple[E, ...]


def read_splits(section: TaskSection, make: Callable[[Row], E]) -> Splits[E]:
    """Reads the data, as `read_examples` does, and splits it where it does not come split.

    Raises:
        RecipeError: as `read_examples` does; or there are too few examples.
    """
    parts = read_examples(section, make)
    if len(parts) == 1:
        return split(parts["all"], section.train, section.dev, section.test, section.split_seed)
    counts = dict(zip(GIVEN, (section.test, section.dev, section.train), strict=True))
    drawn = {name: draw(parts[name], count, section.split_seed) for name, count in counts.items()}
    return Splits(train=drawn["train"], dev=drawn["validation"], test=drawn["test"])


def read_examples(section: TaskSection, make: Callable[[Row], E]) -> Mapping[str, Sequence[E]]:
    """All examples in the order of the data: of a folder by the names in GIVEN, else under "all".

    Rows that ask the same count once, so that no split sees another's: of a folder the test part keeps them, then the
    validation part.

    Args:
        make: the example of a row; raises RecipeError for a row that is not what it should be.

    Raises:
        RecipeError: the data is not there, a row is wrong, or two rows contradict each other.
    """
    parts: dict[str, list[E]] = {}
    seen: dict[Hashable, tuple[E, Row]] = {}
    for name, rows in read_parts(section).items():
        parts[name] = []
        for row in rows:
            example = make(row)
            first, where = seen.setdefault(example.asked, (example, row))
            if where is row:
                parts[name].append(example)
            elif problem := first.contradicts(example):
                raise RecipeError(
                    f"task.data: {where.place} and {row.place} have one text, but {problem}: keep one of them, or "
                    "name a column in task.template that tells them apart"
                )
        if not parts[name]:
            raise RecipeError(f"task.data: {section.data} has no example in {name} that is not in another part")
    return parts


def split(examples: Sequence[E], train: int, dev: int, test: int, seed: int) -> Splits[E]:
    """Deals the examples out by a seeded permutation. The test split does not move when `train` or `dev` changes.

    Raises:
        RecipeError: if there are fewer examples than asked for.
    """
    asked = train + dev + test
    if asked > len(examples):
        raise RecipeError(
            f"task.train {train} + task.dev {dev} + task.test {test} = {asked}, but the data has {len(examples)} "
            "different examples: ask for fewer"
        )
    drawn = draw(examples, asked, seed)
    return Splits(test=drawn[:test], dev=drawn[test : test + dev], train=drawn[test + dev :])


def draw(examples: Sequence[E], count: int, seed: int) -> tuple[E, ...]:
    """The first `count` examples of a seeded permutation, or all of them where there are fewer."""
    return tuple(examples[index] for index in permutation(seed, 0, len(examples))[:count])
