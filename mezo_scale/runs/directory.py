"""The directory of a run: its files by name, and what is written there so that no file is ever seen half-written."""

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import RECIPE_FILE, Recipe, dump


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
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

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

    def describe(self, recipe: Recipe, world: World) -> None:
        """Writes the resolved recipe, and adds this session to environment.json."""
        replace_file(self.recipe, dump(recipe))
        path = self.path / "environment.json"
        sessions = json.loads(path.read_text()) if path.is_file() else []
        replace_file(path, json.dumps([*sessions, environment(world)], indent=2) + "\n")
        self.interrupted.unlink(missing_ok=True)

    def mark_interrupted(self, step: int, signal: str) -> None:
        """Leaves word that `signal` stopped the run after `step`; the next session removes it."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        replace_file(self.interrupted, json.dumps({"signal": signal, "step": step, "when": when}) + "\n")

    def read_evaluation(self) -> dict[str, Any]:
        """What evaluation.json holds; empty if there is none yet."""
        return json.loads(self.evaluation.read_text()) if self.evaluation.is_file() else {}

    def add_evaluation(self, **results: Any) -> dict[str, Any]:
        """Adds results to evaluation.json and returns all of them."""
        everything = self.read_evaluation() | results
        replace_file(self.evaluation, json.dumps(everything, indent=2) + "\n")
        return everything

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without one that a crash cut short."""
        lines = self.metrics.read_text().splitlines() if self.metrics.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


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
    """Writes a file that is never seen half-written."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
