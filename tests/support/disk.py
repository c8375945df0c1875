"""A disk that takes a log's steps only when somebody waits for them: later than any other file of the run."""

import math
import os
import threading
from collections.abc import Callable

import pytest

from mezo_scale.trajectory import Trajectory, sync


class LazyDisk:
    """os.fsync in the log's thread returns once `sync` or `release` of a log is waiting for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._waited_for, self._fsync = threading.Event(), os.fsync
        patch.setattr(sync, "LONGEST_S", math.inf)
        patch.setattr(os, "fsync", self.fsync)
        for name in ("sync", "release"):
            patch.setattr(Trajectory, name, self._waiting(getattr(Trajectory, name)))

    def fsync(self, number: int) -> None:
        if threading.current_thread().name == "mezo log":
            assert self._waited_for.wait(60)
        self._fsync(number)

    def _waiting(self, original: Callable[[Trajectory], None]) -> Callable[[Trajectory], None]:
        def wait(log: Trajectory) -> None:
            self._waited_for.set()
            original(log)
            self._waited_for.clear()

        return wait
