"""Rank 0 writes the log; what keeps it from that, all ranks are told."""

import os
import pathlib

import torch.distributed as dist

import mezo_scale as ms
from mezo_scale.errors import MezoError
from tests.support import models
from tests.support.pool import Ranks


def two_writers(path: pathlib.Path) -> tuple[int, str, int]:
    opt = ms.MeZO(models.build("llama"), eps=1e-2, trajectory=path)
    opt.step(batch=models.batch("llama", 2), objective=models.objective("llama"))
    try:
        ms.MeZO(models.build("llama"), eps=1e-2, trajectory=path)
    except MezoError as error:
        said = str(error)
    assert opt.trajectory is not None
    opt.trajectory.close()
    return os.getpid() if dist.get_rank() == 0 else 0, said, len(opt.trajectory)


def test_all_ranks_are_told_that_another_writes_the_log(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    (pid, first, steps), (_, second, others) = ranks(2, two_writers, path=tmp_path / "t.mezo")
    assert f"is being written by process {pid} on " in first
    assert second == first
    assert steps == others == len(ms.Trajectory.open(tmp_path / "t.mezo")) == 1
