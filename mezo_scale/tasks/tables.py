"""Tables on disk: the rows of a file by its type, every value as it is written. What does not fit is refused."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mezo_scale.errors import RecipeError

_LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit of 131,072 is a setting of the process


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        fields: its values by the name of their column.
        place: where a person finds it: "line 3 of reviews.csv" where the file has lines, else "row 2 of ...".
        blank: columns that a template leaves out, for a prompt that says nothing of the row.
    """

    fields: Mapping[str, Any]
    place: str
    blank: frozenset[str] = frozenset()


def kind_of(path: Path) -> str | None:
    """The type of a table by its name (".csv", ".jsonl", ...), whether it is compressed by gzip or not; else None."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_table(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        RecipeError: if the file can't be read, or is not wholly what its name says.
    """
    kind = kind_of(path)
    if kind is None:
        raise RecipeError(f"task.data: the type of {path} is not known by its name, expected {', '.join(READERS)}")
    try:
        with _opened(path) as file:
            return list(READERS[kind](file, str(path)))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise RecipeError(f"task.data: {path} is not text in UTF-8 (found the byte {byte:#04x}): save it so") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"task.data: {path} can't be read ({shown([error], 200)}): give a whole file") from None


def shown(values: Sequence[object], longest: int = 40) -> str:
    """Values for one line of a message, cut where they are many or have more than `longest` characters."""
    more = f" and {len(values) - 12} more" if len(values) > 12 else ""
    return ", ".join(" ".join(str(value).split())[:longest] for value in values[:12]) + more


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    # utf-8-sig drops the mark that some programs begin a file with.
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise RecipeError(f"task.data: line {number} of {name} has a NUL, expected text in UTF-8: save it so")
            yield line


def _delimited(file: BinaryIO, name: str, delimiter: str, called: str) -> Iterator[Row]:
    rows = list(_records(file, name, delimiter, called))
    if rows:
        _check_quotes(rows, delimiter)
    return iter(rows)


def _records(file: BinaryIO, name: str, delimiter: str, called: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_lines(file, name), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1} of {name}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise RecipeError(
                f"task.data: {place} is not {called}-separated ({error}): quote the field and double the quotes in it"
            ) from None
        if fields is None:
            return
        if not fields:  # an empty line
            continue
        if not header:
            header = fields
            _check_header(header, place, called)
        elif len(fields) != len(header):
            raise RecipeError(
                f"task.data: {place} has {len(fields)} field(s), expected {len(header)} ({shown(header)}): quote a "
                f"field that has a {called} in it, leave none out"
            )
        else:
            yield Row(dict(zip(header, fields, strict=True)), place)


def _check_quotes(rows: Sequence[Row], delimiter: str) -> None:
    """Two stray quotes make one field of all the rows between them; it then has lines that begin or end as rows do."""
    columns = list(rows[0].fields)
    begins, ends = ({row.fields[column] for row in rows} - {""} for column in (columns[0], columns[-1]))
    for row in rows:
        for value in row.fields.values():
            lines = re.split(r"\r\n|\r|\n", value)
            rows_begun = [line for line in lines[1:] if delimiter in line and line.partition(delimiter)[0] in begins]
            rows_ended = [line for line in lines[:-1] if delimiter in line and line.rpartition(delimiter)[2] in ends]
            for line in (*rows_begun, *rows_ended):
                raise RecipeError(
                    f"task.data: {row.place} has what looks like a row of its own in a quoted field, {line!r:.60}: "
                    "double the quotes that are text and quote the field, or write the data as JSONL"
                )


def _check_header(header: Sequence[str], place: str, called: str) -> None:
    if len(header) == 1:
        raise RecipeError(
            f"task.data: {place}, the header, has one column, {header[0]!r:.60}: expected several, with a {called} "
            "between them"
        )
    _check_names(header, place)


def _check_names(names: Sequence[str], place: str) -> None:
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise RecipeError(f"task.data: {place} names {twice[0]!r:.60} twice: give each column a name of its own")


def _json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, name), 1):
        if line.strip():
            place = f"line {number} of {name}"
            yield _row(_parsed(line, place), place)


def _json_array(file: BinaryIO, name: str) -> Iterator[Row]:
    text = "".join(_lines(file, name))
    found = _parsed(text, name, "one array of objects; where each line is one, name the file .jsonl") if text else []
    if not isinstance(found, list):
        raise RecipeError(f"task.data: {name} holds one {type(found).__name__}, expected an array of objects")
    for number, item in enumerate(found, 1):
        place = f"row {number} of {name}"
        yield _row(item, place)


def _parsed(text: str, place: str, expected: str = "one object in JSON") -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([key for key, _ in pairs], place)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=str)  # 0.10 would become 0.1
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"task.data: {place} is not JSON ({error}), expected {expected}") from None


def _row(found: Any, place: str) -> Row:
    if not isinstance(found, dict):
        raise RecipeError(
            f"task.data: {place} holds one {type(found).__name__}, expected an object with the columns as keys"
        )
    return Row(found, place)


def _parquet(file: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow  # half a second to import, and only for those who need it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
        _check_names(table.column_names, name)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise RecipeError(
            f"task.data: {name} is not a Parquet file ({shown([error], 200)}): give a whole one"
        ) from None
    for number, fields in enumerate(rows, 1):
        yield Row(fields, f"row {number} of {name}")


def _text(file: BinaryIO, name: str) -> Iterator[Row]:
    text = "".join(_lines(file, name))
    return iter([Row({"text": text}, name)] if text.strip() else [])


READERS: Mapping[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".csv": partial(_delimited, delimiter=",", called="comma"),
    ".tsv": partial(_delimited, delimiter="\t", called="tab"),
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet,
    ".txt": _text,  # one row
}
