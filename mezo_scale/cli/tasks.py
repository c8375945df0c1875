"""`mezo-scale tasks` and `mezo-scale tasks show`"""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import console
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection, options, parse
from mezo_scale.recipe.reading import parse_override

_ANY_LENGTH = 2**30  # tokens: nothing is cut off, for nothing is run


class Part(StrEnum):
    """A part of a task's data."""

    train = "train"
    dev = "dev"
    validation = "validation"
    test = "test"


group = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(group, name="tasks")


@group.callback()
def tasks(context: typer.Context) -> None:
    """List the tasks that a recipe can name; `tasks show` prints what one makes of your data."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from mezo_scale import tasks as room

    table = Table("name", "kind", "metric", "what it is", "columns", box=None, header_style="bold")
    for name, task in room.known().items():
        kind = task.kind
        described = (kind.name, kind.metric) if isinstance(kind, room.NamedKind) else ("", "")
        table.add_row(name, *described, task.about, ", ".join(task.columns))
    console().print(table)


@group.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A task, as `mezo-scale tasks` lists them.")],
    data: Annotated[str, typer.Option(help="What task.data would be: a folder of splits, a file, a name on the hub.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Other fields of the recipe's task, like task.template=..."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="What task.subset would be.")] = None,
    split: Annotated[
        Part,
        typer.Option(help="Which part of a folder; dev is validation. Data that does not come split has one part."),
    ] = Part.test,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Examples, from the beginning.")] = 3,
    model: Annotated[
        str | None, typer.Option(help="A folder or a name on the hub: show which of its tokenizer's tokens are scored.")
    ] = None,
    cloze: Annotated[
        bool, typer.Option("--cloze", help="Show what a masked language model is asked, with {mask} for its mask.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print what a task asks of the rows of your data: prompt, candidates, and what is right.

    All rows are checked as for a run.
    """
    from mezo_scale import tasks as room
    from mezo_scale.tasks.task import MODELING

    task = room.known().get(name)
    whole = {} if task is not None and task.kind is MODELING else {"max_length": _ANY_LENGTH}
    section = _section(overrides or (), name=name, data=data, subset=subset, **whole)
    if cloze:
        section = room.posed_to(section, masked=True)
    all_ = _of_part(room.examples(section), "validation" if split is Part.dev else split.value, data)
    total, shown = len(all_), [example.as_dict() for example in all_[:count]]
    if model is not None:
        total, tokens = _tokens(section, all_, count, model)
        # Of running text what is shown are blocks.
        shown = [*shown, *({"candidates": [], "gold": []} for _ in tokens[len(shown) :])]
        shown = [one | more for one, more in zip(shown, tokens, strict=True)]
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
        return
    for number, one in enumerate(shown, 1):
        typer.echo("\n".join(_lines(one, f"example {number} of {total:,}")))


def _section(overrides: Sequence[str], **fields: Any) -> TaskSection:
    """The section that a recipe would have. Raises RecipeError for an override that is none of its fields."""
    known = [option.key for option in options() if option.key.startswith("task.")]
    for override in overrides:
        key, value = parse_override(override, known, "docs/recipe.md lists a task's", "options")
        fields[key.removeprefix("task.")] = value
    # A model stands in a recipe, and here it does not matter which.
    return parse({"model": {"name": "none"}, "task": fields}, "the command line").task


def _of_part(parts: Mapping[str, Sequence[Any]], part: str, data: str) -> Sequence[Any]:
    if "all" in parts:
        return parts["all"]
    if part not in parts:
        raise RecipeError(f"--split: {data} has no {part} part with labels, expected {' or '.join(parts)}")
    return parts[part]


def _tokens(section: TaskSection, examples: Sequence[Any], count: int, model: str) -> tuple[int, list[dict[str, Any]]]:
    """How many examples there are, and for each of the first ones: length, the tokens of its longest sequence; tokens,
    those that are scored; of a chat, a cloze or a block of running text also the prompt, as the model gets it."""
    from mezo_scale import tasks as room
    from mezo_scale.models.checkpoints import load_processor, silence_transformers  # seconds to import
    from mezo_scale.tasks.kinds.chat import Chat
    from mezo_scale.tasks.kinds.cloze import ClozeChoice
    from mezo_scale.tasks.kinds.modeling import Modeling

    silence_transformers()
    tokenizer = load_processor(model)
    kind = room.kind_of(section, tokenizer)
    if isinstance(kind, Modeling):
        rows = kind.encode_all(examples)
        prompts = [kind.text(row) for row in rows[:count]]
    else:
        rows = [kind.encode(example) for example in examples[:count]]
        prompts = [kind.posed(one) for one in examples[:count]] if isinstance(kind, Chat | ClozeChoice) else []
    found: list[dict[str, Any]] = [
        {
            **({} if kind.reads_images else {"length": kind.length(row)}),
            "tokens": [tokenizer.convert_ids_to_tokens(list(answer)) for answer in kind.scored(row)],
        }
        for row in rows[:count]
    ]
    for one, prompt in zip(found, prompts, strict=False):
        one["prompt"] = prompt
    return max(len(examples), len(rows)), found


def _lines(one: dict[str, Any], title: str) -> list[str]:
    right = [one["gold"], *one.get("also", ())] if one["candidates"] else one["gold"]
    answers = one["candidates"] or one["gold"]
    tokens = one.get("tokens", [])
    lines = [f"--- {title} ---", one["prompt"], ""]
    for number, answer in enumerate(answers):
        scored = f"   scored: {' '.join(tokens[number])}" if number < len(tokens) else ""
        lines.append(f"  {'*' if answer in right else ' '} {answer!r}{scored}")
    if tokens and not answers:
        lines.append(f"  scored: {' '.join(tokens[0])}")
    if "length" in one:
        lines.append(f"  {one['length']:,} tokens at most")
    return [*lines, ""]
