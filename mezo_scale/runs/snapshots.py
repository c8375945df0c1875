"""Snapshots: ordinary checkpoints on the way, so that a run goes on without replaying all of its steps.

A snapshot is a folder `snapshots/step-N` of the run directory, with a `snapshot.json` that says of which run and step
it is, and by what its files and its weights can be known. It is never more than a shorter way: whatever is wrong with
one, the log and the base model are still the run.
"""

import gc
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from mezo_scale import collectives, models
from mezo_scale import recipe as recipes
from mezo_scale.distributed.world import World
from mezo_scale.errors import SharedError, TrajectoryError
from mezo_scale.models import Loaded, adapters, checkpoints, low_bits, save, tuning
from mezo_scale.optim.mezo import MeZO
from mezo_scale.optim.replay import Replay, Start
from mezo_scale.optim.update import low_bits_of
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.sharding import shards
from mezo_scale.sharding.fingerprint import fingerprint, fingerprints
from mezo_scale.trajectory import Trajectory

ABOUT = "snapshot.json"
_NAME = re.compile(r"step-(\d+)")
_LEFT_OVER = re.compile(r"step-\d+\.(partial|old)")


class Snapshot(BaseModel):
    """What snapshot.json holds.

    Attributes:
        step: steps that are in the weights.
        run_id: of the trajectory's header.
        chain: the trajectory's chain value behind these steps.
        digest: the `fingerprint` of the tuned weights, and under rounding "master" of their low bits.
        frozen: that of the other weights and buffers, as in the trajectory's header.
        noise_version, rounding: as in the trajectory's header.
        files: per file its bytes, and a BLAKE2b of it; of safetensors only of the header, for `digest` covers the rest.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    step: int
    run_id: str
    chain: str
    digest: str
    frozen: str | None
    noise_version: int
    rounding: str
    files: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, folder: Path) -> "Snapshot":
        """Raises ValueError, in one line, or OSError: it is not one, or a file of it is not what was written."""
        try:
            found = cls.model_validate_json((folder / ABOUT).read_bytes())
        except ValidationError as error:
            raise ValueError(f"{ABOUT} can't be read: {error.errors()[0]['msg']}") from None
        here = files(folder)
        wrong = [name for name in sorted(found.files.keys() | here) if found.files.get(name) != here.get(name)]
        if wrong:
            raise ValueError(f"{wrong[0]} is not the file that was written")
        return found

    def check(self, folder: Path, log: Trajectory) -> None:
        """Raise a ValueError, in one line, if it is not of this log's past."""
        header = log.header
        expected = {"run_id": header.run_id, "noise_version": header.noise_version, "rounding": header.rounding}
        expected |= {"frozen": header.frozen}
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(f"its {name} is {getattr(self, name)}, the run's is {value}")
        if folder.name != f"step-{self.step}" or not 0 < self.step <= len(log):
            raise ValueError(f"it is of step {self.step}, and the trajectory has {len(log)} steps")
        if log.chain(self.step) != self.chain:
            raise ValueError("it is of another past: the trajectory has another chain value there")


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Per file its size and what is hashed of it, snapshot.json left out."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ABOUT)
    return {str(path.relative_to(folder)): (path.stat().st_size, _hash(path)) for path in found}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        size = -1
        if path.suffix == ".safetensors":
            size = int.from_bytes(file.read(8), "little") + 8
            file.seek(0)
        return blake2b(file.read(min(size, path.stat().st_size)), digest_size=16).hexdigest()


def are_wanted(model: nn.Module) -> bool:
    """Whether they shorten the way: an adapter is so small that all its steps are written again in no time."""
    return adapters.config_in(model) is None


def write(optimizer: MeZO, loaded: Loaded, run: RunDirectory, keep: int) -> str:
    """Saves the weights as they are, and then takes older snapshots away but `keep`; every rank calls it.

    Returns a line for the user. One that can't be written is no reason to stop: nothing depends on it.

    Raises:
        TrajectoryError: on rank 0, if the steps up to here did not come to the disk.
    """
    step, masters, log = optimizer.step_count, optimizer.low_bits(), optimizer.trajectory
    assert log is not None, "a run keeps a log"
    log.sync()
    digest, folder = fingerprint([*shards(loaded.model), *masters]), run.snapshots / f"step-{step}"

    def seal(beside: Path) -> None:
        header = log.header
        about = {"step": step, "run_id": header.run_id, "chain": log.chain(step), "digest": digest}
        about |= {"frozen": header.frozen, "noise_version": header.noise_version, "rounding": header.rounding}
        (beside / ABOUT).write_text(json.dumps({**about, "files": files(beside)}, indent=2) + "\n")

    gc.collect()  # the last step's batch makes room for what rank 0 gathers
    try:
        save.write(loaded.model, loaded.processor, folder, masters=masters, seal=seal)
    except SharedError as error:
        return f"step {step}: no snapshot, and the run goes on without: {error}"
    left = ""
    if collectives.rank() == 0:
        try:
            _prune(run, log, keep)
        except OSError as error:
            left = f"; older ones stay ({error.strerror}), and the run goes on"
    return f"step {step}: snapshot {folder}{left}"


