"""Tasks. A task reads its data and names the kind it is of; what follows (training, evaluation, reports) knows kinds.

A new task is one file in `suite/` and one line in _TASKS; one from outside the package is `register`ed. A new kind is
one module in `kinds/`.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, TaskSection, takes_steps
from mezo_scale.tasks.example import Dialogue, Example, Passage, Picture, Question
from mezo_scale.tasks.own import ANSWER, CHAT, CHOICE, IMAGE, TEXT
from mezo_scale.tasks.reward import Reward, is_reward
from mezo_scale.tasks.rows import has_mask
from mezo_scale.tasks.splits import Splits, split
from mezo_scale.tasks.suite import (
    aqua,
    boolq,
    cb,
    cifar10,
    copa,
    drop,
    mnli,
    multirc,
    piqa,
    record,
    rte,
    sentiment,
    snli,
    squad,
    sst2,
    sst5,
    trec,
    wic,
    wikitext,
    wsc,
)
from mezo_scale.tasks.task import FILLING_IN, SOME_TAKE, NamedKind, Task

if TYPE_CHECKING:
    from mezo_scale.tasks.kinds.kind import Kind
    from mezo_scale.tasks.score import Metric, Score

__all__ = [
    "Dialogue",
    "Example",
    "Kind",
    "Metric",
    "NamedKind",
    "Passage",
    "Picture",
    "Question",
    "Score",
    "Splits",
    "Task",
    "examples",
    "kind_of",
    "known",
    "load",
    "objective_of",
    "posed_to",
    "register",
    "split",
]


_TASKS: dict[str, Task] = {
    "choice": CHOICE,
    "answer": ANSWER,
    "chat": CHAT,
    "text": TEXT,
    "image": IMAGE,
    "sentiment": sentiment.TASK,
    "sst2": sst2.TASK,
    "rte": rte.TASK,
    "cb": cb.TASK,
    "boolq": boolq.TASK,
    "wsc": wsc.TASK,
    "wic": wic.TASK,
    "multirc": multirc.TASK,
    "copa": copa.TASK,
    "record": record.TASK,
    "squad": squad.TASK,
    "drop": drop.TASK,
    "sst5": sst5.TASK,
    "trec": trec.TASK,
    "snli": snli.TASK,
    "mnli": mnli.TASK,
    "piqa": piqa.TASK,
    "aqua": aqua.TASK,
    "wikitext": wikitext.TASK,
    "cifar10": cifar10.TASK,
}

_LATER = {
    "Kind": "mezo_scale.tasks.kinds.kind",
    "Metric": "mezo_scale.tasks.score",
    "Score": "mezo_scale.tasks.score",
}


def __getattr__(name: str) -> Any:
    """These need torch, which takes seconds to import; reading and listing tasks does not."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def known() -> Mapping[str, Task]:
    """All tasks that recipes of this process can name."""
    return dict(_TASKS)


def register(name: str, task: Task) -> None:
    """Adds a task that recipes of this process can then name. Raises ValueError if there is one of that name."""
    if name in _TASKS:
        raise ValueError(f"there is a task {name!r} already: give another name")
    _TASKS[name] = task


def posed_to(section: TaskSection, masked: bool, images: bool = False) -> TaskSection:
    """The section as it is posed to a model: to a masked language model by the task's cloze, if it has no template.

    A task whose kind is from outside the package is left alone: the kind knows which models it is for.

    Args:
        masked: whether it is a masked language model, or a causal one.
        images: whether it is an image classifier, and no language model at all.

    Raises:
        RecipeError: the task or the prompt is for models of another sort, or there is none.
    """
    task, template = _find(section), section.template
    if not isinstance(task.kind, NamedKind):
        return section
    _check_sort(section, task.kind, images)
    if images:
        return section
    if not masked:
        if has_mask(template):
            raise RecipeError(
                f"task.template {template!r} has a mask, but model.name is a causal language model, which goes on "
                "after a text: leave {mask} and what follows it out, or give a masked language model, like RoBERTa"
            )
        return section
    if task.cloze is None:
        raise RecipeError(
            f"model.name is a masked language model, which fills in one token, and task.name is {section.name}, which "
            "can't be asked so: give a causal language model, or another task"
        )
    if template is None and task.cloze:
        return section.model_copy(update={"template": task.cloze})
    if not has_mask(template):
        found = "missing" if template is None else repr(template)
        raise RecipeError(
            f"task.template is {found}, but model.name is a masked language model, which answers at a mask: write "
            "{mask} where the answer stands, as in {text} It was {mask}."
        )
    return section


def load(section: TaskSection) -> Splits[Any]:
    """The examples of the task that the recipe names. Raises RecipeError if there is none, or its data is wrong."""
    return _find(section).load(section)


