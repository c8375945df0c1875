"""Being stopped by a person or a scheduler: the step in flight ends, all ranks stop after the same one.

A signal reaches the ranks at different moments, some perhaps not at all. The first rank that notices, at the end of
step s, announces through the store "stop after step s + 1". No rank can be further: step s + 1 ends in an all-reduce
that this one has not joined yet. So every rank reads the announcement at the end of step s + 1 at the latest, and none
waits for another.

Outside of the steps there is nothing that would have to end: there, and at a second signal, the process ends at once.
It loses nothing but the step in flight, for all others are written in the log.

A launcher that is killed passes nothing on. Its ranks end with it: the system kills them (`end_with_parent`), for a
rank that waits inside of a library for another one, or for the launcher's store, runs no handler.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # seconds to import
    import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
ECHO_S = 1.0  # a launcher passes on what the terminal or srun sends to its ranks as well: that is no second signal
_KEY = "stop-after"
_PR_SET_PDEATHSIG = 1


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """The signal handler outside of the steps: the process ends with 128 + `number`, rank 0 with a line before."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        said = f"stopped at once by {name}: what is in the log is written, and the same command goes on after it\n"
        os.write(2, said.encode())
    os._exit(128 + number)


def end_at_once_when_signalled() -> None:
    """From now on, until `watch` and after it."""
    for number in SIGNALS:
        signal.signal(number, end_at_once)


def end_with_parent() -> None:
    """From now on the system kills this process when the one that started it ends, on Linux."""
    with suppress(AttributeError):  # other systems have no prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Interrupted(SystemExit):
    """Leaves the program with 128 + the signal's number, as shells count; the run goes on when it is started again."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Interruption:
    """Whether the run is to stop. A signal that comes twice within ECHO_S counts once."""

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store
        self._received = 0
        self._since_s = 0.0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler in the steps, and on the way out."""
        if not self._received:
            self._received, self._since_s = number, time.monotonic()
        elif time.monotonic() - self._since_s > ECHO_S:
            end_at_once(number)

    def after(self, step: int) -> int:
        """The number of the signal to stop for now that `step` steps are done, or 0. Every rank calls it after each."""
        if self._store is None:
            return self._received
        if not self._store.check([_KEY]):
            if not self._received:
                return 0
            self._store.compare_set(_KEY, "", f"{step + 1} {self._received}")
        last, number = self._store.get(_KEY).decode().split()
        return int(number) if step >= int(last) else 0


@contextmanager
def watch(store: dist.Store | None) -> Iterator[Interruption]:
    """Takes the signals over for the time of the training loop."""
    interruption = Interruption(store)
    before = {number: signal.signal(number, interruption.receive) for number in SIGNALS}
    stopped = False
    try:
        yield interruption
    except Interrupted:
        stopped = True  # on the way out: the second signal of a pair must not kill
        raise
    finally:
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)
