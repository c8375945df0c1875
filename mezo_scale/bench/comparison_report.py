"""The report of a comparison: a table of methods, the runs behind it, and a plot."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mezo_scale.bench.comparing import finished
from mezo_scale.bench.comparison import Cell, Comparison
from mezo_scale.recipe import takes_steps
from mezo_scale.runs.directory import RunDirectory, replace_file, replace_plot
from mezo_scale.runs.report import RESULTS, as_markdown, main_metric

REPORT, TABLE, RUNS, PLOT = "compare.md", "compare.csv", "runs.csv", "compare.png"
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, two-sided 95%, by degrees of freedom


@dataclass(frozen=True)
class Run:
    """A cell's figures, each None where it has none.

    Attributes:
        dev: the main metric on dev after the step that is graded, of methods that take steps.
        test: the main metric on test; low, high: its 95% interval over the test's rows.
        seconds: of the method's own work: steps, or forward passes; evaluations aside.
        memory_gib: the most that a rank took in it.
        reason: why there is no result.
        more_is_better: of the main metric.
    """

    name: str
    label: str
    lr: float
    seed: int | None
    metric: str | None = None
    dev: float | None = None
    test: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    memory_gib: float | None = None
    reason: str | None = None
    more_is_better: bool = True


Row = dict[str, Any]
"""A method's line: label, lr (None where nothing is tuned), metric, mean and deviation over seeds, low and high (95%
interval over seeds; of one seed, over the test's rows), seeds, seconds and memory_gib."""


def write(comparison: Comparison, failed: dict[str, str]) -> str:
    """Writes the report's files into the comparison's folder, and returns its table, in Markdown."""
    runs = [measured(cell, failed.get(cell.name)) for cell in comparison.cells]
    rows = table(comparison.cells, runs)
    pd.DataFrame([asdict(run) for run in runs]).to_csv(comparison.out / RUNS, index=False)
    pd.DataFrame(rows).to_csv(comparison.out / TABLE, index=False)
    _plot(rows, comparison.out / PLOT)
    shown = _markdown(rows, runs)
    replace_file(comparison.out / REPORT, "\n".join([*_head(comparison.cells), shown, "", *_NOTES]) + "\n")
    return shown


def measured(cell: Cell, reason: str | None) -> Run:
    """What a cell's directory holds."""
    recipe, method = cell.recipe, cell.recipe.method.name
    run, found = RunDirectory(recipe.directory), Run(cell.name, cell.label, recipe.optimizer.lr, cell.seed)
    if reason is not None or not finished(cell):
        return replace(found, reason=reason or "has not been run yet")
    result, lines = run.read_evaluation()[RESULTS[method]], run.read_metrics()
    metric = main_metric(result)
    if result[metric] is None:
        return replace(found, reason=f"it ended, but with no {metric}: on some rows that is not finite")
    graded = [line.get(f"dev_{metric}") for line in lines if line["step"] == result.get("step")]
    dev = next((value for value in graded if value is not None), None) if takes_steps(method) else None
    low, high = result.get("interval_95", (None, None))
    found = replace(found, metric=metric, dev=dev, test=result[metric], low=low, high=high)
    seconds = [line["seconds"] for line in lines if line.get("seconds") is not None]
    memory = [line["memory_gib"] for line in lines if line.get("memory_gib") is not None]
    found = replace(found, seconds=sum(seconds) if seconds else None, memory_gib=max(memory, default=None))
    return replace(found, more_is_better=result.get("more_is_better", True))


