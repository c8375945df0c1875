"""Jobs: a recipe frozen into its run directory, and handed to SLURM.

    RUN_DIR/recipe.yaml        the recipe as resolved: the job runs this one, whatever happens to the original
    RUN_DIR/job/job.sbatch     the job script: a launch script with its settings filled in
    RUN_DIR/job/               the launch scripts that it calls, as they were; slurm-ID.out, what the job printed
    RUN_DIR/job/job.json       the job's id, the code's version and commit, the packages
    RUN_DIR/job/code.diff      what the code had on top of its commit, if anything

An array has one run per value, each in a folder of its own inside RUN_DIR.
"""

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mezo_scale import models
from mezo_scale import recipe as recipes
from mezo_scale.distributed.world import World
from mezo_scale.errors import LaunchError, RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.recipe.paths import BESIDE, find_beside
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.slurm import commands

_SINGLE, _ARRAY = "slurm.sbatch", "slurm_array.sbatch"
_SCRIPTS = (_SINGLE, _ARRAY, "torchrun_multinode.sh", "deepspeed.sh", "accelerate.sh", "accelerate.yaml")


@dataclass(frozen=True)
class Resources:
    """What a job asks the scheduler for.

    Attributes:
        nodes, gpus_per_node: of each run; without GPUs one process per node runs on its CPUs.
        partition, time: SLURM's; None means the cluster's own default, and 24 hours.
        launcher: torchrun, deepspeed or accelerate.
        options: more options of sbatch, as they are ("--account=...").
    """

    nodes: int = 1
    gpus_per_node: int = 8
    partition: str | None = None
    time: str | None = None
    launcher: str = "torchrun"
    options: tuple[str, ...] = ()

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def world(self) -> World:
        """The job's ranks, as the first of them will see them."""
        local = self.processes_per_node
        return World(0, 0, local, self.nodes * local, torch.device("cpu"))


@dataclass(frozen=True)
class Job:
    """What is known of a job before it runs.

    Attributes:
        id: SLURM's; None until it is submitted.
        runs: the folders of an array's elements in their order; empty for a job that is no array.
        frozen: when it was made (ISO 8601).
        version, commit, changed: of the code; `changed` if it had more than its commit has.
        python, packages: the environment.
    """

    id: str | None
    runs: tuple[str, ...]
    frozen: str
    version: str
    commit: str | None
    changed: bool
    python: str
    packages: tuple[str, ...]

    @classmethod
    def read(cls, home: Path) -> "Job | None":
        """The job of a run directory; None if it has none."""
        path = home / "job" / "job.json"
        if not path.is_file():
            return None
        known = json.loads(path.read_text())
        return cls(**known | {"runs": tuple(known["runs"]), "packages": tuple(known["packages"])})

    def write(self, home: Path) -> None:
        (home / "job" / "job.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def submit(
    source: str, overrides: Sequence[str], array: str | None, resources: Resources, *, dry_run: bool
) -> list[str]:
    """Freezes a recipe and submits it, or with `dry_run` only freezes it. Returns what the user should know, in lines.

    `array` is KEY=VALUE,VALUE,...: one run per value.

    Raises:
        RecipeError, ModelError, ShardingError: what `train` would say on that many processes.
        LaunchError: no scheduler, no such partition, what a job script can't hold, or a job that the scheduler refuses.
    """
    if not dry_run:
        _check_scheduler(resources)
    runs = _runs(source, overrides, array)
    for recipe in runs.values():
        _check(recipe, resources.world)
    home = recipes.load(source, overrides).directory
    directives = _directives((home / "job").absolute(), 0 if array is None else len(runs), resources)
    script = _freeze(home, runs, resources, directives, is_array=array is not None)
    arguments = [str(script), *map(str, runs)]
    if dry_run:
        return [f"job script: {script}", f"not submitted; to do so: {shlex.join(['sbatch', *arguments])}"]
    id_ = commands.sbatch(arguments)
    job = Job.read(home)
    assert job is not None, "it was written a moment ago"
    replace(job, id=id_).write(home)
    output = shlex.quote(str(home / "job")) + "/slurm-" + (f"{id_}-*.out" if array else f"{id_}.out")
    return [
        f"submitted: SLURM job {id_}, {len(runs)} run(s) of {resources.nodes} node(s)",
        f"job script: {script}",
        f"how far it is: mezo-scale status {shlex.quote(str(home))}",
        f"what it says: tail -F {output}",
        f"to end it: scancel {id_}",
    ]


