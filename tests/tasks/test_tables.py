"""Data as people have it: read as its name says and value by value, or refused by file, row and value in one line."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.tables import read_table

ROWS = [(f"review {n} , quite long", n % 2) for n in range(8)]


def table(header: tuple[str, ...] = ("text", "label"), rows: list[Any] = ROWS, delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


def json_lines(rows: list[Any] = ROWS) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def load(folder: Path, name: str, content: str | bytes, **fields: Any) -> dict[str, int]:
    """The labels of all examples by their texts."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sizes = {"train": 4, "dev": 2, "test": 2}
    splits = tasks.load(TaskSection.model_validate({"data": str(path), **sizes, **fields}))
    everything = splits.train + splits.dev + splits.test
    return {example.prompt.removesuffix(" It was"): example.label for example in everything}


def parquet(frame: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.to_parquet(file, index=False)
    return file.getvalue()


WRITTEN: dict[str, Callable[[], str | bytes]] = {
    "d.csv": table,
    "bom.csv": lambda: b"\xef\xbb\xbf" + table().encode(),
    "label_first_with_bom.csv": lambda: "\ufeff" + table(("label", "text"), [(label, text) for text, label in ROWS]),
    "LOUD.CSV": table,
    "d.csv.gz": lambda: gzip.compress(table().encode()),
    "gaps.csv": lambda: table().replace("\r\n", "\r\n\r\n"),
    "old.csv": lambda: table().replace("\r\n", "\r"),
    "d.tsv": lambda: table(delimiter="\t"),
    "d.jsonl": json_lines,
    "bom.jsonl": lambda: "\ufeff" + json_lines().replace("\n", "\n\n"),
    "d.jsonl.gz": lambda: gzip.compress(json_lines().encode()),
    "d.json": lambda: json.dumps([{"text": text, "label": label} for text, label in ROWS], indent=1),
    "d.parquet": lambda: parquet(pd.DataFrame(ROWS, columns=["text", "label"])),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_type_of_file_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    assert load(tmp_path, name, WRITTEN[name]()) == dict(ROWS)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0,\t"), min_size=1).filter(str.strip)


@given(st.lists(TEXT, min_size=3, unique_by=str.strip))
def test_every_text_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    rows = [(text, n % 2) for n, text in enumerate(texts)]
    for name, content in (
        ("d.csv", table(rows=rows)),
        ("d.tsv", table(rows=rows, delimiter="\t")),
        ("d.jsonl", json_lines(rows)),
    ):
        (folder / name).write_bytes(content.encode())
        assert [row.fields["text"] for row in read_table(folder / name)] == texts


def test_separators_quotes_and_line_breaks_inside_a_text_are_the_text(tmp_path: Path) -> None:
    texts = ["a, b\nc, d", 'she said "no"\n', "one\ttwo\r\nthree", "1,\n,1x", ',"', '\t"\t']
    rows = [(text, n % 2) for n, text in enumerate(texts)]
    assert load(tmp_path, "d.csv", table(rows=rows), train=4, dev=1, test=1) == dict(rows)
    assert load(tmp_path, "d.tsv", table(rows=rows, delimiter="\t"), train=4, dev=1, test=1) == dict(rows)


def test_values_are_not_converted(tmp_path: Path) -> None:
    texts = ["001", "1.0", "NA", "null", "None", "nan", "true", "2020-01-01"]
    rows = [(text, n % 2) for n, text in enumerate(texts)]
    assert load(tmp_path, "d.csv", table(rows=rows)) == dict(rows)
    assert load(tmp_path, "d.jsonl", json_lines(rows)) == dict(rows)
    assert load(tmp_path, "d.parquet", parquet(pd.DataFrame(rows, columns=["text", "label"]))) == dict(rows)
    numbers = '{"text": 0.10, "label": 0}\n{"text": 7, "label": 1}\n{"text": 1e3, "label": 1}\n'
    assert set(load(tmp_path, "n.jsonl", numbers, train=1, dev=1, test=1)) == {"0.10", "7", "1e3"}


def test_a_long_field_is_read(tmp_path: Path) -> None:
    rows = [("x" * 200_000, 1), *ROWS[1:]]
    assert load(tmp_path, "d.csv", table(rows=rows)) == dict(rows)


LOOSE = "label,text\n" + "".join(f"{n % 2},review {n}, which has a comma, unquoted\n" for n in range(8))
SHORT = "label,text\n" + "".join(f"{n % 2},review {n}\n" for n in range(7)) + "1\n"
REFUSED: list[tuple[str, str | bytes, str]] = [
    (
        "d.csv",
        LOOSE,
        r"line 2 of .*d\.csv has 4 field\(s\), expected 2 \(label, text\): quote a field that has a comma",
    ),
    ("d.csv", SHORT, r"line 9 of .*d\.csv has 1 field\(s\), expected 2"),
    ("d.csv", 'text,label\n"a\nb",0\nc,0,0\n', r"line 4 of .* has 3 field\(s\)"),
    ("d.csv", 'text,label\na,0\n"never closed,1\nb,0\n', "line 3 of .* is not comma-separated .*: quote the field"),
    ("d.csv", 'text,label\n"great" movie,1\n', "line 2 of .* is not comma-separated"),
    ("d.csv", 'text,label\n"he said \\"no\\" ",1\n', "line 2 of .* is not comma-separated"),
    (
        "d.csv",
        table(delimiter=";"),
        "line 1 of .* the header, has one column, 'text;label': expected several, with a comma",
    ),
    (
        "d.csv",
        'text,label\n" a mess ,0\nfine,1\nit works . ",1\n',
        "line 2 of .* has what looks like a row .* field, 'fine,1'",
    ),
    (
        "d.tsv",
        'label\ttext\n0\ta bore\n1\t" a mess\n0\tit works . "\n',
        "line 3 of .* looks like a row .* field, .0.{1,3}it works",
    ),
    ("d.tsv", table(), "the header, has one column, 'text,label': expected several, with a tab"),
    ("d.csv", ",,\na,b,0\n", "line 2 of .* has no column 'text'"),
    ("d.csv", "text,text,label\na,b,0\n", "line 1 of .* names 'text' twice"),
    (
        "d.csv",
        table(("sentence", "label")),
        "has no column 'text'; it has sentence, label: name one of them in task.temp",
    ),
    ("d.csv", table(("Text", "label")), r"has no column 'text' \(did you mean 'Text'\?\); it has Text, label"),
    ("d.csv", table(("text", "labels")), r"has no column 'label' \(did you mean 'labels'\?\); it has text, labels"),
    ("d.csv", "I loved it,1\nI did not,0\n", "has no column 'text'; it has I loved it, 1"),
    ("d.csv", table(rows=[("a", "negative")]), "line 2 of .* has the label 'negative', expected 0 to 1"),
    ("d.csv", table(rows=[("a", 0.0)]), r"line 2 of .* has the label '0\.0', expected 0 to 1"),
    ("d.csv", table(rows=[("a", "01")]), "has the label '01', expected 0 to 1"),
    ("d.csv", table(rows=[("a", "\u0661")]), "has the label '\u0661', expected 0 to 1"),
    ("d.csv", table(rows=[("a", "")]), "has the label '', expected 0 to 1"),
    ("d.csv", table(rows=[("a", 0), ("", 1)]), "line 3 of .* has no text in text, expected text"),
    ("d.csv", table(rows=[("a", 0), (" \n", 1)]), "line 3 of .* has no text in text"),
    ("d.csv", table().encode("utf-16"), r"is not text in UTF-8 \(found the byte 0xff\): save it so"),
    ("d.csv", table().encode("utf-16-le"), "line 1 of .* has a NUL, expected text in UTF-8"),
    ("d.csv", table(rows=[("caf\xe9", 0)]).encode("latin-1"), r"is not text in UTF-8 \(found the byte 0xe9\)"),
    ("d.csv", "", "d.csv has no rows"),
    ("d.csv", "text,label\n", "d.csv has no rows"),
    ("d.csv", "\n\n", "d.csv has no rows"),
    ("d.csv.gz", table(), "can't be read .*: give a whole file"),
    ("d.csv.gz", gzip.compress(table().encode(), mtime=0)[:-20], "can't be read .*: give a whole file"),
    ("d.jsonl", "", "d.jsonl has no rows"),
    ("d.jsonl", table(), "line 1 of .*d.jsonl is not JSON .* expected one object in JSON"),
    ("d.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "la', "line 2 of .*d.jsonl is not JSON"),
    ("d.jsonl", '["a", 0]\n', "line 1 of .*d.jsonl holds one list, expected an object"),
    ("d.jsonl", "[" * 100_000, "line 1 of .*d.jsonl is not JSON"),
    ("d.jsonl", '{"text": "a", "text": "b", "label": 0}\n', "line 1 of .* names 'text' twice"),
    ("d.jsonl", '{"text": "a", "label": 0}\n{"label": 0}\n', "line 2 of .* has no column 'text'; it has label"),
    ("d.jsonl", '{"text": null, "label": 0}\n', "line 1 of .* has no text in text"),
    ("d.jsonl", '{"text": NaN, "label": 0}\n', "line 1 of .* has no text in text"),
    ("d.jsonl", '{"text": ["a"], "label": 0}\n', "line 1 of .* has a list in text, expected text"),
    ("d.jsonl", '{"text": true, "label": 0}\n', "line 1 of .* has a bool in text, expected text"),
    ("d.jsonl", '{"text": "a\\ud83d", "label": 0}\n', "line 1 of .* has half a surrogate pair in text"),
    ("d.jsonl", '{"text": "a", "label": true}\n', "line 1 of .* has the label True, expected 0 to 1"),
    ("d.jsonl", '{"text": "a", "label": 1.0}\n', r"line 1 of .* has the label '1\.0', expected 0 to 1"),
    ("d.jsonl", '{"text": "a", "label": -1}\n', "line 1 of .* has the label -1, expected 0 to 1"),
    ("d.jsonl", '{"text": "a", "label": [1]}\n', r"line 1 of .* has the label \[1\], expected 0 to 1"),
    ("d.json", json_lines(), r"d\.json is not JSON .* expected one array of objects; where each line is one, name"),
    ("d.json", '{"text": "a", "label": 0}', r"d\.json holds one dict, expected an array of objects"),
    ("d.json", '[{"text": "a", "label": 0}, 3]', r"row 2 of .*d\.json holds one int, expected an object"),
    ("d.json", "", r"d\.json has no rows"),
    ("d.csv", table(("te\nxt", "label")), "has no column 'text' .* it has te xt, label"),
    (
        "d.parquet",
        WRITTEN["d.parquet"]()[:-200] + b"\x0f" * 192 + WRITTEN["d.parquet"]()[-8:],
        "can't be read .*: give a",
    ),
    ("d.parquet", table(), r"d\.parquet is not a Parquet file"),
    (
        "d.parquet",
        parquet(pd.DataFrame({"text": ["a", None], "label": [0, 1]})),
        r"row 2 of .*d\.parquet has no text in",
    ),
    (
        "d.parquet",
        parquet(pd.DataFrame({"text": ["a"], "label": [1.0]})),
        r"row 1 of .* has the label 1\.0, expected 0",
    ),
    (
        "d.parquet",
        parquet(pd.DataFrame({"text": [b"a"], "label": [1]})),
        "row 1 of .* has a bytes in text, expected text",
    ),
    (
        "d.dat",
        table(),
        r"the type of .*d\.dat is not known by its name, expected \.csv, \.tsv, \.jsonl, \.json, \.parquet",
    ),
]


@pytest.mark.parametrize(("name", "content", "said"), REFUSED)
def test_what_is_not_as_it_should_be_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        load(tmp_path, name, content)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(RecipeError, match=r"d\.csv is a folder with no test file; expected a file, or a folder with"):
        tasks.load(TaskSection(data=str(tmp_path / "d.csv")))


def test_a_message_about_a_table_without_a_header_stays_short(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no column 'text'") as refused:
        load(tmp_path, "d.csv", table(("x" * 9000, *map(str, range(40))), [("a", *range(40))]))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["absent.tsv", "absent.jsonl", "a/absent.parquet", "absent.json", "absent.jsonl.gz"])
def test_an_absent_file_of_any_type_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(RecipeError, match=f"there is no file {name}; expected one in .csv, .tsv, .jsonl, .json, .parq"):
        tasks.load(TaskSection(data=name))
