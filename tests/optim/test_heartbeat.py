"""A rank that others wait for in the middle of a forward, or before a step: they name it and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import mezo_scale as ms
from mezo_scale.optim import heartbeat, mezo
from tests.support.launch import ROOT, Launch
from tests.support.pool import Ranks


def main(where: str) -> None:
    """What each rank of a launch runs: rank 1 fails in step 1, at `where`, and its user catches that and goes on."""
    dist.init_process_group("gloo")
    heartbeat.BEAT_S = 0.2
    mezo.PATIENCE_S = 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    opt = ms.MeZO(model, lr=1e-3, hang_timeout=6.0, paired=True)
    batch = {"x": torch.ones(2, 4)}

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"])[:, 0]

    opt.step(batch=batch, objective=objective)
    if dist.get_rank() == 1:
        if where == "absent":
            time.sleep(200)
        if where == "stopped":
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGSTOP)).start()
            model[1].register_forward_pre_hook(lambda *_: time.sleep(200))

        def fails(*_: object) -> None:
            raise KeyError("on purpose")

        model[1].register_forward_pre_hook(fails)
        try:
            opt.measure(batch=batch, objective=objective) if where == "measure" else opt.step(
                batch=batch, objective=objective
            )
        except KeyError:
            time.sleep(200)
    opt.step(batch=batch, objective=objective)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("step", "error: rank 1 failed in step 1 while this one waited for its part of the weights: KeyError"),
        ("measure", "error: rank 1 failed in step 1 while this one waited for its part of the weights: KeyError"),
        ("absent", " s: rank 1"),
        ("stopped", "entered it and no longer answers"),
    ],
)
def test_ranks_that_wait_for_one_that_will_not_come_end_and_name_it(launch: Launch, where: str, line: str) -> None:
    start = time.monotonic()
    running = launch.start("torchrun", "--nproc-per-node", "2", "-m", "tests.optim.test_heartbeat", where)
    running.await_output(line, timeout_s=100)
    assert time.monotonic() - start < 100
    if where == "stopped":
        for process in running.ranks():
            process.kill()
    assert running.wait(60).code != 0


def quick_steps(count: int) -> tuple[int, list[str]]:
    """Steps that are all shorter than a beat: what they left in the store, and the threads that watched."""
    heartbeat.BEAT_S = 300.0  # on any machine
    model = nn.Linear(4, 1)
    opt = ms.MeZO(model, lr=1e-3)
    for _ in range(count):
        opt.step(batch={"x": torch.ones(2, 4)}, objective=lambda model, batch: model(batch["x"])[:, 0])
    vigil = opt._heartbeat._vigil
    assert vigil is not None
    names = [thread.name for thread in threading.enumerate()]
    said = len([word for word in vigil.beats() if word])
    vigil.ended.set()
    return said, names


def test_a_step_shorter_than_a_beat_says_nothing_to_anybody(ranks: Ranks) -> None:
    for said, names in ranks(2, quick_steps, count=3, fresh=True):
        assert said == 0
        assert "mezo heartbeat" in names


if __name__ == "__main__":
    main(sys.argv[1])


LEAVES_IN_A_BEAT = """
import datetime
import time
import torch.distributed as dist
from mezo_scale import collectives
from mezo_scale.optim import heartbeat


class Slow:
    def __init__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, 1, True)

    def set(self, *_):
        self.store.wait(["never"], datetime.timedelta(seconds=1))


heartbeat.BEAT_S = 1e-3
store = Slow()
collectives.is_distributed, collectives.store = lambda: True, lambda: store
collectives.rank, collectives.world_size = lambda: 0, lambda: 2
beats = heartbeat.Heartbeat(600.0)
beats._begun().entered = time.monotonic()
time.sleep(0.3)
"""


def test_a_process_may_end_while_its_thread_is_in_a_call_of_the_store() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES_IN_A_BEAT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
