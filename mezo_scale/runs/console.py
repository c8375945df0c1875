"""What the user sees while a run goes on: lines, tables, progress with rate and time left."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mezo_scale.distributed.world import World

_RECENT = 20  # steps that the shown rate is the mean of
_LINE_EVERY_S = 30.0


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
    def counting(self, what: str, unit: str = "") -> Iterator[Any]:
        """Progress over something short: yields a function (done, total). With a `unit` the rate is shown as well, and
        elsewhere than on a terminal a line every half minute, and one at the end."""
        start = time.perf_counter()

        def rate(done: int) -> str:
            return f"{done / max(time.perf_counter() - start, 1e-9):.1f} {unit}/s" if unit else ""

        if not self._console.is_terminal:
            yield _Lines(self, what, rate) if unit else lambda done, total: None
            return
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(what, total=None, rate="")
            yield lambda done, total: bar.update(task, completed=done, total=total, rate=rate(done))


class _Lines:
    """Progress as plain lines: called with (done, total)."""

    def __init__(self, screen: Screen, what: str, rate: Callable[[int], str]) -> None:
        self._screen, self._what, self._rate = screen, what, rate
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == total or now - self._last >= _LINE_EVERY_S:
            self._last = now
            self._screen.say(f"{self._what}: {done}/{total}, {self._rate(done)}")


class StepProgress:
    """Loss, rate and time left of a run under way."""

    def __init__(self, screen: Screen, bar: Progress | None, done: int, total: int, log_every: int) -> None:
        self._screen, self._bar, self._total, self._log_every = screen, bar, total, log_every
        self._task = bar.add_task("", total=total, completed=done, state="") if bar is not None else None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._last = time.perf_counter()
        self._first = True

    def advance(self, done: int, loss: float, skipped: int) -> None:
        """After a step: `done` steps are, `skipped` of them wrote nothing, the last one's mean loss was `loss`."""
        now = time.perf_counter()
        if not self._first:  # that one compiles and checks
            self._recent.append(now - self._last)
        self._first, self._last = False, now
        state = f"loss {loss:.4f}" + (f"  {skipped} skipped" if skipped else "")
        if self._recent:
            rate = sum(self._recent) / len(self._recent)
            state += f"  {rate:.2f} s/step  {timedelta(seconds=round(rate * (self._total - done)))} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, state=state)
        elif done % self._log_every == 0 or done == self._total:
            self._screen.say(f"step {done}/{self._total}  {state}")

    def note(self, text: str) -> None:
        """A line between the steps; the time that went by since the last step does not count as one's."""
        self._screen.say(text)
        self._last = time.perf_counter()
