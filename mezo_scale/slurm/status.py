"""How a run is getting on, from the files it writes and from the scheduler."""

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.table import Table

from mezo_scale import recipe as recipes
from mezo_scale.errors import RecipeError
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.slurm import commands
from mezo_scale.slurm.submit import Job
from mezo_scale.trajectory import Trajectory

_RECENT = 20  # steps that the rate is the mean of


def status(directory: Path) -> list[dict[str, str]]:
    """One line per run in a run directory, its own or those of an array.

    Returns:
        run, state, steps, s/step, left, last losses: as text, for people.

    Raises:
        RecipeError: there is no run.
        TrajectoryError: its trajectory can't be read.
    """
    job = Job.read(directory)
    if job is not None and job.runs:
        runs = [directory / name for name in job.runs]
    elif (directory / recipes.RECIPE_FILE).is_file():
        runs = [directory]
    else:
        raise RecipeError(f"{directory} holds no run: expected a folder with {recipes.RECIPE_FILE}")
    return [_status(run, job, number) for number, run in enumerate(runs)]


def table(lines: Sequence[dict[str, str]]) -> Table:
    """The lines for the screen."""
    shown = Table()
    for name in lines[0]:
        shown.add_column(name)
    for line in lines:
        shown.add_row(*line.values())
    return shown


def _status(run: Path, job: Job | None, number: int) -> dict[str, str]:
    files = RunDirectory(run)
    train = recipes.load(run).train
    steps, has_ended = train.steps, files.has_ended(train)
    done = len(Trajectory.open(files.trajectory)) if files.trajectory.is_file() else 0
    lines = [line for line in files.read_metrics() if "loss" in line][-_RECENT:]
    rate = sum(line["seconds"] for line in lines) / len(lines) if lines else None
    return {
        "run": str(run),
        "state": "finished" if has_ended and done else ", ".join(_state(files, job, number, done)),
        "step": f"{done}/{steps}",
        "s/step": "" if rate is None else f"{rate:.2f}",
        "left": ""
        if rate is None or has_ended or done >= steps
        else str(timedelta(seconds=round(rate * (steps - done)))),
        "last losses": " ".join(f"{line['loss']:.4f}" for line in lines[-3:]),
    }


def _state(files: RunDirectory, job: Job | None, number: int, done: int) -> list[str]:
    said = []
    if job is not None and job.id is not None:
        element = f"{job.id}_{number}" if job.runs else job.id
        said.append(f"job {element} {commands.state(element)}")
    if files.interrupted.is_file():
        stopped = json.loads(files.interrupted.read_text())
        said.append(f"stopped by {stopped['signal']} after step {stopped['step']}")
    elif done:
        ago = timedelta(seconds=round(time.time() - files.trajectory.stat().st_mtime))
        said.append(f"last step {ago} ago")
    return said or ["not started"]
