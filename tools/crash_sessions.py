"""Sessions of a run as a user starts them, which end by themselves, or are killed from outside or at a failpoint.

All processes are forked from this one, which has imported everything: so a session of one process costs a second, and
one of two ranks, under torchrun's agent, three.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.pool import ROOT, WORKER_ENVIRONMENT
from tools.failpoints import EVIDENCE, VARIABLE

LIMIT_S = 180
SETTINGS = [
    "train.steps=6",
    "train.eval_every=3",
    "train.snapshot_every=2",
    "train.keep_snapshots=1",
    "train.check_every=3",
    "optimizer.schedule=constant",
]


class Sessions:
    """Starts the command line and sees how it ends: (code, output); code None if it was ended after its limit."""

    def __init__(self, work: Path) -> None:
        self.work, self.number, self.warm = work, 0, False
        made = [sys.executable, "-m", "tests.support.workload", str(work)]
        said = subprocess.run(
            made, cwd=ROOT, env=os.environ | WORKER_ENVIRONMENT, check=True, capture_output=True, text=True
        ).stdout
        self.recipe = said.strip()

    def __call__(self, layout: str, run: Path, *, failpoint: str = "", steps: str = "", **ending: Any) -> Any:
        self.number += 1
        log = self.work / f"session{self.number}.log"
        arguments = ["train", self.recipe, f"output.dir={run}", f"sharding.strategy={layout}", *SETTINGS, steps]
        arguments = [argument for argument in arguments if argument]
        environment = {VARIABLE: failpoint, EVIDENCE: str(run) + ".hit"}
        process = self._forked(layout, arguments, log, environment)
        try:
            code = _ended(process, log, **ending)
        finally:  # a campaign that is stopped leaves nothing behind: ranks end with their launcher
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return code, log.read_text(errors="replace")

    def _forked(self, layout: str, arguments: list[str], log: Path, environment: dict[str, str]) -> psutil.Process:
        if not self.warm:
            _import_everything()
            self.warm = True
        if pid := os.fork():
            return psutil.Process(pid)
        code = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ |= WORKER_ENVIRONMENT | environment
            sys.argv = ["mezo-scale", *arguments]
            code = _main() if layout == "single" else _with_agent(str(log))
        finally:
            os._exit(code)


def _with_agent(log: str) -> int:
    """Two ranks under torchrun's agent, as `torchrun --standalone --nproc-per-node 2` starts them, but forked."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
    )
    try:
        elastic_launch(config, _rank)(log)
    except ChildFailedError:
        return 1
    return 0


def _rank(log: str) -> None:
    Path(f"{log}.rank{os.environ['RANK']}").write_text(str(os.getpid()))
    if code := _main():
        sys.stderr.flush()
        os._exit(code)


def _import_everything() -> None:
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import mezo_scale.cli
    import mezo_scale.runs.session  # noqa: F401
    from tools import compile_kernels

    compile_kernels.main()
    gc.collect()
    gc.freeze()  # a run collects between its phases: of what was imported a fork would have to copy every page


def _main() -> int:
    import traceback

    from tools import failpoints

    try:
        failpoints.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def _ended(
    process: psutil.Process, log: Path, *, after_s: float | None = None, who: str = "0", limit_s: float = LIMIT_S
) -> Any:
    """The exit code. A process is killed after `after_s` seconds; after `limit_s` the launcher, whose ranks then go."""
    began = time.monotonic()
    if after_s is not None:
        with contextlib.suppress(psutil.TimeoutExpired):
            return process.wait(after_s)
        for one in _chosen(process, log, who):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    family = _family(process)
    try:
        code = process.wait(max(1.0, limit_s - (time.monotonic() - began)))
    except psutil.TimeoutExpired:
        family, code = _family(process), None
        process.kill()
        process.wait()
    if left := psutil.wait_procs(family, timeout=30)[1]:
        for one in left:
            one.kill()
        raise RuntimeError(f"{len(left)} ranks outlived their launcher by 30 s")
    return code


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def _chosen(process: psutil.Process, log: Path, who: str) -> list[psutil.Process]:
    family = _family(process)
    if who == "launcher" or not family:
        return [process]
    if who == "all":
        return [process, *family]
    path = Path(f"{log}.rank{who}")
    return [one for one in family if path.exists() and path.read_text() == str(one.pid)] or [process]
