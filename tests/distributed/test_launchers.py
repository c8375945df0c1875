"""The launch lane itself: real launchers start real ranks, and none of them outlives its test."""

import pathlib
import signal

import psutil
import pytest

from tests.support.launch import Launch

START = {
    "torchrun": ("torchrun", "--nproc-per-node", "2"),
    "deepspeed": ("deepspeed", "--num_accelerators", "2", "--no_local_rank"),
}
PROGRAM = """
import datetime, os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, dist.get_rank())
sys.stdout.write(f"saw {sum(seen)}\\n")
sys.stdout.flush()
time.sleep(float(sys.argv[1]))
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("launcher", START)
def test_a_launcher_s_ranks_meet(launch: Launch, program: pathlib.Path, launcher: str) -> None:
    finished = launch(*START[launcher], program, "0")
    assert finished.code == 0, finished.output
    assert finished.output.count("saw 1") == 2


def test_no_rank_outlives_its_launcher_s_death(tmp_path: pathlib.Path, program: pathlib.Path) -> None:
    launch = Launch(tmp_path)
    running = launch.start("torchrun", "--nproc-per-node", "2", program, "1000")
    running.await_output("saw 1")
    ranks = running.ranks()
    assert len(ranks) == 2
    running.send(signal.SIGKILL)
    launch.close()
    assert not psutil.wait_procs(ranks, timeout=5)[1]