def examples(section: TaskSection) -> Mapping[str, Sequence[Any]]:
    """All examples of the recipe's task, in the order of its data: by train, validation and test, or under "all".

    Raises:
        RecipeError: there is no such task, its data is wrong, or it does not read rows.
    """
    parts = _find(section).parts
    if parts is None:
        raise RecipeError(f"task.name: {section.name} does not read its data row by row, expected a task that does")
    return parts(section)


def kind_of(section: TaskSection, processor: Any) -> "Kind[Any, Any]":
    """The kind of the recipe's task, for a run. Raises RecipeError if there is no such task, or it does not fit.

    Args:
        processor: the model's tokenizer, or what it reads images with, which says so by `reads_images`.
    """
    task = _find(section)
    if isinstance(task.kind, NamedKind):
        _check_sort(section, task.kind, getattr(processor, "reads_images", False))
    is_cloze = task.cloze is not None and has_mask(section.template)
    kind = (FILLING_IN if is_cloze else task.kind)(processor, section)
    if section.neutral_prompt is not None and not section.calibrate:
        raise RecipeError("task.neutral_prompt is given, but task.calibrate is false: set it to true, or leave it out")
    if section.calibrate and not kind.calibrates:
        what = "a cloze" if is_cloze else "a task"
        raise RecipeError(
            f"task.calibrate is true, but task.name={section.name} is {what} that scores no candidates after a prompt: "
            "leave it out"
        )
    if section.metric is not None and section.metric not in kind.metrics:
        raise RecipeError(
            f"task.metric: found {section.metric!r} for task.name={section.name}; "
            f"{_nearest(section.metric, kind.metrics) if kind.metrics else 'leave it out'}"
        )
    return kind


def objective_of(recipe: Recipe, kind: "Kind[Any, Any]") -> str:
    """The name of what the recipe minimises: where it says nothing, the task's own, or the first of its kind.

    Where it names a function of its own, the kind has learned of it afterwards.

    Raises:
        RecipeError: the kind has no such objective, or it takes no temperature, or the function can't be imported.
    """
    name = _objective_of(recipe, kind)
    if recipe.task.temperature and not hasattr(kind.objectives[name], "smooth"):
        raise RecipeError(
            f"task.temperature is {recipe.task.temperature:g}, but train.objective is {name}, for which nothing is "
            "written: leave it out, or take an objective that grades what is written"
        )
    if recipe.task.calibrate and takes_steps(recipe.method.name) and hasattr(kind.objectives[name], "smooth"):
        raise RecipeError(
            f"task.calibrate is true, but train.objective is {name}, which grades the choices of steps, where nothing "
            "is calibrated: leave the one or the other out"
        )
    return name


def _objective_of(recipe: Recipe, kind: "Kind[Any, Any]") -> str:
    name = recipe.train.objective
    if name is None:
        return _find(recipe.task).objective or next(iter(kind.objectives))
    if name in kind.objectives:
        return name
    if not is_reward(name):
        raise RecipeError(
            f"train.objective: found {name!r} for task.name={recipe.task.name}; {_nearest(name, kind.objectives)}, or "
            "module:function of your own"
        )
    if not kind.learn_from(Reward.load(name)):
        raise RecipeError(
            f"train.objective: found {name!r}, but task.name={recipe.task.name} gives no texts that a function could "
            f"score; {_nearest(name, kind.objectives)}"
        )
    return name


def _check_sort(section: TaskSection, kind: NamedKind, images: bool) -> None:
    """Raises RecipeError unless the task is for the sort of model that there is."""
    if kind.reads_images != images:
        sorts = ("a language model", "an image classifier")
        raise RecipeError(
            f"model.name is {sorts[images]}, but task.name is {section.name}, which is for {sorts[not images]}: give "
            f"{sorts[not images]}, or a task for {sorts[images]}"
        )


def _find(section: TaskSection) -> Task:
    if section.name not in _TASKS:
        raise RecipeError(f"task.name: found {section.name!r}; {_nearest(section.name, _TASKS)}")
    task = _TASKS[section.name]
    for field in SOME_TAKE:
        if getattr(section, field) is not None and field not in task.takes:
            raise RecipeError(
                f"task.{field} is given, but task.name is {section.name}, which has no use for it: leave it out"
            )
    if task.cloze is None and isinstance(task.kind, NamedKind) and has_mask(section.template):
        raise RecipeError(
            f"task.template has a mask, which one token fills, and task.name is {section.name}, which can't be asked "
            "so: leave {mask} out, or take another task"
        )
    return task


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"expected {' or '.join(known)}"
