"""What sweeps over a model's parameters take, checked once and then used step after step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mezo_scale.noise import check

Runs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A shard that is written.

    Attributes:
        local, runs, param_id, remainder: as `mezo_scale.noise.write_` takes them.
        alphas, decays: which rows of a step's multipliers and decays it takes.
        shape: of the whole parameter, for low-rank noise.
        rank: of its z; None: each element has its own.
    """

    local: Tensor
    runs: Runs
    param_id: int
    remainder: Tensor | None = None
    alphas: int = 0
    decays: int = 0
    shape: tuple[int, ...] = ()
    rank: int | None = None


class Branches(Sequence[tuple[int, float]]):
    """(seed, scale) pairs with scales rounded to float32; a slice of them knows the whole that it is of.

    Attributes:
        whole: all branches of a step; first: the position of the first one here among them.
        seeds, scales: uint64 and float32, [branches].
        leaders: int64 [branches], the first branch of the same seed.

    Raises:
        ValueError: there is none, or a seed is no integer of 64 bits.
    """

    def __init__(self, pairs: Sequence[tuple[int, float]], whole: Branches | None = None, first: int = 0) -> None:
        self._pairs = check.branches(pairs) if whole is None else pairs
        self.whole, self.first = self if whole is None else whole, first
        if whole is None:
            self.seeds = np.array([seed for seed, _ in self._pairs], dtype=np.uint64)
            self.scales = np.array([scale for _, scale in self._pairs], dtype=np.float32)
        else:
            here = slice(first, first + len(pairs))
            self.seeds, self.scales = whole.seeds[here], whole.scales[here]
        names = self.seeds.tolist()
        self.leaders = np.array([names.index(seed) for seed in names])
        self._slices: dict[tuple[int | None, int | None], Branches] = {}

    @overload
    def __getitem__(self, index: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, index: slice) -> Branches: ...
    def __getitem__(self, index: int | slice) -> tuple[int, float] | Branches:
        if not isinstance(index, slice):
            return self._pairs[index]
        key = (index.start, index.stop)
        if key not in self._slices:  # every parameter of a step asks for the same ones
            self._slices[key] = Branches(self._pairs[index], self.whole, self.first + index.indices(len(self))[0])
        return self._slices[key]

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(self._pairs)
