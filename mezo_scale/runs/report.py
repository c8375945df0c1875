"""The end of a run: the table of its results, its report and its plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory, replace_file, replace_plot
from mezo_scale.runs.learning import estimator_of
from mezo_scale.runs.memory import MEANING
from mezo_scale.tasks.score import interval_key

_TITLES = {
    "majority": "majority class",
    "zero_shot": "zero-shot",
    "icl": "in-context learning",
    "linear_probe": "linear probe",
}
_ENDS = ("zero_shot", "icl", "linear_probe", "tuned")  # of the model, after what needs none

RESULTS = {"mezo": "tuned", "adamw": "tuned", "icl": "icl", "linear_probe": "linear_probe", "zero_shot": "zero_shot"}
"""By the name of a method, where evaluation.json has what it came to."""


def results_table(results: Mapping[str, Any]) -> list[list[str]]:
    """The results of a run, as `Score.as_dict` writes them, in rows of cells; the first row names the columns.

    The main metric has a column, and every other one that has an interval.
    """
    main = main_metric(results["zero_shot"])
    others = [
        name for name in results["zero_shot"] if interval_key(name, main) in results["zero_shot"] and name != main
    ]
    shown = [main, *others]
    header = ["test split", *(cell for name in shown for cell in (name.replace("_", " "), "95% interval")), "examples"]
    ends = [key for key in _ENDS if key in results]
    rows = [header]
    for key in [*(key for key in results if key not in (*ends, "best", "ended")), *ends]:
        found = results[key]
        title = _TITLES.get(key, key.replace("_", " "))
        count = f"{found['count']:,}" + (f", {found['not_finite']:,} not finite" if found.get("not_finite") else "")
        cells = (cell for name in shown for cell in _cells(found, name, main))
        rows.append([f"{title}, {_steps(found)}" if key == "tuned" else title, *cells, count])
    return rows


def is_share(found: Mapping[str, Any]) -> bool:
    """Whether the main metric lies between 0 and 1, and is told in percent. Runs of before `bounded` was written have
    `more_is_better` or, before that, an interval where it holds."""
    return bool(found.get("bounded", found.get("more_is_better", "interval_95" in found)))


def told(value: float, share: bool) -> str:
    """A value of a metric, for people."""
    return f"{value:.1%}" if share else f"{value:.4f}"


def main_metric(found: Mapping[str, Any]) -> str:
    """The metric that decides; runs of before there were several name none."""
    main: str = found.get("main", "accuracy")
    return main


def _cells(found: Mapping[str, Any], name: str, main: str) -> tuple[str, str]:
    if found.get(name) is None:
        return "", ""
    # What is not the main metric has an interval if it is a share.
    share = is_share(found) if name == main else interval_key(name, main) in found
    if interval_key(name, main) not in found:
        return told(found[name], share), ""
    low, high = found[interval_key(name, main)]
    return told(found[name], share), f"{told(low, share)} to {told(high, share)}"


def as_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """`results_table` for the screen."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def write_report(
    run: RunDirectory,
    recipe: Recipe,
    layout: str,
    tuned: str,
    eps: float,
    results: Mapping[str, Any],
    memory_gib: Mapping[str, float],
    commands: Mapping[str, str],
) -> None:
    """report.md and the plot it shows.

    Args:
        layout: `Strategy.layout`.
        tuned: what was tuned, as `Trainer` says it.
        eps: of the run.
        memory_gib: by phase, of the session that ends with this report.

    Raises:
        RecipeError: they can't be written.
    """
    _plot(run, results)
    estimator = estimator_of(recipe)
    steps = [line for line in run.read_metrics() if "loss" in line]
    seconds = sorted(line["seconds"] for line in steps)
    median = f"{seconds[len(seconds) // 2]:.2f} s per step (median), " if seconds else ""
    lines = [
        f"# {recipe.task.name} with {recipe.model.name}",
        "",
        f"MeZO, {_steps(results['tuned'])} of {recipe.train.batch_size} examples, lr {recipe.optimizer.lr:g}, "
        f"eps {eps:g}, {estimator.name}, {estimator.num_directions} direction(s), "
        f"seed {recipe.optimizer.seed}; {median}{layout}. {tuned}.",
        "",
        *as_markdown(results_table(results)),
        "",
        *_explanations(results),
        f"![loss and {main_metric(results['tuned']).replace('_', ' ')}]({run.plot.name})",
        "",
        *_memory(memory_gib),
        "Settings: `recipe.yaml`. Where it ran: `environment.json`. Every step: `trajectory.mezo`, `metrics.jsonl`.",
        *(line for what, command in commands.items() for line in ("", f"{what}:", "", f"    {command}")),
    ]
    replace_file(run.report, "\n".join(lines) + "\n")


