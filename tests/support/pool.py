"""Warm gloo workers, so that a test on several ranks costs milliseconds instead of seconds.

    def world_sum(start: int) -> int: ...            # runs on every rank, within a process group of exactly that size

    def test_...(ranks: Ranks) -> None:
        assert ranks(3, world_sum, start=10) == [33, 33, 33]

- The function goes by reference (module and name), arguments and results by value.
- A world of each size is started when first asked for and kept; each has its own processes and process group.
- An exception on any rank raises RankFailed with the rank, its traceback and what the ranks printed.
- A world in which a call failed, or took longer than its timeout, is killed and started anew when next asked for. So is
  one that has answered many calls: each process group that it made keeps a thread that wakes at 100 Hz.
- `fresh=True` starts a world for this call alone: for functions that kill processes or spoil global state.
- Ranks take turns in two interpreters, so neighbours have other hash seeds; `first=1` gives each rank the other one.
"""

import contextlib
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Any, TypeVar

from tests.support.worker import Fork, Kill

T = TypeVar("T")

MAX_RANKS = 4
INTERPRETERS = 2  # each takes as much to begin as twenty tests
START_TIMEOUT_S = 240  # interpreters import torch, transformers and deepspeed on two cores
CALLS = 40  # that a world answers
GRACE_S = 3  # for the other ranks, after one has failed

ROOT = pathlib.Path(__file__).parents[2]

WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RankFailed(AssertionError):
    """A rank raised, died or hung. `rank` is the first that did, and `why` what it said, in a line."""

    def __init__(self, rank: int, why: str, message: str) -> None:
        super().__init__(message)
        self.rank, self.why = rank, why


class Nursery:
    """An interpreter, with a hash seed of its own, that forks workers."""

    def __init__(self) -> None:
        self.control, theirs = Pipe()
        hash_seed = str(random.SystemRandom().randrange(2**32))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker", str(theirs.fileno())],
            cwd=ROOT,
            env=os.environ | WORKER_ENVIRONMENT | {"PYTHONHASHSEED": hash_seed},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches pytest alone, which ends the workers
        )
        theirs.close()

    def ask(self, order: Fork | Kill, fd: int | None = None) -> int:
        self.control.send(order)
        if fd is not None:
            send_handle(self.control, fd, self.process.pid)
        if not self.control.poll(START_TIMEOUT_S):
            raise RuntimeError(f"no answer from the nursery in {START_TIMEOUT_S} s")
        answer: int = self.control.recv()
        return answer

    def close(self) -> None:
        self.control.close()  # it reads end-of-file, kills its workers and leaves
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Worker:
    rank: int
    nursery: Nursery
    calls: Connection
    pid: int
    log: pathlib.Path

    def printed(self, offset: int = 0) -> str:
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")[-4000:]

    def kill(self) -> str:
        """End the process and say how it ended."""
        self.calls.close()
        code = os.waitstatus_to_exitcode(self.nursery.ask(Kill(self.pid)))
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class World:
    """The workers of one process group."""

    def __init__(self, nurseries: list[Nursery], folder: pathlib.Path) -> None:
        self.workers = []
        self.left = CALLS
        for rank, nursery in enumerate(nurseries):
            ours, theirs = Pipe()
            log = folder / f"rank{rank}.log"
            pid = nursery.ask(Fork(rank, len(nurseries), str(folder / "store"), str(log)), theirs.fileno())
            theirs.close()
            self.workers.append(Worker(rank, nursery, ours, pid, log))

    def call(self, function: Callable[..., T], kwargs: dict[str, Any], timeout_s: float) -> list[T]:
        offsets = [worker.log.stat().st_size if worker.log.exists() else 0 for worker in self.workers]
        call = pickle.dumps((function, kwargs))
        for worker in self.workers:
            worker.calls.send_bytes(call)

        results: dict[int, T] = {}
        failures: dict[int, str] = {}
        waiting = {worker.calls: worker for worker in self.workers}
        deadline = time.monotonic() + timeout_s
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for calls in ready:
                assert isinstance(calls, Connection)
                rank = waiting.pop(calls).rank
                try:
                    succeeded, answer = pickle.loads(calls.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, answer = False, "the process died\n"
                if succeeded:
                    results[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if not failures and not waiting:
            return [results[worker.rank] for worker in self.workers]

        for worker in waiting.values():
            failures[worker.rank] = "no answer; its stack is below\n"
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGUSR1)
        time.sleep(0.2 if waiting else 0)
        report = [f"{function.__qualname__} failed on {len(failures)} of {len(self.workers)} ranks"]
        report += [f"--- rank {rank}: {message}" for rank, message in failures.items()]
        for worker, offset in zip(self.workers, offsets, strict=True):
            if printed := worker.printed(offset):
                report.append(f"--- rank {worker.rank} printed:\n{printed}")
        first = next(iter(failures))
        raise RankFailed(first, failures[first].strip().splitlines()[-1], "\n".join(report))

    def kill(self) -> list[str]:
        return [worker.kill() for worker in self.workers]


class Ranks:
    """Callable: `ranks(world_size, function, **kwargs)` -> the result of each rank, in order."""

    def __init__(self, max_ranks: int = MAX_RANKS) -> None:
        self._max_ranks = max_ranks
        self._nurseries: list[Nursery] = []
        self._worlds: dict[tuple[int, int], World] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mezo-ranks-")
        self._started = 0

    def __call__(
        self,
        world_size: int,
        function: Callable[..., T],
        *,
        timeout_s: float = 120,
        fresh: bool = False,
        first: int = 0,
        **kwargs: Any,
    ) -> list[T]:
        if not 1 <= world_size <= self._max_ranks:
            raise ValueError(f"world_size {world_size}: the pool has 1 to {self._max_ranks} ranks")
        if fresh:
            world = self._start(world_size, first)
            try:
                return world.call(function, kwargs, timeout_s)
            finally:
                world.kill()
        world = self._worlds.pop((world_size, first), None) or self._start(world_size, first)
        try:
            results = world.call(function, kwargs, timeout_s)
        except BaseException:
            world.kill()
            raise
        world.left -= 1
        if world.left:
            self._worlds[world_size, first] = world
        else:
            world.kill()
        return results

    def rest(self) -> None:
        """End the worlds; the interpreters stay, and begin others when asked."""
        while self._worlds:
            self._worlds.popitem()[1].kill()

    def close(self) -> None:
        for nursery in self._nurseries:
            nursery.close()
        self._nurseries.clear()
        self._worlds.clear()
        self._folder.cleanup()

    def _start(self, world_size: int, first: int) -> World:
        # Their imports take seconds and run side by side.
        count = min(INTERPRETERS, self._max_ranks)
        while len(self._nurseries) < count:
            self._nurseries.append(Nursery())
        self._started += 1
        folder = pathlib.Path(self._folder.name) / f"world{self._started}-of-{world_size}"
        folder.mkdir()
        hosts = [self._nurseries[(first + rank) % count] for rank in range(world_size)]
        return World(hosts, folder)
