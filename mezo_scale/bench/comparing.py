"""A comparison under way: its cells one after the other, each by `mezo-scale train` in processes of its own.

So one that fails, is killed or runs out of memory ends a cell and not the comparison, and no cell inherits another's
memory. What is done is what the cells' directories hold.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mezo_scale.bench.comparison import Cell, Comparison
from mezo_scale.bench.running import check_alone, ending_on_sigterm, killed_by, launched
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, differences, dump, takes_steps
from mezo_scale.runs.directory import RunDirectory, replace_file
from mezo_scale.runs.inputs import differing, inputs_now
from mezo_scale.runs.methods.session import is_finished

FAILED = "failed.json"
Start = Callable[[Cell, Path, int | None], str | None]
"""(cell, log, processes) -> why the cell has no result; None if it has one."""


def launch(cell: Cell, log: Path, processes: int | None) -> str | None:
    """Runs a cell by the command line, as a user would; what it says goes to the log."""
    command = [sys.executable, "-m", "mezo_scale.cli", "train", str(cell.recipe.directory)]
    command += [] if processes is None else ["--processes", str(processes)]
    code = launched(command, log)
    if code == 0:
        return None
    said = re.findall(r"^(?:\[\w+\]:)? *error: (.+)$", log.read_text(errors="replace"), re.MULTILINE)
    return said[0] if said else killed_by(code) if code < 0 else f"ended with exit code {code}, see {log}"


def run(
    comparison: Comparison,
    *,
    processes: int | None = None,
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
    start: Start = launch,
) -> dict[str, str]:
    """Runs the cells that have neither a result nor a failure, and returns why cells failed, by their names.

    - A cell that fails, for whatever reason, is kept with its reason; the next one goes on.
    - Killed at any point, the same call goes on; a MeZO run goes on inside, a baseline's begins again.

    Raises:
        LaunchError: a launcher around this process.
        RecipeError: a cell's directory holds another run, or a result on other data or weights, or the folder can't be
            made; nothing has begun then.
    """
    check_alone("a comparison starts the ranks of each run", "run mezo-scale compare once, with --processes")
    for cell in comparison.cells:
        _frozen(cell)
    out = comparison.out
    RunDirectory(out / "logs").create()
    names = [cell.name for cell in comparison.cells]
    failed = {} if retry_failed else _without_result(comparison, _read_failed(out))
    left = [cell for cell in comparison.cells if cell.name not in failed and not finished(cell)]
    _check_inputs(comparison, afresh=bool(left))
    if len(left) < len(names):
        say(f"{len(left)} of {len(names)} runs are left: the others have a result or have failed (--retry-failed)")
    with ending_on_sigterm():
        for number, cell in enumerate(left, 1):
            if number > 1:
                _check_inputs(comparison, afresh=True)  # a file may be edited while a run goes on
            say(f"[{number}/{len(left)}] {cell.name}")
            if finished(cell):  # by another comparison in the same folder, in the meantime
                continue
            run = RunDirectory(cell.recipe.directory)
            run.create()
            replace_file(run.recipe, dump(_frozen(cell)))
            reason = start(cell, out / "logs" / f"{cell.name}.log", processes)
            if reason is None and not finished(cell):
                reason = f"ended without a result, see {out / 'logs' / f'{cell.name}.log'}"
            if reason is not None:
                failed[cell.name] = reason
                say(f"    failed: {reason}")
            replace_file(out / FAILED, json.dumps(failed, indent=2) + "\n")
    if left:
        _check_inputs(comparison, afresh=True)
    return _without_result(comparison, failed)


def _without_result(comparison: Comparison, failed: dict[str, str]) -> dict[str, str]:
    """Less the cells that have a result by now: of one that failed because another comparison was at it, that one's."""
    return {cell.name: failed[cell.name] for cell in comparison.cells if cell.name in failed and not finished(cell)}


def finished(cell: Cell) -> bool:
    """Whether a cell's directory has its result."""
    return is_finished(cell.recipe, RunDirectory(cell.recipe.directory))


def _check_inputs(comparison: Comparison, *, afresh: bool) -> None:
    """Raise RecipeError if a result rests on other data or weights than another, or than those that are there.

    afresh: look at what is there now, which a run that is left would have.
    """
    known: dict[str, dict[str, str]] = {}
    for cell in filter(finished, comparison.cells):
        recipe, run = cell.recipe, RunDirectory(cell.recipe.directory)
        found = run.read_inputs()
        if not found:
            continue  # of a version that did not write it
        asked = (
            recipe.task.model_dump_json(exclude={"max_length"}),
            recipe.model.name,
            recipe.tune.adapter,
            recipe.train.objective,
        )
        if str(asked) not in known:
            known[str(asked)] = inputs_now(recipe) if afresh else found
        if others := differing(found, known[str(asked)]):
            than = "than there are now" if afresh else "than others of this comparison"
            raise RecipeError(
                f"{run.path} has a result on other {others} {than}: give another output.dir, or put back what it was "
                "made with"
            )


def _frozen(cell: Cell) -> Recipe:
    """The recipe that a cell's directory is to hold. Raises RecipeError if it holds another."""
    run, asked = RunDirectory(cell.recipe.directory), cell.recipe
    if not run.recipe.is_file():
        return asked
    recorded = run.recorded()
    if asked.train.objective is None:  # a run writes out which that is
        asked = asked.model_copy(
            update={"train": asked.train.model_copy(update={"objective": recorded.train.objective})}
        )
    changed = differences(recorded, asked)
    if finished(cell) and takes_steps(asked.method.name):
        changed += _graded_otherwise(recorded, asked)
    if changed:
        raise RecipeError(
            f"{run.path} holds a run with {'; '.join(changed)}: give another output.dir, or the same values"
        )
    return asked


def _graded_otherwise(recorded: Recipe, asked: Recipe) -> list[str]:
    """What a run may go on with, but decides which of its steps the result is of: as `differences`."""
    before, after = (
        {
            "output.checkpoint=best": recipe.output.checkpoint == "best",
            "train.patience": recipe.train.patience,
            "train.steps": recipe.train.steps,
            "train.eval_every": recipe.train.eval_every,
        }
        for recipe in (recorded, asked)
    )
    if not any((before["output.checkpoint=best"], after["output.checkpoint=best"], after["train.patience"])):
        return []  # the last step's, of as many as are asked for
    return [f"{name}: {before[name]!r}, now {after[name]!r}" for name in before if before[name] != after[name]]


def _read_failed(out: Path) -> dict[str, str]:
    path = out / FAILED
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(found, dict) or not all(isinstance(why, str) for why in found.values()):
            raise ValueError("no reasons by name")
    except ValueError:
        raise RecipeError(f"{path} is damaged: take it away, and what failed is run again") from None
    return found
