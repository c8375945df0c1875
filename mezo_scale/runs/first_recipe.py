"""A recipe to begin with, for a model and a table: what can be read off both, with comments for the rest."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from timeit import timeit
from typing import Any

import torch
import yaml

from mezo_scale import recipe as recipes
from mezo_scale import tasks
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.models import checkpoints, heads
from mezo_scale.planner import GIB, Architecture, Cluster, Workload, architecture, plan, recommended
from mezo_scale.planner.command import overrides
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import common_prefix
from mezo_scale.tasks.rows import column, read_parts
from mezo_scale.tasks.tables import Row, shown

_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "target")
_ANSWERS = ("answer", "answers", "response", "output", "completion", "summary", "translation")
_IDS = ("id", "idx", "index", "uid", "guid", "source", "split")
_MOST_CLASSES, _LONGEST_CLASS = 20, 40
_LEAST_EXAMPLES = 20
_LEAST_OF_A_LABEL = 20  # examples, to be dealt out as often as those of any other
_UNEVEN = 1.3  # a label's share of the examples, times the number of labels, that makes accuracy say little
_LOOKED_AT = 500  # examples whose length in tokens is asked for
_BATCH = 16
_GROUP = 4  # at least: rows of a direction's own cost no forwards (docs/how-to/choose-an-estimator.md)
_SORT_WINDOW = 8


@dataclass(frozen=True)
class _Guess:
    """What is to be learned: the fields of the task section, in order, and a remark for some of them.

    Attributes:
        labels: how many labels each step is to have in equal number; None: its rows come as they are.
        numbers: the labels, where they are chosen by their numbers.
    """

    fields: Mapping[str, Any]
    remarks: Mapping[str, str]
    about: str
    labels: int | None = None
    numbers: Sequence[Any] = ()

    @property
    def group_size(self) -> int:
        """Rows that share a direction, of each label as many."""
        return _BATCH if self.labels is None else self.labels * -(-_GROUP // self.labels)

    @property
    def batch_size(self) -> int:
        """Rows of a step: about as many as usual, in whole groups."""
        return self.group_size * max(1, round(_BATCH / self.group_size))


def first_recipe(
    model: str, data: str, target: str | None = None, words: Sequence[str] | None = None
) -> tuple[str, str]:
    """A recipe as YAML with comments, checked as for a run, and what it is in a line or two.

    Args:
        model, data: as a recipe names them.
        target: the column that is to be learned; None: the one that looks like it.
        words: what each of its labels means, in their order; None: the labels themselves.

    Raises:
        RecipeError, ModelError: the model or the data can't be read, it can't be told what is to be learned, or there
            are not as many words as labels.
    """
    config = checkpoints.find(model)
    if heads.is_image(config):
        raise RecipeError(
            f"{model} is an image classifier, and init writes recipes for language models: write one with "
            "task.name=image, as docs/how-to/own-data.md has it"
        )
    arch = architecture(config)
    parts = read_parts(TaskSection(name="choice", data=data))
    masked = heads.is_masked(config)
    guess = _guess([row for rows in parts.values() for row in rows], target, " {mask}" if masked else "", words)
    task = {**guess.fields, "data": data}
    tasks.posed_to(TaskSection(**task), masked)
    if "candidates" in task and not masked:
        task = _told_apart_at_once(task, model)
    sizes = _sizes(TaskSection(**task, max_length=2**30))
    length = _length(TaskSection(**task, max_length=2**30), model, config)
    spread = _spread(model, arch, length, guess.batch_size)
    text = _yaml(model, {**task, **sizes, "max_length": length}, guess, arch, spread)
    checked = recipes.parse(yaml.safe_load(text))
    tasks.load(checked.task)
    counts = f"{sizes['train']:,} examples to train on, {sizes['dev']:,} for dev, {sizes['test']:,} to be graded by"
    about = f"{guess.about}; {counts}; {arch.numel:,} parameters, {checked.sharding.strategy}"
    if guess.numbers:
        about += (
            f"\nthe labels are numbers, {', '.join(map(str, guess.numbers))}, which say nothing to a model: it learns "
            "far sooner from words, one for each in this order, as in --words ham,spam"
        )
    return text, about


def _guess(rows: Sequence[Row], target: str | None, gap: str, words: Sequence[str] | None) -> _Guess:
    """gap: what ends a prompt whose answer is chosen."""
    columns = list(rows[0].fields)
    if target is None and "messages" in columns:
        _check_words(words, "messages", None)
        return _Guess({"name": "chat"}, {}, "chats: the assistant's last turn is learned")
    name = target if target is not None else _named(columns, _LABELS) or _few_valued(rows) or _named(columns, _ANSWERS)
    if name is None:
        raise RecipeError(
            f"task.data: it can't be told which of the columns {shown(columns)} is to be learned: say it with --target"
        )
    values = [column(row, name, "name another one with --target") for row in rows]
    given = _texts(rows, name)
    if not given:
        raise RecipeError(f"task.data: besides {name} no column has text, expected one to ask about")
    prompt = "\n".join(f"{{{text}}}" for text in given)
    classes = _classes(values)
    _check_words(words, name, classes)
    if classes is None:
        task: dict[str, Any] = {"name": "answer", "template": f"{prompt}\nAnswer:", "answer_column": name}
        remarks = {"template": "the prompt; the answer follows after a space"}
        return _Guess(task, remarks, f"the texts in {name} are learned, after {', '.join(given)}")
    numbered = words is None and all(isinstance(value, int) or str(value).isdecimal() for value in classes)
    task = {
        "name": "choice",
        "template": f"{prompt}\n{name.replace('_', ' ').capitalize()}:{gap}",
        "candidates": [f" {str(word).strip()}" for word in words or classes],
        "label_column": name,
        "labels": [str(value) for value in classes],
    }
    says = "say here in words what each of labels means" if numbered else "one for each of labels; words that fit in"
    where = "stands at the mask" if gap else "follows"
    remarks = {"template": f"the prompt; one of the candidates {where}", "candidates": says}
    counts = Counter(values)
    share = counts.most_common(1)[0][1] / len(values)
    if share * len(classes) > _UNEVEN:
        task["metric"] = "balanced_accuracy"
        remarks["metric"] = f"the mean over the labels: one of them has {share:.0%} of the rows"
    balanced = min(counts.values()) >= _LEAST_OF_A_LABEL
    about = f"{name} is learned, one of {len(classes)}, after {', '.join(given)}"
    return _Guess(task, remarks, about, len(classes) if balanced else None, classes if numbered else ())


def _check_words(words: Sequence[str] | None, name: str, classes: Sequence[Any] | None) -> None:
    """Raises RecipeError unless there is a word for each class, or none at all."""
    if words is None:
        return
    if classes is None:
        raise RecipeError(f"--words is {','.join(words)}, but what is learned from {name} are texts: leave it out")
    if len(words) != len(classes) or len({word.strip() for word in words} - {""}) < len(words):
        raise RecipeError(
            f"--words is {','.join(words)}, expected {len(classes)} different ones with commas between them, for the "
            f"values of {name} in this order: {', '.join(map(str, classes))}"
        )


def _told_apart_at_once(task: dict[str, Any], model: str) -> dict[str, Any]:
    """The task, with the space before its candidates in the prompt if all of them begin with a token for it alone.

    So do numbers in many tokenizers: two tokens where one would do, one of them always the same, so that each candidate
    is run by itself and half of what tells them apart is averaged away.
    """
    closer = {
        **task,
        "template": f"{task['template']} ",
        "candidates": [candidate.lstrip() for candidate in task["candidates"]],
    }
    processor = checkpoints.load_processor(model)

    def alike(fields: Mapping[str, Any]) -> int:
        """Tokens that all candidates begin with."""
        section = TaskSection(**fields, max_length=2**30)
        kind, example = tasks.kind_of(section, processor), next(iter(tasks.examples(section).values()))[0]
        return common_prefix(kind.scored(kind.encode(example)))

    return closer if alike(task) and not alike(closer) else task


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in columns}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _few_valued(rows: Sequence[Row]) -> str | None:
    """The only column with few different values, if there is one and more rows than could be chance."""
    found = [
        name
        for name in rows[0].fields
        if name.lower() not in _IDS
        and (classes := _classes([row.fields.get(name) for row in rows])) is not None
        and 1 < len(classes) <= len(rows) / 5
    ]
    return found[0] if len(found) == 1 else None


def _classes(values: Sequence[Any]) -> list[Any] | None:
    """The different values of a column, in order; None where they are not a few short ones."""
    if not all(isinstance(value, str | int) and len(str(value)) <= _LONGEST_CLASS for value in values):
        return None
    found = set(values)
    if len(found) > min(_MOST_CLASSES, max(2, len(values) // 2)):
        return None
    return sorted(
        found, key=lambda value: (not str(value).isdecimal(), int(value) if str(value).isdecimal() else 0, str(value))
    )


def _texts(rows: Sequence[Row], target: str) -> list[str]:
    """The columns to ask about: those of several words each, or else the longest."""
    long: dict[str, float] = {}
    for name in rows[0].fields:
        values = [row.fields.get(name) for row in rows]
        texts = [value for value in values if isinstance(value, str)]
        if name == target or name.lower() in _IDS or len(texts) < len(values):
            continue
        length = sum(map(len, texts)) / len(texts)
        long[name] = length if 2 * sum(" " in text.strip() for text in texts) > len(texts) else -length
    several = [name for name, length in long.items() if length > 0]
    return several or sorted(long, key=lambda name: abs(long[name]))[-1:]


def _sizes(section: TaskSection) -> dict[str, int]:
    """Examples for each part: all that there are, a fifth of them to be graded by, at most the defaults."""
    counts = {name: len(part) for name, part in tasks.examples(section).items()}
    if sum(counts.values()) < _LEAST_EXAMPLES:
        raise RecipeError(
            f"task.data: {section.data} has {sum(counts.values())} different examples, expected {_LEAST_EXAMPLES} or "
            "more to train on some and be graded by others"
        )
    first = counts.get("all", counts.get("train", 0))
    test = counts.get("test") if "test" in counts else counts.get("validation")
    dev = counts.get("validation") if "test" in counts else None
    dealt = first
    found = {"test": min(section.test, first // 5 if test is None else test)}
    dealt -= found["test"] if test is None else 0
    found["dev"] = min(section.dev, first // 10 if dev is None else dev)
    dealt -= found["dev"] if dev is None else 0
    return {"train": dealt, "dev": found["dev"], "test": found["test"]}


def _length(section: TaskSection, model: str, config: Any) -> int:
    """Tokens that 19 of 20 examples fit in, in a multiple of 16, and the model too."""
    kind = tasks.kind_of(section, checkpoints.load_processor(model))
    some = next(iter(tasks.examples(section).values()))[:_LOOKED_AT]
    lengths = sorted(kind.length(kind.encode(example)) for example in some)
    wanted = -(-lengths[int(0.95 * (len(lengths) - 1))] // 16) * 16
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return max(16, wanted if most is None else min(wanted, int(most)))


def _spread(model: str, arch: Architecture, tokens: int, batch_size: int) -> list[str]:
    """How the model lies on this machine's devices, as fields of the recipe."""
    devices = torch.cuda.device_count()
    if not devices:
        computing = ["model.compute_dtype=bfloat16"] if _bfloat16_pays() else []
        return ["model.dtype=float32", *computing, "sharding.strategy=single"]
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(devices)) / GIB
    cluster = Cluster(devices, devices, memory)
    rows = -(-batch_size // devices)
    while rows:
        work = Workload(rows, tokens, 2, "bfloat16")
        entry = recommended(plan(arch, cluster, work))
        if entry is not None:
            found = [
                one for one in overrides(model, entry.strategy, work) if not one.startswith(("model.name", "train"))
            ]
            return [*found, *([f"train.micro_batch={rows}"] if rows * devices < batch_size else [])]
        rows //= 2
    raise ModelError(
        f"{model} does not fit {devices} devices of {memory:.0f} GiB: `mezo-scale plan --model {model} --gpus 8 "
        f"--gpu-memory {memory:.0f}` says what it takes"
    )


def _bfloat16_pays() -> bool:
    """Whether this processor multiplies in bfloat16 well above the speed of float32: some have units for it."""
    operands = {dtype: torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(operands, float("inf"))
    for _ in range(10):  # in turns, and the least of each: others may be using the machine
        for dtype, matrix in operands.items():
            seconds[dtype] = min(seconds[dtype], timeit(partial(torch.mm, matrix, matrix), number=1))
    return seconds[torch.bfloat16] < 0.6 * seconds[torch.float32]


def _yaml(model: str, task: Mapping[str, Any], guess: _Guess, arch: Architecture, spread: Sequence[str]) -> str:
    said: dict[str, dict[str, str]] = {}
    for one in spread:
        key, _, value = one.partition("=")
        section, _, name = key.partition(".")
        said.setdefault(section, {})[name] = value
    billions = arch.numel / 1e9
    small = "1.0e-4" if guess.labels == 2 else "2.0e-5"  # a choice among few has the flatter loss
    lr = next(rate for most, rate in ((0.3, small), (1, "1.0e-5"), (3, "2.0e-6"), (1e9, "1.0e-6")) if billions < most)
    eps = "4.0e-3" if billions < 1 and said["model"].get("compute_dtype") == "bfloat16" else "1.0e-3"
    grouped = guess.group_size < guess.batch_size
    lines = [
        "# Written by `mezo-scale init`. All fields: `mezo-scale train --help`. Look at it first: `train --dry-run`.",
        "model:",
        f"  name: {_scalar(model)}",
        *(f"  {name}: {value}" for name, value in said.pop("model").items()),
        "task:",
    ]
    for name in ("name", "data", *(name for name in task if name not in ("name", "data"))):
        remark = f"  # {guess.remarks[name]}" if name in guess.remarks else ""
        lines.append(f"  {name}: {_scalar(task[name])}{remark}")
    lines += [
        "optimizer:",
        f"  lr: {lr}  # a first guess for a model of this size; halve and double it, and compare on dev",
        f"  eps: {eps}",
        *(
            [f"  estimator: grouped\n  group_size: {guess.group_size}  # rows that share a direction"]
            if grouped
            else []
        ),
        "train:",
        "  steps: 1000  # MeZO learns slowly: thousands are usual, and a finished run goes on when asked for more",
        f"  batch_size: {guess.batch_size}",
        "  eval_every: 100",
        *(["  balance: labels  # each step has every label as often"] if guess.labels else []),
        f"  sort_window: {_SORT_WINDOW}  # rows of like length share a step: less padding",
        *(f"  {name}: {value}" for name, value in said.pop("train", {}).items()),
    ]
    for section, fields in said.items():
        lines += [f"{section}:", *(f"  {name}: {value}" for name, value in fields.items())]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value on one line, quoted wherever YAML could take it for something else."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else str(value)
