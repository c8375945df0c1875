"""The directory of a run: its files by name, and what is written there so that no file is ever seen half-written."""

import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import RECIPE_FILE, Recipe, TrainSection, dump, load, parse
from mezo_scale.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADAPTER_INIT = "adapter_init"
_Kind = TypeVar("_Kind", list[Any], dict[str, Any])


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run, by name. Only rank 0 writes them."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE_FILE

    @property
    def trajectory(self) -> Path:
        return self.path / "trajectory.mezo"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def adapter_init(self) -> Path:
        """The adapter that the run began with, as PEFT's folder; none where weights of the model's own are tuned."""
        return self.path / ADAPTER_INIT

    @property
    def plot(self) -> Path:
        return self.path / "loss_accuracy.png"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def interrupted(self) -> Path:
        """There while a run that a signal stopped waits to go on."""
        return self.path / "interrupted.json"

    def create(self) -> None:
        """Makes the folder. Raises RecipeError if it can't be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output.dir: {self.path} can't be made ({error.strerror})") from None

    def describe(self, recipe: Recipe, world: World, inputs: Mapping[str, str]) -> None:
        """Writes the resolved recipe, and adds this session to environment.json.

        inputs: digests of what it rests on, as `inputs_of` gives them.
        """
        replace_file(self.recipe, dump(recipe))
        sessions = _read_json(self.environment, list)
        if sessions is None:
            keep_aside(self.environment)
        session = environment(world) | {"inputs": dict(inputs), "recipe": recipe.model_dump(mode="json")}
        replace_file(self.environment, json.dumps([*(sessions or []), session], indent=2) + "\n")
        self.interrupted.unlink(missing_ok=True)

    def read_inputs(self) -> dict[str, str]:
        """What the last session rested on; empty where it is not known, as of runs of before it was written."""
        sessions = _read_json(self.environment, list) or [{}]
        found = sessions[-1].get("inputs") if isinstance(sessions[-1], dict) else None
        return found if isinstance(found, dict) else {}

    def recorded(self) -> Recipe:
        """The recipe of the last session; recipe.yaml may have been edited since. Where none is known, that one."""
        sessions = _read_json(self.environment, list) or [{}]
        found = sessions[-1].get("recipe") if isinstance(sessions[-1], dict) else None
        return parse(found, str(self.environment)) if isinstance(found, dict) else load(self.path)

    def mark_interrupted(self, step: int, signal: str) -> None:
        """Leaves word that `signal` stopped the run after `step`; the next session removes it."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        replace_file(self.interrupted, json.dumps({"signal": signal, "step": step, "when": when}) + "\n")

    def read_evaluation(self) -> dict[str, Any]:
        """What evaluation.json holds; empty if there is none yet, or if it is damaged: then it is made anew."""
        return _read_json(self.evaluation, dict) or {}

    def add_evaluation(self, **results: Any) -> dict[str, Any]:
        """Adds results to evaluation.json and returns all of them. A damaged one is kept beside."""
        before = _read_json(self.evaluation, dict)
        if before is None:
            keep_aside(self.evaluation)
        everything = (before or {}) | results
        replace_file(self.evaluation, json.dumps(everything, indent=2) + "\n")
        return everything

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without those that are damaged or that a crash cut short."""
        data = self.metrics.read_bytes() if self.metrics.is_file() else b""
        lines = (_parse(line, dict) for line in data.splitlines())
        return [line for line in lines if line is not None and type(line.get("step")) is int]

    def keep_damaged_metrics(self) -> None:
        """Keeps metrics.jsonl beside if a line of it is damaged, before the whole ones are written anew."""
        data = self.metrics.read_bytes() if self.metrics.is_file() else b""
        if len(self.read_metrics()) < len(data[: data.rfind(b"\n") + 1].splitlines()):
            keep_aside(self.metrics)

    def steps_said(self) -> int:
        """How many steps the trajectory had on the disk for certain, as evaluation.json and metrics.jsonl say: with
        fewer it has lost some.

        evaluation.json is written after that. A line of metrics says it as `synced`; one without it was written after
        its step was on the disk.
        """
        results = self.read_evaluation()
        parts = [results.get(name) for name in ("tuned", "ended")]
        graded = [part.get("step") for part in parts if isinstance(part, dict)]
        said = [line.get("synced", line["step"]) for line in self.read_metrics()]
        return max(number for number in (0, *graded, *said) if isinstance(number, int))

    def has_ended(self, train: TrainSection) -> bool:
        """Whether evaluation.json has the result of all the steps, or of those after which the run's patience was over.

        Runs of before `ended` was written have the result's step.
        """
        results = self.read_evaluation()
        ended = results.get("ended", results.get("tuned"))
        if not isinstance(results.get("tuned"), dict) or not isinstance(ended, dict):
            return False
        early = ended.get("patience")
        return ended.get("step") == train.steps or (early is not None and early == train.patience)

    def read_log(self) -> Trajectory:
        """The run's trajectory. Raises TrajectoryError if it is not there, damaged, or has lost steps."""
        return Trajectory.open(self.trajectory, at_least=self.steps_said())

    def check_unclaimed(self) -> None:
        """Whether a run can begin here: the folder has no trajectory, and so nothing that a run would write over.

        Raises:
            RecipeError: it holds something of the kind, a user's or that of a run whose trajectory is gone.
        """
        results = (
            self.checkpoint,
            self.snapshots,
            self.report,
            self.evaluation,
            self.metrics,
            self.environment,
            self.plot,
        )
        found = [path.name for path in results if path.exists()]
        if not found and self.recipe.exists() and not self._recipe_is_resolved():
            found = [self.recipe.name]
        if found:
            raise RecipeError(
                f"output.dir: {self.path} holds {', '.join(found)}, but no {self.trajectory.name}: give another "
                f"output.dir; if they are a run's, put its {self.trajectory.name} back or move them away"
            )

    def _recipe_is_resolved(self) -> bool:
        """Whether recipe.yaml is as a job's submission leaves it; a person's would lose its comments."""
        return self.recipe.read_text(encoding="utf-8") == dump(load(self.path))


