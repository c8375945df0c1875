"""A hash of elements that does not depend on how they are sharded: a sum modulo 2^64 over all of them.

Each element contributes a mix of its bits, its index and a salt. On the CPU one compiled loop (`digest_cpu`) as fast as
memory is read; elsewhere torch, which gives the same number.
"""

from __future__ import annotations

import importlib.util

import torch

from mezo_scale.sharding.shard import Runs

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What elements are read as, by their bytes."""

_CHUNK = 1 << 20  # elements at a time: bounds the int64 temporaries at a few tens of MB
ODD = 0x9E3779B97F4A7C15  # Weyl's constant
MIX = 0xBF58476D1CE4E5B9  # SplitMix64's first multiplier


def digest(stored: torch.Tensor, runs: Runs, salt: int) -> int:
    """The sum over a rank's elements, a signed integer of 64 bits.

    Args:
        stored: 1-D and contiguous, of a dtype whose size is in BITS.
        runs: which of its elements count, and as which of the whole.
        salt: 64 bits.
    """
    bits = stored.detach().view(BITS[stored.element_size()])
    if bits.device.type == "cpu" and importlib.util.find_spec("numba"):
        from mezo_scale.sharding.digest_cpu import total  # a second to import, and only for those who hash

        return signed(total(bits, runs, salt))
    return _sum_torch(bits, runs, salt)


def signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63


def _sum_torch(bits: torch.Tensor, runs: Runs, salt: int) -> int:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for offset, start, length in runs.tolist():
        for begin in range(0, length, _CHUNK):
            count = min(_CHUNK, length - begin)
            index = torch.arange(start + begin, start + begin + count, dtype=torch.int64, device=bits.device)
            mixed = index.mul_(signed(ODD)).add_(signed(salt))
            mixed += bits[offset + begin : offset + begin + count]
            mixed ^= mixed >> 29
            mixed *= signed(MIX)
            mixed ^= mixed >> 32
            total += mixed.sum()
    return int(total.item())