def _prune(run: RunDirectory, log: Trajectory, keep: int) -> None:
    """The newest good ones stay. Those that are damaged, or of a past that the log has lost, hold no place among them.

    Raises:
        OSError: one can't be read, and is left, or one can't be taken away.
    """
    by_step, good = _by_step(run), []
    for step, path in by_step.items():
        with suppress(ValueError, FileNotFoundError):
            Snapshot.read(path).check(path, log)
            good.append(step)
    for step, path in by_step.items():
        if step not in sorted(good)[-keep:]:
            path.replace(path.with_name(f"{path.name}.old"))  # a name that is never read, before anything goes
    tidy(run)


def tidy(run: RunDirectory) -> None:
    """Takes away what a session that was killed left of a snapshot; for rank 0, while it holds the log's lock."""
    for path in run.snapshots.iterdir() if run.snapshots.is_dir() else ():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _by_step(run: RunDirectory) -> dict[int, Path]:
    found = run.snapshots.iterdir() if run.snapshots.is_dir() else ()
    named = ((_NAME.fullmatch(path.name), path) for path in found)
    return {int(match[1]): path for match, path in named if match}


def load(
    recipe: Recipe, world: World, run: RunDirectory, screen: Screen, until: int | None = None
) -> tuple[Loaded, Start | None]:
    """The model at the run's newest good snapshot, and where that is; without one the base model, and None.

    Every rank calls it. Of each snapshot that is passed over a line says why. Errors as of `models.load`.

    Args:
        until: the last step that may be in it; None: any.
    """

    def candidates() -> bytes:
        return json.dumps(_candidates(recipe, run, screen, until)).encode()

    for found in json.loads(collectives.from_first_rank(candidates)):
        about = Snapshot.model_validate_json(found)
        folder = run.snapshots / f"step-{about.step}"
        loaded = models.load(recipe, world, folder)
        start, frozen = _taken(loaded.model, about, folder)
        pairs = (("weights", start.digest, about.digest), ("frozen weights", frozen, about.frozen))
        wrong = [
            f"its {what} have digest {here}, not {there}"
            for what, here, there in pairs
            if None not in (here, there) and here != there
        ]
        if not wrong:
            return loaded, start
        screen.say(f"{folder} is passed over: {wrong[0]}")
        del loaded
        gc.collect()
    return models.load(recipe, world), None


def check_all(run: RunDirectory, replay: Replay, log: Trajectory, steps: range) -> Iterator[str]:
    """Compares the snapshots of these steps with a replay, which goes on to them; yields what holds, one line each.

    Raises:
        TrajectoryError: at the first one that is not what the trajectory gives.
    """
    dtype = getattr(torch, log.header.manifest[0][2])
    for step, folder in sorted(_by_step(run).items()):
        if step not in steps:
            continue
        try:
            about = Snapshot.read(folder)
            about.check(folder, log)
        except (OSError, ValueError) as error:
            raise TrajectoryError(f"{folder} is no good ({error}): delete it, a run goes on without") from None
        replay.to(step)
        saved = checkpoints.read(str(folder), dtype)
        tuning.only_(saved, [entry[0] for entry in log.header.manifest])
        start, _ = _taken(saved, about, folder)
        if start.digest != replay.digest():
            raise TrajectoryError(
                f"{folder} has weights with digest {start.digest}, but {step} replayed steps give {replay.digest()}: "
                "delete it, a run goes on without"
            )
        yield f"{folder}: bit for bit what {step} replayed steps give"


def _candidates(recipe: Recipe, run: RunDirectory, screen: Screen, until: int | None) -> list[str]:
    """The snapshots that may be gone on from, the newest first, as JSON each: all but their weights is checked."""
    by_step = {step: path for step, path in _by_step(run).items() if until is None or step <= until}
    if not by_step or not run.trajectory.is_file() or "zero_shot" not in run.read_evaluation():
        return []  # without a grade of the base model that has to be read
    if run.recipe.is_file() and recipes.load(run.path).model.name != recipe.model.name:
        return []  # whether it is the run's base model has to be asked of its weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a torn end somebody else speaks
        log = Trajectory.open(run.trajectory)
    good = []
    for step in sorted(by_step, reverse=True):
        try:
            about = Snapshot.read(by_step[step])
            about.check(by_step[step], log)
        except (OSError, ValueError) as error:
            screen.say(f"{by_step[step]} is passed over: {error}")
        else:
            good.append(about.model_dump_json())
    return good


def _taken(model: nn.Module, about: Snapshot, folder: Path) -> tuple[Start, str | None]:
    """Where a snapshot's weights stand, with the digests that they have; of the frozen ones None if unknown."""
    stored, masters = shards(model), []
    for shard in stored if about.rounding == "master" else ():
        if shard.local.dtype == torch.bfloat16:
            device = "cpu" if shard.paged else shard.local.device
            zeros = torch.zeros(shard.local.numel(), dtype=torch.int16, device=device)
            masters.append((shard.name, low_bits_of(shard, zeros)))
    low = [shard for _, shard in masters]
    low_bits.read_(folder, low)
    tuned, frozen = fingerprints(model, [*stored, *low])
    return Start(about.step, about.chain, tuned, {name: shard.local for name, shard in masters}), frozen
