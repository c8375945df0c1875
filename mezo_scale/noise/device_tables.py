"""What the GPU's kernels read besides tensors of weights: uploaded once, and kept for as long as it holds.

Where elements lie is a table for each shard, or for all shards of a model together. A step's seeds and numbers are
written into buffers that stay where they are, so that a launch which reads them may be recorded in a CUDA graph and run
again with others. A buffer belongs to one stream of work: what is launched later on another stream must wait for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mezo_scale.noise.parts import Part, Runs

KEPT = 4096  # tables: more than a model has parameters, or they would be made again at every step
COARSE = 64  # programs that share an entry of the coarse index; `triton_kernels.job` knows it, too


@dataclass(frozen=True, eq=False, slots=True)
class Places:
    """Runs that one launch takes.

    Attributes:
        tensors: what places are counted from, and the same of remainders.
        arrays: table, firsts and coarse index, as `triton_kernels.job` takes them.
        programs: tiles of all of them.
        aligned: whether all addresses of a tile's lanes are multiples of 16 elements, given that the tensors' are.
    """

    tensors: tuple[Tensor, Tensor | None] | None
    arrays: tuple[Tensor, Tensor, Tensor]
    programs: int
    single: bool
    aligned: bool

    def among(self, tensors: tuple[Tensor, Tensor | None]) -> Places:
        return Places(tensors, self.arrays, self.programs, self.single, self.aligned)


_TABLES: OrderedDict[tuple[object, ...], tuple[list[Places], object]] = OrderedDict()
"""By where the elements lie; beside it what must stay alive for the key to mean that."""

_BUFFERS: dict[tuple[torch.device, str, tuple[int, ...]], tuple[Tensor, bytes]] = {}


def runs_table(runs: Runs, param_id: int, device: torch.device) -> list[Places]:
    """The runs of one parameter in one tensor, whichever that is."""
    # One run comes in a new array every time; several, in the array that is kept with the shard.
    key = (device, param_id, *(runs[0].tolist() if len(runs) == 1 else ("at", id(runs))))
    return _kept(key, runs, lambda: _places(_rows(runs, param_id, 0, 0, 0, 0), device))


def parts_table(parts: Sequence[Part]) -> list[Places]:
    """The runs of several shards of one dtype, each with its remainder or none."""
    first = parts[0]
    low = first.remainder
    key = tuple(
        (part.local.data_ptr(), id(part.runs), part.param_id, part.alphas, part.decays)
        + (() if part.remainder is None else (part.remainder.data_ptr(),))
        for part in parts
    )
    if len(parts) == 1 and len(first.runs) == 1 and not first.alphas and not first.decays:
        found = runs_table(first.runs, first.param_id, first.local.device)
        return [places.among((first.local, low)) for places in found]

    def build() -> list[Places]:
        each = [
            _rows(
                part.runs,
                part.param_id,
                _distance(part.local, first.local),
                0 if low is None or part.remainder is None else _distance(part.remainder, low),
                part.alphas,
                part.decays,
            )
            for part in parts
        ]
        return _places(np.concatenate(each), first.local.device)

    found = _kept(("parts", first.local.dtype, *key), [part.runs for part in parts], build)
    return [places.among((first.local, low)) for places in found]


def current(device: torch.device, name: str, array: npt.NDArray[np.generic]) -> Tensor:
    """The array on the device, int64 for integers, in the buffer of that name and shape."""
    key, data = (device, name, array.shape), array.tobytes()
    buffer, known = _BUFFERS.get(key, (None, b""))
    if buffer is None or known != data:
        dtype = torch.float32 if array.dtype == np.float32 else torch.int64
        given = torch.frombuffer(bytearray(data), dtype=dtype)
        if buffer is None:
            buffer = given.to(device)
        else:
            buffer.copy_(
                given, non_blocking=True
            )  # what was launched before reads the old ones: in order of the stream
        _BUFFERS[key] = buffer, data
    return buffer


@lru_cache(maxsize=1024)
def constant(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """int64 numbers on the device."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def _kept(key: tuple[object, ...], alive: object, build: Callable[[], list[Places]]) -> list[Places]:
    found = _TABLES.get(key)
    if found is None:
        found = _TABLES[key] = build(), alive
        if len(_TABLES) > KEPT:
            _TABLES.popitem(last=False)
    return found[0]


def _rows(runs: Runs, param_id: int, place: int, low: int, alphas: int, decays: int) -> Runs:
    rows = np.zeros((len(runs), 8), dtype=np.int64)
    rows[:, 0], rows[:, 1] = runs[:, 0] + place, runs[:, 0] + low
    rows[:, 2:4] = runs[:, 1:3]
    rows[:, 4] = np.array([param_id], dtype=np.uint64).view(np.int64)
    rows[:, 5], rows[:, 6] = alphas, decays
    return rows[rows[:, 3] > 0]


def _places(rows: Runs, device: torch.device) -> list[Places]:
    """Those that are aligned, and the others."""
    aligned = ((rows[:, :2] - rows[:, 2:3]) % 16 == 0).all(axis=1)
    found = []
    for which in (True, False):
        part = rows[aligned == which]
        if not len(part):
            continue
        tiles = (part[:, 2] + part[:, 3] - 1 >> 10) - (part[:, 2] >> 10) + 1
        firsts = np.concatenate([[0], np.cumsum(tiles)])
        programs = int(firsts[-1])
        coarse = np.searchsorted(firsts, np.arange(0, programs, COARSE), side="right") - 1
        arrays = (torch.from_numpy(array).to(device) for array in (part.ravel(), firsts, coarse.astype(np.int32)))
        table, starts, index = arrays
        found.append(Places(None, (table, starts, index), programs, len(part) == 1, which))
    return found


def _distance(tensor: Tensor, origin: Tensor) -> int:
    """From the one's first element to the other's, in elements."""
    return (tensor.data_ptr() - origin.data_ptr()) // tensor.element_size()
