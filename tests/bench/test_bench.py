"""The benchmark: its cells, its rows, what becomes of a rank that fails, and a whole sweep of a tiny model."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig

from mezo_scale.bench import processes, report, sweep
from mezo_scale.bench.cell import Cell, Grid, quick
from mezo_scale.bench.figures import efficiency, figures, planned, series
from mezo_scale.bench.projection import measured_rates, project
from mezo_scale.distributed.launcher import Launcher
from mezo_scale.errors import RecipeError
from mezo_scale.planner import Rates, Workload

ROOT = Path(__file__).parents[2]
ALONE = Launcher("none")
Run = Callable[..., tuple[int, str, str]]

# A rank in place of the real one: figures at once, in which a cell's rows can be told.
FIGURES = """
import json, sys
asked = json.load(open(sys.argv[1]))
json.dump({"figures": {"step_s": [asked["cell"]["rows"]] * asked["rounds"], "forwards_s": [1.0] * asked["rounds"],
    "peak_bytes": 5, "base_bytes": 1, "stored_bytes": 2, "waited": 0}}, open(sys.argv[2], "w"))
"""
KILLED = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
HANGS = "import time\ntime.sleep(60)"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What a cell's ranks run from now on."""
    return lambda text: monkeypatch.setattr(processes, "RANK_PROGRAM", ("-c", text))


def cells(*rows: int, world_size: int = 1) -> list[Cell]:
    return [Cell("random:opt-125m", "fsdp2", world_size, each, 16) for each in rows]


def row(strategy: str, world_size: int, rows: int, step_s: float, **rest: Any) -> dict[str, Any]:
    """One that was measured: two bare forwards take half as long as the step."""
    gather = [{"op": "c10d::_allgather_base_", "ranks": world_size, "calls": 3, "bytes": 1000}]
    moved = gather if world_size > 1 else []
    cell = Cell("random:opt-125m", strategy, world_size, rows, 16, method=rest.pop("method", "mezo"))
    return {
        "cell": cell.as_dict(),
        "date": "2026-01-02 03:04",
        "step_s": [step_s, 2 * step_s, step_s],
        "forwards_s": [step_s / 2, step_s, step_s / 2],
        "peak_bytes": 3 << 30,
        "base_bytes": 1 << 30,
        "stored_bytes": 1 << 29,
        "waited": 0.25,
        "parameters": 125_239_296,
        "layers": 12,
        "layer_bytes": 4 * 7_087_872,
        "gather_s": None,
        "step_collectives": moved,
        "forward_collectives": moved,
        "device_type": "cpu",
        "device": "a processor",
        "threads": 1,
        "cores": 2,
        "torch": "2.0",
        **rest,
    }


# -- cells ---------------------------------------------------------------------------------------------------------


def test_on_one_rank_strong_and_weak_scaling_are_one_cell() -> None:
    found = Grid(["random:opt-125m"], ["fsdp2"], [1, 2, 4], rows=8).cells()
    assert [(cell.world_size, cell.rows) for cell in found] == [(1, 8), (2, 8), (2, 16), (4, 8), (4, 32)]


def test_a_method_runs_only_where_it_can() -> None:
    methods = ["mezo", "published", "naive", "adamw"]
    found = Grid(["m"], ["single", "fsdp2", "hsdp", "zero3"], [1, 2], ["strong"], methods, [1, 4], 8).cells()
    places = {method: {(c.strategy, c.world_size) for c in found if c.method == method} for method in methods}
    assert places["published"] == {("single", 1)}
    assert places["naive"] == places["adamw"] == {("fsdp2", 1), ("fsdp2", 2)}
    assert ("hsdp", 2) in places["mezo"]
    assert ("hsdp", 1) not in places["mezo"]
    assert {c.num_directions for c in found if c.method != "mezo"} == {1}


def test_the_first_look_has_every_method_and_both_kinds_of_scaling() -> None:
    found = quick(["a"])
    assert {cell.method for cell in found} == {"mezo", "published", "naive", "adamw"}
    assert {(cell.strategy, cell.world_size) for cell in found} >= {("fsdp2", 1), ("fsdp2", 2), ("zero3", 2)}
    assert {cell.rows for cell in found if cell.world_size == 2} == {4, 8}


# -- rows, and going on --------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_with_the_cells_that_have_no_row(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(FIGURES)
    sweep.run(cells(1, 2), tmp_path, ALONE, rounds=2)
    before = (tmp_path / sweep.ROWS).read_text()
    with (tmp_path / sweep.ROWS).open("a") as file:
        file.write('{"cell": {"model"')  # killed while writing
    said: list[str] = []
    rows = sweep.run(cells(1, 2, 3), tmp_path, ALONE, rounds=2, say=said.append)
    assert [one["cell"]["rows"] for one in rows] == [1, 2, 3]
    assert [one["step_s"] for one in rows] == [[1, 1], [2, 2], [3, 3]]
    assert (tmp_path / sweep.ROWS).read_text().startswith(before)
    assert [line for line in said if line.startswith("[")] == ["[1/1] random:opt-125m, fsdp2, 1 rank, 3 x 16, mezo"]


