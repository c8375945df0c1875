"""A run opened at weights of a later step: only with the run's own log, and only with the weights that were saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mezo_scale as ms
from mezo_scale.errors import ShardingError, TrajectoryError
from mezo_scale.optim.replay import Start
from mezo_scale.sharding.fingerprint import fingerprint
from tests.support import models

BATCH, LOSS = models.batch("llama", 4), models.objective("llama")


def opened(model: nn.Module, log: Path, **options: Any) -> ms.MeZO:
    return ms.MeZO(model, lr=1e-3, eps=1e-2, trajectory=log, **options)


def take(opt: ms.MeZO, steps: int) -> None:
    for _ in range(steps):
        opt.step(batch=BATCH, objective=LOSS)


def saved(log: Path, rounding: str = "nearest") -> tuple[nn.Module, Start]:
    """A run of 5 steps in a log, and its weights after 3, with where that is."""
    model = models.build("llama", dtype=torch.bfloat16 if rounding == "master" else torch.float32)
    opt = opened(model, log, rounding=rounding)
    take(opt, 3)
    assert opt.trajectory is not None
    copy = models.build("llama", dtype=next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    low = opt.low_bits()
    bits = {shard.name.removesuffix(".low_bits"): shard.local.clone() for shard in low}
    start = Start(3, str(opt.trajectory.chain(3)), fingerprint([*ms.shards(model), *low]), bits)
    take(opt, 2)
    opt.trajectory.close()
    return copy, start


@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_only_the_steps_after_it_are_applied_and_the_bits_are_those_of_all_steps(tmp_path: Path, rounding: str) -> None:
    model, start = saved(tmp_path / "log", rounding)
    counted: list[tuple[int, int]] = []
    opt = opened(
        model,
        tmp_path / "log",
        rounding=rounding,
        start=start,
        progress=lambda done, total: counted.append((done, total)),
    )
    assert counted == [(2, 2)]
    whole = models.build("llama", dtype=next(model.parameters()).dtype)
    twin = opened(whole, tmp_path / "copy", rounding=rounding)
    take(twin, 5)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), whole.parameters(), strict=True))
        lows = zip(opt.low_bits(), twin.low_bits(), strict=True)
        assert all(torch.equal(one.local, other.local) for one, other in lows)
        take(opt, 1)
        take(twin, 1)
    assert opt.last_record == twin.last_record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0" * 16}, "the weights have digest .*, but those saved after step 3 had 0000000000000000"),
        ({"chain": "0" * 16}, "is not the log that the weights were saved with after step 3"),
        ({"step": 6}, "has 5 steps, but the weights were saved after 6"),
        ({"step": 2}, "is not the log that the weights were saved with after step 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_log_is_free_again(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model, start = saved(tmp_path / "log")
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(TrajectoryError, match=message):
        opened(model, tmp_path / "log", start=replace(start, **changes))
    assert (tmp_path / "log").read_bytes() == before
    opened(model, tmp_path / "log", start=start)


def test_other_weights_no_log_and_missing_low_bits_are_refused(tmp_path: Path) -> None:
    model, start = saved(tmp_path / "log", "master")
    with pytest.raises(ShardingError, match="start from the base model"):
        opened(model, tmp_path / "log", rounding="master", start=replace(start, low_bits={}))
    with pytest.raises(TrajectoryError, match="can't be read"):
        opened(model, tmp_path / "none", rounding="master", start=start)
    next(model.parameters()).data.view(torch.int16)[0, 0] ^= 1
    with pytest.raises(TrajectoryError, match="start from the base model"):
        opened(model, tmp_path / "log", rounding="master", start=start)
