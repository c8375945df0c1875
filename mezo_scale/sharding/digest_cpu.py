"""The hash of `digest` as one compiled loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mezo_scale.noise.cpu_jit import I64, memory_of, sweep, u64
from mezo_scale.sharding.shard import Runs

WEYL, FACTOR = u64(0x9E3779B97F4A7C15), u64(0xBF58476D1CE4E5B9)  # those of `digest`; a test compares the two


def total(bits: torch.Tensor, runs: Runs, salt: int) -> int:
    """The sum over the elements that the runs name, modulo 2^64; `bits` are integers on the CPU."""
    return int(_sum(memory_of(bits, f"i{bits.element_size()}"), np.ascontiguousarray(runs), u64(salt % 2**64)))


@sweep
def _sum(words: npt.NDArray[Any], runs: I64, salt: u64) -> u64:
    total = u64(0)
    for number in range(len(runs)):
        offset, start = runs[number, 0], runs[number, 1]
        for i in range(runs[number, 2]):
            mixed = np.int64(words[offset + i]) + np.int64(u64(start + i) * WEYL + salt)
            mixed = np.int64(u64(mixed ^ (mixed >> 29)) * FACTOR)
            total += u64(mixed ^ (mixed >> 32))
    return total