def write_results(
    run: RunDirectory, title: str, about: str, results: Mapping[str, Any], memory_gib: Mapping[str, float]
) -> None:
    """report.md of a run without a trajectory.

    Args:
        about: what was done, in sentences.
        memory_gib: by phase.
    """
    lines = [f"# {title}", "", about, "", *as_markdown(results_table(results)), ""]
    if "tuned" in results:
        lines += _explanations(results)
        _plot(run, results)
        lines += [f"![loss and {main_metric(results['tuned']).replace('_', ' ')}]({run.plot.name})", ""]
    lines += _memory(memory_gib)
    lines.append("Settings: `recipe.yaml`. Where it ran: `environment.json`. What was measured: `metrics.jsonl`.")
    replace_file(run.report, "\n".join(lines) + "\n")


def as_markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first row names the columns."""
    header, *others = rows
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in others)]


def _memory(memory_gib: Mapping[str, float]) -> list[str]:
    return [
        "Peak memory of the rank that took most, in this session. On CUDA it is what torch's allocator held, on a CPU "
        "the resident memory of the process, with the interpreter and the libraries in it.",
        "",
        "| phase | GiB | |",
        "|---|---|---|",
        *(f"| {phase} | {gib:.2f} | {MEANING[phase]} |" for phase, gib in memory_gib.items()),
        "",
    ]


def _steps(tuned: Mapping[str, Any]) -> str:
    skipped = tuned.get("skipped", 0)
    return f"{tuned['step']} steps" + (f" ({skipped} skipped)" if skipped else "")


def ended_early(results: Mapping[str, Any]) -> str:
    """Why a run took fewer steps than it could; empty if it did not."""
    ended, best = results.get("ended", {}), results.get("best", {})
    if ended.get("patience") is None:
        return ""
    found = f"the {best['metric']} of step {best['step']}" if best else "a value at all"
    return (
        f"Ended early, after step {ended['step']}: {ended['patience']} evaluation(s) on dev were no better than {found}"
    )


def _explanations(results: Mapping[str, Any]) -> list[str]:
    lines = []
    if best := results.get("best"):
        value = told(best["value"], is_share(results["tuned"]))
        lines += [f"On dev the {best['metric']} was best after step {best['step']}: {value}.", ""]
    if said := ended_early(results):
        lines += [f"{said}.", ""]
    if any(found.get("not_finite") for found in results.values()):
        wrong = "count as wrong, and there is" if is_share(results["tuned"]) else "leave"
        lines += [f"Examples whose scores are not finite {wrong} no mean over them.", ""]
    if results["tuned"].get("skipped"):
        lines += ["A step is skipped when a loss is not finite: it is counted, and writes no weight.", ""]
    return lines


def _plot(run: RunDirectory, results: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure  # slow to import

    lines, main = run.read_metrics(), main_metric(results["tuned"])
    called = main.replace("_", " ")
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    dev = [(line["step"], line[f"dev_{main}"]) for line in lines if line.get(f"dev_{main}") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    if steps:
        numbers, losses = zip(*steps, strict=True)
        left.plot(numbers, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        left.plot(numbers, running_mean(losses), color="tab:blue", label="training loss, mean of 20 steps")
    left.set(xlabel="step", ylabel="loss")
    right = left.twinx()
    if dev:
        right.plot(*zip(*dev, strict=True), color="tab:orange", marker="o", label=f"{called} on dev")
    for key, style in (("zero_shot", ":"), ("tuned", "--")):
        if results[key][main] is not None:
            label = f"{called} on test, {key.replace('_', '-')}: {_cells(results[key], main, main)[0]}"
            right.axhline(results[key][main], color="tab:green", linestyle=style, label=label)
    right.set(ylabel=called)
    if is_share(results["tuned"]):
        right.set(ylim=(0, 1))
    handles = [artist for axes in (left, right) for artist in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")
    replace_plot(run.plot, figure, dpi=150)


def running_mean(values: Sequence[float], width: int = 20) -> list[float]:
    """Of each value and those before it, as many as there are up to `width`."""
    return [sum(values[max(0, n + 1 - width) : n + 1]) / min(n + 1, width) for n in range(len(values))]
