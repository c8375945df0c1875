"""What the benchmark counts, and what its rivals do, on real ranks."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mezo_scale.bench.counting import Collective, Traffic, summed
from mezo_scale.bench.rivals import RIVALS, AdamW, NaiveFSDP, Published
from tests.support import layouts, models
from tests.support.pool import Ranks


def known_collectives() -> list[Collective]:
    world = dist.get_world_size()
    pairs = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("across", "pair"))
    mine, everyone = torch.ones(6), torch.empty(6 * world)
    with Traffic() as traffic:
        dist.all_reduce(mine.double())
        dist.all_gather_into_tensor(everyone, mine)
        dist.all_gather(list(everyone.chunk(world)), mine)
        dist.reduce_scatter_tensor(mine, everyone)
        dist.broadcast(mine, src=0)
        dist.all_reduce(mine, group=pairs.get_group("pair"))
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    return traffic.collectives


def test_every_collective_is_counted_with_its_bytes_and_its_group(ranks: Ranks) -> None:
    for found in ranks(4, known_collectives):
        assert [(one.nbytes, one.ranks, "allgather" in one.op) for one in found] == [
            (6 * 8, 4, False),
            (4 * 6 * 4, 4, True),
            (4 * 6 * 4, 4, True),
            (4 * 6 * 4, 4, False),  # what a reduce-scatter reads
            (6 * 4, 4, False),
            (6 * 4, 2, False),
        ]
        assert {"op": found[0].op, "ranks": 4, "calls": 1, "bytes": 48} in summed(found)


def gathers_of(rival: str) -> tuple[int, int, int]:
    """Bytes gathered by a bare forward and by a step, and bytes reduce-scattered by the step."""
    sharded = layouts.shard("fsdp2", models.build("llama"))
    batch, objective = models.batch("llama", 2), models.objective("llama")
    method = RIVALS[rival](sharded.model)
    method.step(batch, objective)
    with Traffic() as bare, torch.no_grad():
        objective(sharded.model, batch)
    with Traffic() as step:
        method.step(batch, objective)
    gathered = [sum(one.nbytes for one in traffic.collectives if "allgather" in one.op) for traffic in (bare, step)]
    scattered = sum(one.nbytes for one in step.collectives if "reduce_scatter" in one.op)
    return gathered[0], gathered[1], scattered


def test_the_naive_rival_gathers_the_weights_twice(ranks: Ranks) -> None:
    for bare, step, scattered in ranks(2, gathers_of, rival="naive"):
        assert bare > 0
        assert (step, scattered) == (2 * bare, 0)


def test_adamw_reduces_as_many_bytes_of_gradients_as_a_forward_gathers(ranks: Ranks) -> None:
    for bare, step, scattered in ranks(2, gathers_of, rival="adamw"):
        assert scattered == bare
        assert step > bare


def losses_of_adamw() -> list[float]:
    sharded = layouts.shard("fsdp2", models.build("llama"))
    method = AdamW(sharded.model, lr=1e-2)
    return [method.step(models.batch("llama", 2), models.objective("llama")) for _ in range(8)]


def test_adamw_lowers_the_loss_and_all_ranks_see_the_same_one(ranks: Ranks) -> None:
    first, second = ranks(2, losses_of_adamw)
    assert first == second
    assert first[-1] < 0.7 * first[0]


def drift_of_naive(lr: float) -> list[float]:
    sharded = layouts.shard("fsdp2", models.build("llama"))
    before = sharded.gather()
    method = NaiveFSDP(sharded.model, lr=lr, eps=1e-2)
    method.step(models.batch("llama", 2), models.objective("llama"))
    return [float((after - before[name]).abs().max()) for name, after in sharded.gather().items()]


def test_the_naive_rival_moves_every_weight_by_its_update_alone(ranks: Ranks) -> None:
    assert max(ranks(2, drift_of_naive, lr=0.0)[0]) < 1e-6
    assert min(ranks(2, drift_of_naive, lr=1e-2)[0]) > 1e-5


def test_published_mezo_returns_to_where_it_began_within_rounding() -> None:
    model, batch, objective = models.build("llama"), models.batch("llama", 2), models.objective("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Published(model, lr=0.0, eps=1e-2).step(batch, objective)
    drift = max(float((after.detach() - before[name]).abs().max()) for name, after in model.named_parameters())
    assert 0 < drift < 1e-6


def test_published_mezo_takes_the_step_that_its_two_losses_ask_for() -> None:
    model, batch, objective = models.build("llama"), models.batch("llama", 2), models.objective("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    method = Published(model, lr=1e-2, eps=1e-3, seed=7)
    seen: list[float] = []

    def watched(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = objective(model, rows)
        seen.append(float(losses.double().mean()))
        return losses

    loss = method.step(batch, watched)
    assert loss == sum(seen) / 2
    seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(7)))
    torch.manual_seed(seed)
    slope = (seen[0] - seen[1]) / 2e-3
    for parameter, old in zip(model.parameters(), before, strict=True):
        z = torch.normal(0.0, 1.0, old.shape)
        assert torch.allclose(parameter.detach(), old - 1e-2 * slope * z, atol=1e-6)