def test_a_rank_that_is_killed_is_a_row_and_the_next_cell_goes_on(
    tmp_path: Path, program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.2)
    program(KILLED)
    (failed,) = sweep.run(cells(2, world_size=2), tmp_path, ALONE)
    assert failed["reason"] == "rank 1: killed by SIGKILL (out of memory, if the kernel did it)"
    program(FIGURES)
    rows = sweep.run(cells(2, 4, world_size=2), tmp_path, ALONE, rounds=1)
    assert ["reason" in one for one in rows] == [True, False]
    rows = sweep.run(cells(2, 4, world_size=2), tmp_path, ALONE, rounds=1, retry_failed=True)
    assert ["reason" in one for one in rows] == [False, False]


def test_a_cell_that_hangs_is_ended_and_says_so(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(HANGS)
    (failed,) = sweep.run(cells(2, world_size=2), tmp_path, ALONE, timeout_s=0.3)
    assert failed["reason"] == "rank 0: took longer than 0.3 s"
    assert all(path.suffix == ".log" for path in (tmp_path / "logs").iterdir())


def test_rows_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / sweep.ROWS).write_text("hello\n")
    with pytest.raises(RecipeError, match=r"rows.jsonl, line 1 is no row of a sweep: take the line out"):
        sweep.read(tmp_path)


# -- what is said of them ------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_each_round() -> None:
    one = figures(row("fsdp2", 2, 8, 0.5))
    assert (one.step_s, one.ratio, one.ratio_low, one.ratio_high) == (0.5, 2.0, 2.0, 2.0)
    assert one.tokens_s == 8 * 16 / 0.5
    assert (one.peak_gib, one.stored_gib, one.gathered, one.gathers) == (2.0, 0.5, 1000, 1.0)


def test_efficiency_is_tokens_per_rank_against_the_fewest_ranks() -> None:
    one, strong, weak = (figures(row("fsdp2", *each)) for each in ((1, 8, 1.0), (2, 8, 0.8), (2, 16, 1.25)))
    alone, zero3 = figures(row("single", 1, 8, 0.9)), figures(row("zero3", 2, 8, 0.6))
    everyone = [one, strong, weak, alone, zero3]
    assert [each.cell.rows for each in series(everyone, "weak") if each.cell.strategy == "fsdp2"] == [8, 16]
    assert efficiency(strong, "strong", everyone) == (pytest.approx(1.0 / 2 / 0.8), one)
    assert efficiency(weak, "weak", everyone) == (pytest.approx(1.0 / 1.25), one)
    assert efficiency(zero3, "strong", everyone) == (pytest.approx(0.9 / 2 / 0.6), alone)
    assert efficiency(zero3, "strong", [zero3]) is None


def test_the_plan_beside_a_cell_is_that_of_its_layout(tmp_path: Path) -> None:
    weights = 4 * 125_239_296  # OPT-125m has 125,239,296 parameters
    _, gathered, reduced = planned(Cell("random:opt-125m", "fsdp2", 2, 2, 16, num_directions=4))
    assert (gathered, reduced) == (pytest.approx(weights, rel=1e-4), 8 * (8 + 6))
    assert planned(Cell("random:opt-125m", "hsdp", 2, 2, 16, replicate=2))[1] == 0
    peak, gathered, _ = planned(Cell("random:opt-125m", "single", 1, 2, 16))
    assert gathered == 0
    assert peak is not None
    assert weights < peak < 2 * weights
    assert planned(Cell("random:opt-125m", "fsdp2", 2, 2, 16, "adamw")) == (None, None, None)
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)  # no arithmetic for it
    assert planned(Cell(f"{tmp_path}/", "fsdp2", 2, 2, 16)) == (None, None, None)
    assert planned(Cell("./gone", "fsdp2", 2, 2, 16)) == (None, None, None)


