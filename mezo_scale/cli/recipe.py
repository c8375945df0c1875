"""`mezo-scale recipe`"""

import json
from typing import Annotated

import typer

from mezo_scale import recipe as recipes
from mezo_scale.cli.app import app
from mezo_scale.errors import RecipeError


@app.command()
def recipe(
    schema: Annotated[
        bool, typer.Option("--schema", help="The JSON schema instead, by which editors complete and check a recipe.")
    ] = False,
    example: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A file of the paper's settings instead, for compare: opt, roberta, ..."),
    ] = None,
) -> None:
    """Print the reference page of the recipe, in Markdown."""
    if schema and example:
        raise RecipeError("--schema and --example are given: ask for one of them")
    if schema:
        typer.echo(json.dumps(recipes.Recipe.model_json_schema(), indent=2))
    elif example:
        typer.echo(_shipped(example), nl=False)
    else:
        typer.echo(recipes.reference(), nl=False)


def _shipped(name: str) -> str:
    """The text of a file that comes along. Raises RecipeError if there is none of that name."""
    from mezo_scale.bench.comparison import SHIPPED, shipped

    if name not in shipped():
        raise RecipeError(f"--example: found {name!r}, expected {', '.join(shipped())}")
    return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
