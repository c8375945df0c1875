"""The recipe: everything a run is made of, as one strict tree.

A recipe is a YAML file, safe-loaded, checked against the classes below and frozen; `key=value` on the command line
overrides single fields. The descriptions under the fields are the only documentation of the options: `train --help`
and docs/recipe.md are made from them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticUndefined

RECIPE_FILE = "recipe.yaml"  # the name of the resolved recipe in a run directory
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-6, without a dot, as text.
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _printable(value: str) -> str:
    if not value.isprintable() or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError("expected a name of printable characters, no part of a path longer than 255 bytes")
    return value


Real = Annotated[float, BeforeValidator(_number)]
Name = Annotated[str, AfterValidator(_printable)]


class Section(BaseModel):
    """A frozen part of a recipe: unknown keys are refused and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """The model that is tuned."""

    name: Name = Field(
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

    name: Name = Field(
        "sentiment", description="Which task reads the data and poses the question; `mezo-scale tasks` lists them."
    )
    data: Name = Field(
        description="A file in CSV, TSV, JSONL, JSON (an array of objects) or Parquet, its type by its name; a folder "
        "with one such file each for train, validation and test; or the name of a dataset on the hub (its train split)."
    )
    subset: Name | None = Field(
        None, description="Only the rows whose `source` column says this; for a dataset on the hub its configuration."
    )
    template: str | None = Field(
        None,
        description="The prompt, with the example's fields in braces, used exactly as written (white space included); "
        "null means the task's own.",
    )
    candidates: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=2,
        description="The answers, one per label and in the order of the labels; null means the task's own. For tasks "
        "that choose among the same answers for every row.",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of an answer at most, within max_length; null means 16. For answers that are written.",
    )
    train: int = Field(1000, ge=1, description="Examples to train on; at most, where the data is a folder of splits.")
    dev: int = Field(500, ge=1, description="Examples to evaluate on during the run; likewise.")
    test: int = Field(1000, ge=1, description="Examples for the result; no decision is taken on them. Likewise.")
    split_seed: int = Field(0, ge=0, lt=2**63, description="Seed of the permutation that splits the examples.")
    max_length: int = Field(
        256,
        ge=8,
        description="Longest sequence in tokens; the beginning of a longer prompt is cut off. A model with a table of "
        "positions must have as many.",
    )


class OptimizerSection(Section):
    """MeZO."""

    lr: Real = Field(1e-6, gt=0, allow_inf_nan=False, description="Learning rate.")
    eps: Real = Field(1e-3, gt=0, allow_inf_nan=False, description="How far the weights are perturbed either way.")
    check_eps: bool = Field(
        True,
        description="Before the first step, measure how much of the slope at this eps is rounding and how much "
        "curvature, in the time of a few steps, and say so in a line. Changes no result.",
    )
    estimator: Literal["spsa", "one_sided", "grouped"] = Field(
        "spsa",
        description="spsa: all rows see the same directions, from both sides. one_sided: likewise, from one side, with "
        "the mean over directions as the baseline; it needs num_directions of 2 or more and a small eps. grouped: "
        "every group_size rows have a direction of their own, from both sides.",
    )
    group_size: int | None = Field(
        None, ge=1, description="For grouped: rows that share a direction; it divides train.batch_size."
    )
    weight_decay: Real = Field(
        0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay; biases and normalisation are exempt."
    )
    num_directions: int = Field(
        1,
        ge=1,
        description="Random directions per step; each costs two forward passes, under one_sided one. Under grouped "
        "they follow from the groups.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the directions and of the order of the examples.")
    rounding: Literal["nearest", "stochastic", "master"] = Field(
        "nearest",
        description="How 16-bit weights take an update. nearest loses most small ones, stochastic keeps them on "
        "average; master keeps a float32 master of bfloat16 weights, at 2 bytes more per element. float32 weights "
        "need none of it.",
    )
    distribution: Literal["normal", "rademacher"] = Field(
        "normal", description="What directions are drawn from; rademacher is +1 and -1."
    )
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
    balance: Literal["none", "labels"] = Field(
        "none",
        description="labels: every group of rows (the whole step, unless the estimator is grouped) has each label as "
        "often, so that what moves all labels alike cancels; rows of rare labels come more often. For tasks whose rows "
        "have labels.",
    )
    sort_window: int = Field(
        0,
        ge=0,
        description="Steps whose rows are exchanged so that rows of like length share a step, which saves padding; 0 "
        "means none.",
    )
    objective: Name | None = Field(
        None,
        description="What is minimised; null means the task's own. Tasks that choose: candidates (cross-entropy over "
        "the candidates' scores, the mean log-probability of their tokens; the default), language_modeling (the loss "
        "on the right candidate's tokens, over the whole vocabulary; the default of copa and record). Tasks that "
        "write: language_modeling (the loss on the first right answer; the default), f1, exact_match (1 minus the "
        "score of what the model writes).",
    )
    eval_every: int = Field(500, ge=0, description="Steps between evaluations on the dev split; 0 means never.")
    eval_batch: int = Field(32, ge=1, description="Examples per forward pass on one rank in evaluations.")
    log_every: int = Field(10, ge=1, description="Steps between lines of progress where there is no terminal.")
    max_skipped: int = Field(
        10,
        ge=1,
        description="Steps in a row that may be skipped because a loss is not finite; after that many the run stops.",
    )
    hang_timeout: Real = Field(
        600.0,
        gt=0,
        description="Seconds that a step may wait for a rank that has not entered it or no longer answers, or ten "
        "times the slowest step before it if that is more; then the others name it and end.",
    )


class ShardingSection(Section):
    """How the weights are spread over the ranks. Changes no result beyond rounding, and may change between sessions."""

    strategy: Literal["single", "ddp", "fsdp2", "hsdp", "zero3"] = Field(
        "single",
        description="single: one rank holds the model. ddp: each rank does, and the rows are split; single on several "
        "ranks is the same. fsdp2: sharded over all ranks. hsdp: sharded inside groups of "
        "ranks, only scalars cross between the groups. zero3: DeepSpeed ZeRO-3.",
    )
    replicate: int | None = Field(
        None, ge=1, description="For hsdp: how many copies of the model there are; null means one per node."
    )
    cpu_offload: bool = Field(False, description="For fsdp2 and hsdp on GPUs: keep the shards in host memory.")
    ds_config: Name = Field("ds_configs/zero3.json", description="For zero3: DeepSpeed's own configuration file.")


class OutputSection(Section):
    """What is left behind."""

    dir: Name | None = Field(None, description="The run directory; null means runs/ and the recipe's file name.")
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

    Free are where the weights lie, what is written, how often is reported, when the run gives up, how the batch is cut
    up, and how many steps there are (a linear schedule then goes on along the line of the new length).
    """
    names = ("steps", "micro_batch", "eval_every", "eval_batch", "log_every", "max_skipped", "hang_timeout")
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
