"""The rows of a sweep as report.json, cells.csv and report.md with its plots."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mezo_scale.bench import plots
from mezo_scale.bench.figures import beside_mezo, frame, rates, series
from mezo_scale.bench.sweep import Cell
from mezo_scale.runs.directory import replace_file
from mezo_scale.runs.report import as_markdown

Row = dict[str, Any]
_NOTHING: Mapping[str, float] = {}


def write(rows: Sequence[Row], out: Path, published_s: Mapping[str, float] = _NOTHING) -> Path:
    """Writes the report of these rows into `out`, and returns the Markdown's path.

    Args:
        published_s: seconds per step that others published, by model.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells, measured = frame(rows), rates(frame(rows))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = ["# Scale-up benchmark", "", f"    {command}", "", *_about(rows, cells)]
    if len(cells):
        pairs = beside_mezo(cells)
        plots.scaling(cells, out / "scaling.png")
        plots.methods(pairs, out / "methods.png")
        replace_file(out / "cells.csv", cells.to_csv(index=False))
        lines += ["", "## Scaling", *_scaling(cells), "", "## Methods side by side", *_methods(pairs, published_s)]
        lines += ["", "## Traffic of a step", *_traffic(cells)]
    failed = [{"cell": str(Cell(**row["cell"])), "reason": row["reason"]} for row in rows if "reason" in row]
    if failed:
        lines += ["", "## Cells without figures", "", *_table(pd.DataFrame(failed))]
    if measured:
        options = " ".join(f"--rate {name}={value:.4g}" for name, value in measured.items())
        lines += ["", "## For the plan", "", "Rates that these GPUs reached; the plan's others are stated ones:"]
        lines += ["", f"    mezo-scale plan --gpus 1,2,4..64 {options}"]
    figures = json.loads(cells.to_json(orient="records"))
    tree = {"command": command, "rows": list(rows), "figures": figures, "rates": measured}
    replace_file(out / "report.json", json.dumps(tree, indent=1) + "\n")
    replace_file(out / "report.md", "\n".join(lines) + "\n")
    return out / "report.md"


def _about(rows: Sequence[Row], cells: pd.DataFrame) -> Iterator[str]:
    dates = sorted(row["date"] for row in rows)
    yield f"Measured {dates[0]} to {dates[-1]} UTC, {len(cells)} of {len(rows)} cells." if rows else "No cells."
    if not len(cells):
        return
    devices = " and ".join((cells["device"] + ", " + cells["cores"].astype(str) + " cores").unique())
    several = {name: " or ".join(map(str, cells[name].unique())) for name in ("threads", "rounds", "torch")}
    computed = cells["compute_dtype"].map(lambda dtype: f" computed in {dtype}" if dtype else "")
    yield (
        f"On {devices}; {several['threads']} thread(s) per rank; torch {several['torch']}; weights in "
        f"{' and in '.join((cells['dtype'] + computed).unique())}. A step and two bare forwards on the same rows and "
        f"layout take turns, {several['rounds']} rounds after a warm-up; given are the median and the 10th to 90th "
        "percentile of the rounds, each as long as its slowest rank took. The loss is over two candidates of one "
        "token: one position's logits per row."
    )
    on_cpu = cells[cells["device_type"] == "cpu"]
    if len(on_cpu):
        most, cores, waited = on_cpu["world_size"].max(), on_cpu["cores"].min(), on_cpu["waited"]
        turns = "more ranks than cores take turns; " if most * on_cpu["threads"].max() > cores else ""
        yield ""
        yield (
            f"**What {most} ranks on the {cores} cores of one machine can show:** the bytes that cross between ranks, "
            "the memory each rank needs, that every rank computes its part, what a step costs beside bare forwards. "
            "**What they cannot:** how it scales on a cluster. The ranks share memory, caches and clock, gathering is "
            "copying through the loopback interface by the cores that compute, and so nothing is overlapped; "
            f"{turns}GPUs and links have other ratios of compute to bandwidth. Memory is the resident set's peak "
            "during a step less what the process took before there was a model; the allocator's holes are in it."
        )
        yield ""
        yield (
            f"Other programs kept a rank from its core for {waited.median():.0%} of the time in the median cell, for "
            f"{waited.max():.0%} at worst."
        )


