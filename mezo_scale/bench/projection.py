"""From the rates of one device and its links to many devices: what a step would take, by the planner's arithmetic.

Nothing here is measured on many devices. What a sweep measured on a GPU replaces the stated rate it belongs to; the
rest are the planner's, and the report says which is which.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mezo_scale.planner import GIB, Rates, Strategy, Workload, architecture_of, memory, seconds, traffic
from mezo_scale.planner.workload import BYTES

DEVICES = (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_NODE = 8
DEVICE_GIB = 80.0
NETWORKS_GBIT = (100.0, 10.0)
LAYOUTS = {"fsdp2": "FSDP2 over all", "hsdp": f"HSDP, a copy per {GPUS_PER_NODE}, scalars between"}


@dataclass(frozen=True)
class Point:
    """One projected step.

    Attributes:
        layout: one of LAYOUTS.
        between_gbit_s: the network of each node.
        step_s, tokens_s: projected; tokens of all devices together.
        layer_compute_s, layer_gather_s: a decoder layer's share of the two terms.
    """

    layout: str
    devices: int
    between_gbit_s: float
    step_s: float
    tokens_s: float
    layer_compute_s: float
    layer_gather_s: float


def project(model: str, workload: Workload, rates: Rates) -> list[Point]:
    """Weak scaling: every device has the workload's rows. What does not fit a device of DEVICE_GIB is left out."""
    arch = architecture_of(model)
    layers = arch.layers
    points = []
    for network in NETWORKS_GBIT:
        linked = replace(rates, between_gbit_s=network)
        for devices in DEVICES:
            nodes = max(1, devices // GPUS_PER_NODE)
            layouts = [Strategy("fsdp2", shard=devices)]
            if nodes > 1:
                layouts.append(Strategy("hsdp", replicate=nodes, shard=GPUS_PER_NODE))
            for strategy in layouts:
                if memory(arch, strategy, workload).peak > DEVICE_GIB * GIB:
                    continue
                step = seconds(arch, strategy, workload, linked, GPUS_PER_NODE).step
                alone = seconds(arch, Strategy("fsdp2"), workload, linked).step
                moved = traffic(arch, strategy, workload, GPUS_PER_NODE)
                gather = max(
                    moved.inside_node / (linked.inside_gb_s * 1e9),
                    moved.between_nodes * GPUS_PER_NODE / (linked.between_gbit_s * 1e9 / 8),
                )
                points.append(
                    Point(
                        strategy.name,
                        devices,
                        network,
                        step,
                        devices * workload.rows * workload.tokens / step,
                        alone / layers,
                        gather / layers,
                    )
                )
    return points


def measured_rates(rows: Sequence[dict[str, Any]]) -> tuple[Rates, list[str]]:
    """The planner's rates, with those that a sweep on GPUs has measured in their place, and what each was measured as.

    Compute comes from two bare forwards on one GPU, noise from what a step takes besides, the gather inside a node from
    gathering a decoder layer.
    """
    rates, said = Rates(), []
    on_gpus = [row for row in rows if "reason" not in row and row["device_type"] == "cuda"]
    whole = [row for row in on_gpus if not Strategy(row["cell"]["strategy"]).is_sharded]
    alone = [row for row in whole if row["cell"]["world_size"] == 1 and row["cell"]["method"] == "mezo"]
    alone = [row for row in alone if row["cell"]["num_directions"] == 1]
    if alone:
        row = max(alone, key=lambda row: row["parameters"])
        cell, forwards = row["cell"], float(np.median(row["forwards_s"]))
        tokens = cell["rows"] * cell["tokens"]
        per_token = 2 * row["layers"] * row["layer_bytes"] // BYTES[cell["dtype"]]
        per_token += 4 * row["layers"] * architecture_of(cell["model"]).hidden * cell["tokens"]
        rates = replace(rates, compute_tflops=2 * tokens * per_token / forwards / 1e12)
        said.append(f"compute {rates.compute_tflops:.0f} TFLOP/s: forwards of {cell['model']}, {row['device']}")
        besides = float(np.median(np.array(row["step_s"]) - np.array(row["forwards_s"])))
        if besides > 0:
            rates = replace(rates, noise_g_s=2 * row["parameters"] / besides / 1e9)
            said.append(f"noise {rates.noise_g_s:.0f} G/s: what a step takes besides those forwards")
    gathers = [row for row in on_gpus if row["gather_s"] and row["cell"]["world_size"] <= GPUS_PER_NODE]
    if gathers:
        row = max(gathers, key=lambda row: (row["cell"]["world_size"], row["layer_bytes"]))
        ranks = row["cell"]["world_size"]
        rates = replace(rates, inside_gb_s=row["layer_bytes"] * (ranks - 1) / ranks / row["gather_s"] / 1e9)
        said.append(f"gather {rates.inside_gb_s:.0f} GB/s inside a node: a layer over {ranks} ranks")
    return rates, said
