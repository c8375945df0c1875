"""A sharding scheme that the package does not know: one adapter, and MeZO tunes and saves what it stores."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import ShardingError
from mezo_scale.sharding import schemes
from mezo_scale.sharding.adapter import Adapter, Stored
from mezo_scale.sharding.gather import Gather, stored
from mezo_scale.sharding.shard import run
from tests.support.pool import Ranks

LR, EPS, SEED = 1e-2, 1e-2, 3


class RowParameter(nn.Parameter):
    """A rank's rows of a weight, and while its module runs all of them."""

    rows: Tensor
    whole: torch.Size


class ByRows(Adapter):
    """The whole of what the scheme owes to the package."""

    movers = (__name__,)

    def owns(self, param: Tensor) -> bool:
        return isinstance(param, RowParameter)

    def stored(self, name: str, param: Any) -> Stored:
        before = sum(len(rows) for rows in torch.empty(param.whole).chunk(dist.get_world_size())[: dist.get_rank()])
        runs = run(0, before * param.whole[1], param.rows.numel())
        return Stored(tuple(param.whole), param.rows.view(-1), runs, replica=0)

    def storage(self, param: Any) -> Tensor:
        return param.rows


def split_(model: nn.Module) -> nn.Module:
    """The scheme itself: each rank keeps its rows of every Linear's weight, and gathers them for its forward pass."""
    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        weight = RowParameter(linear.weight.detach())
        weight.whole = weight.shape
        weight.rows = weight.data.chunk(dist.get_world_size())[dist.get_rank()].clone()
        weight.data = weight.rows
        linear.weight = weight
        linear.register_forward_pre_hook(gather_rows)
        linear.register_forward_hook(release_rows, always_call=True)
    return model


def gather_rows(linear: Any, args: Any) -> None:
    parts = [torch.empty_like(rows) for rows in torch.empty(linear.weight.whole).chunk(dist.get_world_size())]
    for source, part in enumerate(parts):
        part.copy_(linear.weight.rows) if source == dist.get_rank() else None
        dist.broadcast(part, source)
    linear.weight.data = torch.cat(parts)


def release_rows(linear: Any, args: Any, output: Any) -> None:
    linear.weight.data = linear.weight.rows


@contextmanager
def known(adapter: Adapter) -> Iterator[None]:
    before = schemes.ADAPTERS
    schemes.ADAPTERS = (adapter, *before)
    try:
        yield
    finally:
        schemes.ADAPTERS = before


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).eval()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def tune(model: nn.Module, trajectory: Path) -> list[float]:
    """Three steps, on the same rows on every rank. Returns the losses."""
    optimizer = ms.MeZO(model, lr=LR, eps=EPS, seed=SEED, num_directions=2, trajectory=trajectory)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "y": torch.tensor([0, 1, 2, 1])}
    return [optimizer.step(batch=batch, objective=loss) for _ in range(3)]


def tuned(folder: Path, split: bool) -> tuple[list[float], dict[str, list[float]], int]:
    """Losses, the gathered weights on rank 0, stored elements on this rank."""
    with known(ByRows()):
        model = split_(build()) if split else build()
        losses = tune(model, folder / f"{split}.mezo")
        shards, _ = stored(model)
        gather = Gather(shards)
        whole = {shard.name: gather(number) for number, shard in enumerate(shards)}
    weights = {name: value.flatten().tolist() for name, value in whole.items() if value is not None}
    return losses, weights, sum(shard.local_numel for shard in shards)


def test_a_scheme_is_one_adapter(ranks: Ranks, tmp_path: Path) -> None:
    split = ranks(2, tuned, folder=tmp_path, split=True)
    plain = ranks(2, tuned, folder=tmp_path, split=False)
    assert split[0][0] == split[1][0]
    assert split[0][0] == pytest.approx(plain[0][0], abs=1e-6)
    assert split[0][1].keys() == plain[0][1].keys()
    for name, weights in plain[0][1].items():
        assert split[0][1][name] == pytest.approx(weights, abs=1e-5)
        assert weights != pytest.approx(build().get_parameter(name).flatten().tolist(), abs=1e-5)
    assert split[0][1] != {}
    # 7 rows over 2 ranks are 4 and 3; 3 are 2 and 1. Biases and the normalisation are whole on both.
    assert [stored for _, _, stored in split] == [4 * 5 + 2 * 7 + 24, 3 * 5 + 1 * 7 + 24]


def unknown() -> str:
    with pytest.raises(ShardingError) as caught:
        ms.shards(split_(build()))
    return str(caught.value)


def test_without_its_adapter_it_is_refused(ranks: Ranks) -> None:
    for said in ranks(2, unknown):
        assert "RowParameter" in said
        assert "not known here" in said
