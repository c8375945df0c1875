"""The log of a run at its beginning: a new one, or one whose steps a model takes up."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mezo_scale import collectives
from mezo_scale.errors import TrajectoryError
from mezo_scale.optim.replay import Progress, Start, apply_all_
from mezo_scale.optim.update import Writer
from mezo_scale.sharding.fingerprint import fingerprint
from mezo_scale.trajectory import Header, Trajectory


def take_up_(
    path: str | os.PathLike[str], header: Header, writer: Writer, progress: Progress | None, start: Start | None = None
) -> Trajectory:
    """The log of a run that is described by `header`: the one that is there, its steps applied, or a new one.

    Every rank calls it; rank 0 writes the file. If something fails, the file is free again.

    Raises:
        TrajectoryError: on every rank, if rank 0 can't have the file (it is damaged, another run's, or another process
            writes it), or the weights are not those of `start`.
    """
    if start is not None:
        writer.take_low_bits_(start.low_bits)
        found = fingerprint(writer.stored())
        if found != start.digest:
            raise TrajectoryError(
                f"the weights have digest {found}, but those saved after step {start.step} had {start.digest}: start "
                "from the base model"
            )
    trajectory = _taken_up(path, header, start)
    with ExitStack() as undo:
        undo.callback(trajectory.release)
        apply_all_(writer, trajectory, 0 if start is None else start.step, len(trajectory), progress)
        undo.pop_all()
    return trajectory


def _taken_up(path: str | os.PathLike[str], header: Header, start: Start | None) -> Trajectory:
    if not collectives.is_distributed():
        return _mine(path, header, start)
    kept: list[Trajectory] = []

    def begin() -> bytes:
        kept.append(_mine(path, header, start))
        return Path(path).read_bytes()

    data = collectives.from_first_rank(begin)
    if kept:
        return kept[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trajectory = Trajectory.parse(data, str(path))
    _check_same(trajectory, header, start, str(path))
    return trajectory


def _mine(path: str | os.PathLike[str], header: Header, start: Start | None) -> Trajectory:
    if not os.path.lexists(path) and start is None:
        return Trajectory.create(path, header)
    trajectory = Trajectory.open(path, append=True)
    try:
        _check_same(trajectory, header, start, str(path))
    except TrajectoryError:
        trajectory.release()
        raise
    return trajectory


def _check_same(trajectory: Trajectory, header: Header, start: Start | None, where: str) -> None:
    if start is not None:
        start.check_log(trajectory, where)
        header = replace(header, fingerprint=trajectory.header.fingerprint)  # the base weights are not here to be asked
    trajectory.header.check_same(header, where)