def _scaling(cells: pd.DataFrame) -> Iterator[str]:
    for kind, same in (("strong", "the same batch over more ranks"), ("weak", "the same rows on every rank")):
        mine = series(cells, kind)
        yield from ("", f"### {kind.capitalize()}: {same}", "")
        shown = _named(mine)
        shown["rows x tokens"] = mine["rows"].astype(str) + " x " + mine["tokens"].astype(str)
        shown["s/step"] = _spread(mine, "step_s", "low_s", "high_s")
        shown["x two forwards"] = _spread(mine, "ratio", "ratio_low", "ratio_high")
        shown["tokens/s"] = mine["tokens_s"].map("{:,.0f}".format)
        if mine["of_matmul"].notna().any():
            shown["of matmul rate"] = _text(mine["of_matmul"], "{:.0%}")
        shown["efficiency"] = _text(mine[kind], "{:.0%}")
        yield from _table(shown)
        against = mine.dropna(subset=f"{kind}_against").groupby("strategy")[f"{kind}_against"].first()
        if len(against):
            yield from ("", f"Efficiency against: {', '.join(f'{own}: {which}' for own, which in against.items())}.")
    yield from ("", "![Seconds per step and efficiency over ranks](scaling.png)")


def _methods(pairs: pd.DataFrame, published_s: Mapping[str, float]) -> Iterator[str]:
    yield ""
    yield (
        "`mezo` is this package's step. The others are `mezo_scale/bench/rivals.py`: `published`, MeZO with four "
        "sweeps in place; `naive`, the same on FSDP2's shards; `adamw`, backpropagation under FSDP2, activations kept. "
        "`x mezo` is against `mezo` on the same ranks and strategy. Gathers: of each weight, in a step."
    )
    yield ""
    shown = _named(pairs)
    shown["method"] = pairs["method"]
    shown["s/step"] = _spread(pairs, "step_s", "low_s", "high_s")
    shown["time x mezo"] = _text(pairs["step_s"] / pairs["step_s_mezo"], "{:.2f}")
    shown["peak GiB"] = _text(pairs["peak_gib"], "{:.2f}")
    shown["planned"] = _text(pairs["planned_gib"], "{:.2f}")
    shown["peak x mezo"] = _text(pairs["peak_gib"] / pairs["peak_gib_mezo"], "{:.2f}")
    shown["gathers"] = _text(pairs["gathers"].where(pairs["gathered"] > 0), "{:.0f}")
    if published_s:
        shown["published s/step"] = _text(pairs["model"].map(published_s).where(pairs["method"] != "adamw"), "{:.3f}")
    yield from _table(shown)
    yield from ("", "![Time and memory of each method](methods.png)")


def _traffic(cells: pd.DataFrame) -> Iterator[str]:
    yield from ("", "Bytes per rank, counted where torch dispatches collectives, beside the planner's formula.", "")
    cells = cells[cells["world_size"] > 1]
    shown = _named(cells)
    directions = ", " + cells["num_directions"].astype(str) + " dir."
    shown["method"] = cells["method"] + directions.where(cells["method"] == "mezo", "")
    for name, column in (("gathered", "gathered"), ("all-reduced", "reduced")):
        shown[name] = _text(cells[column], "{:,.0f}")
        shown[f"{name}, formula"] = _text(cells[f"planned_{column}"], "{:,.0f}")
    shown["reduce-scattered"] = _text(cells["scattered"], "{:,.0f}")
    yield from _table(shown.drop_duplicates())


def _named(cells: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"model": cells["name"], "strategy": cells["strategy"], "ranks": cells["world_size"]})


def _spread(cells: pd.DataFrame, *columns: str) -> list[str]:
    return [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in cells[[*columns]].to_numpy()]


def _text(values: pd.Series, form: str) -> pd.Series:
    return values.map(lambda value: form.format(value) if pd.notna(value) else "—")


def _table(shown: pd.DataFrame) -> list[str]:
    rows = (shown.columns, *shown.astype(str).to_numpy())
    return as_markdown([[text.replace("|", "/") for text in row] for row in rows])
