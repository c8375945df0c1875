"""The test layouts themselves: sharding and gathering a model gives it back, and it still computes the same."""

import pytest
import torch

from tests.support import layouts, models
from tests.support.pool import Ranks


def there_and_back(layout: str, name: str) -> tuple[bool, float]:
    """Whether gathering gives the plain weights bit for bit, and the losses' largest relative difference."""
    reference = models.build(name)
    sharded = layouts.shard(layout, models.build(name))
    batch, objective = models.batch(name, 3), models.objective(name)
    with torch.no_grad():
        expected, found = objective(reference, batch), objective(sharded.model, batch)
    whole = sharded.gather()
    sharded.close()
    plain = dict(reference.named_parameters())
    same = list(whole) == list(plain) and all(torch.equal(whole[key], plain[key]) for key in plain)
    return same, ((found - expected) / expected).abs().max().item()


CELLS = [
    *((layout, name, 2) for layout in layouts.LAYOUTS for name in ("llama",) if layout != "fsdp2-tp"),
    *((layout, name, 3) for layout in ("fsdp2", "fsdp1-flat", "zero3") for name in ("opt", "mixtral", "t5")),
    ("fsdp2-two", "llama", 4),
    ("fsdp2-tp", "llama", 4),
    ("hsdp", "opt", 4),
]


@pytest.mark.parametrize(("layout", "name", "world_size"), CELLS)
def test_a_sharded_model_is_the_model(ranks: Ranks, layout: str, name: str, world_size: int) -> None:
    tolerance = 2e-2 if layout == "fsdp2-mixed" else 1e-5
    for same, difference in ranks(world_size, there_and_back, layout=layout, name=name):
        assert same
        assert difference < tolerance