def test_a_report_shows_measured_beside_planned_and_what_failed(tmp_path: Path) -> None:
    rows = [row("fsdp2", 1, 8, 1.0), row("fsdp2", 2, 8, 0.8), row("fsdp2", 2, 8, 1.6, method="adamw")]
    rows += [{"cell": rows[0]["cell"] | {"method": "adamw"}, "date": "2026-01-02 03:05", "reason": "out of memory: 9"}]
    path = report.write(rows, tmp_path, "opt-1.3b")
    text = path.read_text()
    assert "| random:opt-125m | fsdp2 | 2 | 8 x 16 | 0.80 (0.80 to 1.44) | 2.00 (2.00 to 2.00) | 160 | 62% |" in text
    assert "| random:opt-125m | fsdp2 | 2 | adamw | 1.60 (1.60 to 2.88) | 2.00 | 2.00 | — | 1.00 | 1 |" in text
    assert "| random:opt-125m, fsdp2, 1 rank, 8 x 16, adamw | out of memory: 9 |" in text
    assert "What 2 ranks on the 2 cores of one machine can show" in text
    assert "Other programs kept a rank from its core for 25% of the time in the median cell" in text
    assert "**Projected, not measured on any cluster**" in text
    for name in ("scaling.png", "methods.png", "projection.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    with (tmp_path / "cells.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [one["method"] for one in table] == ["mezo", "mezo", "adamw"]
    assert float(table[1]["strong_efficiency"]) == pytest.approx(0.625)
    assert int(table[1]["planned_gathered"]) > 500_000_000
    tree = json.loads((tmp_path / "report.json").read_text())
    assert tree["rows"] == rows
    assert tree["projection"]["measured"] == []


def test_a_report_of_failures_alone_is_one_too(tmp_path: Path) -> None:
    failed = {"cell": cells(1)[0].as_dict(), "date": "2026-01-02 03:05", "reason": "killed by SIGKILL"}
    assert "killed by SIGKILL" in report.write([failed], tmp_path, "opt-1.3b").read_text()


def test_only_rates_measured_on_gpus_replace_the_stated_ones() -> None:
    assert measured_rates([row("single", 1, 8, 1.0)]) == (Rates(), [])
    gpu = {"device_type": "cuda", "device": "a GPU"}
    rates, said = measured_rates([row("single", 1, 8, 1.0, **gpu), row("fsdp2", 2, 8, 1.0, gather_s=1e-3, **gpu)])
    assert len(said) == 3
    flops = 2 * 8 * 16 * (2 * 12 * 7_087_872 + 4 * 12 * 768 * 16)
    assert rates.compute_tflops == pytest.approx(flops / 0.5 / 1e12)
    assert rates.noise_g_s == pytest.approx(2 * 125_239_296 / 0.5 / 1e9)
    assert rates.inside_gb_s == pytest.approx(4 * 7_087_872 / 2 / 1e-3 / 1e9)
    assert rates.between_gbit_s == Rates().between_gbit_s


def test_the_projection_keeps_weights_off_the_network_under_hsdp_alone() -> None:
    points = project("opt-66b", Workload(rows=4, tokens=400), Rates())
    step = {(point.layout, point.devices, point.between_gbit_s): point.step_s for point in points}
    assert ("fsdp2", 1, 100.0) not in step  # 132 GB of weights
    assert step["hsdp", 64, 10.0] == step["hsdp", 64, 100.0] == step["fsdp2", 8, 100.0]
    assert step["fsdp2", 64, 10.0] > 5 * step["fsdp2", 64, 100.0] > 5 * step["hsdp", 64, 100.0]


# -- ranks that really measure -------------------------------------------------------------------------------------


def test_a_sweep_of_a_tiny_model_on_two_ranks_ends_in_a_report(run: Run, model_folder: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--model", model_folder, "--scaling", "strong", "--rows", 4, "--rounds", 2]
    arguments += ["--project", "opt-125m", "--out", tmp_path]
    small = ["--world-size", 2, "--tokens", 16]
    code, out, err = run(*arguments, *small)
    assert (code, err) == (0, "")
    assert f"report: {tmp_path / 'report.md'}" in out
    (row,) = sweep.read(tmp_path)
    ours = figures(row)
    assert (ours.gathered, ours.reduced) == (ours.planned_gathered, ours.planned_reduced)
    assert (ours.gathers, ours.rounds, row["layers"]) == (1.0, 2, 2)
    assert ours.step_s > 0
    assert not list((tmp_path / "logs").iterdir())
    # The same again measures nothing; a cell for which there is no memory is a row.
    assert "[1/" not in run(*arguments, *small)[1]
    code, out, err = run(*arguments, "--world-size", 1, "--tokens", 10**13)
    assert code == 0
    assert sweep.read(tmp_path)[1]["reason"].startswith("out of memory: can't allocate memory")
    assert "out of memory" in (tmp_path / "report.md").read_text()


def test_the_script_for_one_gpu_runs_on_a_tiny_shape(model_folder: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tools" / "gpu_66b.py"), "--any-device", "--model", str(model_folder)]
    small = ["--rows", "2", "--tokens", "16", "--rounds", "1", "--out", str(tmp_path)]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*script, *small], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    rows = sweep.read(folder)
    assert [one["cell"]["method"] for one in rows] == ["mezo", "adamw", "published"]
    assert all(one["cell"]["memory_cap_gib"] == pytest.approx(74.5, abs=0.1) for one in rows)
    assert all("reason" not in one for one in rows)
    assert (folder / "note.md").read_text().count("/llama | ") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model: none is given; expected a folder, a name on the hub or random:SHAPE, or --quick"),
        (["--model", "random:opt-125m", "--strategy", "ddp"], "--strategy: found 'ddp', expected single, fsdp2"),
        (["--model", "random:opt-125m", "--method", "adam"], "--method: found 'adam', expected mezo, published"),
        (["--model", "random:opt-125m", "--rows", 3], "--rows is 3, which 2 ranks can't share evenly"),
        (["--model", "random:opt-125m", "--method", "adamw", "--strategy", "zero3"], "no cell is left"),
        (["--model", "./nowhere"], "there is no nowhere"),
        (["--quick", "--project", "./nowhere"], "there is no nowhere"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(
    run: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, _, err = run("bench", *arguments, "--world-size", 1, "--world-size", 2, "--out", tmp_path / "out")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
