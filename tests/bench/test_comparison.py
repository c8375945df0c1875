"""Comparisons: what a file multiplies out to, how one goes on, and the table that it comes to."""

import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_scale import recipe as recipes
from mezo_scale.bench import comparing, comparison, comparison_report
from mezo_scale.bench.comparison import Cell
from mezo_scale.errors import LaunchError, MezoError, RecipeError
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.session import train

Run = Callable[..., tuple[int, str, str]]
METHODS = {
    "zero-shot": {"method": {"name": "zero_shot"}},
    "probe": {"method": {"name": "linear_probe"}},
    "adamw": {"method": {"name": "adamw"}, "optimizer": {"lr": [1e-4, 1e-2]}},
    "mezo": {"optimizer": {"lr": 1e-3, "eps": 1e-2}},
}


@pytest.fixture
def tree(tmp_path: Path, model_folder: Path, reviews_file: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(model_folder)},
        "task": {"data": str(reviews_file), "train": 48, "dev": 16, "test": 32, "max_length": 40},
        "train": {"steps": 2, "batch_size": 6, "eval_every": 2},
        "output": {"dir": str(tmp_path / "out")},
        "compare": {"methods": dict(METHODS), "seeds": [0, 1]},
    }


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(cell: Cell, log: Path, processes: int | None) -> str | None:
    """A cell in this process: quicker than one of its own."""
    try:
        train(cell.recipe)
    except MezoError as error:
        return str(error)
    return None


def names(asked: comparison.Comparison) -> list[str]:
    return [cell.name for cell in asked.cells]