def _check_scheduler(resources: Resources) -> None:
    if not commands.is_here():
        raise LaunchError(
            "there is no sbatch on this machine: submit from a login node of a SLURM cluster, or use --dry-run to only "
            "write the job script"
        )
    if resources.partition is not None:
        known = commands.partitions()
        missing = [name for name in resources.partition.split(",") if name not in known]
        if missing:
            raise LaunchError(
                f"--partition: there is no partition {', '.join(missing)}; the cluster has {', '.join(known)}"
            )


def _runs(source: str, overrides: Sequence[str], array: str | None) -> dict[Path, Recipe]:
    """The recipe of each run, by its run directory."""
    whole = recipes.load(source, overrides)
    home = whole.directory
    if array is None:
        return {home: whole}
    key, equals, text = array.partition("=")
    values = text.split(",")
    if not equals or not key or not all(values) or len(set(values)) < len(values):
        raise RecipeError(f"--array: found {array!r}, expected a field and different values, like seed=13,21,42")
    if any(character.isspace() for character in str(home)):
        raise RecipeError(f"output.dir: {home} has a space in it, and arrays need one without")
    runs: dict[Path, Recipe] = {}
    for value in values:
        folder = home / f"{key.split('.')[-1]}-{re.sub(r'[^A-Za-z0-9.+-]', '_', value)}"
        place = f"output.dir={json.dumps(str(folder), ensure_ascii=False)}"
        recipe = recipes.load(source, [*overrides, f"{key}={value}", place])
        if folder in runs:
            raise RecipeError(
                f"--array: two of its values would share the folder {folder}: give values that differ in it"
            )
        if _settings(recipe) in map(_settings, runs.values()):
            raise RecipeError(f"--array: {key}={value} makes the run that another value makes: give different values")
        runs[folder] = recipe
    return runs


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe without the place of its run."""
    return recipe.model_dump(exclude={"output": {"dir"}})


def _check(recipe: Recipe, world: World) -> None:
    """What the ranks of the job would find wrong, found before it waits in the queue."""
    models.check(recipe, world)
    if recipe.train.batch_size < world.size:
        raise RecipeError(
            f"train.batch_size is {recipe.train.batch_size}, but {world.nodes} nodes x {world.local_size} are "
            f"{world.size} processes: give each at least one row, train.batch_size={world.size}"
        )
    run = RunDirectory(recipe.directory)
    if run.trajectory.exists() and run.recipe.is_file():
        changed = recipes.differences(recipes.load(run.path), recipe)
        if changed:
            raise RecipeError(f"{run.path} holds a run with {'; '.join(changed)}: give another output.dir")


def _freeze(
    home: Path,
    runs: Mapping[Path, Recipe],
    resources: Resources,
    directives: Mapping[str, str],
    *,
    is_array: bool,
) -> Path:
    """Writes all that the job needs. Returns its script."""
    folder, source = home / "job", _launch_scripts()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output.dir: {home} can't be made ({error.strerror})") from None
    for name in _SCRIPTS:
        shutil.copy(source / name, folder / name)
    for run, recipe in runs.items():
        run.mkdir(parents=True, exist_ok=True)
        (run / recipes.RECIPE_FILE).write_text(recipes.dump(recipe), encoding="utf-8")
    _describe(tuple(run.name for run in runs) if is_array else (), folder / "code.diff").write(home)
    template = (folder / (_ARRAY if is_array else _SINGLE)).read_text(encoding="utf-8")
    script = folder / "job.sbatch"
    script.write_text(_fill(template, folder.absolute(), directives, resources), encoding="utf-8")
    return script


def _directives(folder: Path, elements: int, resources: Resources) -> dict[str, str]:
    """What a job asks for, as lines for sbatch by the names of their options; an empty line takes the template's out.

    Raises:
        LaunchError: a value that no such line can hold.
    """
    output = str(folder).replace("%", "%%") + ("/slurm-%A-%a.out" if elements else "/slurm-%j.out")
    directives: dict[str, tuple[str, object]] = {
        "job-name": ("output.dir", f"mezo-{folder.parent.name}"),
        "nodes": ("--nodes", resources.nodes),
        "gpus-per-node": ("--gpus-per-node", resources.gpus_per_node or None),
        "partition": ("--partition", resources.partition),
        "output": ("output.dir", output),
        "array": ("--array", f"0-{elements - 1}" if elements else None),
        "chdir": ("the working directory", Path.cwd()),
    }
    if resources.time is not None:
        directives["time"] = ("--time", resources.time)
    lines = {
        name: "" if value is None else f"#SBATCH --{name}={_quoted(value, origin)}"
        for name, (origin, value) in directives.items()
    }
    for option in resources.options:
        match = re.fullmatch(r"(--?[A-Za-z][A-Za-z0-9-]*)(?:([= ])(.*))?", option)
        if match is None:
            raise LaunchError(f"--sbatch: found {option!r}, expected an option of sbatch, like --account=lab")
        name, between, value = match.groups()
        lines[option] = f"#SBATCH {name}" + (f"{between}{_quoted(value, '--sbatch')}" if between else "")
    return lines


def _quoted(value: object, origin: str) -> str:
    """A value as sbatch reads it back from a script's directive. Raises LaunchError if it can't be written there."""
    text = str(value)
    if not text.isprintable() or '"' in text or "\\" in text:
        raise LaunchError(
            f"{origin}: found {text!r}, expected no quotes, backslashes, line breaks or control characters: the "
            "directives of a job script can't hold them"
        )
    return f'"{text}"'


def _fill(template: str, folder: Path, directives: Mapping[str, str], resources: Resources) -> str:
    """A launch script with a job's directives in the place of its own, and its settings below them."""
    shebang, *lines = template.splitlines()
    named = {line: re.match(r"#SBATCH --([\w-]+)", line) for line in lines}
    kept = [line for line, name in named.items() if name is not None and name[1] not in directives]
    body = [line for line in lines if named[line] is None]
    asked = [line for line in directives.values() if line]
    settings = [
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH LAUNCH={shlex.quote(str(folder))}",
        f"export LAUNCHER={shlex.quote(resources.launcher)} PROCESSES={resources.processes_per_node}",
    ]
    return "\n".join([shebang, *kept, *asked, *settings, *body]) + "\n"


def _launch_scripts() -> Path:
    """The folder of the launch scripts: beside the package in a checkout, else where it was installed."""
    found = find_beside(f"launch/{_SINGLE}")
    if found is None:
        places = " or ".join(str(place / "launch") for place in BESIDE)
        raise LaunchError(f"the launch scripts are not there, expected them in {places}")
    return found.parent


def _describe(runs: tuple[str, ...], diff: Path) -> Job:
    """The code and its environment, as they are now; writes what the code has on top of its commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError):
            return ""

    commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", ".")
    if changes:
        diff.write_text(changes, encoding="utf-8")
    return Job(
        id=None,
        runs=runs,
        frozen=datetime.now(UTC).isoformat(timespec="seconds"),
        version=importlib.metadata.version("mezo-scale"),
        commit=commit or None,
        changed=bool(changes),
        python=platform.python_version(),
        packages=tuple(sorted({f"{found.name}=={found.version}" for found in importlib.metadata.distributions()})),
    )
