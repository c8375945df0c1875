"""Whole parameters from what the ranks store: bit for bit, under every scheme, and never from ranks that lack some."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mezo_scale.errors import ShardingError
from mezo_scale.sharding.gather import Gather, stored
from tests.support import layouts, models
from tests.support.pool import Ranks


def different(layout: str, name: str, dtype: torch.dtype, frozen: bool) -> list[str]:
    """Names that are not gathered, or whose gathered values are not the plain model's; none on ranks other than 0."""
    plain = models.build(name, dtype=dtype)
    plain.register_buffer("mask", torch.tensor([True, False, True]))
    plain.register_buffer("count", torch.tensor(7))
    plain.register_buffer("unsaved", torch.zeros(3), persistent=False)
    model = models.build(name, dtype=dtype)
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("unsaved", torch.zeros(3), persistent=False)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not (frozen and number % 2))
    wanted = plain.state_dict()
    sharded = layouts.shard(layout, model)
    with torch.no_grad():
        models.objective(name)(sharded.model, models.batch(name, 2))  # leaves some schemes gathered
    shards, tied = stored(sharded.model)
    gather = Gather(shards)
    found = {shard.name: gather(index) for index, shard in enumerate(shards)}
    sharded.close()
    if torch.distributed.get_rank() > 0:
        return [key for key, value in found.items() if value is not None]
    found |= {alias: found[key] for alias, key in tied.items()}
    wrong = [key for key in wanted if key not in found] + [key for key in found if key not in wanted]
    return wrong + [key for key in wanted if key in found and not is_same(wanted[key], found[key])]


def is_same(wanted: torch.Tensor, found: torch.Tensor | None) -> bool:
    return found is not None and found.dtype == wanted.dtype and torch.equal(found, wanted)


CELLS = [
    *((layout, "llama-tied", size) for layout in ("fsdp2", "fsdp2-kept", "fsdp1", "zero3") for size in (1, 2, 3)),
    *((layout, "opt", 4) for layout in ("plain", "fsdp2", "fsdp1", "fsdp1-flat", "zero3", "hsdp")),
    *((layout, "llama", 2) for layout in ("fsdp1-flat", "fsdp2-offload", "zero3-persisted", "zero3-offload", "tp")),
    ("hsdp", "mixtral", 4),
    ("fsdp2-tp", "llama", 4),
    ("plain", "gpt2", 1),
]


@pytest.mark.parametrize(("layout", "name", "world_size"), CELLS)
def test_what_is_gathered_is_the_model(ranks: Ranks, layout: str, name: str, world_size: int) -> None:
    results = ranks(world_size, different, layout=layout, name=name, dtype=torch.float32, frozen=False)
    assert results == [[]] * world_size


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "fsdp1", "zero3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_sixteen_bits_and_frozen_weights_are_gathered_as_they_are(ranks: Ranks, layout: str, frozen: bool) -> None:
    results = ranks(2, different, layout=layout, name="gpt2", dtype=torch.bfloat16, frozen=frozen)
    assert results == [[]] * 2


def refusal() -> str:
    """What is said if rank 1 takes its part for a copy of rank 0's."""
    shards, _ = stored(layouts.shard("fsdp2", models.build("gpt2")).model)
    if torch.distributed.get_rank() == 1:
        shards[0] = replace(shards[0], replica=1)
    with pytest.raises(ShardingError) as caught:
        Gather(shards)
    return str(caught.value)


def test_a_parameter_of_which_a_part_is_missing_is_refused_on_every_rank(ranks: Ranks) -> None:
    said = ranks(2, refusal)
    assert said[0] == said[1]
    assert "the ranks have values for" in said[0]


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ShardingError, match="weight can't be gathered: the ranks have values for 0 of its 6 elements"):
        Gather(stored(model)[0])
