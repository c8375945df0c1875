"""`mezo-scale compare`"""

from typing import Annotated

import typer

from mezo_scale.cli.app import app
from mezo_scale.errors import RecipeError

Source = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe (YAML) with a section compare, or one that is shipped.")
]
Fields = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Single fields, like task.test=500 or compare.seeds=[0,1,2]."),
]


def _fields() -> str:
    """The fields of the section, for --help. The backspace keeps click from joining the lines."""
    from mezo_scale.bench.comparison import fields

    return "\b\nThe section's fields:\n" + "\n".join(f"  {name}: {about}" for name, about in fields())


@app.command(epilog=_fields())
def compare(
    recipe: Source,
    overrides: Fields = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many ranks each run has on this machine; default: one per GPU.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what has failed before.")] = False,
) -> None:
    """Compare methods: run each with several seeds and learning rates, and put them into one table.

    Every run has a directory of its own in output.dir; `mezo-scale runs` lists them. One that fails is a row with its
    reason, and the exit code is then 2. Stopped, the same command goes on.

    \b
      mezo-scale compare compare.yaml
      mezo-scale compare opt-mezo model.name=facebook/opt-1.3b compare.seeds=[0,1,2]
    """
    from mezo_scale.bench import comparing, comparison, comparison_report  # seconds to import

    asked = comparison.load(recipe, overrides or ())
    failed = comparing.run(asked, processes=processes, retry_failed=retry_failed, say=typer.echo)
    table = comparison_report.write(asked, failed)
    typer.echo(table)
    typer.echo(f"report: {asked.out / comparison_report.REPORT}")
    if failed:
        raise RecipeError(
            f"{len(failed)} of {len(asked.cells)} runs have no result, the table says why: mend that and give "
            "--retry-failed"
        )
