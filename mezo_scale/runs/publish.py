"""From a base model and a trajectory, or an adapter, to an ordinary checkpoint; and from there to the hub."""

from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token

from mezo_scale import recipe as recipes
from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError, RecipeError, one_line
from mezo_scale.models import adapters, checkpoints, heads, save
from mezo_scale.models.fingerprints import of_files
from mezo_scale.optim.replay import replay
from mezo_scale.runs.beginning import begun
from mezo_scale.runs.card import CARD, LOG, add_licence
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import ADAPTER_INIT, RunDirectory
from mezo_scale.trajectory import Trajectory


def rebuild(base: str, trajectory: Path, out: Path, until: int | None, adapter: Path | None = None) -> int:
    """Replays a trajectory on its base model and saves an ordinary checkpoint in `out`. Returns the steps applied.

    In one process and on the CPU: the bits are the run's, whatever layout it had.

    Args:
        adapter: the one that the run began with; None: what lies beside the trajectory, if anything does. With one, an
            adapter is saved.

    Raises:
        RecipeError: `out` is there already, or the base model is not.
        TrajectoryError: the trajectory is damaged, or is not of this base model.
    """
    world = World.from_environment()
    if world.size > 1:
        raise RecipeError(f"replay runs in one process, but WORLD_SIZE is {world.size}: start it without a launcher")
    _check_free(out)
    records = Trajectory.open(trajectory)
    beside = trajectory.with_name(ADAPTER_INIT)
    checkpoints.find(base)
    tokenizer = checkpoints.load_processor(base)
    model = begun(base, records, beside if adapter is None and beside.is_dir() else adapter)
    screen = Screen(world)
    with screen.counting("replaying", "steps") as progress:
        steps = replay(model, records, until, progress=progress)
    save.write(model, tokenizer, out)
    return steps


def export(directory: Path, out: Path) -> tuple[int, int]:
    """Writes the compact form of a run's trajectory. Returns its steps and bytes.

    Raises:
        TrajectoryError: the trajectory is damaged or has fewer steps than were taken, or `out` is there already.
    """
    run = RunDirectory(directory)
    records = run.read_log()
    return len(records), records.export(out)


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Uploads the checkpoint of a finished run to the hub, with its card and its log. Returns its address.

    Args:
        repo: its name there, `owner/name`; made if it is not there.
        private: whether one that is made is seen by its owner only.

    Raises:
        RecipeError: the run has no checkpoint of its last step, there is no token, or the hub refuses.
    """
    run = RunDirectory(directory)
    _check_last(run)
    if get_token() is None:
        raise RecipeError("push: there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        add_licence(run.checkpoint / CARD, recipes.load(directory).model.name)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=run.checkpoint, commit_message=f"Checkpoint of {directory.name}"
        )
    except MezoError:
        raise
    except Exception as error:  # the hub's client has roots of its own
        raise RecipeError(f"push: the hub does not take {repo} ({one_line(error)})") from None
    return str(made)


def merge(source: Path, out: Path, base: str | None) -> str:
    """Adds an adapter to its base model and saves an ordinary checkpoint in `out`. Returns the base model's name.

    In one process and on the CPU. The sum is taken in float32, and stored in the dtype of the base model's checkpoint.

    Args:
        source: an adapter, or the directory of a run that tuned one.
        base: the base model; None: the one that the adapter names.

    Raises:
        RecipeError: `out` is there already, `source` holds no adapter (or one of before its run's last step), or there
            is no such base model.
        ModelError: the adapter can't be added to weights, or is another model's.
    """
    _check_free(out)
    run, folder = RunDirectory(source), source
    if run.recipe.is_file():
        _check_last(run)
        folder = run.checkpoint
    named = adapters.base_of(folder)
    base = base or named
    if not base:
        raise RecipeError(f"{folder} does not say which model it is an adapter of: give --base")
    config = checkpoints.find(base)
    _check_same_weights(run, base)
    heads.check_language(f"{base}: merge adds adapters to language models; it", config)
    tokenizer = checkpoints.load_processor(base)
    model = checkpoints.read(base, torch.float32)
    merged = adapters.merged(model, folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    save.write(merged.to(dtype), tokenizer, out)
    return base


def _check_same_weights(run: RunDirectory, base: str) -> None:
    """Raises RecipeError if a run began with other weights than a base model has now."""
    begun_with = run.read_inputs().get("weights") if run.recipe.is_file() else None
    if begun_with is not None and begun_with != of_files(checkpoints.weight_files(base)):
        raise RecipeError(
            f"{run.path} tuned an adapter of other weights than {base} has: give the --base that it began with, or "
            f"merge {run.checkpoint} if the same weights lie in other files there"
        )


def _check_last(run: RunDirectory) -> None:
    """Raises RecipeError if the run has no checkpoint, or has taken other steps since it was made."""
    if not run.checkpoint.is_dir():
        raise RecipeError(f"{run.path} has no checkpoint: expected the directory of a run that has ended")
    log = run.checkpoint / LOG
    if log.is_file() and run.trajectory.is_file():
        then, now = len(Trajectory.open(log)), len(run.read_log())
        if then != now:
            raise RecipeError(
                f"{run.path} has taken {now} steps, but its checkpoint was made after {then}: let the run end with "
                "output.checkpoint=true, or rebuild its weights by `mezo-scale replay`"
            )


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} is there already: give the name of a folder that is not")
