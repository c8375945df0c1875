"""One log gives the same bits whoever replays it: one to four ranks, in every layout."""

import pathlib

import pytest
import torch
import torch.distributed as dist

import mezo_scale as ms
from tests.support import layouts, models
from tests.support.pool import Ranks

NAME, STEPS = "llama-tied", 5
CELLS = [
    *((layout, size) for layout in ("plain", "fsdp2", "zero3") for size in (1, 2, 3, 4)),
    *(("hsdp", size) for size in (2, 4)),
]


def replayed(log: str, layout: str) -> dict[str, torch.Tensor]:
    sharded = layouts.shard(layout, models.build(NAME))
    assert ms.replay(sharded.model, log) == STEPS
    weights = sharded.gather()
    sharded.close()
    return weights if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("log") / "t.mezo"
    model = models.build(NAME)
    objective = models.objective(NAME)
    optimizer = ms.MeZO(model, lr=1e-2, eps=1e-2, weight_decay=0.1, num_directions=2, trajectory=path)
    for step in range(STEPS):
        optimizer.step(batch=models.batch(NAME, 4, seed=step), objective=objective)
    torch.save(dict(model.named_parameters()), path.with_suffix(".pt"))
    return path


@pytest.mark.parametrize(("layout", "size"), CELLS)
def test_a_log_is_replayed_to_the_same_bits(ranks: Ranks, log: pathlib.Path, layout: str, size: int) -> None:
    live = torch.load(log.with_suffix(".pt"))
    found = ranks(size, replayed, log=str(log), layout=layout)[0]
    assert found.keys() == live.keys()
    assert [name for name, weight in found.items() if not torch.equal(weight, live[name])] == []
    plain = dict(models.build(NAME).named_parameters())
    assert not any(torch.equal(weight, plain[name]) for name, weight in live.items())
