"""How many forward rows each estimator needs to a loss on dev, each at the learning rate that suits it best.

    python -m tools.learning_bench [COMPARISON] [KEY=VALUE ...] [--to 0.65] [--processes 2] [--out tools/results]

The runs are those of `mezo-scale compare`: stopped, the same command goes on; what has run is not run again. The loss
on dev at a number of rows is the mean over the seeds; where it falls to the target between two evaluations, a straight
line says where. The rate is the one that reaches it with the fewest rows, of all that have every seed. Written are a
table of all rates (CSV), one of the best (Markdown) and a plot.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from mezo_scale.bench import comparing, comparison
from mezo_scale.bench.comparison import Cell
from mezo_scale.optim.estimators import group_size
from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.learning import estimator_of
from mezo_scale.runs.report import as_markdown

Curve = list[tuple[float, float]]
"""(forward rows, loss on dev), in the order of the steps."""


@dataclass(frozen=True)
class Learned:
    """A method at one learning rate.

    Attributes:
        rows: forward rows to the target; None: not reached.
        last, deviation: the loss on dev after the last step, mean and standard deviation over the seeds.
        seconds: a step's, in the median over all seeds.
    """

    method: str
    lr: float
    seeds: int
    rows: float | None
    last: float
    deviation: float
    seconds: float
    curve: Curve


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Rows at which a curve is first at the target or below, on a straight line between two points; None: never."""
    before: tuple[float, float] | None = None
    for rows, loss in curve:
        if loss <= target:
            if before is None:
                return rows
            return before[0] + (rows - before[0]) * (before[1] - target) / (before[1] - loss)
        before = rows, loss
    return None


def learned(cells: Sequence[Cell], target: float) -> Learned | None:
    """What a method's seeds found at one rate; None if one of them has no result."""
    curves, seconds = [], []
    for cell in cells:
        if not comparing.finished(cell):
            return None
        recipe, run = cell.recipe, RunDirectory(cell.recipe.directory)
        per_step, lines = forward_rows(recipe), run.read_metrics()
        curves.append([(line["step"] * per_step, line["dev_loss"]) for line in lines if "dev_loss" in line])
        seconds += [line["seconds"] for line in lines if line.get("seconds") is not None]
    mean = [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=True)]
    ends = [curve[-1][1] for curve in curves]
    return Learned(
        cells[0].label,
        cells[0].recipe.optimizer.lr,
        len(cells),
        crossing(mean, target),
        statistics.mean(ends),
        statistics.stdev(ends) if len(ends) > 1 else 0.0,
        statistics.median(seconds),
        mean,
    )


def forward_rows(recipe: Recipe) -> int:
    """What a step costs: its rows times their evaluations, where a backward pass counts two."""
    if recipe.method.name == "adamw":
        return 3 * recipe.train.batch_size
    estimator = estimator_of(recipe)
    forwards = len(estimator.branches(range(estimator.num_directions), 1e-3))
    if group_size(estimator) is not None:  # a row is in its own group's branches only
        forwards //= estimator.num_directions
    return forwards * recipe.train.batch_size


def best(found: Sequence[Learned]) -> list[Learned]:
    """Of each method the rate with the fewest rows to the target; where none reaches it, with the lowest last loss."""
    chosen = []
    for method in dict.fromkeys(one.method for one in found):
        own = [one for one in found if one.method == method]
        chosen.append(min(own, key=lambda one: (one.rows is None, one.last if one.rows is None else one.rows)))
    return chosen


def table(chosen: Sequence[Learned], target: float) -> str:
    """In Markdown; the first method's rows are 1."""
    base = chosen[0].rows
    lines = [["method", "lr", f"rows to {target:g}", "of the first's", "last loss", "seeds", "s per step"]]
    for one in chosen:
        rows = "not reached" if one.rows is None else f"{one.rows:.0f}"
        share = "" if one.rows is None or base is None else f"{one.rows / base:.2f}"
        last = f"{one.last:.4f} ± {one.deviation:.4f}"
        lines.append([one.method, f"{one.lr:g}", rows, share, last, str(one.seeds), f"{one.seconds:.2f}"])
    return "\n".join(as_markdown(lines))


def plot(chosen: Sequence[Learned], target: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for one in chosen:
        axes.plot(*zip(*one.curve, strict=True), marker="o", label=f"{one.method}, lr {one.lr:g}")
    axes.axhline(target, color="0.6", linestyle=":")
    axes.set(xlabel="forward rows", ylabel="loss on dev, mean over seeds")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", nargs="?", default=str(Path(__file__).with_name("learning.yaml")))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--to", type=float, default=0.65, help="the loss on dev that counts (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="ranks per run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    asked = comparison.load(options.comparison, options.overrides)
    failed = comparing.run(asked, processes=options.processes)
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in asked.cells:
        groups.setdefault((cell.label, cell.lr), []).append(cell)
    found = [one for cells in groups.values() if (one := learned(cells, options.to)) is not None]
    for name, why in failed.items():
        print(f"{name}: no result: {why}")
    if not found:
        raise SystemExit("learning_bench: no method has a result of all its seeds")
    name = Path(options.comparison).stem
    pd.DataFrame([asdict(one) for one in found]).to_csv(options.out / f"{name}.csv", index=False)
    chosen = best(found)
    shown = table(chosen, options.to)
    (options.out / f"{name}.md").write_text(shown + "\n")
    plot(chosen, options.to, options.out / f"{name}.png")
    print(shown)


if __name__ == "__main__":
    main()
