"""Steps along directions of low rank: unbiased, of one record in every layout, and of one kind for the whole run."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale import noise
from mezo_scale.errors import TrajectoryError
from mezo_scale.noise import Noise
from tests.support import layouts, models
from tests.support.pool import Ranks

NAME = "llama-tied"
NOISES = [Noise("low_rank"), Noise("low_rank", 4), Noise("low_rank", 1, "normal"), Noise("low_rank", 4, "normal")]
OPTIONS = {"lr": 1e-2, "eps": 1e-2, "seed": 3}


class Tiny(nn.Module):
    """Matrices and vectors on which a loss depends in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

    def losses(self, parameters: dict[str, Tensor]) -> Tensor:
        """Loss [directions] of parameters [directions, *shape]."""
        x = torch.linspace(-1, 1, 18).view(3, 6)
        h = torch.tanh(x @ parameters["one.weight"].mT + parameters["one.bias"][:, None])
        return (h @ parameters["two.weight"].mT + parameters["two.bias"][:, None]).square().mean((1, 2))


def directions(model: nn.Module, count: int, kind: Noise) -> dict[str, Tensor]:
    """z of every parameter under the seeds 0 .. count - 1: float32 [count, *shape]."""
    found = {name: torch.empty(count, *param.shape) for name, param in model.named_parameters()}
    for name, out in found.items():
        zero = torch.zeros(out.shape[1:])
        for start in range(0, count, 32):
            branches = [(seed, 1.0) for seed in range(start, start + 32)]
            noise.view(zero, noise.param_id(name), branches, out[start : start + 32], noise=kind)
    return found


@pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.name)
def test_the_mean_over_many_directions_is_the_gradient(kind: Noise) -> None:
    model, count, eps = Tiny(), 2**15, 1e-2
    parameters = {name: param.detach() for name, param in model.named_parameters()}
    z = directions(model, count, kind)
    plus, minus = (
        model.losses({name: param + sign * eps * z[name] for name, param in parameters.items()}) for sign in (1, -1)
    )
    slopes = (plus - minus) / (2 * eps)
    estimate = torch.cat([(slopes.view(-1, *[1] * (each.dim() - 1)) * each).mean(0).flatten() for each in z.values()])
    asked = {name: param[None].requires_grad_() for name, param in parameters.items()}
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(model.losses(asked).sum(), list(asked.values()))])
    assert float(estimate @ gradient / gradient.norm() ** 2) == pytest.approx(1, abs=0.03)
    # The mean of n directions of d numbers is off by |gradient| sqrt(d / n), a little more in normals of low rank.
    assert float((estimate - gradient).norm() / gradient.norm()) < 1.5 * math.sqrt(len(gradient) / count)


def trained(layout: str, log: pathlib.Path, kind: Noise, steps: int = 3) -> dict[str, Tensor]:
    """The weights after some steps, or after going on from the log."""
    sharded = layouts.shard(layout, models.build(NAME, dtype=torch.bfloat16))
    opt = ms.MeZO(sharded.model, **OPTIONS, distribution=kind, trajectory=log, num_directions=2, rounding="stochastic")
    rank = dist.get_rank() if dist.is_initialized() else 0
    while opt.step_count < steps:
        opt.step(batch=models.batch(NAME, 2, seed=10 * opt.step_count + rank), objective=models.objective(NAME))
    assert opt.paired is not False
    weights = sharded.gather()
    sharded.close()
    return weights


def replayed(layout: str, log: pathlib.Path) -> dict[str, Tensor]:
    sharded = layouts.shard(layout, models.build(NAME, dtype=torch.bfloat16))
    ms.replay(sharded.model, log)
    weights = sharded.gather()
    sharded.close()
    return weights


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", [NOISES[0], NOISES[3]], ids=lambda kind: kind.name)
def test_a_sharded_run_is_replayed_bit_by_bit_in_every_layout(
    ranks: Ranks, tmp_path: pathlib.Path, layout: str, kind: Noise
) -> None:
    log = tmp_path / "t.mezo"
    live = ranks(2, trained, layout=layout, log=log, kind=kind)[0]
    base = dict(models.build(NAME, dtype=torch.bfloat16).named_parameters())
    assert not any(torch.equal(live[name], base[name]) for name in live)
    for found in (replayed("plain", log), *ranks(2, replayed, layout="fsdp2", log=log)):
        assert [name for name in live if not torch.equal(found[name], live[name])] == []
    for found in ranks(2, replayed, layout="zero3", log=log):
        assert [name for name in live if not torch.equal(found[name], live[name])] == []


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
def test_a_continued_run_is_the_run(ranks: Ranks, tmp_path: pathlib.Path, layout: str) -> None:
    whole, halves = ({"layout": layout, "log": tmp_path / name, "kind": NOISES[1]} for name in ("whole", "halves"))
    expected = ranks(2, trained, **whole, steps=4)[0]
    ranks(2, trained, **halves, steps=2)
    for found in ranks(2, trained, **halves, steps=4):
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_layouts_record_the_same_slopes(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    slopes = []
    for layout in ("plain", "fsdp2", "zero3"):
        ranks(2, trained, layout=layout, log=tmp_path / layout, kind=NOISES[0], steps=1)
        slopes.append(ms.Trajectory.open(tmp_path / layout)[0].projected_grads)
    assert np.allclose(slopes[1:], slopes[0], rtol=1e-2)


def test_a_trajectory_says_which_noise_it_has(tmp_path: pathlib.Path) -> None:
    trained("plain", tmp_path / "low", NOISES[3])
    trained("plain", tmp_path / "dense", Noise("rademacher"))
    low, dense = (ms.Trajectory.open(tmp_path / name).header for name in ("low", "dense"))
    assert (low.noise_version, low.distribution) == (2, "low_rank of rank 4 in normal")
    assert (dense.noise_version, dense.distribution) == (1, "rademacher")


@pytest.mark.parametrize(
    "other", [Noise("low_rank", 2), Noise("low_rank", 1, "normal"), Noise("rademacher"), Noise()], ids=lambda k: k.name
)
def test_a_run_goes_on_with_its_own_noise_only(tmp_path: pathlib.Path, other: Noise) -> None:
    one = NOISES[0]
    for first, second in ((one, other), (other, one)):
        log = tmp_path / first.name
        trained("plain", log, first)
        before = log.read_bytes()
        with pytest.raises(TrajectoryError, match=f"distribution = {first.name}, this run has {second.name}"):
            trained("plain", log, second)
        assert log.read_bytes() == before


def test_a_trajectory_of_a_noise_that_is_not_known_is_refused_in_a_line(tmp_path: pathlib.Path) -> None:
    header = ms.MeZO(models.build(NAME), trajectory=tmp_path / "t.mezo").trajectory.header
    kept = ms.Trajectory.open(tmp_path / "t.mezo")
    object.__setattr__(kept.header, "distribution", "sparse")
    with pytest.raises(TrajectoryError, match="distribution is 'sparse'.*use the mezo-scale release that wrote it"):
        ms.replay(models.build(NAME), kept)
    assert header.distribution == "normal"
