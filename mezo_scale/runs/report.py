"""The end of a run: the table of its results, its report and its plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory, replace_file
from mezo_scale.runs.memory import MEANING

RESULT_COLUMNS = ("test split", "accuracy", "95% interval", "examples")


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The results of a run, under RESULT_COLUMNS."""
    rows = []
    for title, key in (("majority class", "majority"), ("zero-shot", "zero_shot"), ("tuned", "tuned")):
        found = results.get(key)
        if found is None:
            continue
        low, high = found["interval_95"]
        name = f"{title}, {_steps(found)}" if key == "tuned" else title
        count = f"{found['count']:,}" + (f", {found['not_finite']:,} not finite" if found.get("not_finite") else "")
        rows.append((name, f"{found['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", count))
    return rows


def as_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """`result_rows` for the screen."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in RESULT_COLUMNS:
        table.add_column(name, justify="left" if name == RESULT_COLUMNS[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def write_report(
    run: RunDirectory,
    recipe: Recipe,
    layout: str,
    results: Mapping[str, Any],
    memory_gib: Mapping[str, float],
    commands: Mapping[str, str],
) -> None:
    """report.md and the plot it shows.

    Args:
        layout: `Strategy.layout`.
        memory_gib: by phase, of the session that ends with this report.
    """
    _plot(run, results)
    steps = [line for line in run.read_metrics() if "loss" in line]
    seconds = sorted(line["seconds"] for line in steps)
    median = f"{seconds[len(seconds) // 2]:.2f} s per step (median), " if seconds else ""
    lines = [
        f"# {recipe.task.name} with {recipe.model.name}",
        "",
        f"MeZO, {_steps(results['tuned'])} of {recipe.train.batch_size} examples, lr {recipe.optimizer.lr:g}, "
        f"eps {recipe.optimizer.eps:g}, {recipe.optimizer.num_directions} direction(s), seed {recipe.optimizer.seed}; "
        f"{median}{layout}.",
        "",
        f"| {' | '.join(RESULT_COLUMNS)} |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in result_rows(results)),
        "",
        *_explanations(results),
        f"![loss and accuracy]({run.plot.name})",
        "",
        "Peak memory of the rank that took most, in this session. On CUDA it is what torch's allocator held, on a CPU "
        "the resident memory of the process, with the interpreter and the libraries in it.",
        "",
        "| phase | GiB | |",
        "|---|---|---|",
        *(f"| {phase} | {gib:.2f} | {MEANING[phase]} |" for phase, gib in memory_gib.items()),
        "",
        "Settings: `recipe.yaml`. Where it ran: `environment.json`. Every step: `trajectory.mezo`, `metrics.jsonl`.",
        *(line for what, command in commands.items() for line in ("", f"{what}:", "", f"    {command}")),
    ]
    replace_file(run.report, "\n".join(lines) + "\n")


def _steps(tuned: Mapping[str, Any]) -> str:
    skipped = tuned.get("skipped", 0)
    return f"{tuned['step']} steps" + (f" ({skipped} skipped)" if skipped else "")


def _explanations(results: Mapping[str, Any]) -> list[str]:
    lines = []
    if any(found.get("not_finite") for found in results.values()):
        lines += ["Examples whose scores are not finite count as wrong, and there is no mean loss over them.", ""]
    if results["tuned"].get("skipped"):
        lines += ["A step is skipped when a loss is not finite: it is counted, and writes no weight.", ""]
    return lines


def _plot(run: RunDirectory, results: Mapping[str, Any]) -> None:
    import matplotlib as mpl  # slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = run.read_metrics()
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    dev = [(line["step"], line["dev_accuracy"]) for line in lines if "dev_accuracy" in line]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if steps:
        left.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        left.plot(*zip(*_smooth(steps), strict=True), color="tab:blue", label="training loss, mean of 20 steps")
    left.set(xlabel="step", ylabel="loss")
    right = left.twinx()
    if dev:
        right.plot(*zip(*dev, strict=True), color="tab:orange", marker="o", label="accuracy on dev")
    for key, style in (("zero_shot", ":"), ("tuned", "--")):
        accuracy = results[key]["accuracy"]
        label = f"accuracy on test, {key.replace('_', '-')}: {accuracy:.1%}"
        right.axhline(accuracy, color="tab:green", linestyle=style, label=label)
    right.set(ylabel="accuracy", ylim=(0, 1))
    handles = [artist for axes in (left, right) for artist in axes.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="lower left", fontsize="small")
    beside = run.plot.with_name(run.plot.name + ".partial")
    figure.savefig(beside, dpi=150, format="png")
    beside.replace(run.plot)
    plt.close(figure)


def _smooth(points: list[tuple[int, float]], width: int = 20) -> list[tuple[int, float]]:
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, n + 1 - width) : n + 1]) / len(values[max(0, n + 1 - width) : n + 1]))
        for n, (step, _) in enumerate(points)
    ]
