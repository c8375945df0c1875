"""The rows of a sweep as report.json, cells.csv and report.md with its plots."""

import csv
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mezo_scale.bench import plots
from mezo_scale.bench.cell import Cell, short_name
from mezo_scale.bench.figures import Figures, efficiency, figures, series
from mezo_scale.bench.projection import DEVICE_GIB, GPUS_PER_NODE, Point, measured_rates, project
from mezo_scale.planner import FORMULA, Workload
from mezo_scale.runs.directory import replace_file

Row = dict[str, Any]
PROJECTED = Workload(rows=4, tokens=400, dtype="bfloat16")


def write(rows: Sequence[Row], out: Path, model: str = "opt-66b") -> Path:
    """Writes the report of these rows into `out`, with a projection of `model`, and returns the Markdown's path."""
    everyone = [figures(row) for row in rows if "reason" not in row]
    failed = [(Cell(**row["cell"]), row["reason"]) for row in rows if "reason" in row]
    rates, said = measured_rates(rows)
    points = project(model, PROJECTED, rates)
    about = f"{PROJECTED.rows} x {PROJECTED.tokens} tokens per device, {PROJECTED.dtype}"
    compared = _compared(everyone)
    out.mkdir(parents=True, exist_ok=True)
    plots.projection(points, model, about, out / "projection.png")
    if everyone:
        plots.scaling(everyone, out / "scaling.png")
        plots.methods(compared, out / "methods.png")
        _write_csv(everyone, out / "cells.csv")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = ["# Scale-up benchmark", "", f"    {command}", "", *_about(rows, everyone)]
    if everyone:
        lines += ["## Scaling", *_scaling(everyone)]
        lines += ["## Methods side by side", *_methods(compared)]
        lines += ["## Traffic of a step", *_traffic(everyone)]
    if failed:
        lines += ["## Cells without figures", "", *_table(("cell", "reason"), [(str(c), why) for c, why in failed])]
    lines += [f"## Projected: {short_name(model)} on 1 to 64 devices", *_projection(points, about, said, asdict(rates))]
    tree = {
        "command": command,
        "rows": list(rows),
        "figures": [asdict(one) for one in everyone],
        "projection": {"model": model, "workload": asdict(PROJECTED), "rates": asdict(rates), "measured": said}
        | {"points": [asdict(point) for point in points]},
    }
    replace_file(out / "report.json", json.dumps(tree, indent=1) + "\n")
    replace_file(out / "report.md", "\n".join(lines).rstrip() + "\n")
    return out / "report.md"


def _about(rows: Sequence[Row], everyone: Sequence[Figures]) -> Iterator[str]:
    measured = [row for row in rows if "reason" not in row]
    dates = sorted(row["date"] for row in rows)
    yield f"Measured {dates[0]} to {dates[-1]} UTC, {len(measured)} of {len(rows)} cells." if rows else "No cells."
    if everyone:
        devices = " and ".join(dict.fromkeys(f"{one.device}, {one.cores} cores" for one in everyone))
        threads = " or ".join(str(count) for count in dict.fromkeys(one.threads for one in everyone))
        rounds = " or ".join(str(count) for count in dict.fromkeys(one.rounds for one in everyone))
        dtypes = dict.fromkeys(
            one.cell.dtype + (f" computed in {one.cell.compute_dtype}" if one.cell.compute_dtype else "")
            for one in everyone
        )
        yield (
            f"On {devices}; {threads} thread(s) per rank; torch {measured[0]['torch']}; weights in "
            f"{' and in '.join(dtypes)}. A step and two bare forwards on the same rows and layout take turns, {rounds} "
            "rounds after a warm-up; given are the median and the 10th to 90th percentile of the rounds, each as long "
            "as its slowest rank took. The loss is over two candidates of one token: one position's logits per row."
        )
    if any(one.device_type == "cpu" for one in everyone):
        most = max(one.cell.world_size for one in everyone)
        waited = [one.waited for one in everyone]
        cores = min(one.cores for one in everyone)
        yield ""
        yield (
            f"**What {most} ranks on the {cores} cores of one machine can show:** the bytes that cross between ranks, "
            "the memory each rank needs, that every rank computes its part, what a step costs beside bare forwards. "
            "**What they cannot:** how it scales on a cluster. The ranks share memory, caches and clock, gathering is "
            "copying through the loopback interface by the cores that compute, and so nothing is overlapped; "
            f"{'more ranks than cores take turns; ' if most * max(one.threads for one in everyone) > cores else ''}"
            "GPUs and links have other ratios of compute to bandwidth. Memory is the resident set's peak during a step "
            "less what the process took before there was a model; the allocator's holes are in it."
        )
        yield ""
        yield (
            f"Other programs kept a rank from its core for {np.median(waited):.0%} of the time in the median cell, for "
            f"{max(waited):.0%} at worst."
        )
    yield ""


def _scaling(everyone: Sequence[Figures]) -> Iterator[str]:
    for kind in ("strong", "weak"):
        same = "the same batch over more ranks" if kind == "strong" else "the same rows on every rank"
        yield from ("", f"### {kind.capitalize()}: {same}", "")
        body, references = [], {}
        for one in series(everyone, kind):
            found = efficiency(one, kind, everyone)
            if found is not None and found[1] is not one:
                references[one.cell.strategy] = f"{found[1].cell.strategy} on {found[1].cell.world_size}"
            body.append(
                (
                    *_names(one.cell),
                    f"{one.cell.rows} x {one.cell.tokens}",
                    _spread(one.step_s, one.low_s, one.high_s),
                    _spread(one.ratio, one.ratio_low, one.ratio_high),
                    f"{one.tokens_s:,.0f}",
                    "—" if found is None else f"{found[0]:.0%}",
                )
            )
        head = ("model", "strategy", "ranks", "rows x tokens", "s/step", "x two forwards", "tokens/s", "efficiency")
        yield from _table(head, body)
        if references:
            yield "Efficiency against: " + ", ".join(f"{name}: {which}" for name, which in references.items()) + "."
            yield ""
    yield from ("![Seconds per step and efficiency over ranks](scaling.png)", "")


