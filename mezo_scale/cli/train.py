"""`mezo-scale train`"""

import textwrap
from typing import Annotated

import typer

from mezo_scale import recipe as recipes
from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import Overrides, Processes, Source, launch, loading
from mezo_scale.distributed.signals import end_at_once_when_signalled


def _fields() -> str:
    """The recipe's fields for --help. The backspaces keep click from joining the lines."""
    paragraphs, section = ["\b\nThe recipe's fields:"], None
    for option in recipes.options():
        if section != option.key.split(".")[0]:
            section = option.key.split(".")[0]
            paragraphs.append(f"\b\n{section}")
        default = option.default if option.default == "required" else f"default {option.default}"
        indent = " " * 6
        about = textwrap.fill(
            option.description, 78, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        paragraphs[-1] += f"\n  {option.key} ({option.type}; {default})\n{about}"
    return "\n\n".join(paragraphs)


@app.command(epilog=_fields())
def train(
    recipe: Source,
    overrides: Overrides = None,
    processes: Processes = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Everything but the steps: read the data, show prompts, load the model, plan memory."
        ),
    ] = False,
) -> None:
    """Train: start a run, or go on with the one in the recipe's run directory.

    Run it alone, or under torchrun, deepspeed, accelerate launch or srun.
    """
    end_at_once_when_signalled()
    parsed = recipes.load(recipe, overrides or ())
    launch(processes)
    with loading():  # seconds
        from mezo_scale.models.checkpoints import silence_transformers
        from mezo_scale.runs.session import train as run

    silence_transformers()

    run(parsed, dry_run=dry_run)
