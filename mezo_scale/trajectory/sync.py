"""Group commit: what is written to a file comes to the disk in a thread of its own, all that is there in one fsync."""

from __future__ import annotations

import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

LONGEST_S = 1.0
"""A write that is older than this and not on the disk yet is waited for before the next one."""


class Mark(NamedTuple):
    """How far a file goes: its records, the steps among them, its bytes."""

    records: int
    steps: int
    end: int


class Syncer:
    """Syncs a file in a thread, for one writer, who waits only where it says so.

    - The thread begins with the first write, takes with each fsync all that was written before it, and ends with `end`.
    - A failed fsync is the last one: nobody knows then what the disk holds. Whoever waits is told, then and later.

    Attributes:
        synced: what is on the disk for certain.
        process: the one that the thread runs in; in a fork of it there is none.

    Args:
        file: stays open until `end` has returned.
        begun: how far it goes by now, all of which is on the disk.
        most: writes that may be on their way to the disk.
    """

    def __init__(self, file: io.FileIO, begun: Mark, most: int) -> None:
        self.synced, self.process = begun, os.getpid()
        self._file, self._most = file, most
        self._pending: deque[tuple[Mark, float]] = deque()  # and when it was written, in seconds
        self._changed = threading.Condition()
        self._ending = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def await_room(self) -> None:
        """Returns when one more write may follow. Raises what the fsync raised."""
        self._await(self._has_room)

    def await_all(self) -> None:
        """Returns when all that was written is on the disk. Raises what the fsync raised."""
        self._await(lambda: not self._pending)

    def wrote(self, mark: Mark) -> None:
        """The file goes up to here now."""
        with self._changed:
            self._pending.append((mark, time.monotonic()))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mezo log", daemon=True)
            self._thread.start()

    def end(self) -> Exception | None:
        """Syncs what is left and ends the thread. After a failed fsync the file is cut to what is on the disk for
        certain, and what the fsync raised is returned."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._error is not None:
            with suppress(OSError):
                self._file.truncate(self.synced.end)
        return self._error

    def _has_room(self) -> bool:
        waiting = self._pending
        return not waiting or (len(waiting) < self._most and time.monotonic() - waiting[0][1] <= LONGEST_S)

    def _await(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or done())
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._ending)
                count = len(self._pending)
            if not count:
                return
            error: Exception | None = None
            try:
                os.fsync(self._file.fileno())
            except Exception as failure:  # whatever it is: without a word the writer would wait for ever
                error = failure
            with self._changed:
                if error is None:
                    for _ in range(count):
                        self.synced, _ = self._pending.popleft()
                self._error = error
                self._changed.notify_all()
            if error is not None:
                return
