"""Rows of a task's data, wherever they lie, and what a task takes from them: texts and labels, checked."""

import difflib
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection, means_disk
from mezo_scale.tasks.tables import READERS, Row, kind_of, read_table, shown

MASK = "mask"  # in a template's braces: no column, but where a masked language model fills in the answer
GIVEN = ("test", "validation", "train")  # the files of a folder whose data comes split


def read_parts(section: TaskSection) -> dict[str, list[Row]]:
    """All rows of `section.data`: of a folder by the names in GIVEN, of the hub by those of them that it has (a test
    split without labels is none), else under one name.

    Raises:
        RecipeError: if the data is missing, unreadable or empty.
    """
    path = Path(section.data)
    if not means_disk(section.data):
        parts = _from_hub(section)
    elif path.is_dir():
        parts = {name: _of_subset(read_table(file), section, file) for name, file in _files(path).items()}
    elif path.is_file():
        parts = {"all": _of_subset(read_table(path), section, path)}
    else:
        raise RecipeError(f"task.data: there is no file {section.data}; expected one in {_types()}")
    for name, rows in parts.items():
        if not rows:
            where = f" in {name}" if len(parts) > 1 else ""
            subset = "" if section.subset is None else f" with the source {section.subset!r}"
            raise RecipeError(f"task.data: {section.data} has no rows{where}{subset}")
    return parts


def fill(template: str, row: Row) -> str:
    """The template, exactly as it is written, with the row's fields in its braces.

    Raises:
        RecipeError: if it names a field that the row lacks or has no text in, or none at all.
    """
    try:
        if not any(name is not None for _, name, _, _ in string.Formatter().parse(template)):
            raise RecipeError(f"task.template {template!r} names no column, expected one in braces, as in {{text}}")
        return _Filler(row).vformat(template, (), row.fields)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(
            f"task.template {template!r}: {row.place} can't fill it ({shown([error], 200)}); it has "
            f"{shown(list(row.fields))}"
        ) from None


def has_mask(template: str | None) -> bool:
    """Whether a template is that of a cloze."""
    try:
        return any(name == MASK for _, name, _, _ in string.Formatter().parse(template or ""))
    except ValueError:  # `fill` says what is wrong with it
        return False


def fill_around_mask(template: str, row: Row) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """What stands before the mask of a template, and what behind it, both in parts: each a text, and whether it is one
    of the row's fields.

    Raises:
        RecipeError: as `fill`; or there are several masks.
    """
    sides: list[list[tuple[str, bool]]] = [[]]
    for words, name, form, conversion in string.Formatter().parse(template):
        if words:
            sides[-1].append((words, False))
        if name == MASK:
            sides.append([])
        elif name is not None:
            field = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"
            sides[-1].append((fill(field, row), True))
    columns = sum(own for side in sides for _, own in side)
    if len(sides) != 2 or not columns:
        raise RecipeError(
            f"task.template {template!r} has {len(sides) - 1} masks and {columns} columns, expected one {{mask}} and a "
            "column in braces, as in {text} It was {mask}."
        )
    before, after = map(tuple, sides)
    return before, after


def label_of(row: Row, count: int, names: Sequence[str] = ()) -> int:
    """The number in the column `label`. Raises RecipeError unless it is one of 0 to count - 1, written as such.

    Args:
        names: what may be written in their place, in lower case; nothing else may where there are not `count`.
    """
    value = column(row, "label", "rename the one that is meant")
    if len(names) == count and isinstance(value, str | bool) and str(value).lower() in names:
        return list(names).index(str(value).lower())
    # 1.0, true and "01" are what other programs make of labels, and of much else.
    known = range(count) if isinstance(value, int) and not isinstance(value, bool) else [str(n) for n in range(count)]
    if value not in known:
        raise RecipeError(
            f"task.data: {row.place} has the label {value!r:.60}, expected 0 to {count - 1}, the number of a candidate"
            + (f", or its name: {', '.join(names)}" if len(names) == count else "")
        )
    return int(value)


def text_of(row: Row, name: str) -> str:
    """The text in a column. Raises RecipeError if there is no such column, or no text in it."""
    value = column(row, name, "rename the one that is meant")
    problem = unlike_text(value)
    if problem:
        raise RecipeError(f"task.data: {row.place} has {problem} in {name}, expected text")
    return str(value)


