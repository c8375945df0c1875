"""How single runs learn, beside each other: the metric on dev over steps, forward rows and hours.

    python -m tools.learning_curves RUN [RUN ...] --out docs/results/NAME

Runs are directories; one that is not finished is shown as far as it is. Hours are steps times the median of their
seconds, without evaluations: what a run waited for other work on its machine would be in their sum. Written are a plot
(NAME.png) and a table (NAME-curves.md), which is printed too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mezo_scale.recipe import load
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.report import as_markdown
from tools.learning_bench import forward_rows


@dataclass(frozen=True)
class Learning:
    """A run's curve.

    Attributes:
        metric: the name of the main one.
        curve: (step, its value on dev), from the first evaluation to the last.
        test: (before, after), each None where it has not been measured.
        rows: forward rows of a step; seconds: of a step, the median.
        memory_gib: the most that a rank took.
    """

    name: str
    metric: str
    curve: list[tuple[int, float]]
    test: tuple[float | None, float | None]
    rows: int
    seconds: float
    memory_gib: float

    @property
    def steps(self) -> int:
        return self.curve[-1][0]

    def hours(self, steps: int) -> float:
        return steps * self.seconds / 3600


def learning(folder: Path) -> Learning:
    """Raises SystemExit for a run that was never evaluated on dev."""
    recipe, run = load(folder, []), RunDirectory(folder)
    lines, results = run.read_metrics(), run.read_evaluation()
    metric = str(results["zero_shot"]["main"])
    curve = [(line["step"], line[f"dev_{metric}"]) for line in lines if f"dev_{metric}" in line]
    if not curve:
        raise SystemExit(f"learning_curves: {folder} has no {metric} on dev: give a run with train.eval_every")
    seconds = statistics.median(line["seconds"] for line in lines if line.get("seconds") is not None)
    memory = max(line["memory_gib"] for line in lines if line.get("memory_gib") is not None)
    test = (results["zero_shot"][metric], results.get("tuned", {}).get(metric))
    return Learning(folder.name, metric, curve, test, forward_rows(recipe), seconds, memory)


def table(runs: Sequence[Learning]) -> str:
    """In Markdown; the metric in percent."""
    head = ["run", "steps", "forward rows", "hours", "peak GiB", "best on dev", "last on dev", "test before", "after"]
    lines = [head]
    for run in runs:
        values = (max(value for _, value in run.curve), run.curve[-1][1], *run.test)
        shown = ["" if value is None else f"{100 * value:.1f}%" for value in values]
        rows = f"{run.steps * run.rows:,}"
        lines.append([run.name, f"{run.steps:,}", rows, f"{run.hours(run.steps):.2f}", f"{run.memory_gib:.2f}", *shown])
    return "\n".join(as_markdown(lines))


def plot(runs: Sequence[Learning], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for run in runs:
        steps, values = zip(*run.curve, strict=True)
        for axis, scale in zip(axes, (1.0, run.rows, run.hours(1)), strict=True):
            axis.plot([step * scale for step in steps], values, marker=".", label=run.name)
    for axis, name in zip(axes, ("steps", "forward rows", "hours"), strict=True):
        axis.set(xlabel=name, xscale="log")
    axes[0].set(ylabel=f"{runs[0].metric} on dev")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="the files' names, without their endings")
    options = parser.parse_args()
    runs = [learning(folder) for folder in options.runs]
    if len({run.metric for run in runs}) > 1:
        raise SystemExit(f"learning_curves: {', '.join(run.metric for run in runs)} can't be compared: give one metric")
    shown = table(runs)
    plot(runs, options.out.with_suffix(".png"))
    options.out.with_name(f"{options.out.name}-curves.md").write_text(shown + "\n")
    print(shown)


if __name__ == "__main__":
    main()
