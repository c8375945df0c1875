"""What the noise is made of: its constants, its generator on plain integers, and the identities that key it.

Generator: Philox4x32-10; Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b

VERSION = 2  # the newest; a run records that of its own noise, `Noise.version`

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
M32 = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF

NORMAL, ROUNDING, RADEMACHER = 0, 1, 2  # streams; of any stream the two low bits say how it is laid out
FORM = 3
LEFT, RIGHT = 4, 8  # added to a stream: the factors U and V of version 2
DIRECTION = 0x4D655A4F  # counter word 3 of a direction's seed: "MeZO"

TILE = 1024  # elements that share 128 blocks; a multiple of both streams' units
LANES = 128

# Box-Muller's polynomials, lowest power first. Each is a float32 exactly.
LN2 = float.fromhex("0x1.62e430p-1")
LOG = tuple(
    map(
        float.fromhex,
        (
            "0x1.fffffep-1",
            "-0x1.00007ap-1",
            "0x1.555a00p-2",
            "-0x1.ff6316p-3",
            "0x1.9785cap-3",
            "-0x1.613806p-3",
            "0x1.4c79e8p-3",
            "-0x1.9f174ap-4",
        ),
    )
)
SIN = tuple(map(float.fromhex, ("0x1.921fb6p+0", "-0x1.4abbbep-1", "0x1.466090p-4", "-0x1.2df3ccp-8")))
COS = tuple(map(float.fromhex, ("0x1.000000p+0", "-0x1.3bd39ep+0", "0x1.03b1eap-2", "-0x1.4edc84p-6")))


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The block of four 32-bit words at `counter` under `key` (all arguments u32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & M32, (p0 >> 32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + WEYL[0]) & M32, (k1 + WEYL[1]) & M32
    return c0, c1, c2, c3


@cache
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
