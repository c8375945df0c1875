"""Failpoints: moments of a run that have a name, at which a test ends the process, hangs it, or fails a write.

    MEZO_FAILPOINT=log.written:kill:3@0 python -m tools.failpoints train recipe.yaml

is `mezo-scale train recipe.yaml`, of which rank 0 is killed when it has written its third record and not yet
applied its step.
A setting is NAME:ACTION[:COUNT][@RANK]; actions are kill (SIGKILL to itself), hang, and the name of an errno, which is
raised as an OSError, as the system raises it.

The package knows nothing of this. A point is a function of the package or of the system that is wrapped before the run
begins (docs/decisions/0014-failpoints.md); one that no longer exists stops the program.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE, EVIDENCE = "MEZO_FAILPOINT", "MEZO_FAILPOINT_HIT"
HEADER, LOG, SNAPSHOT = r"trajectory\.mezo\.partial$", r"trajectory\.mezo$", r"snapshots/step-\d+"


@dataclass(frozen=True)
class Point:
    """One moment.

    Attributes:
        target: "module:attribute", the function around which it is.
        when: "before" the call, "after" it, or "half": when half of what it writes is written.
        path: only of calls with such a path among their arguments, or none.
    """

    target: str
    when: str
    path: str = ""


_TRAINER, _MEZO, _LOG, _LOCK = "runs.trainer:Trainer", "optim.mezo:MeZO", "trajectory.log:", "trajectory.lock:Lock"
_FILE = "trajectory.file:"
_WRITER, _SAVE, _SNAPSHOTS = "optim.update:Writer", "models.save:", "runs.snapshots:"
_PIECE = "models.stream:WeightFiles.write"

POINTS = {
    "run.begun": Point(f"{_TRAINER}.__init__", "before"),
    "weights.loading": Point("models:load", "before"),
    "weights.loaded": Point("models:load", "after"),
    "evaluation.begun": Point(f"{_TRAINER}._evaluate", "before"),
    "evaluation.ended": Point(f"{_TRAINER}._evaluate", "after"),
    "lock.taken": Point(f"{_LOCK}.__init__", "after"),
    "lock.released": Point(f"{_LOCK}.release", "after"),
    "header.writing": Point(f"{_FILE}write", "before", HEADER),
    "header.half_written": Point(f"{_FILE}write", "half", HEADER),
    "header.written": Point("os:fsync", "before", HEADER),
    "header.synced": Point("os:rename", "before", LOG),
    "header.renamed": Point("os:rename", "after", LOG),
    "log.ready": Point(f"{_FILE}LogFile._make_ready", "after"),
    "log.writing": Point(f"{_FILE}write", "before", LOG),
    "log.half_written": Point(f"{_FILE}write", "half", LOG),
    "log.written": Point(f"{_FILE}write", "after", LOG),
    "log.syncing": Point("os:fsync", "before", LOG),
    "log.synced": Point("os:fsync", "after", LOG),
    "log.closing": Point(f"{_LOG}Trajectory.close", "before"),
    "log.closed": Point(f"{_LOG}Trajectory.close", "after"),
    "step.begun": Point(f"{_MEZO}.step", "before"),
    "step.measured": Point(f"{_MEZO}._record", "before"),
    "step.recorded": Point(f"{_LOG}Trajectory.append", "after"),
    "step.half_applied": Point(f"{_WRITER}._write_", "after"),
    "step.applied": Point(f"{_WRITER}.apply_", "after"),
    "step.ended": Point(f"{_MEZO}.step", "after"),
    "ranks.comparing": Point(f"{_MEZO}.check_ranks", "before"),
    "ranks.compared": Point(f"{_MEZO}.check_ranks", "after"),
    "recipe.writing": Point("os:replace", "before", r"/recipe\.yaml$"),
    "recipe.written": Point("os:replace", "after", r"/recipe\.yaml$"),
    "environment.writing": Point("os:replace", "before", r"/environment\.json$"),
    "environment.written": Point("os:replace", "after", r"/environment\.json$"),
    "results.synced": Point("os:fsync", "before", r"/evaluation\.json\.partial$"),
    "results.writing": Point("os:replace", "before", r"/evaluation\.json$"),
    "results.written": Point("os:replace", "after", r"/evaluation\.json$"),
    "metrics.rewriting": Point("os:replace", "before", r"/metrics\.jsonl$"),
    "metrics.rewritten": Point("os:replace", "after", r"/metrics\.jsonl$"),
    "metrics.writing": Point("runs.metrics:Metrics.log", "before"),
    "metrics.half_written": Point("runs.metrics:Metrics.log", "half"),
    "metrics.written": Point("runs.metrics:Metrics.log", "after"),
    "metrics.closed": Point("runs.metrics:Metrics.close", "after"),
    "snapshot.begun": Point(f"{_SNAPSHOTS}write", "before"),
    "snapshot.half_written": Point(_PIECE, "after", rf"{SNAPSHOT}\.partial/"),
    "snapshot.sealed": Point("os:fsync", "before", rf"{SNAPSHOT}\.partial/"),
    "snapshot.renaming": Point("os:rename", "before", rf"{SNAPSHOT}$"),
    "snapshot.renamed": Point("os:rename", "after", rf"{SNAPSHOT}$"),
    "snapshot.pruning": Point(f"{_SNAPSHOTS}_prune", "before"),
    "snapshot.half_pruned": Point("os:replace", "after", rf"{SNAPSHOT}\.old$"),
    "snapshot.pruned": Point(f"{_SNAPSHOTS}_prune", "after"),
    "checkpoint.begun": Point(f"{_SAVE}_begin", "before", r"/checkpoint\.partial$"),
    "checkpoint.half_written": Point(_PIECE, "after", r"/checkpoint\.partial/"),
    "checkpoint.written": Point("os:fsync", "before", r"/checkpoint\.partial$"),
    "checkpoint.set_aside": Point("os:rename", "after", r"/checkpoint\.old$"),
    "checkpoint.renaming": Point("os:rename", "before", "/checkpoint$"),
    "checkpoint.renamed": Point("os:rename", "after", "/checkpoint$"),
    "plot.writing": Point("os:replace", "before", r"/loss_accuracy\.png$"),
    "report.begun": Point(f"{_TRAINER}._finish", "before"),
    "report.writing": Point("os:replace", "before", r"/report\.md$"),
    "report.written": Point("os:replace", "after", r"/report\.md$"),
    "resume.snapshot_read": Point(f"{_SNAPSHOTS}Snapshot.check", "after"),
    "resume.log_read": Point(f"{_LOG}Trajectory.open", "after"),
    "resume.replaying": Point("optim.opening:apply_all_", "before"),
    "resume.half_replayed": Point(f"{_WRITER}._write_", "after"),
    "resume.replayed": Point("optim.opening:apply_all_", "after"),
    "resume.torn_end_kept": Point("os:fsync", "before", r"trajectory\.mezo\.torn$"),
    "resume.torn_end_cut": Point(f"{_FILE}LogFile._make_ready", "after"),
}


def install(setting: str) -> None:
    """Arms one failpoint in this process, if its rank is the one. Raises ValueError, KeyError for a wrong setting."""
    found = re.fullmatch(r"([\w.]+):(\w+)(?::(\d+))?(?:@(\d+))?", setting)
    if found is None:
        raise ValueError(f"{VARIABLE} is {setting!r}, expected NAME:ACTION[:COUNT][@RANK]")
    name, action, count, rank = found.groups()
    point = POINTS[name]
    if rank is not None and rank != os.environ.get("RANK", "0"):
        return
    owner, attribute, original = _find(point.target)
    act = functools.partial(_act, action)
    wrapped = _wrapped(_plain(original), point, _Countdown(int(count or 1)), act)
    setattr(owner, attribute, classmethod(wrapped) if isinstance(original, classmethod) else wrapped)


class _Countdown:
    """True once: at the given call."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def _find(target: str) -> tuple[Any, str, Any]:
    module, _, attribute = target.partition(":")
    owner = importlib.import_module(module if module == "os" else f"mezo_scale.{module}")
    *classes, name = attribute.split(".")
    for one in classes:
        owner = getattr(owner, one)
    return owner, name, vars(owner)[name]


