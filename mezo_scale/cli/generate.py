"""`mezo-scale generate`"""

from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import Until


@app.command()
def generate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_DIR|MODEL", help="The directory of a run, a folder with a model, a hub name.")
    ],
    prompt: Annotated[list[str], typer.Option("-p", "--prompt", help="What is to be continued; repeatable.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="How freely tokens are drawn; 0: the likeliest every time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    until: Until = None,
) -> None:
    """Show what a model writes after your prompts: a run's after all its steps, or any other."""
    from mezo_scale.models.checkpoints import silence_transformers
    from mezo_scale.runs.generate import generate as write

    silence_transformers()

    for given, text in zip(prompt, write(source, prompt, max_new_tokens, temperature, seed, until), strict=True):
        typer.echo(f"--- {given}\n{text}\n")
