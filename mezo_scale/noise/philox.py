"""Philox4x32-10 on plain integers, and the two identities everything else is keyed by.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
M32 = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF

NORMAL, ROUNDING, RADEMACHER = 0, 1, 2  # streams
DIRECTION = 0x4D655A4F  # counter word 3 of a direction's seed: "MeZO"

TILE = 1024  # elements that share 128 blocks; a multiple of both streams' units
LANES = 128


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The block of four 32-bit words at `counter` under `key` (all arguments u32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & M32, (p0 >> 32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + WEYL[0]) & M32, (k1 + WEYL[1]) & M32
    return c0, c1, c2, c3


@lru_cache(maxsize=None)
def param_id(name: str) -> int:
    """The u64 that stands for a parameter: BLAKE2b-64 of its canonical name, read little-endian."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def direction_seed(run_seed: int, step: int, k: int) -> int:
    """The u64 seed of direction `k` of step `step` in the run seeded `run_seed` (u64, u64, u32)."""
    for argument, value, bits in (("run_seed", run_seed, 64), ("step", step, 64), ("k", k, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{argument} is {value}, expected an integer of {bits} bits without sign")
    words = philox((step & M32, step >> 32, k, DIRECTION), (run_seed & M32, run_seed >> 32))
    return words[0] | words[1] << 32
