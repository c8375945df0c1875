"""From a base model and a trajectory to the tuned weights: what resuming, joining late and publishing a run have in
common."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mezo_scale import collectives
from mezo_scale.errors import TrajectoryError
from mezo_scale.noise import VERSION, Noise
from mezo_scale.optim.update import Writer
from mezo_scale.sharding import Shard, discover
from mezo_scale.sharding.fingerprint import fingerprints as fingerprints_of
from mezo_scale.trajectory import Header, Trajectory

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_CHUNK = 32  # steps per sweep: between two of them progress is shown


def replay(
    model: nn.Module,
    trajectory: str | os.PathLike[str] | Trajectory,
    until: int | None = None,
    *,
    progress: Progress | None = None,
) -> int:
    """Bring a base model's weights to where a run left them; bit-identical in every layout and world size.

    Args:
        model: the run's base model, in the dtype it was trained in, sharded in any way.
        trajectory: the run's, or the path of its file (read by rank 0 only).
        until: apply the steps before this one; None: all.
        progress: called with (steps done, steps in all) every few steps.

    Returns:
        The number of steps applied.

    Raises:
        TrajectoryError: damaged, or of another model, other base weights or another noise version.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = load(trajectory)
    header = trajectory.header
    layout = discover(model)
    groups = {name: group for name, _, _, group, _ in header.manifest}
    writer = Writer(layout, groups, rounding=header.rounding, noise=Noise(header.distribution))
    here = describe(model, writer, header.num_directions, header.num_groups, header.seed, header.eps)
    header.check_same(replace(here, estimator=header.estimator, rule=header.rule), "the trajectory")
    if until is not None and not 0 <= until <= len(trajectory):
        raise TrajectoryError(
            f"until is {until}, but the trajectory has {len(trajectory)} steps: expected 0 to {len(trajectory)}"
        )
    return apply_all_(writer, trajectory, len(trajectory) if until is None else until, progress)


def load(path: str | os.PathLike[str]) -> Trajectory:
    """A trajectory's file, read by rank 0 and handed to all. Every rank calls it, and gets the same error."""
    if not collectives.is_distributed():
        return Trajectory.open(path)

    def read() -> bytes:
        Trajectory.open(path)
        return Path(path).read_bytes()

    data = collectives.from_first_rank(read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 0 has said it
        return Trajectory.parse(data, str(path))


def take_up_(path: str | os.PathLike[str], header: Header, writer: Writer, progress: Progress | None) -> Trajectory:
    """The log of a run, its steps applied; if that fails, the file is free again. Errors as of `_taken_up`."""
    trajectory = _taken_up(path, header)
    with ExitStack() as undo:
        undo.callback(trajectory.release)
        apply_all_(writer, trajectory, len(trajectory), progress)
        undo.pop_all()
    return trajectory


def _taken_up(path: str | os.PathLike[str], header: Header) -> Trajectory:
    """The log of a run that is described by `header`: the one that is there, or a new one. Rank 0 writes it.

    Every rank calls it, and gets the same error if rank 0 can't have the file: it is damaged, another run's, or
    another process writes it.
    """
    if not collectives.is_distributed():
        return _mine(path, header)
    kept: list[Trajectory] = []

    def begin() -> bytes:
        kept.append(_mine(path, header))
        return Path(path).read_bytes()

    data = collectives.from_first_rank(begin)
    if kept:
        return kept[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trajectory = Trajectory.parse(data, str(path))
    trajectory.header.check_same(header, str(path))
    return trajectory


def _mine(path: str | os.PathLike[str], header: Header) -> Trajectory:
    if not os.path.lexists(path):
        return Trajectory.create(path, header)
    trajectory = Trajectory.open(path, append=True)
    try:
        trajectory.header.check_same(header, str(path))
    except TrajectoryError:
        trajectory.release()
        raise
    return trajectory


def apply_all_(writer: Writer, trajectory: Trajectory, until: int, progress: Progress | None) -> int:
    """The first ``until`` records, a chunk at a time."""
    for start in range(0, until, _CHUNK):
        stop = min(start + _CHUNK, until)
        writer.apply_(trajectory[start:stop])
        if progress is not None:
            progress(stop, until)
    return until


def describe(
    model: nn.Module,
    writer: Writer,
    num_directions: int,
    num_groups: int,
    seed: int,
    eps: float,
    fingerprints: Mapping[str, str] | None = None,
) -> Header:
    """The header of a trajectory that starts from the weights as they are now. All ranks must call it."""
    tuned, frozen = fingerprints_of(model, writer.layout.shards)
    return Header(
        noise_version=VERSION,
        fingerprint=tuned,
        manifest=manifest(writer),
        num_directions=num_directions,
        num_groups=num_groups,
        distribution=writer.noise.kind,
        rounding=writer.rounding,
        seed=seed,
        eps=eps,
        frozen=frozen,
        fingerprints=dict(fingerprints) if fingerprints else None,
    )


def manifest(writer: Writer) -> list[list[Any]]:
    """Per trainable parameter [name, shape, dtype, parameter group, decayed]."""
    return [_entry(shard, writer.groups.get(shard.name, 0)) for shard in writer.layout.shards]


def _entry(shard: Shard, group: int) -> list[Any]:
    dtype = str(shard.local.dtype).removeprefix("torch.")
    return [shard.name, list(shard.shape), dtype, group, shard.decayed]
