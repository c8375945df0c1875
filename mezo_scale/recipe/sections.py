"""The sections of a recipe: what can be said about the model, the task, the method, the run.

The descriptions under the fields are the only documentation of the options: `train --help` and docs/recipe.md are made
from them.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-6, without a dot, as text.
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _printable(value: str) -> str:
    if not value.isprintable() or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError("expected a name of printable characters, no part of a path longer than 255 bytes")
    return value


Real = Annotated[float, BeforeValidator(_number)]
NUMBER = "a number"  # the name of a branch, which messages leave out
PositiveOrAuto = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number), Tag(NUMBER)]
    | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if value == "auto" else NUMBER),
]
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


class TuneSection(Section):
    """What is tuned; the rest of the model is frozen. `docs/how-to/adapters.md` has an example of each."""

    what: Literal["full", "lora", "prefix", "peft", "adapter", "head", "names"] = Field(
        "full",
        description="full: every weight. lora: low-rank matrices beside the model's own. prefix: keys and values "
        "before every text. peft: another method of PEFT. adapter: an adapter that is there already. head: the output "
        "embedding. names: the weights of some names.",
    )
    r: int = Field(8, ge=1, description="For lora: the rank.")
    alpha: int = Field(16, ge=1, description="For lora: its output counts alpha / r times.")
    target_modules: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="For lora: names of the linear modules, or all-linear alone; null means PEFT's choice for the type "
        "of model, mostly the query and value projections.",
    )
    num_virtual_tokens: int = Field(5, ge=1, description="For prefix: its length in tokens.")
    peft: dict[str, Any] | None = Field(
        None, description="For peft: the fields of PEFT's configuration, peft_type among them."
    )
    adapter: Name | None = Field(
        None, description="For adapter: the folder of an adapter of model.name, with its adapter_config.json."
    )
    names: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="For names: patterns of parameters' names, with * for any text, as in model.layers.0.*.",
    )
    init_seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of a new adapter's weights; null means optimizer.seed."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        """A field of another `what` would be ignored in silence."""
        for name, kinds in _FIELDS_OF.items():
            is_given = getattr(self, name) != type(self).model_fields[name].default
            if is_given and self.what not in kinds:
                raise ValueError(f"expected {name} only where what is {' or '.join(kinds)}: leave one of them out")
            if not is_given and kinds == (self.what,) and name == self.what:
                raise ValueError(f"expected {name} as well, since what is {name}")
        return self


_FIELDS_OF = {
    "r": ("lora",),
    "alpha": ("lora",),
    "target_modules": ("lora",),
    "num_virtual_tokens": ("prefix",),
    "peft": ("peft",),
    "adapter": ("adapter",),
    "names": ("names",),
    "init_seed": ("lora", "prefix", "peft"),
}
"""Which values of `tune.what` look at a field."""


class OptimizerSection(Section):
    """MeZO. AdamW takes lr, weight_decay, seed and schedule from here, in-context learning the seed of its draws."""

    lr: Real = Field(1e-6, gt=0, allow_inf_nan=False, description="Learning rate.")
    eps: PositiveOrAuto = Field(
        1e-3,
        description="How far the weights are perturbed either way. auto: before the first step, the power of two times "
        "0.001 with the least rounding and curvature in the slope; the trajectory keeps it.",
    )
    check_eps: bool = Field(
        False,
        description="Before the first step, measure roughly how much of the slope at this eps is rounding and how much "
        "curvature, in the time of six steps, and say so in a line. Changes no result.",
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
    distribution: Literal["normal", "rademacher", "low_rank"] = Field(
        "normal",
        description="What directions are drawn from; rademacher is +1 and -1. low_rank: matrices move by U V^T / "
        "sqrt(rank), which costs a step little more than its forward passes.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="For low_rank: columns of U and V, at most the smaller side of every matrix; null means 1.",
    )
    entries: Literal["signs", "normal"] | None = Field(
        None, description="For low_rank: what U and V, and vectors, are drawn from; null means signs, +1 and -1."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="The learning rate over the steps: as it is, or falling towards 0, linearly or as half a cosine; "
        "after method.warmup.",
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
        "on the right candidate's tokens, over the whole vocabulary; the default of copa, record and piqa), accuracy "
        "(1 where a wrong one is chosen). Tasks that write: language_modeling (the loss on the first right answer; the "
        "default), f1, exact_match (1 minus the score of what the model writes). Images: cross_entropy (the default), "
        "accuracy. What chooses or writes texts: module:function of your own, which scores them.",
    )
    eval_every: int = Field(500, ge=0, description="Steps between evaluations on the dev split; 0 means never.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Evaluations on dev in a row that may be no better than the best one by the main metric: the run "
        "then ends early, after the last of them. null means that it takes all of its steps.",
    )
    eval_batch: int = Field(32, ge=1, description="Examples per forward pass on one rank in evaluations.")
    snapshot_every: int = Field(
        500,
        ge=0,
        description="Steps between snapshots, checkpoints in the run directory from which a run goes on without "
        "replaying all of its steps; 0 means never. Bits and results do not depend on them.",
    )
    keep_snapshots: int = Field(
        2, ge=1, description="Snapshots that stay; for a moment there is one more. Each takes what a checkpoint does."
    )
    check_every: int = Field(
        100,
        ge=0,
        description="Steps between comparisons of the weights among ranks that hold the same ones; 0 means only at the "
        "start, before a snapshot and at the end.",
    )
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
    checkpoint: bool | Literal["best"] = Field(
        True,
        description="At the end, save an ordinary Hugging Face checkpoint in the run directory: true that of the last "
        "step, best that of the step which was best on dev by the main metric. With best the result on test is that "
        "step's too, which a replay rebuilds; for mezo.",
    )
    trackers: tuple[Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb"], ...] = (
        Field(
            (),
            strict=False,
            description="Where each step's numbers go besides metrics.jsonl and TensorBoard, as in [wandb]; log in to "
            "them in their own ways.",
        )
    )