def test_methods_multiply_with_seeds_and_rates_and_what_draws_nothing_is_run_once(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    asked = comparison.load(write(tmp_path, tree))
    adamw = [f"adamw-lr{lr}-seed{seed}" for lr in ("0.0001", "0.01") for seed in (0, 1)]
    assert names(asked) == ["zero-shot", "probe", *adamw, "mezo-seed0", "mezo-seed1"]
    by_name = {cell.name: cell.recipe for cell in asked.cells}
    assert by_name["adamw-lr0.01-seed1"].optimizer.lr == 1e-2
    assert by_name["adamw-lr0.01-seed1"].optimizer.seed == 1
    assert by_name["mezo-seed1"].train.steps == 2
    assert by_name["zero-shot"].train.steps == 20_000  # it has no use for what is shared
    assert by_name["mezo-seed0"].output.dir == str(tmp_path / "out" / "mezo-seed0")
    assert not by_name["mezo-seed0"].output.checkpoint
    splits = comparison.load(write(tmp_path, tree), ["compare.vary=task.split_seed", "compare.seeds=[7]"])
    assert names(splits) == ["zero-shot-seed7", "probe-seed7", *adamw_of(7), "mezo-seed7"]
    assert {cell.recipe.task.split_seed for cell in splits.cells} == {7}


def adamw_of(seed: int) -> list[str]:
    return [f"adamw-lr{lr}-seed{seed}" for lr in ("0.0001", "0.01")]


def test_an_override_holds_for_every_method_that_looks_at_it(tmp_path: Path, tree: dict[str, Any]) -> None:
    asked = comparison.load(write(tmp_path, tree), ["lr=1e-4", "task.test=8", "eps=5e-3"])
    assert names(asked) == ["zero-shot", "probe", "adamw-seed0", "adamw-seed1", "mezo-seed0", "mezo-seed1"]
    assert {cell.recipe.task.test for cell in asked.cells} == {8}
    assert [cell.recipe.optimizer.eps for cell in asked.cells] == [*[1e-3] * 4, 5e-3, 5e-3]
    assert asked.cells[-1].recipe.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compare": None}, "has no section compare"),
        ({"compare": {"methods": {}}}, "compare: methods"),
        (
            {"compare": {"methods": {"a": {}}, "seeds": []}},
            "compare: seeds: found [] (a list), expected at least 1 item",
        ),
        ({"compare": {"methods": {"a": {"optimizer": {"lr": []}}}}}, "optimizer.lr: found [] (a list), expected a"),
        ({"compare": {"methods": {"a/b": {}}}}, "expected a name of letters"),
        ({"compare": {"methods": {"a": {"lr": 3}}}}, "compare.methods.a.lr: found '3', expected sections of a recipe"),
        ({"compare": {"methods": {"a": {"output": {"dir": "x"}}}}}, "each run has its folder in output.dir"),
        ({"compare": {"methods": {"a": {"optimizer": {"seed": 3}}}}}, "but compare.seeds says what it is"),
        ({"compare": {"methods": {"a": {"optimizer": {"lr": ["x"]}}}}}, "optimizer.lr: found 'x' (text), expected a"),
        ({"compare": {"methods": {"a": {"method": {"name": "magic"}}}}}, "method.name: found 'magic' (text)"),
        ({"compare": {"methods": {"a": {}}, "seed": [0]}}, "unknown key seed; did you mean compare.seeds?"),
        ({"trian": {"steps": 2}}, "trian: found"),
        ({"method": {"draws": 2}}, "method.draws is 2, which none of the methods has a use for: leave it out"),
        (
            {"train": {"steps": 3, "batch_size": 6, "eval_every": 2}},
            "train.eval_every is 2, but dev chooses among several optimizer.lr after the last of 3 steps",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, tree: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        comparison.load(write(tmp_path, {name: found for name, found in (tree | change).items() if found is not None}))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_comparison_that_there_is_not_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"no file nowhere: give a comparison \(YAML\), or one of opt, opt-written, rob"
    ):
        comparison.load("nowhere")


@pytest.mark.parametrize(
    "methods", [{"a-seed0": METHODS["probe"], "a": {}}, {"a": {"optimizer": {"lr": [0.1, 0.1 + 1e-9]}}}]
)
def test_two_runs_are_given_no_folder_in_common(tmp_path: Path, tree: dict[str, Any], methods: dict[str, Any]) -> None:
    tree["compare"]["methods"] = methods
    with pytest.raises(
        RecipeError, match=r"compare.yaml: two runs would be called a-.*seed0: give methods other names"
    ):
        comparison.load(write(tmp_path, tree))


def test_a_folder_that_cannot_be_made_stops_all(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "logs").touch()
    for out, why in ((tmp_path, "File exists"), (tmp_path / "logs" / "in it", "Not a directory")):
        asked = comparison.load(write(tmp_path, tree), [f"output.dir={out}"])
        with pytest.raises(RecipeError, match=rf"^output.dir: {out}/logs can't be made \({why}\)$"):
            comparing.run(asked, start=start)


@pytest.mark.parametrize("text", ["{", "[]", '{"mezo-seed0": 3}'])
def test_damaged_reasons_are_refused(tmp_path: Path, tree: dict[str, Any], text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / comparing.FAILED).write_text(text)
    with pytest.raises(RecipeError, match=r"failed.json is damaged: take it away, and what failed is run again"):
        comparing.run(comparison.load(write(tmp_path, tree)), start=start)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "logs"] == [comparing.FAILED]


def test_a_launcher_around_a_comparison_is_refused(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LaunchError, match="started 2 processes, but a comparison starts the ranks of each run itself"):
        comparing.run(comparison.load(write(tmp_path, tree)), start=start)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "code", "reason"),
    [
        ("all is well", 0, None),
        ("[rank0]: error: too few examples\nerror: another", 2, "too few examples"),
        ("", -9, "killed by SIGKILL (out of memory, if the kernel did it)"),
        ("Traceback", 1, r"ended with exit code 1, see .*/x.log"),
    ],
)
def test_the_reason_of_a_run_is_its_own_error_or_how_it_ended(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, said: str, code: int, reason: str | None
) -> None:
    def launched(command: list[str], log: Path) -> int:
        assert command[-3:] == [str(cell.recipe.directory), "--processes", "2"]
        log.write_text(said)
        return code

    monkeypatch.setattr(comparing, "launched", launched)
    cell, *_ = comparison.load(write(tmp_path, tree)).cells
    found = comparing.launch(cell, tmp_path / "x.log", 2)
    assert found == reason or (reason is not None and re.fullmatch(reason, found or ""))


