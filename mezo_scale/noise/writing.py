"""Writing steps into many shards that were checked before, with as few waits as their devices allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from mezo_scale.noise.dispatch import draw_factors, kernels_of
from mezo_scale.noise.kind import NORMAL, Noise
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Part

FACTORS = 1 << 22  # numbers of factors that are held at once: 16 MiB


def write_all_(
    parts: Sequence[Part],
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    *,
    stochastic: bool = False,
    noise: Noise = NORMAL,
) -> None:
    """`mezo_scale.noise.write_` of many shards: on a GPU in one launch for all that are stored alike, on a CPU without
    a wait between one and the next. Nothing is checked here.

    seeds: [S, K]; alphas: [groups, S, K]; decays: [rows, S]; each part says which of the last two are its own.
    """
    if not len(seeds):
        return
    with torch.no_grad():
        for sweeps, some in _together([part for part in parts if len(part.runs)], seeds.size):
            if not hasattr(sweeps, "write_all_") or _numbers(some[0], seeds.size) > FACTORS:
                for part in some:
                    _write_(part, sweeps, seeds, alphas[part.alphas], decays[part.decays], stochastic, noise)
                continue
            drawn = [_factors(part, seeds, noise) for part in some]
            sweeps.write_all_(some, seeds, alphas, decays, stochastic, noise.stream, drawn)


def _together(parts: Sequence[Part], draws: int) -> Iterator[tuple[ModuleType, list[Part]]]:
    """What is written at once, by whom: one part, or several whose factors have FACTORS numbers at most."""
    batches: dict[ModuleType, list[Part]] = {}
    held: dict[ModuleType, int] = {}
    for part in parts:
        sweeps, numbers = kernels_of(part.local), _numbers(part, draws)
        if sweeps in batches and held[sweeps] + numbers > FACTORS:
            yield sweeps, batches.pop(sweeps)
            held[sweeps] = 0
        batches.setdefault(sweeps, []).append(part)
        held[sweeps] = held.get(sweeps, 0) + numbers
    yield from batches.items()


def _numbers(part: Part, draws: int) -> int:
    """How many numbers the factors of a part have in so many directions."""
    return 0 if part.rank is None else draws * part.rank * sum(part.shape)


def _factors(part: Part, seeds: npt.NDArray[np.uint64], noise: Noise) -> Factors | None:
    return draw_factors(seeds.ravel(), part.param_id, part.rank, part.shape, noise, part.local)


def _write_(
    part: Part,
    sweeps: ModuleType,
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    stochastic: bool,
    noise: Noise,
) -> None:
    """One shard, with as many steps at once as FACTORS numbers allow."""
    at_once = len(seeds) if part.rank is None else max(1, FACTORS // _numbers(part, seeds.shape[1]))
    for first in range(0, len(seeds), at_once):
        some = slice(first, first + at_once)
        steps = (np.ascontiguousarray(array[some]) for array in (seeds, alphas, decays))
        drawn = _factors(part, seeds[some], noise)
        sweeps.write_(part.local, part.runs, part.param_id, *steps, part.remainder, stochastic, noise.stream, drawn)
