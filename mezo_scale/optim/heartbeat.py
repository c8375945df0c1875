"""A step needs every rank. Where one can't come, the others say which and end, instead of waiting for hours.

Nothing in torch ends a rank's wait for another one's part of a weight but the end of a process. So a thread watches
over steps that take longer than a beat: it tells the other ranks over the process group's store that this one is still
in the step, and ends this process when a rank has said that it can't go on, or when the step has waited too long for
one.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist

from mezo_scale import collectives

BEAT_S = 2.0
_LAST_CALL_S = 10.0
SLOWEST = 10
"""A step may take this many times as long as the slowest one before it, whatever the timeout says."""

_KEY = "mezo-scale/heartbeat"  # one of a process, which is in one step at a time whatever its optimizers


@dataclass
class _Vigil:
    """What the thread knows of the step that the main thread is in."""

    store: dist.Store
    rank: int
    size: int
    timeout_s: float
    ended: threading.Event = field(default_factory=threading.Event)
    step: int = -1
    entered: float | None = None
    slowest_s: float = 0.0

    def watch(self) -> None:
        """Until `ended`: once per beat, look at a step that takes longer than one."""
        for count in itertools.count():
            if self.ended.wait(BEAT_S):
                return
            if (entered := self.entered) is None or time.monotonic() - entered < BEAT_S:
                continue
            with suppress(RuntimeError):  # the store went with its process: whoever waits for that one is told by torch
                reason = self.beat(count, time.monotonic() - entered)
                if reason and self.entered == entered:
                    _end(reason)

    def beat(self, count: int, inside_s: float) -> str:
        """Tell the others that this rank is in its step; why the step can't go on, or nothing."""
        step = self.step
        self.store.set(f"{_KEY}/{self.rank}", f"{step} {count} {socket.gethostname()}")
        if self.store.check([f"{_KEY}/failed"]):
            number, rank, why = self.store.get(f"{_KEY}/failed").decode(errors="replace").split("\n", 2)
            if int(number) == step:
                return f"rank {rank} failed in step {step} while this one waited for its part of the weights: {why}"
        if inside_s < max(self.timeout_s, SLOWEST * self.slowest_s):
            return ""
        missing, silent = self.absent(step)
        if missing:
            return f"step {step} has waited for {inside_s:.0f} s: {_named(missing)} did not enter it"
        if silent:
            return f"step {step} has waited for {inside_s:.0f} s: {_named(silent)} entered it and no longer answers"
        return ""  # all are in it and alive: slow, or an exchange that hangs, which the process group's timeout ends

    def absent(self, step: int) -> tuple[list[str], list[str]]:
        """The ranks that are not in the step, and those that are and gave no beat for some time."""
        before = self.beats()
        self.ended.wait(4 * BEAT_S)
        after = self.beats()
        missing, silent = [], []
        for rank in set(range(self.size)) - {self.rank}:
            number, _, host = (after[rank] or "-1 0 ").split(" ", 2)
            if int(number) != step:
                missing.append(f"{rank}{f' on {host}' if host else ''}")
            elif before[rank] == after[rank]:
                silent.append(f"{rank} on {host}")
        return missing, silent

    def beats(self) -> list[str]:
        """Each rank's last word, empty where there is none."""
        keys = [f"{_KEY}/{rank}" for rank in range(self.size)]
        return [self.store.get(key).decode() if self.store.check([key]) else "" for key in keys]


class Heartbeat:
    """Watches over the steps of one optimizer.

    Args:
        timeout_s: how long a step may wait for a rank; None: as long as the process group does.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = float("inf") if timeout_s is None else timeout_s
        self._vigil: _Vigil | None = None

    @contextmanager
    def inside(self, step: int) -> Iterator[None]:
        """The main thread is in a step."""
        vigil = self._begun()
        if vigil is None or vigil.entered is not None:
            yield
            return
        vigil.step, vigil.entered = step, time.monotonic()
        try:
            yield
        finally:
            vigil.slowest_s = max(vigil.slowest_s, time.monotonic() - vigil.entered)
            vigil.entered = None

    def give_up(self, step: int, error: BaseException) -> None:
        """Tell the ranks that wait in this step for this one that it will not come."""
        if self._vigil is not None:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            with suppress(RuntimeError):
                self._vigil.store.set(f"{_KEY}/failed", f"{step}\n{self._vigil.rank}\n{line}")

    def _begun(self) -> _Vigil | None:
        """The thread's knowledge; the thread starts with the first step that has other ranks in it."""
        if self._vigil is None and collectives.is_distributed():
            store = collectives.store()
            if store is not None:
                vigil = _Vigil(store, collectives.rank(), collectives.world_size(), self.timeout_s)
                thread = threading.Thread(target=vigil.watch, name="mezo heartbeat", daemon=True)
                weakref.finalize(self, _finish, vigil, thread)
                thread.start()
                self._vigil = vigil
        return self._vigil


def _finish(vigil: _Vigil, thread: threading.Thread) -> None:
    """Ends the thread, and waits for it: at the interpreter's end one that is in a call of the store would abort."""
    vigil.ended.set()
    if thread is not threading.current_thread():
        thread.join(_LAST_CALL_S)


def _end(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(2)


def _named(ranks: list[str]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{' and others' * (len(ranks) > 8)}"
