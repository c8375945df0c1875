"""Runs that are killed at every point that has a name, and launchers that are killed before their ranks are."""

import pathlib
import signal
import time

import psutil
import pytest

from tests.support.launch import Launch, Running


def loading(running: Running, timeout_s: float = 60) -> list[psutil.Process]:
    """The two ranks, once both have begun to load torch; the command line is behind them then."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ranks = running.ranks()
        if len(ranks) == 2 and all(any("libtorch_cpu" in part.path for part in one.memory_maps()) for one in ranks):
            return ranks
        time.sleep(0.05)
    pytest.fail(f"no two ranks that load in:\n{running.output}")


def test_ranks_that_load_end_with_a_launcher_that_is_killed(
    launch: Launch, recipe_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "mezo_scale.cli", "train", recipe_file)
    running = launch.start(*command, "sharding.strategy=fsdp2")
    ranks = loading(running)
    running.send(signal.SIGKILL)
    running.wait(5)
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert not (tmp_path / "run" / "checkpoint").exists()
