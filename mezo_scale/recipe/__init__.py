"""The recipe of a run: its `sections`, the whole `tree`, its `reading` and its `reference` page."""

from mezo_scale.recipe.method import MethodSection, looks_at, takes_steps
from mezo_scale.recipe.paths import means_disk
from mezo_scale.recipe.reading import load, parse
from mezo_scale.recipe.reference import reference
from mezo_scale.recipe.sections import ModelSection, ShardingSection, TrainSection, TuneSection
from mezo_scale.recipe.task import TaskSection
from mezo_scale.recipe.tree import (
    RECIPE_FILE,
    Option,
    Recipe,
    differences,
    dump,
    options,
)

__all__ = [
    "RECIPE_FILE",
    "MethodSection",
    "ModelSection",
    "Option",
    "Recipe",
    "ShardingSection",
    "TaskSection",
    "TrainSection",
    "TuneSection",
    "differences",
    "dump",
    "load",
    "looks_at",
    "means_disk",
    "options",
    "parse",
    "reference",
    "takes_steps",
]
