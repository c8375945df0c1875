"""From a base model and a trajectory to the tuned weights: what resuming, joining late and publishing a run have in
common."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.errors import TrajectoryError
from mezo_scale.noise import Noise
from mezo_scale.optim.update import Writer
from mezo_scale.sharding import Shard, discover
from mezo_scale.sharding.fingerprint import fingerprint
from mezo_scale.sharding.fingerprint import fingerprints as fingerprints_of
from mezo_scale.trajectory import UNSYNCED, Header, Trajectory

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_CHUNK = 32  # steps per sweep: between two of them progress is shown


@dataclass(frozen=True)
class Start:
    """Where a run stood when the weights were saved that a model holds in the place of the base weights.

    Attributes:
        step: steps that are in them, of those in the run's trajectory.
        chain: the trajectory's chain value behind these steps: no other run, and no other past of this one, has it.
        digest: the `fingerprint` of the tuned weights and their low bits.
        low_bits: under rounding "master" the low halves of this rank's bfloat16 elements, int16 by shard name.
    """

    step: int
    chain: str
    digest: str
    low_bits: Mapping[str, Tensor] = field(default_factory=dict)

    def check_log(self, trajectory: Trajectory, where: str) -> None:
        """Raise a TrajectoryError if the weights are not of this run, or of steps that it no longer has."""
        if self.step > len(trajectory):
            raise TrajectoryError(
                f"{where} has {len(trajectory)} steps, but the weights were saved after {self.step}: restore the file "
                "from a copy, or start from the base model"
            )
        if trajectory.chain(self.step) != self.chain:
            raise TrajectoryError(
                f"{where} is not the log that the weights were saved with after step {self.step}: start from the base "
                "model, or give the run's own log"
            )


def replay(
    model: nn.Module,
    trajectory: str | os.PathLike[str] | Trajectory,
    until: int | None = None,
    *,
    progress: Progress | None = None,
    start: Start | None = None,
) -> int:
    """Bring a base model's weights to where a run left them; bit-identical in every layout and world size.

    Args:
        model: the run's base model, in the dtype it was trained in, sharded in any way.
        trajectory: the run's, or the path of its file (read by rank 0 only).
        until: apply the steps before this one; None: all.
        progress: called with (steps done, steps in all) every few steps.
        start: where the run stood whose weights the model holds; None: it holds the base weights.

    Returns:
        The number of steps that are in the weights.

    Raises:
        TrajectoryError: damaged, or of another model, other base weights or another noise version.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = load(trajectory)
    return Replay(model, trajectory, start).to(len(trajectory) if until is None else until, progress=progress)


class Replay:
    """A model on its way through a run. Arguments and errors as of `replay`.

    Attributes:
        step: steps that are in the weights.
    """

    def __init__(self, model: nn.Module, trajectory: Trajectory, start: Start | None = None) -> None:
        header = trajectory.header
        layout = discover(model)
        groups = {name: group for name, _, _, group, _ in header.manifest}
        self._writer = Writer(layout, groups, rounding=header.rounding, noise=_noise_of(header))
        self._trajectory = trajectory
        self.step = 0
        if start is not None:
            start.check_log(trajectory, "the trajectory")
            self._writer.take_low_bits_(start.low_bits)
            self.step = start.step
        numbers = (header.num_directions, header.num_groups, header.seed, header.eps)
        here = describe(model, self._writer, *numbers, estimator=header.estimator, rule=header.rule)
        if start is not None:
            here = replace(here, fingerprint=header.fingerprint)  # the base weights are not here to be asked
        header.check_same(here, "the trajectory")

    def to(self, step: int, *, progress: Progress | None = None) -> int:
        """Go on to where `step` steps are applied. Returns it. Raises TrajectoryError: there are not so many, or more
        are applied already."""
        count = len(self._trajectory)
        if not self.step <= step <= count:
            raise TrajectoryError(
                f"until is {step}, but the trajectory has {count} steps: expected {self.step} to {count}"
            )
        apply_all_(self._writer, self._trajectory, self.step, step, progress)
        self.step = step
        return step

    def digest(self) -> str:
        """The `fingerprint` of the tuned weights and their low bits as they are now. Every rank calls it."""
        return fingerprint(self._writer.stored())


def _noise_of(header: Header) -> Noise:
    try:
        return Noise.of(header.distribution)
    except ValueError as error:
        raise TrajectoryError(f"the trajectory's {error}: use the mezo-scale release that wrote it") from None


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


def apply_all_(writer: Writer, trajectory: Trajectory, first: int, until: int, progress: Progress | None) -> None:
    """The records from ``first`` up to ``until``, a chunk at a time; progress counts those."""
    for start in range(first, until, _CHUNK):
        stop = min(start + _CHUNK, until)
        writer.apply_(trajectory[start:stop])
        if progress is not None:
            progress(stop - first, until - first)


def describe(
    model: nn.Module,
    writer: Writer,
    num_directions: int,
    num_groups: int,
    seed: int,
    eps: float,
    fingerprints: Mapping[str, str] | None = None,
    estimator: str = "spsa",
    rule: str = "sgd",
) -> Header:
    """The header of a trajectory that starts from the weights as they are now. All ranks must call it."""
    tuned, frozen = fingerprints_of(model, writer.layout.shards)
    return Header(
        noise_version=writer.noise.version,
        fingerprint=tuned,
        manifest=manifest(writer),
        num_directions=num_directions,
        num_groups=num_groups,
        distribution=writer.noise.name,
        rounding=writer.rounding,
        seed=seed,
        eps=eps,
        frozen=frozen,
        fingerprints=dict(fingerprints) if fingerprints else None,
        estimator=estimator,
        rule=rule,
        unsynced=UNSYNCED,
    )


def manifest(writer: Writer) -> list[list[Any]]:
    """Per trainable parameter [name, shape, dtype, parameter group, decayed]."""
    return [_entry(shard, writer.groups.get(shard.name, 0)) for shard in writer.layout.shards]


def _entry(shard: Shard, group: int) -> list[Any]:
    dtype = str(shard.local.dtype).removeprefix("torch.")
    return [shard.name, list(shard.shape), dtype, group, shard.decayed]
