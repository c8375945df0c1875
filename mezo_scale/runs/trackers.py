"""Experiment trackers, through accelerate's one interface to all of them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe

_PACKAGES = {"comet_ml": "comet-ml"}  # where pip's name is not the tracker's
_PROJECT = "mezo-scale"


def check(names: Sequence[str]) -> None:
    """Raise a RecipeError if one of these trackers is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers  # seconds to import

    there = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in there:
            raise RecipeError(
                f"output.trackers: {name} is not installed: pip install {_PACKAGES.get(name, name)}, or leave it out"
            )


class Trackers:
    """The recipe's trackers, open on the one process that reports: a run by the name of its directory in each of them.

    A session that goes on with a run goes on in the same run of W&B and trackio; in the others it is a new one of that
    name. A tracker that fails later stops the session: what it was asked to keep is not dropped silently.
    """

    def __init__(self, recipe: Recipe, run_id: str | None) -> None:
        self._open: list[Any] = []
        names = recipe.output.trackers
        if not names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        threads = torch.get_num_threads()
        PartialState(cpu=not torch.cuda.is_available())  # their loggers ask for it; it takes the group that there is
        torch.set_num_threads(threads)
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        for name in names:
            made = LOGGER_TYPE_TO_CLASS[name]
            folder = {"logging_dir": str(recipe.directory / name)} if made.requires_logging_directory else {}
            try:
                tracker = made(project, **folder, **_identity(name, recipe.directory, run_id))
                if hasattr(tracker, "start"):
                    tracker.start()
                tracker.store_init_configuration(_flat(recipe))
            except Exception as error:  # each service has its own for a login that is missing
                self.close()
                raise RecipeError(
                    f"output.trackers: {name} can't be opened ({' '.join(str(error).split())[:200]}): log in to it, or "
                    "leave it out"
                ) from None
            self._open.append(tracker)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step; what is no number is left out."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._open:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        while self._open:
            self._open.pop().finish()


def _identity(name: str, directory: Path, run_id: str | None) -> dict[str, Any]:
    """What ties a tracker's run to this one, in its own words."""
    if name == "wandb":
        return {"name": directory.name, "id": run_id, "resume": "allow"}
    if name == "trackio":
        return {"name": directory.name, "resume": "allow"}
    return {"mlflow": {"run_name": directory.name}, "swanlab": {"experiment_name": directory.name}}.get(name, {})


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields by their keys: text and numbers, as all trackers take them."""
    return {
        f"{section}.{name}": value if isinstance(value, int | float | str) else str(value)
        for section, fields in recipe.model_dump(mode="json").items()
        for name, value in (fields or {}).items()
    }
