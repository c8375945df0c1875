"""The command line's page, from the commands themselves; mkdocs calls `on_page_markdown` for every page."""

from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner

from mezo_scale.cli import app

PAGE, MARK = "reference/cli.md", "<!-- the commands -->"
EPILOG = "The recipe's fields:"  # they have a page of their own


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:
    return markdown.replace(MARK, commands()) if page.file.src_uri == PAGE else None


def commands() -> str:
    """A section for every command, with what it prints for --help."""
    names = _names(typer.main.get_command(app))
    return "\n\n".join(f"## {name}\n\n```text\n{_help_of(name)}\n```" for name in names)


def _names(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        yield before + name
        if hasattr(command, "commands"):
            yield from _names(command, f"{before}{name} ")


def _help_of(name: str) -> str:
    said = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="mezo-scale", terminal_width=100)
    if said.exit_code:
        raise RuntimeError(f"mezo-scale {name} --help ended with {said.exit_code}: {said.output}")
    return said.output.partition(EPILOG)[0].strip()
