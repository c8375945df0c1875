"""The report of a comparison: a table of methods, the runs behind it, and a plot."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mezo_scale.bench.comparing import finished
from mezo_scale.bench.comparison import Cell, Comparison
from mezo_scale.recipe import takes_steps
from mezo_scale.runs.directory import RunDirectory, replace_file
from mezo_scale.runs.report import RESULTS, main_metric

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


@dataclass(frozen=True)
class Row:
    """A method's line. `low` and `high` are the 95% interval over seeds, of one seed that over the test's rows."""

    label: str
    lr: float | None
    metric: str | None
    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    seeds: int
    seconds: float | None
    memory_gib: float | None


def write(comparison: Comparison, failed: dict[str, str]) -> str:
    """Writes the report's files into the comparison's folder, and returns its table, in Markdown."""
    runs = [measured(cell, failed.get(cell.name)) for cell in comparison.cells]
    rows = table(comparison.cells, runs)
    pd.DataFrame([asdict(run) for run in runs]).to_csv(comparison.out / RUNS, index=False)
    pd.DataFrame([asdict(row) for row in rows]).to_csv(comparison.out / TABLE, index=False)
    _plot(rows, comparison.out / PLOT)
    shown = _markdown(rows, runs)
    replace_file(comparison.out / REPORT, "\n".join([*_head(comparison.cells), shown, "", *_notes()]) + "\n")
    return shown


def measured(cell: Cell, reason: str | None) -> Run:
    """What a cell's directory holds."""
    recipe, method = cell.recipe, cell.recipe.method.name
    run = RunDirectory(recipe.directory)
    if reason is not None or not finished(cell):
        return Run(cell.name, cell.label, recipe.optimizer.lr, cell.seed, reason=reason or "has not been run yet")
    result, lines = run.read_evaluation()[RESULTS[method]], run.read_metrics()
    metric = main_metric(result)
    low, high = result.get("interval_95", (None, None))
    graded = [line.get(f"dev_{metric}") for line in lines if line["step"] == result.get("step")]
    dev = next((value for value in graded if value is not None), None) if takes_steps(method) else None
    seconds = [line["seconds"] for line in lines if line.get("seconds") is not None]
    memory = [line["memory_gib"] for line in lines if line.get("memory_gib") is not None]
    return Run(
        cell.name,
        cell.label,
        recipe.optimizer.lr,
        cell.seed,
        metric,
        dev,
        result[metric],
        low,
        high,
        sum(seconds) if seconds else None,
        max(memory, default=None),
        None,
        result.get("more_is_better", True),
    )


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
    return Row(
        label,
        runs[0].lr if tuned else None,
        runs[0].metric,
        statistics.mean(values),
        statistics.stdev(values) if several else None,
        low,
        high,
        len(values),
        statistics.mean(seconds) if seconds else None,
        max((run.memory_gib for run in runs if run.memory_gib is not None), default=None),
    )


def _markdown(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    metrics = list(dict.fromkeys(row.metric for row in rows))
    name = metrics[0] if len(metrics) == 1 else "result"
    lines = [f"| method | lr | {name}, mean | deviation | 95% interval | runs | s | peak GiB |", "|---" * 8 + "|"]
    for row in rows:
        cells = [row.label, "" if row.lr is None else f"{row.lr:g}", _number(row.mean), _number(row.deviation)]
        span = "" if row.low is None else f"{_number(row.low)} to {_number(row.high)}"
        cells += [f"{span} (rows)" if span and row.seeds == 1 else span, str(row.seeds)]
        cells += ["" if row.seconds is None else f"{row.seconds:.1f}"]
        cells += ["" if row.memory_gib is None else f"{row.memory_gib:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {run.name} | | no result: {run.reason} | | | | | |" for run in runs if run.reason is not None]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _head(cells: Sequence[Cell]) -> list[str]:
    first = cells[0].recipe
    models = ", ".join(dict.fromkeys(cell.recipe.model.name for cell in cells))
    return [f"# {first.task.name} with {models}", "", *_place(cells)]


def _place(cells: Sequence[Cell]) -> list[str]:
    """Where the runs ran."""
    places = []
    for cell in cells:
        path = RunDirectory(cell.recipe.directory).environment
        if path.is_file():
            ran: dict[str, Any] = json.loads(path.read_bytes())[-1]
            places.append(f"{ran['world_size']} process(es) on {ran['device']}, {ran['cpus']} CPUs")
    return [f"{'; '.join(dict.fromkeys(places))}.", ""] if places else []


def _notes() -> list[str]:
    return [
        "The result is on the test split; where several learning rates were run, dev chose after the last step. The "
        "interval is Student's over the runs; of a single run, marked (rows), that of its own report, over the rows of "
        "the test split. s: of a run's steps or forward passes, evaluations aside, on average. Peak GiB: of the rank "
        "that took most; on a CPU the whole process.",
        "",
        f"![the results]({PLOT})",
        "",
        f"Every run: `{RUNS}`. This table: `{TABLE}`. Each run's report is in its folder.",
    ]


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl  # slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1 + 0.45 * max(1, len(rows))), layout="constrained")
    for place, row in enumerate(rows):
        if row.mean is not None:
            ends = [[row.mean - (row.mean if row.low is None else row.low)], [(row.high or row.mean) - row.mean]]
            axes.errorbar([row.mean], [place], xerr=ends, fmt="o", capsize=4, color="tab:blue")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"{rows[0].metric if rows else 'result'} on test, 95% interval")
    beside = path.with_name(path.name + ".partial")
    figure.savefig(beside, dpi=130, format="png")
    beside.replace(path)
    plt.close(figure)
