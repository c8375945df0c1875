"""What a report says of the rows, as a frame: medians and spreads, ratios, and the planner's figure beside each."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from mezo_scale.bench.sweep import Cell, short_name
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.planner import GIB, Workload, architecture_of, forward_flops, memory, traffic

_KEPT = ["waited", "device", "device_type", "threads", "cores", "torch", "date"]
_KEPT += ["parameters", "layers", "layer_bytes", "gather_s"]
_SAME = ["model", "tokens", "method", "num_directions", "dtype", "compute_dtype"]
_BATCH = ["model", "dtype", "compute_dtype", "rows", "tokens"]


def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line per row that has measurements: the cell's fields and, of the rounds, medians and percentiles.

    Columns:
        name: of the model, short.
        step_s, low_s, high_s: median, 10th and 90th percentile of the rounds.
        ratio, ratio_low, ratio_high: step over two bare forwards per direction, within each round; the same three.
        tokens_s: of all ranks together, each token once however many branches see it.
        of_matmul: the operations of a step's forward passes, over those that ranks which only multiply would do in its
            time. Rivals have none, nor rows that were measured before it was, nor models that are gone.
        peak_gib, planned_gib: of the largest rank; on a CPU, what its process takes beyond Python, torch and the rest.
        stored_gib: of the shards.
        gathered, planned_gathered: bytes that the step's all-gathers fill on a rank.
        reduced, planned_reduced: bytes of its all-reduces.
        scattered: bytes of its reduce-scatters.
        gathers: how often each weight is gathered: against one bare forward.
        waited: part of the time for which the rank with the least luck had no core to run on.
        strong, weak: efficiency (`efficiency`); strong_against, weak_against: of what.
        device, device_type, threads, cores, rounds, torch, date, parameters, layers, layer_bytes, gather_s.
    """
    cells = pd.DataFrame([_figures(row) for row in rows if "reason" not in row])
    if len(cells):
        cells = cells.sort_values(["model", "world_size", "rows"], kind="stable", ignore_index=True)
        for kind in ("strong", "weak"):
            cells[kind], cells[f"{kind}_against"] = efficiency(cells, kind)
    return cells


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    cell = Cell(**row["cell"])
    step, forwards = np.array(row["step_s"]), np.array(row["forwards_s"])
    moved, once = row["step_collectives"], _bytes(row["forward_collectives"], "allgather")
    gathered = _bytes(moved, "allgather")
    return {
        **row["cell"],
        "compute_dtype": cell.compute_dtype or "",
        "name": short_name(cell.model),
        **dict(zip(("low_s", "step_s", "high_s"), _spread(step), strict=True)),
        **dict(zip(("ratio_low", "ratio", "ratio_high"), _spread(step / forwards / cell.num_directions), strict=True)),
        "forwards_s": float(np.median(forwards)),
        "besides_s": float(np.median(step - forwards)),
        "tokens_s": cell.rows * cell.tokens / float(np.median(step)),
        "peak_gib": row["memory_bytes"] / GIB,
        "stored_gib": row["stored_bytes"] / GIB,
        "gathered": gathered,
        "reduced": _bytes(moved, "allreduce"),
        "scattered": _bytes(moved, "reduce_scatter"),
        "gathers": gathered / once if once else 0.0,
        "rounds": len(step),
        **planned(cell),
        "of_matmul": _of_matmul(cell, row),
        **{name: row[name] for name in _KEPT},
    }


