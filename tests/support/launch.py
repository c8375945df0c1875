"""Real launchers as subprocesses: started, awaited with a limit, and never outlived by a rank of theirs."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BIN = pathlib.Path(sys.executable).parent
MARK = "MEZO_TEST_LAUNCH"

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Finished:
    """How a launch ended: its exit code, and what it and its ranks printed."""

    code: int
    output: str


@dataclass
class Running:
    """A launch under way."""

    process: subprocess.Popen[bytes]
    log: pathlib.Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def await_output(self, text: str, timeout_s: float = 120) -> None:
        """Return once the launch has printed `text`; fail if it ends or takes longer without."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no {text!r} in:\n{self.output[-4000:]}")
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in the order of RANK."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (rank := process.environ().get("RANK")) is not None:
                    found.setdefault(int(rank), process)
        return [found[rank] for rank in sorted(found)]

    def send(self, number: signal.Signals) -> None:
        """A signal to the launcher, as a terminal or a scheduler sends it."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 180) -> Finished:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s:\n{self.output[-4000:]}")
        return Finished(code, self.output)


@dataclass
class Launch:
    """Starts commands of the environment that runs the tests, from the repository's root."""

    folder: pathlib.Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[Running] = field(default_factory=list)

    def start(self, *command: str | pathlib.Path, env: dict[str, str] | None = None) -> Running:
        log = self.folder / f"launch{len(self.started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | {MARK: self.mark} | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Running(process, log))
        return self.started[-1]

    def __call__(
        self, *command: str | pathlib.Path, timeout_s: float = 180, env: dict[str, str] | None = None
    ) -> Finished:
        return self.start(*command, env=env).wait(timeout_s)

    def close(self) -> None:
        """End what is left, ranks whose launcher is gone included: all carry this launch's mark."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()
        for running in self.started:
            running.process.wait()


@pytest.fixture
def launch(tmp_path: pathlib.Path) -> Iterator[Launch]:
    """Runs real commands: `launch("torchrun", "--nproc-per-node", "2", ...)` -> Finished; `launch.start` -> Running."""
    launch = Launch(tmp_path)
    yield launch
    launch.close()
