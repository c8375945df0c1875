"""What a run says: metrics while it goes, progress on the screen, the plot and the report at its end."""

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mezo_scale.recipe import Recipe
from mezo_scale.run_directory import RunDirectory, replace_file
from mezo_scale.world import World

RESULT_COLUMNS = ("test split", "accuracy", "95% interval", "examples")
_RECENT = 20  # steps that the shown rate is the mean of


class Metrics:
    """Numbers per step, to metrics.jsonl and to TensorBoard; nothing on the ranks that do not write."""

    def __init__(self, run: RunDirectory, world: World, first_step: int) -> None:
        self._file = self._board = None
        if world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            whole = "".join(json.dumps(line) + "\n" for line in run.read_metrics() if line["step"] <= first_step)
            replace_file(run.metrics, whole)
            self._file = run.metrics.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, **values: Any) -> None:
        """Adds one line; `step` counts the steps done. What is not finite is null in the file: JSON has no NaN."""
        if self._file is None:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Screen:
    """What the user sees, on rank 0: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, world: World) -> None:
        self._console = Console(quiet=world.rank != 0, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def show(self, table: Table) -> None:
        self._console.print(table)

    @contextmanager
    def steps(self, done: int, total: int, log_every: int) -> Iterator["StepProgress"]:
        """Progress over the steps of a run."""
        if not self._console.is_terminal:
            yield StepProgress(self, None, done, total, log_every)
            return
        columns = (TextColumn("training"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        with Progress(*columns, console=self._console, expand=True) as bar:
            yield StepProgress(self, bar, done, total, log_every)

    @contextmanager
    def counting(self, what: str) -> Iterator[Any]:
        """Progress over something short, on terminals only: yields a function (done, total)."""
        if not self._console.is_terminal:
            yield lambda done, total: None
            return
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


class StepProgress:
    """Loss, rate and time left of a run under way."""

    def __init__(self, screen: Screen, bar: Progress | None, done: int, total: int, log_every: int) -> None:
        self._screen, self._bar, self._total, self._log_every = screen, bar, total, log_every
        self._task = bar.add_task("", total=total, completed=done, state="") if bar is not None else None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._last = time.perf_counter()
        self._first = True

    def advance(self, done: int, loss: float) -> None:
        """After a step: `done` steps are, the last one's mean loss was `loss`."""
        now = time.perf_counter()
        if not self._first:  # that one compiles and checks
            self._recent.append(now - self._last)
        self._first, self._last = False, now
        state = f"loss {loss:.4f}"
        if self._recent:
            rate = sum(self._recent) / len(self._recent)
            state += f"  {rate:.2f} s/step  {timedelta(seconds=round(rate * (self._total - done)))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=state)
        elif done % self._log_every == 0 or done == self._total:
            self._screen.say(f"step {done}/{self._total}  {state}")

    def note(self, text: str) -> None:
        """A line between the steps; the time that went by since the last step does not count as one's."""
        self._screen.say(text)
        self._last = time.perf_counter()


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The results of a run, under RESULT_COLUMNS."""
    rows = []
    for title, key in (("majority class", "majority"), ("zero-shot", "zero_shot"), ("tuned", "tuned")):
        found = results.get(key)
        if found is None:
            continue
        low, high = found["interval_95"]
        name = f"{title}, {found['step']} steps" if key == "tuned" else title
        rows.append((name, f"{found['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{found['count']:,}"))
    return rows


def as_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """`result_rows` for the screen."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in RESULT_COLUMNS:
        table.add_column(name, justify="left" if name == RESULT_COLUMNS[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def write_report(run: RunDirectory, recipe: Recipe, results: Mapping[str, Any], commands: Mapping[str, str]) -> None:
    """report.md and the plot it shows."""
    _plot(run, results)
    steps = [line for line in run.read_metrics() if "loss" in line]
    seconds = sorted(line["seconds"] for line in steps)
    median = f"{seconds[len(seconds) // 2]:.2f} s per step (median), " if seconds else ""
    lines = [
        f"# {recipe.task.name} with {recipe.model.name}",
        "",
        f"MeZO, {results['tuned']['step']} steps of {recipe.train.batch_size} examples, lr {recipe.optimizer.lr:g}, "
        f"eps {recipe.optimizer.eps:g}, {recipe.optimizer.num_directions} direction(s), seed {recipe.optimizer.seed}; "
        f"{median}{recipe.sharding.strategy}.",
        "",
        f"| {' | '.join(RESULT_COLUMNS)} |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in result_rows(results)),
        "",
        f"![loss and accuracy]({run.plot.name})",
        "",
        "Settings: `recipe.yaml`. Where it ran: `environment.json`. Every step: `trajectory.mezo`, `metrics.jsonl`.",
        *(line for what, command in commands.items() for line in ("", f"{what}:", "", f"    {command}")),
    ]
    replace_file(run.report, "\n".join(lines) + "\n")


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


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _smooth(points: list[tuple[int, float]], width: int = 20) -> list[tuple[int, float]]:
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, n + 1 - width) : n + 1]) / len(values[max(0, n + 1 - width) : n + 1]))
        for n, (step, _) in enumerate(points)
    ]
