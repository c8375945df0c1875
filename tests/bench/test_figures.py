"""What is said of a sweep's rows: medians, ratios, efficiency, rivals, the plan beside them, and the report."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import MambaConfig

from mezo_scale.bench import report
from mezo_scale.bench.figures import beside_mezo, frame, planned, rates, series
from mezo_scale.bench.sweep import Cell
from mezo_scale.planner import GIB


def row(strategy: str, world_size: int, rows: int, step_s: float, **rest: Any) -> dict[str, Any]:
    """One that was measured: two bare forwards take half as long as the step."""
    gather = [{"op": "c10d::_allgather_base_", "ranks": world_size, "calls": 3, "bytes": 1000}]
    moved = gather if world_size > 1 else []
    cell = Cell("random:opt-125m", strategy, world_size, rows, 16, method=rest.pop("method", "mezo"))
    return {
        "cell": json.loads(cell.key),
        "date": "2026-01-02 03:04",
        "step_s": [step_s, 2 * step_s, step_s],
        "forwards_s": [step_s / 2, step_s, step_s / 2],
        "memory_bytes": 2 << 30,
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


def only(cells: pd.DataFrame, **wanted: Any) -> Any:
    """The one cell with these values."""
    for name, value in wanted.items():
        cells = cells[cells[name] == value]
    (found,) = cells.itertuples()
    return found


def test_how_near_a_step_comes_to_ranks_that_only_multiply() -> None:
    """Four rows a rank: each layer's 7,087,872 weights once per token, and attention over 16 tokens."""
    each = 2 * 12 * (2 * 7_087_872 + 4 * 768 * 16) * 4 * 16
    rates = {"matmul_tflops": 0.2}
    found = frame([row("fsdp2", 2, 8, 0.5, **rates), row("single", 1, 4, 0.5)])
    assert only(found, world_size=2).of_matmul == pytest.approx(each / 0.5 / 0.2e12)
    assert math.isnan(only(found, world_size=1).of_matmul)


def test_ratios_are_taken_within_each_round() -> None:
    (one,) = frame([row("fsdp2", 2, 8, 0.5)]).itertuples()
    assert (one.step_s, one.low_s, one.high_s) == (0.5, 0.5, pytest.approx(0.9))
    assert (one.ratio, one.ratio_low, one.ratio_high) == (2.0, 2.0, 2.0)
    assert one.tokens_s == 8 * 16 / 0.5
    assert (one.peak_gib, one.stored_gib, one.gathered, one.gathers) == (2.0, 0.5, 1000, 1.0)


def test_efficiency_is_tokens_per_rank_against_the_fewest_ranks() -> None:
    measured = [("fsdp2", 1, 8, 1.0), ("fsdp2", 2, 8, 0.8), ("fsdp2", 2, 16, 1.25), ("single", 1, 8, 0.9)]
    cells = frame([row(*one) for one in [*measured, ("zero3", 2, 8, 0.6)]])
    strong, weak = only(cells, rows=16), only(cells, strategy="fsdp2", world_size=2, rows=8)
    assert strong.weak == pytest.approx(1.0 / 1.25)
    assert (weak.strong, weak.strong_against) == (pytest.approx(1.0 / 2 / 0.8), "fsdp2 on 1")
    zero3 = only(cells, strategy="zero3")
    assert (zero3.strong, zero3.strong_against) == (pytest.approx(0.9 / 2 / 0.6), "single on 1")
    assert list(series(cells, "weak").query("strategy == 'fsdp2'")["rows"]) == [8, 16]
    assert pd.isna(frame([row("zero3", 2, 8, 0.6)])["strong"][0])
    assert only(cells, strategy="fsdp2", world_size=1).strong == 1


def test_what_is_computed_in_16_bits_is_compared_with_its_like() -> None:
    rows = [row("fsdp2", *one) for one in [(1, 8, 1.0), (2, 8, 0.8), (1, 8, 0.5), (2, 8, 0.5)]]
    for one in rows[2:]:
        one["cell"]["compute_dtype"] = "bfloat16"
    cells = frame(rows)
    assert list(cells["strong"].groupby(cells["compute_dtype"]).min()) == [pytest.approx(0.625), pytest.approx(0.5)]
    assert len(series(cells, "strong")) == 4


