"""What every task comes down to: a prompt, the answers that may follow it, and which of them is right."""

from collections.abc import Sequence
from dataclasses import dataclass

from mezo_scale.errors import RecipeError
from mezo_scale.tasks.order import permutation


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: the text before the answer.
        candidates: the answers to choose from, each with its leading space if it has one.
        label: index of the right candidate.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Splits:
    """A task's examples, in three parts that share none."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]


def split(examples: Sequence[Example], train: int, dev: int, test: int, seed: int) -> Splits:
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


def draw(examples: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    """The first `count` examples of a seeded permutation, or all of them where there are fewer."""
    return tuple(examples[index] for index in permutation(seed, 0, len(examples))[:count])
