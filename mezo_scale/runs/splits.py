"""A task's splits, ready for a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from mezo_scale import tasks
from mezo_scale.models import checkpoints
from mezo_scale.recipe import Recipe
from mezo_scale.tasks.encoding import Encoded, encode


@dataclass(frozen=True)
class EncodedSplits:
    """A task's splits in a model's tokens."""

    train: Sequence[Encoded]
    dev: Sequence[Encoded]
    test: Sequence[Encoded]

    @classmethod
    def read(cls, recipe: Recipe) -> "EncodedSplits":
        """Raises RecipeError or ModelError if the data or the tokenizer is not there or does not fit."""
        splits = tasks.load(recipe.task)
        tokenizer = checkpoints.load_tokenizer(recipe.model.name)
        parts = (splits.train, splits.dev, splits.test)
        return cls(*([encode(example, tokenizer, recipe.task.max_length) for example in part] for part in parts))
