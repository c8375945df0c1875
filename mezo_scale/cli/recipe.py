"""`mezo-scale recipe`"""

import typer

from mezo_scale import recipe as recipes
from mezo_scale.cli.app import app


@app.command()
def recipe() -> None:
    """Print the reference page of the recipe, in Markdown."""
    typer.echo(recipes.reference(), nl=False)
