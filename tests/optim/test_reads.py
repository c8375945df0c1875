"""What nothing reads is neither perturbed nor updated, whatever the layout, and a replay knows it."""

from __future__ import annotations

import pathlib
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import mezo_scale as ms
from mezo_scale.errors import ViewError
from mezo_scale.trajectory import Trajectory
from tests.support.pool import Ranks


class Experts(nn.Module):
    """Each row goes to the expert that its first feature names; one more layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(4))
        self.spare = nn.Linear(4, 4)
        self.forgotten = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.experts[int(row[0])](row[None]) for row in x]
        return (torch.cat(rows) * self.scale).square().mean(1)


def rows(*experts: int) -> dict[str, Tensor]:
    x = torch.randn(len(experts), 4, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.tensor(experts, dtype=torch.float32)
    return {"x": x}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"])


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["batch", "closure"])
def test_a_step_writes_what_was_read_and_names_the_rest_once(how: str, tmp_path: pathlib.Path) -> None:
    model = Experts()
    base, log = snapshot(model), tmp_path / "run.mezo"
    opt = ms.MeZO(model, lr=1e-2, weight_decay=0.1, trajectory=log, paired=False)

    def step(*experts: int) -> None:
        batch = rows(*experts)
        if how == "batch":
            opt.step(batch=batch, objective=loss)
        else:
            opt.step(lambda: loss(model, batch))

    with pytest.warns(UserWarning, match=r"read by nothing in this step .*experts\.1\.weight"):
        step(0, 0)
    first = {"experts.0.weight", "experts.0.bias", "scale"}
    assert changed(model, base) == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(2, 0)
    second = first | {"experts.2.weight", "experts.2.bias"}
    assert changed(model, base) == second
    before = snapshot(model)
    step(0, 0)  # an expert that was read once is part of the run, as in any SPSA
    assert changed(model, before) == second

    again = Experts()
    ms.replay(again, log)
    assert changed(again, model.state_dict()) == set()
    names = [shard.name for shard in ms.shards(model)]
    left = [{names[number] for number in record.unread} for record in Trajectory.open(log)]
    assert left == [set(names) - first, set(names) - second, set(names) - second]

    opt.trajectory.close()  # type: ignore[union-attr]
    opt.trajectory = None
    resumed = Experts()
    other = ms.MeZO(resumed, lr=1e-2, weight_decay=0.1, trajectory=log, paired=False)
    opt.step(lambda: loss(model, rows(0)))
    with pytest.warns(UserWarning, match="read by nothing"):  # said once by each optimizer
        other.step(lambda: loss(resumed, rows(0)))
    assert other.last_record == opt.last_record


def test_a_loaded_state_knows_what_was_read() -> None:
    model = Experts()
    opt = ms.MeZO(model, lr=1e-2, paired=False)
    with pytest.warns(UserWarning, match="read by nothing"):
        opt.step(batch=rows(0, 1, 2), objective=loss)
    weights, state = snapshot(model), opt.state_dict()
    opt.step(batch=rows(0), objective=loss)
    other = Experts()
    other.load_state_dict(weights)
    resumed = ms.MeZO(other, lr=1e-2, paired=False)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="read by nothing"):
        resumed.step(batch=rows(0), objective=loss)
    assert resumed.last_record == opt.last_record
    assert changed(other, model.state_dict()) == set()


def test_losses_of_another_model_are_refused(tmp_path: pathlib.Path) -> None:
    model, other = Experts(), Experts()
    before = snapshot(model)
    opt = ms.MeZO(model, trajectory=tmp_path / "run.mezo")
    with pytest.raises(ViewError, match="without reading any of the model's trainable parameters"):
        opt.step(lambda: loss(other, rows(0, 1)))
    assert changed(model, before) == set()
    assert len(Trajectory.open(tmp_path / "run.mezo")) == 0


def one_expert_each(folder: pathlib.Path) -> tuple[set[str], tuple[int, ...], float]:
    rank = torch.distributed.get_rank()
    model = Experts()
    before = snapshot(model)
    opt = ms.MeZO(model, lr=1e-2, paired=False, trajectory=folder / "run.mezo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(batch=rows(rank, rank), objective=loss)
        opt.step(batch=rows(0), objective=loss)
    assert opt.last_record is not None
    return changed(model, before), opt.last_record.unread, float(model.experts[1].weight.detach().sum())


def test_what_one_rank_reads_all_ranks_update(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    one, two = ranks(2, one_expert_each, folder=tmp_path)
    assert one == two
    assert one[0] == {f"experts.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")} | {"scale"}


def sharded() -> set[str]:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).square().mean(1)

    model = Half()
    fully_shard(model)
    before = {name: param.full_tensor().clone() for name, param in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ms.MeZO(model, lr=1e-2).step(batch={"x": torch.randn(3, 4)}, objective=lambda m, b: m(b["x"]))
    return {name for name, param in model.named_parameters() if not torch.equal(param.full_tensor(), before[name])}


def test_a_sharded_weight_that_nothing_reads_stays(ranks: Ranks) -> None:
    assert ranks(2, sharded) == [{"used.weight", "used.bias"}] * 2
