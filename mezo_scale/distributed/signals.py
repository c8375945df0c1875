"""Being stopped by the scheduler: the step in flight ends, all ranks stop after the same one, and the job goes on.

A signal reaches the ranks at different moments, some perhaps not at all. The first rank that notices, at the end of
step s, announces through the store "stop after step s + 1". No rank can be further: step s + 1 ends in an all-reduce
that this one has not joined yet. So every rank reads the announcement at the end of step s + 1 at the latest, and none
waits for another.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_KEY = "stop-after"


class Interrupted(SystemExit):
    """Leaves the program with 128 + the signal's number, as shells count; the run goes on when it is started again."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Interruption:
    """Whether the run is to stop. A signal that comes twice, as it does through srun and torchrun, counts once."""

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store
        self._received = 0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        self._received = self._received or number

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
