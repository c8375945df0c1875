"""Labelled rows from a CSV file or from a dataset on the hub."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection, means_disk


def read_rows(section: TaskSection) -> list[Mapping[str, Any]]:
    """All rows of `section.data`; of a dataset on the hub its train split.

    Raises:
        RecipeError: if the data is missing, unreadable or empty.
    """
    rows = _from_csv(section) if means_disk(section.data) else _from_hub(section)
    if not rows:
        raise RecipeError(f"task.data: {section.data} has no rows" + _of_subset(section))
    return rows


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's fields in its braces. Raises RecipeError if it names a field the row lacks."""
    try:
        return template.format_map(row)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise RecipeError(f"task.template {template!r}: found {error}, the data has {', '.join(row)}") from None


def _from_csv(section: TaskSection) -> list[Mapping[str, Any]]:
    path = Path(section.data)
    if not path.is_file():
        raise RecipeError(f"task.data: there is no file {section.data}; expected a CSV file with a header")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"task.data: {path} is not a CSV file in UTF-8 ({error})") from None
    if section.subset is None or not rows:
        return rows
    if "source" not in rows[0]:
        raise RecipeError(f"task.subset is {section.subset!r}, but {path} has no column `source`: leave it out")
    return [row for row in rows if row["source"] == section.subset]


def _from_hub(section: TaskSection) -> list[Mapping[str, Any]]:
    from datasets import load_dataset  # seconds to import, and only for those who need it

    try:
        return list(load_dataset(section.data, section.subset, split="train"))
    except Exception as error:  # the hub's client has a dozen roots of its own
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"task.data: {section.data!r} is neither a file nor a dataset that the hub gives ({reason})"
        ) from None


def _of_subset(section: TaskSection) -> str:
    return "" if section.subset is None else f" with the source {section.subset!r}"
