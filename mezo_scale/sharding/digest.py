"""A hash of elements that does not depend on how they are sharded: a sum modulo 2^64 over all of them.

Each element contributes a mix of its bits, its index and a salt. On the CPU one compiled loop, which runs as fast as
memory is read; elsewhere torch, which gives the same number.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mezo_scale.noise.cpu_jit import I64, sweep, u64
from mezo_scale.sharding.shard import Runs

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What elements are read as, by their bytes."""

_CHUNK = 1 << 20  # elements at a time: bounds the int64 temporaries at a few tens of MB
_ODD = 0x9E3779B97F4A7C15  # Weyl's constant
_MIX = 0xBF58476D1CE4E5B9  # SplitMix64's first multiplier
_WEYL, _FACTOR = u64(_ODD), u64(_MIX)


def digest(stored: torch.Tensor, runs: Runs, salt: int) -> int:
    """The sum over a rank's elements, a signed integer of 64 bits.

    Args:
        stored: 1-D and contiguous, of a dtype whose size is in BITS.
        runs: which of its elements count, and as which of the whole.
        salt: 64 bits.
    """
    bits = stored.detach().view(BITS[stored.element_size()])
    if bits.device.type == "cpu":
        return signed(int(_sum(_words(bits), np.ascontiguousarray(runs), u64(salt % 2**64))))
    return _sum_torch(bits, runs, salt)


def signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63


@sweep
def _sum(words: npt.NDArray[Any], runs: I64, salt: u64) -> u64:
    total = u64(0)
    for number in range(len(runs)):
        offset, start = runs[number, 0], runs[number, 1]
        for i in range(runs[number, 2]):
            mixed = np.int64(words[offset + i]) + np.int64(u64(start + i) * _WEYL + salt)
            mixed = np.int64(u64(mixed ^ (mixed >> 29)) * _FACTOR)
            total += u64(mixed ^ (mixed >> 32))
    return total


def _words(bits: torch.Tensor) -> npt.NDArray[Any]:
    """Its memory. Not through Tensor.numpy(), which fixes a storage's size: FSDP frees weights by resizing theirs."""
    kind = f"=i{bits.element_size()}"
    interface = {"version": 3, "typestr": kind, "shape": (bits.numel(),), "data": (bits.data_ptr(), False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _sum_torch(bits: torch.Tensor, runs: Runs, salt: int) -> int:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for offset, start, length in runs.tolist():
        for begin in range(0, length, _CHUNK):
            count = min(_CHUNK, length - begin)
            index = torch.arange(start + begin, start + begin + count, dtype=torch.int64, device=bits.device)
            mixed = index.mul_(signed(_ODD)).add_(signed(salt))
            mixed += bits[offset + begin : offset + begin + count]
            mixed ^= mixed >> 29
            mixed *= signed(_MIX)
            mixed ^= mixed >> 32
            total += mixed.sum()
    return int(total.item())
