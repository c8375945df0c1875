"""The report's plots: small PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezo_scale.bench.cell import short_name
from mezo_scale.bench.figures import Figures, efficiency, series
from mezo_scale.bench.projection import DEVICE_GIB, GPUS_PER_NODE, LAYOUTS, Point

_COLOURS = {"single": "tab:gray", "fsdp2": "tab:blue", "hsdp": "tab:green", "zero3": "tab:orange"}


def scaling(everyone: Sequence[Figures], path: Path) -> None:
    """Seconds per step, and efficiency, over ranks: strong scaling to the left, weak to the right."""
    figure, axes = _pyplot().subplots(2, 2, figsize=(8, 5.5), sharex="col", layout="constrained")
    for column, kind in enumerate(("strong", "weak")):
        cells = series(everyone, kind)
        for model, strategy in dict.fromkeys((one.cell.model, one.cell.strategy) for one in cells):
            line = [one for one in cells if (one.cell.model, one.cell.strategy) == (model, strategy)]
            ranks = [one.cell.world_size for one in line]
            errors = [[one.step_s - one.low_s for one in line], [one.high_s - one.step_s for one in line]]
            look: dict[str, Any] = {"color": _COLOURS[strategy], "label": f"{short_name(model)} {strategy}"}
            axes[0, column].errorbar(ranks, [one.step_s for one in line], errors, marker="o", capsize=3, **look)
            against = [efficiency(one, kind, everyone) for one in line]
            points = [(rank, found[0]) for rank, found in zip(ranks, against, strict=True) if found is not None]
            if points:
                axes[1, column].plot(*zip(*points, strict=True), marker="o", **look)
        axes[0, column].set(title=f"{kind} scaling", ylabel="s per step", ylim=(0, None))
        axes[1, column].axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes[1, column].set(xlabel="ranks", ylabel="efficiency", ylim=(0, None))
        axes[1, column].set_xticks(sorted({one.cell.world_size for one in cells}))
    _legend(axes[0, 0])
    _save(figure, path)


def methods(compared: Sequence[tuple[Figures, Figures]], path: Path) -> None:
    """Time and memory of each method, side by side; pairs of a cell and the one it is compared with."""
    labels = [f"{one.cell.method}\n{one.cell.strategy} x {one.cell.world_size}" for one, _ in compared]
    figure, axes = _pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = ["tab:blue" if one.cell.method == "mezo" else "tab:red" for one, _ in compared]
    axes[0].bar(range(len(labels)), [one.step_s for one, _ in compared], color=colours)
    axes[0].set(ylabel="s per step")
    axes[1].bar(range(len(labels)), [one.peak_gib for one, _ in compared], color=colours)
    for position, (one, _) in enumerate(compared):
        if one.planned_gib is not None:
            line = axes[1].hlines(one.planned_gib, position - 0.4, position + 0.4, color="black", label="planned")
            axes[1].legend(handles=[line], fontsize="small")
    axes[1].set(ylabel="peak GiB per rank")
    for each in axes:
        each.set_xticks(range(len(labels)), labels, fontsize="x-small")
    _save(figure, path)


def projection(points: Sequence[Point], model: str, about: str, path: Path) -> None:
    """Tokens per second over devices, per layout and network."""
    figure, axes = _pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    lines: dict[tuple[tuple[int, float], ...], str] = {}  # one that does not depend on the network is drawn once
    for layout, network in dict.fromkeys((point.layout, point.between_gbit_s) for point in points):
        line = tuple(
            (point.devices, point.tokens_s)
            for point in points
            if (point.layout, point.between_gbit_s) == (layout, network)
        )
        lines[line] = f"{LAYOUTS[layout]}, {'either network' if line in lines else f'{network:g} Gb/s'}"
    for line, label in lines.items():
        axes.plot(*zip(*line, strict=True), "-o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks := sorted({point.devices for point in points}), ticks)
    axes.set(xlabel=f"devices of {DEVICE_GIB:g} GiB, {GPUS_PER_NODE} to a node", ylabel="tokens per second")
    axes.set_title(f"PROJECTED, not measured: {model}, {about}", fontsize="medium")
    _legend(axes)
    _save(figure, path)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _pyplot() -> Any:
    import matplotlib as mpl  # slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, format="png")
    _pyplot().close(figure)