def test_a_rival_stands_beside_mezo_on_the_same_ranks_and_strategy() -> None:
    measured = [row("single", 1, 8, 1.0), row("fsdp2", 1, 8, 1.5), row("fsdp2", 2, 8, 2.0), row("fsdp2", 2, 4, 9.0)]
    rivals = [row("single", 1, 8, 3.0, method="published"), row("fsdp2", 2, 8, 5.0, method="adamw")]
    pairs = beside_mezo(frame([*measured, *rivals]))
    times = {(one.method, one.strategy, one.world_size): (one.step_s, one.step_s_mezo) for one in pairs.itertuples()}
    assert times == {
        ("mezo", "single", 1): (1.0, 1.0),
        ("published", "single", 1): (3.0, 1.0),
        ("mezo", "fsdp2", 1): (1.5, 1.5),
        ("mezo", "fsdp2", 2): (2.0, 2.0),
        ("adamw", "fsdp2", 2): (5.0, 2.0),
    }


def test_the_plan_beside_a_cell_is_that_of_its_layout(tmp_path: Path) -> None:
    weights = 4 * 125_239_296  # OPT-125m has 125,239,296 parameters
    found = planned(Cell("random:opt-125m", "fsdp2", 2, 2, 16, num_directions=4))
    assert (found["planned_gathered"], found["planned_reduced"]) == (pytest.approx(weights, rel=1e-4), 8 * (8 + 9))
    assert planned(Cell("random:opt-125m", "hsdp", 2, 2, 16, replicate=2))["planned_gathered"] == 0
    alone = planned(Cell("random:opt-125m", "single", 1, 2, 16))
    assert alone["planned_gathered"] == 0
    assert alone["planned_gib"] is not None
    assert weights < alone["planned_gib"] * GIB < 2 * weights
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)  # no arithmetic for it
    nothing = [("random:opt-125m", "adamw"), (f"{tmp_path}/", "mezo"), ("./gone", "mezo")]
    for model, method in nothing:
        assert set(planned(Cell(model, "fsdp2", 2, 2, 16, method)).values()) == {None}


def test_a_report_shows_measured_beside_planned_and_what_failed(tmp_path: Path) -> None:
    rows = [row("fsdp2", 1, 8, 1.0), row("fsdp2", 2, 8, 0.8), row("fsdp2", 2, 8, 1.6, method="adamw")]
    rows += [{"cell": rows[0]["cell"] | {"method": "adamw"}, "date": "2026-01-02 03:05", "reason": "out of memory: 9"}]
    text = report.write(rows, tmp_path, {"random:opt-125m": 0.815}).read_text()
    assert "| random:opt-125m | fsdp2 | 2 | 8 x 16 | 0.80 (0.80 to 1.44) | 2.00 (2.00 to 2.00) | 160 | 62% |" in text
    assert "| random:opt-125m | fsdp2 | 2 | adamw | 1.60 (1.60 to 2.88) | 2.00 | 2.00 | — | 1.00 | 1 | — |" in text
    assert "| 0.815 |" in text
    assert "Efficiency against: fsdp2: fsdp2 on 1." in text
    assert "| random:opt-125m, fsdp2, 1 rank, 8 x 16, adamw | out of memory: 9 |" in text
    assert "What 2 ranks on the 2 cores of one machine can show" in text
    assert "Other programs kept a rank from its core for 25% of the time in the median cell" in text
    for name in ("scaling.png", "methods.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    table = pd.read_csv(tmp_path / "cells.csv")
    assert list(table["method"]) == ["mezo", "mezo", "adamw"]
    assert table["strong"][1] == pytest.approx(0.625)
    assert table["planned_gathered"][1] > 500_000_000
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows


def test_a_report_of_failures_alone_is_one_too(tmp_path: Path) -> None:
    failed = {"cell": row("fsdp2", 1, 8, 1.0)["cell"], "date": "2026-01-02 03:05", "reason": "killed by SIGKILL"}
    assert "killed by SIGKILL" in report.write([failed], tmp_path).read_text()


def test_rates_are_measured_on_gpus_alone_and_given_to_the_plan(tmp_path: Path) -> None:
    assert rates(frame([row("single", 1, 8, 1.0)])) == {}
    gpu = {"device_type": "cuda", "device": "a GPU"}
    rows = [row("single", 1, 8, 1.0, **gpu), row("fsdp2", 2, 8, 1.0, gather_s=1e-3, **gpu)]
    flops = 2 * 8 * 16 * (2 * 12 * 7_087_872 + 4 * 12 * 768 * 16)
    assert rates(frame(rows)) == {
        "compute_tflops": pytest.approx(flops / 0.5 / 1e12),
        "noise_g_s": pytest.approx(2 * 125_239_296 / 0.5 / 1e9),
        "inside_gb_s": pytest.approx(4 * 7_087_872 / 2 / 1e-3 / 1e9),
    }
    assert "mezo-scale plan --gpus 1,2,4..64 --rate compute_tflops=" in report.write(rows, tmp_path).read_text()
    for one in rows:
        one["cell"]["model"] = "./gone"  # or one that the planner has no arithmetic for
    assert list(rates(frame(rows))) == ["inside_gb_s"]
