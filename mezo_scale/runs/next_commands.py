"""What a user can do next with a run, as commands that can be pasted."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo_scale.distributed.world import World
from mezo_scale.recipe import Recipe
from mezo_scale.runs.directory import RunDirectory


def train_command(run: RunDirectory, world: World) -> str:
    """What goes on with a run as it was started."""
    launch = f"{_programs()}mezo-scale"
    if world.size > 1:
        launch = f"{_programs()}torchrun --nproc-per-node {world.local_size} -m mezo_scale.cli"
    return f"{launch} train {shlex.quote(str(run.path))}"


def commands(recipe: Recipe, run: RunDirectory, world: World, results: Mapping[str, Any]) -> dict[str, str]:
    """The commands, by what they are for.

    Args:
        results: as evaluation.json has them.
    """
    names = (recipe.model.name, run.trajectory, run.path / "replayed", run.path / "best")
    base, log, out, out_best = (shlex.quote(str(name)) for name in names)
    replay = f"{_programs()}mezo-scale replay --base {base} --trajectory {log}"
    more = "patience=null" if "patience" in results["ended"] else f"steps={2 * recipe.train.steps}"
    found = {
        "continue this run": f"{train_command(run, world)} train.{more}",
        "rebuild its weights": f"{replay} --out {out}",
    }
    if best := results.get("best"):
        found["rebuild those best on dev"] = f"{replay} --until {best['step']} --out {out_best}"
    return found


def _programs() -> str:
    """The folder of this environment's commands, as a prefix; empty if it is on the PATH."""
    programs = Path(sys.executable).parent
    return "" if shutil.which("mezo-scale") == str(programs / "mezo-scale") else f"{os.path.relpath(programs)}/"
