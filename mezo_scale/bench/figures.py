"""What a report says of each row: medians and spreads, ratios, and the planner's figure beside the measured one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mezo_scale.bench.cell import Cell
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.planner import GIB, Workload, architecture_of, memory, traffic


@dataclass(frozen=True)
class Figures:
    """One cell, measured, and planned where the planner has a figure (MeZO; not the baselines).

    Attributes:
        step_s, low_s, high_s: median, 10th and 90th percentile of the rounds.
        ratio, ratio_low, ratio_high: step over two bare forwards per direction, within each round; the same three.
        tokens_s: of all ranks together, each token once however many branches see it.
        peak_gib, planned_gib: of the largest rank; on a CPU, what its process takes beyond Python, torch and the rest.
        stored_gib: of the shards.
        gathered, planned_gathered: bytes that the step's all-gathers fill on a rank.
        reduced, planned_reduced: bytes of its all-reduces.
        scattered: bytes of its reduce-scatters.
        waited: part of the time for which the rank with the least luck had no core to run on.
        gathers: how often each weight is gathered: against one bare forward.
    """

    cell: Cell
    step_s: float
    low_s: float
    high_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    tokens_s: float
    peak_gib: float
    planned_gib: float | None
    stored_gib: float
    gathered: int
    planned_gathered: int | None
    reduced: int
    planned_reduced: int | None
    scattered: int
    gathers: float
    waited: float
    device: str
    device_type: str
    threads: int
    cores: int
    rounds: int


def figures(row: dict[str, Any]) -> Figures:
    """Of a row that has measurements."""
    cell = Cell(**row["cell"])
    step, forwards = np.array(row["step_s"]), np.array(row["forwards_s"])
    low, median, high = map(float, np.percentile(step, [10, 50, 90]))
    ratio_low, ratio, ratio_high = map(float, np.percentile(step / forwards / cell.num_directions, [10, 50, 90]))
    moved, bare = row["step_collectives"], row["forward_collectives"]
    gathered, once = _bytes(moved, "allgather"), _bytes(bare, "allgather")
    planned_peak, planned_gathered, planned_reduced = planned(cell)
    return Figures(
        cell=cell,
        step_s=median,
        low_s=low,
        high_s=high,
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        tokens_s=cell.rows * cell.tokens / median,
        peak_gib=(row["peak_bytes"] - row["base_bytes"]) / GIB,
        planned_gib=None if planned_peak is None else planned_peak / GIB,
        stored_gib=row["stored_bytes"] / GIB,
        gathered=gathered,
        planned_gathered=planned_gathered,
        reduced=_bytes(moved, "allreduce"),
        planned_reduced=planned_reduced,
        scattered=_bytes(moved, "reduce_scatter"),
        gathers=gathered / once if once else 0.0,
        waited=row["waited"],
        device=row["device"],
        device_type=row["device_type"],
        threads=row["threads"],
        cores=row["cores"],
        rounds=len(step),
    )


@lru_cache
def planned(cell: Cell) -> tuple[int | None, int | None, int | None]:
    """(peak bytes, bytes gathered, bytes all-reduced) by the planner's formulas; None for a baseline, and for a model
    that is not there or that the planner refuses."""
    if cell.method != "mezo":
        return None, None, None
    try:
        arch = architecture_of(cell.model)
        dtype = cell.compute_dtype or cell.dtype
        workload = Workload(cell.rows // cell.world_size, cell.tokens, 2 * cell.num_directions, dtype)
        moved = traffic(arch, cell.spread, workload)
        return memory(arch, cell.spread, workload).peak, moved.gathered, moved.scalars
    except (RecipeError, ModelError):  # rows outlive the folder that they were measured on
        return None, None, None


def efficiency(one: Figures, scaling: str, everyone: Sequence[Figures]) -> tuple[float, Figures] | None:
    """Of a cell under strong or weak scaling, and against which: its own strategy on the fewest ranks, or, where that
    was measured on one number of ranks alone, a single rank with the whole model. None if there is none to compare."""
    likes = [other for other in everyone if _alike(one.cell, other.cell, scaling)]
    own = [other for other in likes if other.cell.strategy == one.cell.strategy]
    reference = min(own, key=lambda other: other.cell.world_size)
    if len({other.cell.world_size for other in own}) == 1 and one.cell.world_size > 1:
        alone = [other for other in likes if other.cell.world_size == 1 and not other.cell.spread.is_sharded]
        if not alone:
            return None
        reference = alone[0]
    return one.tokens_s / one.cell.world_size / (reference.tokens_s / reference.cell.world_size), reference


def series(everyone: Sequence[Figures], scaling: str) -> list[Figures]:
    """MeZO's cells that belong to one kind of scaling: the batch, or each rank's part of it, is that of the fewest
    ranks."""
    found = []
    for one in everyone:
        if one.cell.method == "mezo" and one.cell.num_directions == 1:
            fewest = min(
                (other for other in everyone if _same_model(one.cell, other.cell)),
                key=lambda other: (other.cell.world_size, other.cell.rows),
            ).cell
            if _share(one.cell, scaling) == _share(fewest, scaling):
                found.append(one)
    return sorted(found, key=lambda one: (one.cell.model, one.cell.strategy, one.cell.world_size))


def _share(cell: Cell, scaling: str) -> float:
    return cell.rows if scaling == "strong" else cell.rows / cell.world_size


def _same_model(one: Cell, other: Cell) -> bool:
    names = ("model", "tokens", "method", "num_directions", "dtype", "compute_dtype")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _alike(one: Cell, other: Cell, scaling: str) -> bool:
    return _same_model(one, other) and _share(one, scaling) == _share(other, scaling)


def _bytes(collectives: Sequence[dict[str, Any]], kind: str) -> int:
    return sum(one["bytes"] for one in collectives if kind in one["op"])
