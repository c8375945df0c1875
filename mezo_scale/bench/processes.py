"""The ranks of one cell: processes of their own, so that one that runs out of memory, is killed or hangs ends a cell
and not the sweep, and no cell inherits another's memory.

Started alone, a sweep starts all of them on this machine. Under torchrun, deepspeed or srun each process there is
starts the one that has its rank; through the launch's store they agree on a port and hear of each other's failures.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mezo_scale.bench.cell import Cell
from mezo_scale.distributed.launcher import Launcher

_GRACE_S = 5.0  # for the other ranks, after one has failed
_POLL_S = 0.1
RANK_PROGRAM = ("-m", "mezo_scale.bench.measure")
_ENDED = "ended because another rank failed"
# What a launcher leaves for its own processes; a rank of a cell is told everything anew.
_INHERITED = ("TORCHELASTIC_", "ACCELERATE_", "PET_", "CROSS_")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: the figures of each rank, in order, or the reason why there are none."""

    figures: list[dict[str, Any]]
    reason: str = ""


class Ranks:
    """Runs cells, one after the other; under a launcher every process of it runs the same ones.

    Args:
        launcher: who started this process.
        store: the launch's; None for a process alone.
        folder: for the ranks' logs; those of failed ones stay.
        timeout_s: of a cell.
    """

    def __init__(self, launcher: Launcher, store: dist.Store | None, folder: Path, timeout_s: float) -> None:
        self._launcher, self._store, self._folder, self._timeout_s = launcher, store, folder, timeout_s
        self._count = 0

    def run(self, cell: Cell, rounds: int) -> Outcome:
        self._count += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        ranks = range(cell.world_size) if self._store is None else [self._launcher.rank]
        port = self._port()
        children = {rank: self._start(rank, port, cell, rounds) for rank in ranks}
        try:
            reason = self._watch(children)
            left = {rank: reason for rank, child in children.items() if child.process.poll() is None}
        finally:
            for child in children.values():
                child.process.kill()
                child.process.wait()
        answers = self._exchanged({rank: child.answer(left.get(rank)) for rank, child in children.items()}, cell)
        failures = {rank: answer["reason"] for rank, answer in answers.items() if "reason" in answer}
        for child in children.values():
            child.clear(keep_log=bool(failures))
        if failures:
            return Outcome([], _first(failures))
        return Outcome([answers[rank]["figures"] for rank in sorted(answers)])

    def _start(self, rank: int, port: int, cell: Cell, rounds: int) -> "_Child":
        environ = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
        host = self._launcher.rendezvous.rpartition(":")[0] if self._launcher.rendezvous else "127.0.0.1"
        alone = self._store is None
        environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(cell.world_size),
            "LOCAL_RANK": str(rank if alone else self._launcher.local_rank),
            "LOCAL_WORLD_SIZE": str(cell.world_size if alone else self._launcher.local_world_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        environ.setdefault("OMP_NUM_THREADS", "1")
        name = f"cell{self._count}-rank{rank}-{os.getpid()}"
        request, outcome, log = (self._folder / f"{name}.{kind}" for kind in ("request", "json", "log"))
        request.write_text(json.dumps({"cell": cell.as_dict(), "rounds": rounds}), encoding="utf-8")
        command = [sys.executable, *RANK_PROGRAM, str(request), str(outcome)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        return _Child(process, request, outcome, log)

    def _watch(self, children: dict[int, "_Child"]) -> str:
        """Returns when all have ended, or with the reason for ending those that have not: one failed, or it is time."""
        deadline, reason = time.monotonic() + self._timeout_s, f"took longer than {self._timeout_s:g} s"
        waiting = True
        while any(child.process.poll() is None for child in children.values()) and time.monotonic() < deadline:
            if waiting and self._any_failed(children):
                waiting, reason = False, _ENDED
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(_POLL_S)
        return reason

    def _any_failed(self, children: dict[int, "_Child"]) -> bool:
        """Of this process's ranks, or of the other processes'."""
        failed = any(child.process.poll() not in (None, 0) for child in children.values())
        if self._store is None:
            return failed
        key = f"bench/{self._count}/failed"
        if failed:
            self._store.set(key, "1")
        return bool(self._store.check([key]))

    def _exchanged(self, answers: dict[int, dict[str, Any]], cell: Cell) -> dict[int, dict[str, Any]]:
        """Every rank's answer, on all of them."""
        if self._store is None:
            return answers
        for rank, answer in answers.items():
            self._store.set(f"bench/{self._count}/answer/{rank}", json.dumps(answer))
        keys = [f"bench/{self._count}/answer/{rank}" for rank in range(cell.world_size)]
        return {rank: json.loads(self._store.get(key).decode()) for rank, key in enumerate(keys)}

    def _port(self) -> int:
        """A free port on the machine of rank 0."""
        key = f"bench/{self._count}/port"
        if self._store is None or self._launcher.rank == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = int(probe.getsockname()[1])
            if self._store is not None:
                self._store.set(key, str(port))
            return port
        return int(self._store.get(key).decode())


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    request: Path
    outcome: Path
    log: Path

    def answer(self, ended: str | None) -> dict[str, Any]:
        """What it wrote, or else what became of it; `ended` is why this program ended it, if it did."""
        if self.outcome.is_file():
            return dict(json.loads(self.outcome.read_text(encoding="utf-8")))
        if ended is not None:
            return {"reason": ended}
        code = self.process.returncode
        if code < 0:
            why = " (out of memory, if the kernel did it)" if -code == signal.SIGKILL else ""
            return {"reason": f"killed by {signal.Signals(-code).name}{why}"}
        return {"reason": f"ended with exit code {code}, see {self.log}"}

    def clear(self, *, keep_log: bool) -> None:
        for path in (self.request, self.outcome, *(() if keep_log else (self.log,))):
            path.unlink(missing_ok=True)


def _first(failures: dict[int, str]) -> str:
    """What the first rank says that failed of itself."""
    own = {rank: reason for rank, reason in failures.items() if reason != _ENDED}
    rank, reason = min((own or failures).items(), key=lambda one: (_is_consequence(one[1]), one[0]))
    return f"rank {rank}: {reason}" if len(failures) > 1 or rank else reason


def _is_consequence(reason: str) -> bool:
    """A collective that broke off because the other end is gone."""
    return any(word in reason for word in ("Connection closed", "Connection reset", "DistBackendError", "gloo"))
