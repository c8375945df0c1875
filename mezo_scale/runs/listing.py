"""The runs of a folder side by side: what they were asked to do, how far they came, and what they were worth."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mezo_scale import recipe as recipes
from mezo_scale.errors import MezoError, RecipeError
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.report import RESULTS, is_share, main_metric, running_mean, told

_PLACES = ("output.dir",)  # fields that say where a run lies, not what it is


def find(folder: Path) -> list[Path]:
    """The run directories in a folder, at any depth, in the order of their names.

    Raises:
        RecipeError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder: give the one that your runs lie in")
    found = []
    for name, inner, files in os.walk(folder):
        run = RunDirectory(Path(name))
        if recipes.RECIPE_FILE in files and {run.trajectory.name, run.metrics.name} & set(files):
            found.append(Path(name))
            inner.clear()
    if not found:
        raise RecipeError(
            f"{folder} holds no run: expected folders with {recipes.RECIPE_FILE} and trajectory.mezo, or "
            f"{RunDirectory(folder).metrics.name} of a baseline"
        )
    return sorted(found)


def compare(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """One entry per run.

    Returns:
        run; steps (done) and of (asked for), None where a method takes none; s_per_step (median, None before the
        first); metric (its name), bounded (whether it is a share of 1), zero_shot, dev (the last one) and tuned (what
        the method came to), each None until it is known; every recipe field in which the runs differ, by its key, and
        a digest of their data, where that is not the same; and error, in the place of all but `run`, where a run can't
        be read.
    """
    entries = [_entry(run) for run in runs]
    fields = {option.key for option in recipes.options()} - set(_PLACES) | {"data"}
    trees = [entry["recipe"] for entry in entries if "recipe" in entry]
    differ = [key for key in sorted(fields) if len({repr(tree[key]) for tree in trees}) > 1]
    for entry in entries:
        tree = entry.pop("recipe", None)
        entry |= {key: tree[key] for key in differ} if tree is not None else {}
    return entries


def table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """`compare` for the screen."""
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in ("of", "bounded")))
    shown = Table(box=None, header_style="bold")
    for name in names:
        shown.add_column(name.replace("_", " "), justify="left" if name in ("run", "metric", "error") else "right")
    for entry in entries:
        shown.add_row(*(_cell(entry, name) for name in names))
    return shown


def plot(runs: Sequence[Path], path: Path) -> None:
    """The runs' dev metric over their steps, and their training loss, one line each, as a PNG.

    Raises:
        RecipeError: there is nothing to draw yet, or the file can't be written.
    """
    lines = {run: RunDirectory(run).read_metrics() for run in runs}
    if not any("loss" in line for of_run in lines.values() for line in of_run):
        raise RecipeError("--plot: no run has taken a step yet")
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for run, of_run in lines.items():
        losses = [(line["step"], line["loss"]) for line in of_run if line.get("loss") is not None]
        name = main_metric(RunDirectory(run).read_evaluation().get("zero_shot", {}))
        dev = [(line["step"], line[f"dev_{name}"]) for line in of_run if line.get(f"dev_{name}") is not None]
        (drawn,) = upper.plot(*zip(*dev, strict=True) if dev else ([], []), marker="o", label=f"{run.name} ({name})")
        if losses:
            steps, values = zip(*losses, strict=True)
            lower.plot(steps, running_mean(values), color=drawn.get_color())
    upper.set(ylabel="dev")
    upper.legend(fontsize="small")
    lower.set(xlabel="step", ylabel="training loss, mean of 20 steps")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise RecipeError(f"--plot: {path} can't be written: {error.strerror}") from None


def _entry(run: Path) -> dict[str, Any]:
    files = RunDirectory(run)
    try:
        recipe = recipes.load(run)
        lines, method = files.read_metrics(), recipe.method.name
        done = len(files.read_log()) if method == "mezo" else max((at["step"] for at in lines), default=0)
    except MezoError as error:
        return {"run": str(run), "error": str(error)}
    tree = {
        f"{section}.{name}": value
        for section, fields in recipe.model_dump().items()
        for name, value in (fields or {}).items()
    }
    tree["data"] = files.read_inputs().get("data")
    results, steps = files.read_evaluation(), recipes.takes_steps(method)
    metric = main_metric(results.get("zero_shot", {}))
    seconds = sorted(line["seconds"] for line in lines if steps and "seconds" in line)
    graded = results.get("ended", results.get("tuned", {})).get("step", done)
    dev = [line[f"dev_{metric}"] for line in lines if line.get(f"dev_{metric}") is not None]
    return {
        "run": str(run),
        "steps": done if steps else None,
        "of": recipe.train.steps if steps else None,
        "s_per_step": seconds[len(seconds) // 2] if seconds else None,
        "metric": metric,
        "bounded": is_share(results.get("zero_shot", {})),
        "zero_shot": results.get("zero_shot", {}).get(metric),
        "dev": dev[-1] if dev else None,
        "tuned": results.get(RESULTS[method], {}).get(metric) if graded == done else None,  # it has gone on since
        "recipe": tree,
    }


def _cell(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if value is None:
        return ""
    if name == "steps":
        return f"{value}/{entry['of']}"
    if name in ("zero_shot", "dev", "tuned"):
        return told(value, entry["bounded"])
    return f"{value:.3g}" if isinstance(value, float) else str(value)
