"""The hash of elements: one number, whoever computes it and however the elements are shared out."""

import numpy as np
import pytest
import torch

from mezo_scale.sharding import digest as digests
from mezo_scale.sharding.digest import digest, signed
from mezo_scale.sharding.shard import run

SALT = 2**64 - 12345


def by_definition(elements: torch.Tensor, start: int, salt: int) -> int:
    """In Python's integers."""
    total = 0
    for number, bits in enumerate(elements.view(digests.BITS[elements.element_size()]).tolist()):
        mixed = signed((bits + (start + number) * 0x9E3779B97F4A7C15 + salt) % 2**64)
        mixed = signed((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 % 2**64)
        total += mixed ^ (mixed >> 32)
    return signed(total % 2**64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.float64, torch.bool])
def test_compiled_loop_and_torch_give_the_number_of_the_definition(dtype: torch.dtype) -> None:
    elements = (torch.randn(301, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    wanted = by_definition(elements, 70, SALT)
    assert digest(elements, run(0, 70, 301), SALT) == wanted
    bits = elements.view(digests.BITS[elements.element_size()])
    assert digests._sum_torch(bits, run(0, 70, 301), SALT) == wanted


def test_parts_add_up_to_the_whole_and_padding_does_not_count() -> None:
    whole = torch.randn(100, generator=torch.Generator().manual_seed(2))
    first = digest(torch.cat([torch.zeros(3), whole[:60]]), run(3, 0, 60), SALT)
    runs = np.array([[0, 80, 20], [20, 60, 20]])  # a shard may hold its parts in any order
    second = digest(torch.cat([whole[80:], whole[60:80], torch.ones(5)]), runs, SALT)
    assert signed(first + second) == digest(whole, run(0, 0, 100), SALT)
    assert digest(torch.empty(0), run(0, 0, 0), SALT) == 0


def test_one_bit_and_one_exchange_of_two_elements_change_it() -> None:
    whole = torch.arange(50, dtype=torch.float32)
    before = digest(whole, run(0, 0, 50), SALT)
    flipped, exchanged = whole.clone(), whole.clone()
    flipped.view(torch.int32)[17] ^= 1
    exchanged[[3, 4]] = exchanged[[4, 3]]
    assert len({before, digest(flipped, run(0, 0, 50), SALT), digest(exchanged, run(0, 0, 50), SALT)}) == 3