def environment(world: World) -> dict[str, Any]:
    """Where and with what a session runs."""
    packages = ("mezo-scale", "torch", "transformers", "deepspeed", "numba", "triton", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
        "world_size": world.size,
        "nodes": world.nodes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def replace_file(path: Path, text: str) -> None:
    """Writes a file that is never seen half-written, after a power loss neither. Raises RecipeError if it can't be."""
    beside = path.with_name(path.name + ".partial")
    with writing(path):
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def replace_plot(path: Path, figure: "Figure", dpi: int) -> None:
    """Writes a PNG that is never seen half-written. Raises RecipeError if it can't be."""
    beside = path.with_name(path.name + ".partial")
    with writing(path):
        figure.savefig(beside, dpi=dpi, format="png")
        beside.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against a file of the run becomes a RecipeError: there is a disk to be seen to."""
    try:
        yield
    except OSError as error:
        raise RecipeError(
            f"{path} can't be written ({error.strerror or error}): make room, and give the same command again: the run "
            "goes on after the last step in its log"
        ) from None


def keep_aside(path: Path) -> None:
    """Moves a damaged file beside its name, and says so."""
    beside = path.with_name(path.name + ".damaged")
    with writing(path):
        path.replace(beside)
    warnings.warn(f"{path} is damaged and is begun anew; what it held is in {beside}", stacklevel=3)


def _read_json(path: Path, kind: type[_Kind]) -> _Kind | None:
    """A file's list or dict, empty if there is no file; None if it is damaged."""
    return _parse(path.read_bytes(), kind) if path.is_file() else kind()


def _parse(data: bytes, kind: type[_Kind]) -> _Kind | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, kind) else None
