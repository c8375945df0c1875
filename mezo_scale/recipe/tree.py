"""The recipe: everything a run is made of, as one strict tree.

A recipe is a YAML file, safe-loaded, checked against the classes of `sections` and frozen; `key=value` on the command
line overrides single fields.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from mezo_scale.recipe.method import SECTIONS, MethodSection, looks_at, takes_steps
from mezo_scale.recipe.sections import (
    ModelSection,
    OptimizerSection,
    OutputSection,
    Section,
    ShardingSection,
    TrainSection,
    TuneSection,
)
from mezo_scale.recipe.task import TaskSection

RECIPE_FILE = "recipe.yaml"  # the name of the resolved recipe in a run directory


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    task: TaskSection
    tune: TuneSection = TuneSection()
    method: MethodSection = MethodSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    sharding: ShardingSection = ShardingSection()
    output: OutputSection = OutputSection()

    @property
    def directory(self) -> Path:
        """The run directory. A recipe that was read from a file has one (`load` sees to it)."""
        assert self.output.dir is not None
        return Path(self.output.dir)


class Option(NamedTuple):
    """One field of the recipe, as the reference page and the help show it."""

    key: str
    type: str
    default: str
    description: str


def options() -> Iterator[Option]:
    """Every field of the recipe, in order."""
    for section_name in Recipe.model_fields:
        for name, field in section_of(section_name).model_fields.items():
            default = "required" if field.default is PydanticUndefined else _yaml(field.default)
            yield Option(f"{section_name}.{name}", _type(field.annotation), default, field.description or "")


def section_of(name: str) -> type[Section]:
    """The class of a section by its name."""
    kind = Recipe.model_fields[name].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    return kind


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def differences(recorded: Recipe, asked: Recipe) -> list[str]:
    """What keeps `asked` from continuing a run of `recorded`: "key: recorded, now asked", empty if nothing does.

    Free are where the weights lie, what is written, how often is reported and compared, when the run gives up, how the
    batch is cut up, and how many steps there are (a schedule then goes on along the curve of the new length).
    """
    names = ["steps", "micro_batch", "eval_every", "eval_batch", "log_every", "max_skipped", "hang_timeout"]
    names += ["snapshot_every", "keep_snapshots", "check_every", "patience"]
    free = {f"train.{name}" for name in names}
    before, after = recorded.model_dump(), asked.model_dump()
    return [
        f"{option.key}: {before[section][name]!r}, now {after[section][name]!r}"
        for option in options()
        for section, name in [option.key.split(".")]
        if section not in ("sharding", "output")
        and option.key not in {*free, "optimizer.check_eps"}
        and before[section][name] != after[section][name]
    ]


def ignored(recipe: Recipe) -> Iterator[str]:
    """The fields that say something other than their default, and that the recipe's method does not look at."""
    for section in SECTIONS:
        values = getattr(recipe, section)
        for name, field in type(values).model_fields.items():
            key = f"{section}.{name}"
            if not looks_at(recipe.method.name, key) and getattr(values, name) != field.default:
                yield key
    if not takes_steps(recipe.method.name) and recipe.tune.what not in ("full", "adapter"):
        yield "tune.what"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        return "list of text" if inner is str else f"list of {_type(inner)}"
    if get_origin(annotation) is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null"}
    return names.get(annotation) or " | ".join(_type(part) for part in get_args(annotation))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
