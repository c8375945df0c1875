"""`mezo-scale recipe`"""

import json
from typing import Annotated

import typer

from mezo_scale import recipe as recipes
from mezo_scale.cli.app import app


@app.command()
def recipe(
    schema: Annotated[
        bool, typer.Option("--schema", help="The JSON schema instead, by which editors complete and check a recipe.")
    ] = False,
) -> None:
    """Print the reference page of the recipe, in Markdown."""
    if schema:
        typer.echo(json.dumps(recipes.Recipe.model_json_schema(), indent=2))
    else:
        typer.echo(recipes.reference(), nl=False)
