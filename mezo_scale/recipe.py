"""The recipe: everything a run is made of, as one strict tree.

A recipe is a YAML file, safe-loaded, checked against the classes below and frozen; `key=value` on the command line
overrides single fields. The descriptions under the fields are the only documentation of the options: `train --help`
and docs/recipe.md are made from them.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from mezo_scale.errors import RecipeError

RECIPE_FILE = "recipe.yaml"  # the name of the resolved recipe in a run directory
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-6, without a dot, as text.
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


Real = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """A frozen part of a recipe: unknown keys are refused and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """The model that is tuned."""

    name: str = Field(
        description="A folder with a Hugging Face checkpoint (safetensors), a name on the hub, or random:SHAPE, as in "
        "random:opt-66b: random weights of a published shape, to rehearse with."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="What the weights are stored in. float32 is the master that loses no small update; the 16-bit "
        "types halve the memory and lose most updates of a small learning rate.",
    )
    compute_dtype: Literal["bfloat16"] | None = Field(
        None,
        description="What the forward pass computes in; null means as stored. Under fsdp2 and hsdp the weights are "
        "gathered in it (half the traffic), elsewhere it is autocast.",
    )


class TaskSection(Section):
    """The task and its data."""

    name: str = Field("sentiment", description="Which task reads the data and poses the question.")
    data: str = Field(description="A CSV file, or the name of a dataset on the hub.")
    subset: str | None = Field(
        None, description="Only the rows whose `source` column says this; for a dataset on the hub its configuration."
    )
    template: str | None = Field(
        None, description="The prompt, with the example's fields in braces; null means the task's own."
    )
    candidates: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=2,
        description="The answers, one per label and in the order of the labels; null means the task's own.",
    )
    train: int = Field(1000, ge=1, description="Examples to train on.")
    dev: int = Field(500, ge=1, description="Examples to evaluate on during the run.")
    test: int = Field(1000, ge=1, description="Examples for the result; no decision is taken on them.")
    split_seed: int = Field(0, ge=0, lt=2**63, description="Seed of the permutation that splits the examples.")
    max_length: int = Field(
        256, ge=8, description="Longest sequence in tokens; the beginning of a longer prompt is cut off."
    )


class OptimizerSection(Section):
    """MeZO."""

    lr: Real = Field(1e-6, gt=0, allow_inf_nan=False, description="Learning rate.")
    eps: Real = Field(1e-3, gt=0, allow_inf_nan=False, description="How far the weights are perturbed either way.")
    weight_decay: Real = Field(
        0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay; biases and normalisation are exempt."
    )
    num_directions: int = Field(1, ge=1, description="Random directions per step; each costs two forward passes.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the directions and of the order of the examples.")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="The learning rate over the steps: as it is, or falling linearly towards 0."
    )


class TrainSection(Section):
    """The run."""

    steps: int = Field(20_000, ge=1, description="Steps in all, those of a continued run included.")
    batch_size: int = Field(16, ge=1, description="Examples per step over all ranks together.")
    micro_batch: int | None = Field(
        None, ge=1, description="Examples per forward pass on one rank, to bound activation memory; null means all."
    )
    objective: Literal["candidates", "language_modeling"] = Field(
        "candidates",
        description="candidates: cross-entropy over the candidates' scores (the mean log-probability of their tokens). "
        "language_modeling: the loss on the right candidate's tokens, over the whole vocabulary.",
    )
    eval_every: int = Field(500, ge=0, description="Steps between evaluations on the dev split; 0 means never.")
    eval_batch: int = Field(32, ge=1, description="Examples per forward pass on one rank in evaluations.")
    log_every: int = Field(10, ge=1, description="Steps between lines of progress where there is no terminal.")


class ShardingSection(Section):
    """How the weights are spread over the ranks. Changes no result beyond rounding, and may change between sessions."""

    strategy: Literal["single", "fsdp2", "hsdp", "zero3"] = Field(
        "single",
        description="single: each rank holds the model. fsdp2: sharded over all ranks. hsdp: sharded inside groups of "
        "ranks, only scalars cross between the groups. zero3: DeepSpeed ZeRO-3.",
    )
    replicate: int | None = Field(
        None, ge=1, description="For hsdp: how many copies of the model there are; null means one per node."
    )
    cpu_offload: bool = Field(False, description="For fsdp2 and hsdp on GPUs: keep the shards in host memory.")
    ds_config: str = Field("ds_configs/zero3.json", description="For zero3: DeepSpeed's own configuration file.")


class OutputSection(Section):
    """What is left behind."""

    dir: str | None = Field(None, description="The run directory; null means runs/ and the recipe's file name.")
    checkpoint: bool = Field(
        True, description="At the end, save an ordinary Hugging Face checkpoint in the run directory."
    )


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    task: TaskSection
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    sharding: ShardingSection = ShardingSection()
    output: OutputSection = OutputSection()


class Option(NamedTuple):
    """One field of the recipe, as the reference page and the help show it."""

    key: str
    type: str
    default: str
    description: str


