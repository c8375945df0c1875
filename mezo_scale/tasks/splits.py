"""From rows to examples, and from examples to three splits that share none."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example, Picture, Question
from mezo_scale.tasks.order import permutation
from mezo_scale.tasks.rows import read_parts
from mezo_scale.tasks.tables import Row


class Posed(Protocol):
    """What is known of an example of any kind."""

    @property
    def asked(self) -> Hashable: ...

    def contradicts(self, other: Any) -> str | None: ...


Item = TypeVar("Item")
E = TypeVar("E", bound=Posed)


@dataclass(frozen=True)
class Splits(Generic[Item]):
    """A task's examples, in three parts that share none."""

    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: tuple[Item, ...]


def read_splits(section: TaskSection, make: Callable[[Row], E | None]) -> Splits[E]:
    """Reads the data, as `read_examples` does, and splits it where it does not come split.

    Data with train and one other part has that one as the test; dev is dealt out of train.

    Raises:
        RecipeError: as `read_examples` does; there are too few examples, or all have one label.
    """
    parts = dict(read_examples(section, make))
    test = next((parts.pop(name) for name in ("test", "validation") if name in parts), None)
    first, *others = parts.values() if len(parts) == 1 else (parts["train"], parts["validation"])
    _check_labels(first)
    seed, k = section.split_seed, section.k_per_class
    if k is not None:
        found = _few_shot(section, k, first, test, others)
    elif others:
        found = Splits(
            train=draw(first, section.train, seed),
            dev=draw(others[0], section.dev, seed),
            test=draw(test or (), section.test, seed),
        )
    elif test is None:
        found = split(first, section.train, section.dev, section.test, seed)
    else:
        found = replace(split(first, section.train, section.dev, 0, seed), test=draw(test, section.test, seed))
    return found


def _few_shot(
    section: TaskSection, k: int, train: Sequence[E], test: Sequence[E] | None, dev: Sequence[Sequence[E]]
) -> Splits[E]:
    """k examples of each class for train and for dev; the test is what it is without k."""
    seed = section.split_seed
    if test is None:
        if section.test > len(train):
            raise RecipeError(
                f"task.test is {section.test}, but the data has {len(train)} different examples: ask for fewer"
            )
        drawn = draw(train, len(train), seed)
        tested, rest = drawn[: section.test], drawn[section.test :]
    else:
        tested, rest = draw(test, section.test, seed), draw(train, len(train), seed)
    if dev:
        (trained,), (developed,) = (
            _of_each_class(section, part, k, 1) for part in (rest, draw(dev[0], len(dev[0]), seed))
        )
    else:
        trained, developed = _of_each_class(section, rest, k, 2)
    return Splits(train=trained, dev=developed, test=tested)


def _of_each_class(section: TaskSection, examples: Sequence[E], k: int, parts: int) -> list[tuple[E, ...]]:
    """As many parts as asked for, each with k examples of each class, the first ones that are left."""
    if not examples:
        raise RecipeError(
            f"task.k_per_class is {k}, but none of the {section.test} examples is outside the test: ask for a smaller "
            "task.test"
        )
    known = _classes(examples)
    if known is None:
        raise RecipeError(
            f"task.k_per_class is {k}, but the rows of task.name={section.name} share no classes: leave it out"
        )
    classes, labels = known
    counts = dict.fromkeys(classes, 0)
    dealt: list[list[E]] = [[] for _ in range(parts)]
    for example, label in zip(examples, labels, strict=True):
        if counts[label] < k * parts:
            dealt[counts[label] // k].append(example)
        counts[label] += 1
    least = min(classes, key=counts.__getitem__)
    if counts[least] < k * parts:
        raise RecipeError(
            f"task.k_per_class is {k}, which takes {k * parts} rows of each class, but {least!r:.40} has "
            f"{counts[least]} of {len(examples)} outside the test: ask for fewer, or for a smaller task.test"
        )
    return [tuple(part) for part in dealt]


def _classes(examples: Sequence[Posed]) -> tuple[list[str], list[str]] | None:
    """The classes that examples share, and each example's; None where they share none. Images have those that occur."""
    shown = _shown(examples)
    if shown is not None:
        return sorted(set(shown)), shown
    shared = {getattr(example, "candidates", None) for example in examples}
    candidates = shared.pop()
    if shared or candidates is None:
        return None
    # What has candidates has one of them as its label, an example from outside too.
    return [*candidates], [candidates[example.label] for example in examples]  # type: ignore[attr-defined]


def _shown(examples: Sequence[Posed]) -> list[str] | None:
    """The labels of images, which may be numbers or names; None of other examples."""
    labels = [str(example.label) for example in examples if isinstance(example, Picture)]
    return labels if len(labels) == len(examples) else None


def _check_labels(train: Sequence[E]) -> None:
    """Raises RecipeError where there is nothing to tell apart: several examples, and one right answer for all."""
    right = {(example.candidates, example.label) for example in train if isinstance(example, Example)}
    shown = set(_shown(train) or ()) or (
        {candidates[label] for candidates, label in right} if len(right) == 1 else set()
    )
    if len(shown) == 1 and len(train) > 1:
        raise RecipeError(
            f"task.data: all {len(train)} examples for training have the label of {shown.pop()!r:.40}, "
            "expected several of the candidates: give data with rows of others"
        )


def read_examples(section: TaskSection, make: Callable[[Row], E | None]) -> Mapping[str, Sequence[E]]:
    """All examples in the order of the data: of a folder or the hub by the names in GIVEN, else under "all".

    Rows that ask the same count once, so that no split sees another's: of a folder the test part keeps them, then the
    validation part. All answers written to a question are right.

    Args:
        make: the example of a row, None for one that is left out; raises RecipeError for a row that is not what it
            should be.

    Raises:
        RecipeError: the data is not there, a row is wrong, or two rows contradict each other.
    """
    parts: dict[str, list[E]] = {}
    seen: dict[Hashable, tuple[list[E], int, Row]] = {}  # where it lies, and its row
    for name, rows in read_parts(section).items():
        parts[name] = []
        for row in rows:
            example = make(row)
            if example is None:
                continue
            part, at, where = seen.setdefault(example.asked, (parts[name], len(parts[name]), row))
            if where is row:
                part.append(example)
                continue
            first = part[at]
            if isinstance(first, Question) and isinstance(example, Question):
                part[at] = replace(first, answers=tuple(dict.fromkeys((*first.answers, *example.answers))))
            elif problem := first.contradicts(example):
                raise RecipeError(
                    f"task.data: {where.place} and {row.place} ask the same, but {problem}: keep one of them, or "
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


def draw(examples: Sequence[Item], count: int, seed: int) -> tuple[Item, ...]:
    """The first `count` examples of a seeded permutation, or all of them where there are fewer."""
    return tuple(examples[index] for index in permutation(seed, 0, len(examples))[:count])
