"""The application that the commands belong to."""

import typer

app = typer.Typer(
    name="mezo-scale",
    help="Fine-tune language models with forward passes only, sharded over as many devices as it takes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its boxes would reflow the table of the recipe's fields
    pretty_exceptions_enable=False,
)