def options() -> Iterator[Option]:
    """Every field of the recipe, in order."""
    for section_name, section in Recipe.model_fields.items():
        for name, field in section.annotation.model_fields.items():
            default = "required" if field.default is PydanticUndefined else _yaml(field.default)
            yield Option(f"{section_name}.{name}", _type(field.annotation), default, field.description)


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, or the one in a run directory, which then is its own `output.dir`.

    `overrides` are `section.field=value`, the value in YAML; a field's bare name will do where it is the only one.

    Raises:
        RecipeError: in one line, for whatever is wrong with the file, a key or a value.
    """
    source = Path(source)
    path = source / RECIPE_FILE if source.is_dir() else source
    if not path.is_file():
        found = f"the folder {source} holds no {RECIPE_FILE}" if source.is_dir() else f"there is no file {source}"
        raise RecipeError(f"{found}: give a recipe (YAML) or the directory of a run")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {_describe(tree)}, expected sections ({', '.join(Recipe.model_fields)})")
    for override in overrides:
        _override(tree, override)
    recipe = parse(tree, str(path))
    directory = str(source) if source.is_dir() else recipe.output.dir or str(Path("runs") / path.stem)
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": directory})})


def parse(tree: dict[str, Any], origin: str = "the recipe") -> Recipe:
    """Checks a tree of plain values. Raises RecipeError, in one line that names the key."""
    try:
        # A section whose fields are all commented out is read as null.
        return Recipe.model_validate({key: {} if value is None else value for key, value in tree.items()})
    except ValidationError as error:
        # A misspelt key explains the one that is missing.
        first, *others = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise RecipeError(f"{origin}: {_explain(first)}{more}") from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def differences(recorded: Recipe, asked: Recipe) -> list[str]:
    """What keeps `asked` from continuing a run of `recorded`: "key: recorded, now asked", empty if nothing does.

    Free are where the weights lie, what is written, how often is reported, how the batch is cut up, and how many steps
    there are (a linear schedule then goes on along the line of the new length).
    """
    free = {"train.steps", "train.micro_batch", "train.eval_every", "train.eval_batch", "train.log_every"}
    before, after = recorded.model_dump(), asked.model_dump()
    return [
        f"{option.key}: {before[section][name]!r}, now {after[section][name]!r}"
        for option in options()
        for section, name in [option.key.split(".")]
        if section not in ("sharding", "output")
        and option.key not in free
        and before[section][name] != after[section][name]
    ]


def means_disk(name: str) -> bool:
    """Whether a name of a model or of data can only be a path: hub names are `name` or `owner/name`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".csv")


def reference() -> str:
    """The reference page of the recipe, in Markdown."""
    lines = [
        "# The recipe",
        "",
        "Made by `mezo-scale recipe` from the descriptions in `mezo_scale/recipe.py`; a test keeps it up to date.",
        "",
        "A recipe is a YAML file of sections. `mezo-scale train RECIPE.yaml section.field=value ...` overrides single",
        "fields; a field's bare name will do where it is the only one of that name (`steps=200`). Unknown keys and",
        "wrong types are refused. The recipe of a run, every field written out, is kept in the run directory.",
    ]
    section = None
    for option in options():
        if section != option.key.split(".")[0]:
            section = option.key.split(".")[0]
            about = Recipe.model_fields[section].annotation.__doc__
            lines += ["", f"## {section}", "", about, "", "| field | type | default | |", "|---|---|---|---|"]
        kind = option.type.replace("|", "\\|")
        lines.append(f"| `{option.key}` | {kind} | `{option.default}` | {option.description} |")
    return "\n".join(lines) + "\n"


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"found {override!r} after the recipe, expected key=value")
    known = [option.key for option in options()]
    if "." not in key:
        matches = [name for name in known if name.endswith(f".{key}")]
        if len(matches) > 1:
            raise RecipeError(f"{key}= could be {' or '.join(matches)}: write the one you mean in full")
        key = matches[0] if matches else key
    if key not in known:
        raise RecipeError(f"{override}: unknown key {key}{_did_you_mean(key, known)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"{override}: {text!r} is not a YAML value; quote it for YAML and for the shell") from None
    section, name = key.split(".")
    if tree.get(section) is None:
        tree[section] = {}
    if isinstance(tree[section], dict):  # otherwise the check of the whole says what is wrong
        tree[section][name] = value


def _explain(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [*Recipe.model_fields] if len(error["loc"]) == 1 else []
        return f"unknown key {key}{_did_you_mean(key, [*known, *(option.key for option in options())])}"
    if error["type"] == "missing":
        return f"{key} is missing: it has no default"
    if error["type"] == "model_type":
        return f"{key}: found {_describe(error['input'])}, expected fields of a section"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Tuple should have ")
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ").split(" after validation")[0]
    return f"{key}: found {_describe(error['input'])}, expected {expected}"


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # the right field in another section, or without one
        leaf = key.split(".")[-1]
        close = difflib.get_close_matches(leaf, [name.split(".")[-1] for name in known], n=1, cutoff=0.75)
        close = [name for name in known if close and name.split(".")[-1] == close[0]][:1]
    return f"; did you mean {close[0]}?" if close else "; docs/recipe.md lists them all"


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {str: "text", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "a tree"}
    return f"{value!r} ({kinds.get(type(value), type(value).__name__)})"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return "list of text"
    names = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null"}
    return names.get(annotation) or " | ".join(_type(part) for part in get_args(annotation))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value).removesuffix("...\n").strip()