def test_a_run_that_ends_without_a_result_has_failed(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["compare"] = {"methods": {"zero-shot": METHODS["zero-shot"]}}
    del tree["train"]
    failed = comparing.run(comparison.load(write(tmp_path, tree)), start=lambda cell, log, processes: None)
    assert failed == {"zero-shot": f"ended without a result, see {tmp_path / 'out' / 'logs' / 'zero-shot.log'}"}


def test_stopped_and_gone_on_it_comes_to_the_same_table(tmp_path: Path, tree: dict[str, Any]) -> None:
    del tree["compare"]["methods"]["adamw"]
    once, twice = (
        comparison.load(write(tmp_path, tree), [f"output.dir={tmp_path / name}"]) for name in ("once", "twice")
    )
    assert comparing.run(once, start=start) == {}
    begun: list[str] = []

    def stops_at_the_third(cell: Cell, log: Path, processes: int | None) -> str | None:
        begun.append(cell.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return start(cell, log, processes)

    with pytest.raises(KeyboardInterrupt):
        comparing.run(twice, start=stops_at_the_third)
    assert begun == names(twice)[:3]
    said: list[str] = []
    comparing.run(twice, start=start, say=said.append)
    assert said[0] == "2 of 4 runs are left: the others have a result or have failed (--retry-failed)"
    tables = []
    for asked in (once, twice):
        comparison_report.write(asked, {})
        with (asked.out / comparison_report.TABLE).open() as file:
            rows = list(csv.DictReader(file))
        tables.append([{name: row[name] for name in row if name not in ("seconds", "memory_gib")} for row in rows])
    assert tables[0] == tables[1]
    assert [row["label"] for row in tables[0]] == ["zero-shot", "probe", "mezo"]
    assert [row["seeds"] for row in tables[0]] == ["1", "1", "2"]
    assert (once.out / "compare.png").read_bytes().startswith(b"\x89PNG")
    report = (once.out / "compare.md").read_text()
    assert report.count("(rows) |") == 2
    assert "process(es) on" in report


def test_a_cell_that_fails_is_a_row_with_its_reason_and_the_next_goes_on(tmp_path: Path, tree: dict[str, Any]) -> None:
    methods = {"icl": {"method": {"name": "icl", "demonstrations": 49}}, "zero-shot": METHODS["zero-shot"]}
    tree["compare"] = {"methods": methods}
    del tree["train"]
    asked, tries = comparison.load(write(tmp_path, tree)), []

    def counted(cell: Cell, log: Path, processes: int | None) -> str | None:
        tries.append(cell.name)
        return start(cell, log, processes)

    failed = comparing.run(asked, start=counted)
    assert list(failed) == ["icl-seed0"]
    table = comparison_report.write(asked, failed)
    assert "| icl-seed0 | | no result: method.demonstrations is 49, but the train split has 48" in table
    assert "\n| zero-shot |" in table
    assert comparing.run(asked, start=counted) == failed
    assert tries == ["icl-seed0", "zero-shot"]
    assert comparing.run(asked, start=counted, retry_failed=True) == failed
    assert tries == ["icl-seed0", "zero-shot", "icl-seed0"]


def test_the_rate_that_is_best_on_dev_stands_in_the_table() -> None:
    def run(lr: float, seed: int, dev: float | None, test: float | None) -> comparison_report.Run:
        return comparison_report.Run(f"m-{lr}-{seed}", "m", lr, seed, "accuracy", dev, test)

    runs = [run(1.0, 0, 0.9, 0.5), run(1.0, 1, 0.7, 0.6), run(2.0, 0, 0.8, 0.9), run(2.0, 1, 0.7, 0.9)]
    assert comparison_report._chosen([runs[:2], runs[2:]]) == runs[:2]
    lacking = [run(3.0, 0, 1.0, 1.0), run(3.0, 1, None, None)]
    assert comparison_report._chosen([runs[:2], runs[2:], lacking]) == runs[:2]
    assert comparison_report._chosen([lacking]) == lacking[:1]
    assert comparison_report._chosen([lacking[1:]]) == []
    less = [[replace(run, more_is_better=False) for run in runs] for runs in (runs[:2], runs[2:])]
    assert comparison_report._chosen(less) == less[1]


@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (5, 2.7764), (10, 2.2622), (12, 2.2010), (31, 2.0423)])
def test_the_interval_over_seeds_is_students(count: int, t: float) -> None:
    values = [math.sin(number) for number in range(count)]
    low, high = comparison_report.interval(values)
    half = t * statistics.stdev(values) / math.sqrt(count)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(statistics.mean(values))


