"""The report's plots: small PNG files."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mezo_scale.bench.figures import series
from mezo_scale.runs.directory import replace_plot

_COLOURS = {"single": "tab:gray", "fsdp2": "tab:blue", "hsdp": "tab:green", "zero3": "tab:orange"}


def scaling(cells: pd.DataFrame, path: Path) -> None:
    """Seconds per step, and efficiency, over ranks: strong scaling to the left, weak to the right."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, kind in enumerate(("strong", "weak")):
        mine = series(cells, kind)
        for (name, strategy), line in mine.groupby(["name", "strategy"]):
            look: dict[str, Any] = {"color": _COLOURS[strategy], "label": f"{name} {strategy}", "marker": "o"}
            errors = [line["step_s"] - line["low_s"], line["high_s"] - line["step_s"]]
            axes[0, column].errorbar(line["world_size"], line["step_s"], errors, capsize=3, **look)
            axes[1, column].plot(line["world_size"], line[kind], **look)
        axes[0, column].set(title=f"{kind} scaling", ylabel="s per step", ylim=(0, None))
        axes[1, column].axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes[1, column].set(xlabel="ranks", ylabel="efficiency", ylim=(0, None))
        axes[1, column].set_xticks(sorted(mine["world_size"].unique()))
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(fontsize="small")
    replace_plot(path, figure, dpi=100)


def methods(pairs: pd.DataFrame, path: Path) -> None:
    """Time and memory of each method, side by side."""
    labels = [f"{one.method}\n{one.strategy} x {one.world_size}" for one in pairs.itertuples()]
    colours = ["tab:blue" if method == "mezo" else "tab:red" for method in pairs["method"]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for each, column, label in zip(axes, ("step_s", "peak_gib"), ("s per step", "peak GiB per rank"), strict=True):
        each.bar(range(len(labels)), pairs[column], color=colours)
        each.set(ylabel=label)
        each.set_xticks(range(len(labels)), labels, fontsize="x-small")
    places = [place for place, planned in enumerate(pairs["planned_gib"]) if pd.notna(planned)]
    if places:
        ends = [[place + side for place in places] for side in (-0.4, 0.4)]
        axes[1].hlines(pairs["planned_gib"].dropna(), *ends, color="black", label="planned")
        axes[1].legend(fontsize="small")
    replace_plot(path, figure, dpi=100)