def _plain(original: Any) -> Callable[..., Any]:
    plain: Callable[..., Any] = original.__func__ if isinstance(original, classmethod) else original
    return plain


def _wrapped(original: Callable[..., Any], point: Point, is_it: _Countdown, act: Callable[[], None]) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not re.search(point.path, _path_of(args)) or not is_it():
            return original(*args, **kwargs)
        if point.when == "after":
            result = original(*args, **kwargs)
            act()
            return result
        if point.when == "half":
            _write_half(args)
        act()
        return original(*args, **kwargs)

    return call


def _path_of(args: tuple[Any, ...]) -> str:
    """The last path among a call's arguments: of two, the one that a rename leads to."""
    found = ""
    for value in args:
        value = value._files[0] if hasattr(value, "_files") else value
        value = getattr(value, "name", None) if hasattr(value, "write") else value
        if type(value) is int:
            with contextlib.suppress(OSError):  # not every number is a file
                value = os.readlink(f"/proc/self/fd/{value}")
        if isinstance(value, str | Path):
            found = os.fspath(value)
    return found


def _write_half(args: tuple[Any, ...]) -> None:
    """Of a record or header half of its bytes; of a line of metrics its beginning."""
    first = args[0]
    if isinstance(first, os.PathLike) or hasattr(first, "fileno"):
        first.write(args[1][: len(args[1]) // 2])
    elif first._file is not None:
        first._file.write(f'{{"step": {args[1]}, "lo')
        first._file.flush()


def _act(action: str) -> None:
    if evidence := os.environ.get(EVIDENCE):
        Path(evidence).touch()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while action == "hang":
        time.sleep(60)
    code = getattr(errno, action)
    raise OSError(code, os.strerror(code))


def main() -> None:
    from mezo_scale import cli

    if setting := os.environ.get(VARIABLE):
        install(setting)
    cli.main()


if __name__ == "__main__":
    main()