def _of_matmul(cell: Cell, row: dict[str, Any]) -> float | None:
    rate = row.get("matmul_tflops")
    if rate is None or cell.method != "mezo":
        return None
    try:
        forward = forward_flops(architecture_of(cell.model), cell.rows // cell.world_size, cell.tokens)
    except (RecipeError, ModelError):
        return None
    step_s = float(np.median(row["step_s"]))
    return float(2 * cell.num_directions * forward / step_s / (rate * 1e12))


@lru_cache
def planned(cell: Cell) -> dict[str, float | int | None]:
    """planned_gib, planned_gathered and planned_reduced by the planner's formulas; None for a rival, and for a model
    that is not there or that the planner refuses."""
    names = ("planned_gib", "planned_gathered", "planned_reduced")
    if cell.method != "mezo":
        return dict.fromkeys(names)
    try:
        arch = architecture_of(cell.model)
        dtype = cell.compute_dtype or cell.dtype
        workload = Workload(cell.rows // cell.world_size, cell.tokens, 2 * cell.num_directions, dtype)
        moved = traffic(arch, cell.spread, workload)
        peak = memory(arch, cell.spread, workload).peak / GIB
    except (RecipeError, ModelError):  # rows outlive the folder that they were measured on
        return dict.fromkeys(names)
    return dict(zip(names, (peak, moved.gathered, moved.scalars), strict=True))


def efficiency(cells: pd.DataFrame, kind: str) -> tuple[pd.Series, pd.Series]:
    """Tokens per second and rank against a reference, and which one that is: the cell's own strategy on the fewest
    ranks or, where that was measured on one number of ranks alone, a single rank with the whole model. Empty where
    there is none to compare.

    Args:
        cells: of a frame, small worlds first.
        kind: "strong": the same batch; "weak": the same rows on each rank.
    """
    alike = [*(cells[name] for name in _SAME), _share(cells, kind)]
    own = [*alike, cells["strategy"]]
    rate = cells["tokens_s"] / cells["world_size"]
    label = cells["strategy"] + " on " + cells["world_size"].astype(str)
    is_alone = (cells["world_size"] == 1) & (cells["strategy"] == "single")
    several = (cells.groupby(own)["world_size"].transform("nunique") > 1) | (cells["world_size"] == 1)
    references = [
        values.groupby(own).transform("first").where(several, values.where(is_alone).groupby(alike).transform("first"))
        for values in (rate, label)
    ]
    return rate / references[0], references[1].where(references[1] != label)


def series(cells: pd.DataFrame, kind: str) -> pd.DataFrame:
    """MeZO's cells of one direction that belong to one kind of scaling: the batch, or each rank's part of it, is that
    of the fewest ranks."""
    share = _share(cells, kind)
    fewest = share.groupby([cells[name] for name in _SAME]).transform("first")
    ours = (cells["method"] == "mezo") & (cells["num_directions"] == 1) & (share == fewest)
    return cells[ours].sort_values(["model", "strategy", "world_size"], kind="stable")


def beside_mezo(cells: pd.DataFrame) -> pd.DataFrame:
    """Every rival, and MeZO in one direction on the same rows; step_s_mezo and peak_gib_mezo are those of MeZO on the
    same ranks, under the same strategy if it is there."""
    cells = cells[cells["num_directions"] == 1].reset_index()
    with_rival = (cells["method"] != "mezo").groupby([cells[name] for name in _BATCH]).transform("any")
    ours = cells.loc[cells["method"] == "mezo", [*_BATCH, "world_size", "strategy", "step_s", "peak_gib"]]
    pairs = cells[with_rival].merge(ours, on=[*_BATCH, "world_size"], suffixes=("", "_mezo"))
    pairs["other"] = pairs["strategy"] != pairs["strategy_mezo"]
    nearest = pairs.sort_values(["other"], kind="stable").drop_duplicates("index")
    return nearest.sort_values(["model", "world_size", "strategy", "method"], kind="stable")


def rates(cells: pd.DataFrame) -> dict[str, float]:
    """What GPUs measured of the planner's rates, for `plan --rate`: compute from two bare forwards on one GPU, noise
    from what a step takes besides, gathering inside a node from gathering a decoder layer."""
    found: dict[str, float] = {}
    if not len(cells) or not (cells["device_type"] == "cuda").any():
        return found
    cells = cells[cells["device_type"] == "cuda"]
    alone = cells[(cells["world_size"] == 1) & (cells["strategy"] == "single")]
    alone = alone[(alone["method"] == "mezo") & (alone["num_directions"] == 1) & alone["planned_gib"].notna()]
    if len(alone):
        one = alone.loc[alone["parameters"].idxmax()]
        flops = 2 * forward_flops(architecture_of(one.model), one.rows, one.tokens)
        found["compute_tflops"] = float(flops / one.forwards_s / 1e12)
        if one.besides_s > 0:
            found["noise_g_s"] = float(2 * one.parameters / one.besides_s / 1e9)
    gathers = cells[cells["gather_s"].notna() & (cells["world_size"] <= 8)]
    if len(gathers):
        one = gathers.sort_values(["world_size", "layer_bytes"]).iloc[-1]
        found["inside_gb_s"] = float(one.layer_bytes * (1 - 1 / one.world_size) / one.gather_s / 1e9)
    return found


def _share(cells: pd.DataFrame, kind: str) -> pd.Series:
    return cells["rows"] / (1 if kind == "strong" else cells["world_size"])


def _bytes(collectives: Sequence[dict[str, Any]], kind: str) -> int:
    return sum(one["bytes"] for one in collectives if kind in one["op"])


def _spread(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [10, 50, 90])]
