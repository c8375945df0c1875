"""What a model is fitted to a task by: MeZO, or a baseline; and which fields of a recipe each of them looks at."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mezo_scale.recipe.sections import Real, Section

DEMONSTRATIONS = 32  # of a prompt, where the recipe does not say
Strength = Annotated[Real, Field(gt=0, allow_inf_nan=False)]


class MethodSection(Section):
    """MeZO, or a baseline on the same splits and by the same metric: `docs/how-to/compare.md`."""

    name: Literal["mezo", "adamw", "linear_probe", "icl", "zero_shot"] = Field(
        "mezo",
        description="mezo: forward passes only. adamw: fine-tuning by backpropagation, in one process or under fsdp2. "
        "linear_probe: logistic regression on the last hidden state of the prompt's last token; the model stays. icl: "
        "in-context learning, demonstrations before the prompt. zero_shot: the model as it is.",
    )
    demonstrations: int | None = Field(
        None,
        ge=1,
        description="For icl: examples of the train split before each prompt; what does not fit task.max_length is "
        "left out by whole demonstrations. null means 32, or all that there are.",
    )
    draws: int = Field(
        1, ge=1, description="For icl: how often demonstrations are drawn; the result is the mean over the draws."
    )
    strengths: tuple[Strength, ...] = Field(
        (0.001, 0.01, 0.1, 1.0, 10.0),
        strict=False,
        min_length=1,
        description="For linear_probe: inverse strengths of the L2 penalty (C), of which dev chooses.",
    )
    warmup: int = Field(0, ge=0, description="For mezo and adamw: steps over which the learning rate rises from 0.")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for name, methods in _FIELD_OF.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.name not in methods:
                raise ValueError(f"expected {name} only where name is {' or '.join(methods)}: leave one of them out")
        return self


_FIELD_OF = {
    "demonstrations": ("icl",),
    "draws": ("icl",),
    "strengths": ("linear_probe",),
    "warmup": ("mezo", "adamw"),
}

SECTIONS = ("optimizer", "train", "tune")
"""Those with fields that some methods do not look at."""

_EVALUATES = {"train.eval_batch", "train.objective", "tune.what", "tune.adapter"}
_ADAMW = {
    *(f"optimizer.{name}" for name in ("lr", "weight_decay", "seed", "schedule")),
    *(f"train.{name}" for name in ("steps", "batch_size", "micro_batch", "balance", "sort_window", "objective")),
    *(f"train.{name}" for name in ("eval_every", "eval_batch", "log_every", "patience")),
}
_LOOKS_AT = {
    "adamw": _ADAMW,
    "linear_probe": _EVALUATES,
    "icl": {*_EVALUATES, "optimizer.seed"},
    "zero_shot": _EVALUATES,
}


def looks_at(method: str, key: str) -> bool:
    """Whether a method looks at a field, `section.name`, of a recipe."""
    section, name = key.split(".")
    if section == "method":
        return method in _FIELD_OF.get(name, (method,))
    if method == "mezo" or section not in SECTIONS:
        return True
    return key in _LOOKS_AT[method] or (method == "adamw" and section == "tune")


def takes_steps(method: str) -> bool:
    """Whether weights are tuned, a step at a time."""
    return method in ("mezo", "adamw")
