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
        from mezo_scale.runs.report import told

    silence_transformers()

    found, steps = evaluate_recipe(parsed, split.value, until)
    if is_first_rank():
        main = found.metrics[found.main]
        ends = () if main.low is None or main.high is None else (main.low, main.high)
        interval = f", 95% interval {' to '.join(told(end, main.bounded) for end in ends)}" if ends else ""
        typer.echo(f"{parsed.model.name} after {steps} steps: {found.main} on {split.value} {found}{interval}")
