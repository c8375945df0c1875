"""What a run's result rests on besides its recipe, as digests by name: results on different things share no table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo_scale import tasks
from mezo_scale.models import adapters, checkpoints
from mezo_scale.models.fingerprints import of_config, of_examples, of_files, of_processor
from mezo_scale.recipe import Recipe
from mezo_scale.runs.splits import prepare
from mezo_scale.tasks import Kind


def inputs_of(recipe: Recipe, kind: Kind[Any, Any], examples: str, processor: Any) -> dict[str, str]:
    """The digests of the examples, the weights, the configuration, the tokenizer, and of a user's objective or adapter.

    Args:
        examples: `of_examples` of the task's splits.
    """
    name, adapter = recipe.model.name, recipe.tune.adapter
    return {
        "data": examples,
        "weights": of_files(checkpoints.weight_files(name)),
        "config": of_config(checkpoints.find(name)),
        **of_processor(processor),
        **({} if kind.reward is None else {"objective": kind.reward.digest}),
        **({} if adapter is None else {"adapter": of_files([Path(adapter) / adapters.WEIGHTS_FILE])}),
    }


def inputs_now(recipe: Recipe) -> dict[str, str]:
    """What a recipe's run would rest on if it began now. Raises RecipeError or ModelError if it is not all there."""
    recipe, kind = prepare(recipe)
    examples = of_examples(tasks.load(recipe.task))
    return inputs_of(recipe, kind, examples, checkpoints.load_processor(recipe.model.name))


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What two results do not have in common, in words; empty if nothing that is known of both."""
    return " and ".join(name for name in sorted(one.keys() & other.keys()) if one[name] != other[name])