def test_a_directory_with_another_run_stops_all_before_anything_begins(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["compare"] = {"methods": {"zero-shot": METHODS["zero-shot"], "probe": METHODS["probe"]}}
    del tree["train"]
    comparing.run(comparison.load(write(tmp_path, tree)), start=start)
    other = comparison.load(write(tmp_path, tree), ["task.test=16", "compare.seeds=[1]"])
    with pytest.raises(RecipeError, match=r"zero-shot holds a run with task\.test: 32, now 16"):
        comparing.run(other, start=start)


def test_two_comparisons_in_one_folder_do_not_spoil_each_other(tmp_path: Path, tree: dict[str, Any]) -> None:
    """The second does a run that the first, too, has before it."""
    tree["compare"] = {"methods": {"zero-shot": METHODS["zero-shot"], "adamw": {"method": {"name": "adamw"}}}}
    first = comparison.load(write(tmp_path, tree), ["compare.seeds=[0]", "optimizer.lr=1e-3"])
    begun: list[str] = []

    def meanwhile_the_other(cell: Cell, log: Path, processes: int | None) -> str | None:
        begun.append(cell.name)
        train(next(cell for cell in first.cells if cell.label == "adamw").recipe)
        return start(cell, log, processes)

    assert comparing.run(first, start=meanwhile_the_other) == {}
    assert begun == ["zero-shot"]
    assert comparing.run(first, start=start) == {}
    assert recipes.load(tmp_path / "out" / "adamw-seed0").train.objective == "candidates"


def test_a_run_that_another_comparison_was_at_has_that_ones_result(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["compare"] = {"methods": {"zero-shot": METHODS["zero-shot"], "probe": METHODS["probe"]}}
    del tree["train"]
    asked = comparison.load(write(tmp_path, tree))

    def is_taken(cell: Cell, log: Path, processes: int | None) -> str | None:
        return "is being written by process 7" if cell.label == "zero-shot" else start(cell, log, processes)

    assert comparing.run(asked, start=is_taken) == {"zero-shot": "is being written by process 7"}
    train(asked.cells[0].recipe)  # the other one ends
    said: list[str] = []
    assert comparing.run(asked, start=start, say=said.append) == {}
    assert said == ["0 of 2 runs are left: the others have a result or have failed (--retry-failed)"]


def test_the_command_runs_each_cell_in_processes_of_its_own(
    run: Run, tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"method": {"name": "icl", "demonstrations": 49}}
    tree["compare"] = {"methods": {"zero-shot": METHODS["zero-shot"], "broken": broken}}
    del tree["train"]
    code, out, err = run("compare", write(tmp_path, tree))
    assert (code, err) == (
        2,
        "error: 1 of 2 runs have no result, the table says why: mend that and give --retry-failed\n",
    )
    assert "[1/2] zero-shot\n" in out
    assert "| broken-seed0 | | no result: method.demonstrations is 49, but the train split has 48: ask for" in out
    assert json.loads((tmp_path / "out" / "failed.json").read_text()).keys() == {"broken-seed0"}
    assert RunDirectory(tmp_path / "out" / "zero-shot").report.is_file()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # what is done is not begun again
    assert run("compare", tmp_path / "compare.yaml")[0] == 2
