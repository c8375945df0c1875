"""`mezo-scale init`"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.errors import RecipeError


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="What model.name would be: a folder, a name on the hub.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="What task.data would be: a file, a folder, a hub name.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    target: Annotated[
        str | None, typer.Option(help="The column that is to be learned; default: the one that looks like it.")
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(help="What each label means, in the order of the labels, such as `ham,spam` for 0 and 1."),
    ] = None,
) -> None:
    """Write a first recipe for a model and your data: commented, checked, its sizes from the data and the planner."""
    if out.exists():
        raise RecipeError(f"--out: {out} is there already: give another name, or move it away")
    from mezo_scale.models.checkpoints import silence_transformers
    from mezo_scale.runs.first_recipe import first_recipe  # seconds to import

    silence_transformers()
    text, about = first_recipe(model, data, target, None if words is None else words.split(","))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--out: {out} can't be written: {error.strerror}") from None
    name = shlex.quote(str(out))
    typer.echo(f"{out}: {about}\nnext: mezo-scale train {name} --dry-run, then mezo-scale train {name}")