def texts_of(row: Row, name: str, one: str, field: str | None = None) -> tuple[str, ...]:
    """The different texts that a column lists, in their order; with `field`, that this field of a struct lists.

    A list of structs, as some copies have it, is read as a struct of lists.

    Args:
        one: what one of the texts is called in a message.

    Raises:
        RecipeError: there is no such column, it is something else, or there is no text.
    """
    found = column(row, name, "rename the one that is meant")
    texts, expected = found, "a list of texts"
    if field is not None:
        expected = f"a struct whose `{field}` is a list of texts"
        structs = isinstance(found, list) and all(isinstance(item, Mapping) for item in found)
        texts = (
            [item.get(field) for item in found] if structs else found.get(field) if isinstance(found, Mapping) else None
        )
    if not isinstance(texts, list):
        raise RecipeError(f"task.data: {row.place} has the {name} {found!r:.60}, expected {expected}")
    if not texts:
        raise RecipeError(f"task.data: {row.place} has no {one}, expected at least one: leave such rows out")
    for text in texts:
        if not isinstance(text, str) or unlike_text(text):
            raise RecipeError(f"task.data: {row.place} has the {one} {text!r:.60}, expected text: leave such ones out")
    return tuple(dict.fromkeys(texts))


def column(row: Row, name: str, remedy: str) -> Any:
    """A row's value in a column. Raises RecipeError, with the remedy, if there is none of that name."""
    if name in row.fields:
        return row.fields[name]
    names = {str(column).lower(): str(column) for column in row.fields}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    nearest = f" (did you mean {names[close[0]]!r:.60}?)" if close else ""
    raise RecipeError(
        f"task.data: {row.place} has no column {name!r}{nearest}; it has {shown(list(row.fields))}: {remedy}"
    )


class _Filler(string.Formatter):
    """Fills a template with text and numbers of one row, and nothing else."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if isinstance(key, int):
            raise ValueError("braces without a name")
        return column(self.row, key, "name one of them in task.template")

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        value, key = super().get_field(field_name, args, kwargs)
        if key in self.row.blank:
            return _Blank(), key
        problem = unlike_text(value)
        if problem:
            raise RecipeError(
                f"task.data: {self.row.place} has {problem} in {shown([field_name])}, expected text: fill it in, or "
                "leave the row out"
            )
        return value, key


class _Blank:
    """Nothing, however it is formatted."""

    def __format__(self, spec: str) -> str:
        return ""

    def __repr__(self) -> str:
        return ""


def unlike_text(value: Any) -> str | None:
    """What a value is if it can't stand in a prompt."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "no text"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    if isinstance(value, str):
        if not value.strip():
            return "no text"
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return "half a surrogate pair"
    return None


def _of_subset(rows: list[Row], section: TaskSection, path: Path) -> list[Row]:
    if section.subset is None:
        return rows
    lacking = next((row for row in rows if "source" not in row.fields), None)
    if lacking is not None:
        raise RecipeError(
            f"task.subset is {section.subset!r}, but {lacking.place} has no column `source`: leave it out"
        )
    return [row for row in rows if row.fields["source"] == section.subset]


def _files(folder: Path) -> dict[str, Path]:
    """The one file of each part."""
    found: dict[str, list[Path]] = {name: [] for name in GIVEN}
    for path in sorted(folder.iterdir()):
        if path.name.split(".")[0] in found and kind_of(path) and path.is_file():
            found[path.name.split(".")[0]].append(path)
    for name, paths in found.items():
        if len(paths) != 1:
            what = f"{paths[0].name} and {paths[1].name}" if paths else f"no {name} file"
            raise RecipeError(
                f"task.data: {folder} is a folder with {what}; expected a file, or a folder with one file for each of "
                f"{', '.join(reversed(GIVEN))} ({_types()})"
            )
    return {name: paths[0] for name, paths in found.items()}


def _from_hub(section: TaskSection) -> dict[str, list[Row]]:
    from datasets import load_dataset  # seconds to import, and only for those who need it

    name = section.data if section.subset is None else f"{section.data}, {section.subset}"
    try:
        found = load_dataset(section.data, section.subset)
        splits = {part: list(found[part]) for part in GIVEN if part in found}
    except Exception as error:  # the hub's client has a dozen roots of its own
        raise RecipeError(
            f"task.data: {name!r} is neither a file nor a dataset that the hub gives ({shown([error], 200)}): where "
            f"there is no way to the hub, save it elsewhere as a file ({_types()}) or a folder of splits, and give that"
        ) from None
    if "train" not in splits:
        raise RecipeError(
            f"task.data: {name!r} has the splits {shown(list(found))}, expected train, and validation or test: save "
            "those that you mean as a folder with one file for each"
        )
    if _is_unlabelled(splits.get("test", []), section):
        del splits["test"]
    parts = {
        part: [Row(fields, f"row {number} of {part} of {name}") for number, fields in enumerate(rows, 1)]
        for part, rows in splits.items()
    }
    return {"all": parts["train"]} if len(parts) == 1 else parts


def _is_unlabelled(rows: Sequence[Mapping[str, Any]], section: TaskSection) -> bool:
    """Whether no row has a label: the hub writes -1 where a benchmark keeps them to itself."""
    label = section.label_column or "label"
    return bool(rows) and all(row.get(label) == -1 for row in rows)


def _types() -> str:
    return ", ".join(READERS)