def _compared(everyone: Sequence[Figures]) -> list[tuple[Figures, Figures]]:
    """Every baseline and every MeZO of one direction on the same rows, with MeZO on the same ranks (under FSDP2, if it
    is there) to compare with."""
    pairs = []
    baselines = {(one.cell.model, one.cell.rows, one.cell.tokens) for one in everyone if one.cell.method != "mezo"}
    for one in everyone:
        if (one.cell.model, one.cell.rows, one.cell.tokens) not in baselines or one.cell.num_directions > 1:
            continue
        ours = [
            other
            for other in everyone
            if other.cell.method == "mezo"
            and other.cell.num_directions == 1
            and (other.cell.model, other.cell.world_size) == (one.cell.model, one.cell.world_size)
            and (other.cell.rows, other.cell.tokens) == (one.cell.rows, one.cell.tokens)
        ]
        same = [other for other in ours if other.cell.strategy == one.cell.strategy] or ours
        if same:
            pairs.append((one, same[0]))
    return sorted(pairs, key=lambda pair: (pair[0].cell.model, pair[0].cell.world_size, pair[0].cell.strategy))


def _methods(compared: Sequence[tuple[Figures, Figures]]) -> Iterator[str]:
    yield ""
    yield (
        "`mezo` is this package's step. The others are `tools/baselines.py`: `published`, MeZO with four sweeps in "
        "place; `naive`, the same on FSDP2's shards; `adamw`, backpropagation under FSDP2, activations kept. `x mezo` "
        "is against `mezo` on the same ranks and strategy. Gathers: of each weight, in a step."
    )
    yield ""
    body = [
        (
            *_names(one.cell),
            one.cell.method,
            _spread(one.step_s, one.low_s, one.high_s),
            f"{one.step_s / ours.step_s:.2f}",
            f"{one.peak_gib:.2f}",
            "—" if one.planned_gib is None else f"{one.planned_gib:.2f}",
            f"{one.peak_gib / ours.peak_gib:.2f}",
            f"{one.gathers:.0f}" if one.gathered else "—",
        )
        for one, ours in compared
    ]
    head = ("model", "strategy", "ranks", "method", "s/step", "x mezo", "peak GiB", "planned", "x mezo", "gathers")
    yield from _table(head, body)
    yield from ("![Time and memory of each method](methods.png)", "")


def _traffic(everyone: Sequence[Figures]) -> Iterator[str]:
    yield ""
    yield "Bytes per rank, counted where torch dispatches collectives, beside the planner's formula."
    yield ""
    body = [
        (
            *_names(one.cell),
            f"{one.cell.method}, {one.cell.num_directions} dir." if one.cell.method == "mezo" else one.cell.method,
            f"{one.gathered:,}",
            "—" if one.planned_gathered is None else f"{one.planned_gathered:,}",
            f"{one.reduced:,}",
            "—" if one.planned_reduced is None else f"{one.planned_reduced:,}",
            f"{one.scattered:,}",
        )
        for one in everyone
        if one.cell.world_size > 1
    ]
    head = ("model", "strategy", "ranks", "method", "gathered", "formula", "all-reduced", "formula", "reduce-scattered")
    yield from _table(head, list(dict.fromkeys(body)))


def _projection(points: Sequence[Point], about: str, said: Sequence[str], rates: dict[str, float]) -> Iterator[str]:
    stated = ", ".join(f"{name} {value:g}" for name, value in rates.items())
    yield from ("", f"**Projected, not measured on any cluster**: {about}, devices of {DEVICE_GIB:g} GiB.")
    yield f"Measured in this sweep: {'; '.join(said) or 'none of the rates; all are stated ones'}. Rates: {stated}."
    yield from ("", *(f"    {line}" for line in FORMULA.splitlines()), "")
    body = [
        (
            {"hsdp": f"hsdp {point.devices // GPUS_PER_NODE} x {GPUS_PER_NODE}"}.get(point.layout, point.layout),
            str(point.devices),
            f"{point.between_gbit_s:g} Gb/s",
            f"{point.step_s:.2f}",
            f"{point.tokens_s:,.0f}",
            f"{point.layer_compute_s * 1e3:.1f}",
            f"{point.layer_gather_s * 1e3:.1f}",
        )
        for point in points
    ]
    head = ("layout", "devices", "network", "s/step", "tokens/s", "ms compute per layer", "ms gather per layer")
    yield from _table(head, body)
    yield "![Projected tokens per second over devices](projection.png)"


def _names(cell: Cell) -> tuple[str, str, str]:
    return short_name(cell.model), cell.strategy, str(cell.world_size)


def _spread(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield f"| {' | '.join(row)} |"
    yield ""


def _write_csv(everyone: Sequence[Figures], path: Path) -> None:
    records = []
    for one in everyone:
        record = asdict(one)
        record = record.pop("cell") | record
        for kind in ("strong", "weak"):
            found = efficiency(one, kind, everyone) if one in series(everyone, kind) else None
            record[f"{kind}_efficiency"] = None if found is None else found[0]
        records.append(record)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
