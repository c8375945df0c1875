"""The recipe of a run: its fields (`tree`), its reading (`reading`) and its reference page (`reference`)."""

from mezo_scale.recipe.paths import means_disk
from mezo_scale.recipe.reading import load, parse
from mezo_scale.recipe.reference import reference
from mezo_scale.recipe.tree import (
    RECIPE_FILE,
    ModelSection,
    Option,
    Recipe,
    ShardingSection,
    TaskSection,
    TuneSection,
    differences,
    dump,
    options,
)

__all__ = [
    "RECIPE_FILE",
    "ModelSection",
    "Option",
    "Recipe",
    "ShardingSection",
    "TaskSection",
    "TuneSection",
    "differences",
    "dump",
    "load",
    "means_disk",
    "options",
    "parse",
    "reference",
]