def table(cells: Sequence[Cell], runs: Sequence[Run]) -> list[Row]:
    """A row per method that has a result, with the learning rate that dev chooses."""
    rows = []
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [run for run in runs if run.label == label]
        by_rate = {lr: [run for run in own if run.lr == lr] for lr in dict.fromkeys(run.lr for run in own)}
        chosen = _chosen(list(by_rate.values()))
        if chosen:
            tuned = any(takes_steps(cell.recipe.method.name) for cell in cells if cell.label == label)
            rows.append(_row(label, chosen, tuned))
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean of two values or more."""
    freedom, z = len(values) - 1, 1.959964
    if freedom <= len(_T):
        t = _T[freedom - 1]
    else:  # the expansion in 1 / freedom, right to three digits from here on
        t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    mean, half = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _chosen(rates: Sequence[Sequence[Run]]) -> list[Run]:
    """The runs with a result of the rate that is best on dev; rates of which a run has none only if there are no
    others."""
    done = [[run for run in runs if run.test is not None] for runs in rates]
    whole = [found for found, runs in zip(done, rates, strict=True) if len(found) == len(runs)]
    candidates = [found for found in whole or done if found]
    if len(candidates) < 2:
        return candidates[0] if candidates else []
    return max(candidates, key=lambda found: statistics.mean(map(_merit, found)))


def _merit(run: Run) -> float:
    """By which runs are compared; -inf without a value on dev."""
    return -math.inf if run.dev is None else run.dev if run.more_is_better else -run.dev


def _row(label: str, runs: Sequence[Run], tuned: bool) -> Row:
    values = [run.test for run in runs if run.test is not None]
    several = len(values) > 1
    low, high = interval(values) if several else (runs[0].low, runs[0].high)
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return {
        "label": label,
        "lr": runs[0].lr if tuned else None,
        "metric": runs[0].metric,
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if several else None,
        "low": low,
        "high": high,
        "seeds": len(values),
        "seconds": statistics.mean(seconds) if seconds else None,
        "memory_gib": max((run.memory_gib for run in runs if run.memory_gib is not None), default=None),
    }


def _markdown(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    metrics = {row["metric"] for row in rows}
    name = metrics.pop() if len(metrics) == 1 else "result"
    shown = [["method", "lr", f"{name}, mean", "deviation", "95% interval", "runs", "s", "peak GiB"]]
    for row in rows:
        span = "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
        told = [_told(row[key], form) for key, form in (("lr", "g"), ("mean", ".4f"), ("deviation", ".4f"))]
        told += [f"{span} (rows)" if span and row["seeds"] == 1 else span, str(row["seeds"])]
        shown.append([row["label"], *told, _told(row["seconds"], ".1f"), _told(row["memory_gib"], ".2f")])
    failed = [f"| {run.name} | | no result: {run.reason} | | | | | |" for run in runs if run.reason is not None]
    return "\n".join([*as_markdown(shown), *failed])


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _head(cells: Sequence[Cell]) -> list[str]:
    """What was compared, and where the runs ran."""
    models = ", ".join(dict.fromkeys(cell.recipe.model.name for cell in cells))
    places = []
    for cell in cells:
        path = RunDirectory(cell.recipe.directory).environment
        if path.is_file():
            ran: dict[str, Any] = json.loads(path.read_bytes())[-1]
            places.append(f"{ran['world_size']} process(es) on {ran['device']}, {ran['cpus']} CPUs")
    where = [f"{'; '.join(dict.fromkeys(places))}.", ""] if places else []
    return [f"# {cells[0].recipe.task.name} with {models}", "", *where]


_NOTES = (
    "The result is on the test split; where several learning rates were run, dev chose after the last step. The "
    "interval is Student's over the runs; of a single run, marked (rows), that of its own report, over the rows of the "
    "test split. s: of a run's steps or forward passes, evaluations aside, on average. Peak GiB: of the rank that took "
    "most; on a CPU the whole process.",
    "",
    f"![the results]({PLOT})",
    "",
    f"Every run: `{RUNS}`. This table: `{TABLE}`. Each run's report is in its folder.",
)


def _plot(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(7, 1 + 0.45 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        mean, low, high = (row["mean"] if row[key] is None else row[key] for key in ("mean", "low", "high"))
        axes.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], fmt="o", capsize=4, color="tab:blue")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"{rows[0]['metric'] if rows else 'result'} on test, 95% interval")
    replace_plot(path, figure, dpi=130)
