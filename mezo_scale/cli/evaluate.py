"""`mezo-scale evaluate`"""

from enum import StrEnum
from typing import Annotated

import typer

from mezo_scale import recipe as recipes
from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import Overrides, Processes, Source, Until, is_first_rank, launch, loading


class Split(StrEnum):
    """A split of a task's data."""

    train = "train"
    dev = "dev"
    test = "test"


@app.command()
def evaluate(
    recipe: Source,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="Which split is evaluated.")] = Split.test,
    until: Until = None,
    processes: Processes = None,
) -> None:
    """Measure the score of a recipe's model, or of a run's after its last step (or --until another)."""
    parsed = recipes.load(recipe, overrides or ())
    launch(processes)
    with loading():
        from mezo_scale.models.checkpoints import silence_transformers
        from mezo_scale.runs.evaluate import evaluate_recipe

    silence_transformers()

    found, steps = evaluate_recipe(parsed, split.value, until)
    if is_first_rank():
        main = found.metrics[found.main]
        interval = f", 95% interval {main.low:.1%} to {main.high:.1%}" if main.low is not None else ""
        typer.echo(f"{parsed.model.name} after {steps} steps: {found.main} on {split.value} {found}{interval}")
