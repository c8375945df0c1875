"""What the sweeps accept. Each function raises a ValueError that names the argument, or returns it normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mezo_scale.noise import spec
from mezo_scale.noise.kind import Noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = (1 << 63) - 1


def identity(seed: int, param_id: int) -> None:
    for argument, value in (("seed", seed), ("param_id", param_id)):
        if not isinstance(value, int) or not 0 <= value <= spec.M64:
            raise ValueError(f"{argument} is {value!r}, expected an integer of 64 bits without sign")


def span(start: int, count: int) -> None:
    if start < 0 or count < 0 or start + count > LAST:
        raise ValueError(f"start is {start} and count is {count}, expected a part of 0 .. 2**63 - 1")


def stream(noise: Noise) -> int:
    if not isinstance(noise, Noise):
        raise ValueError(f"noise is {noise!r}, expected a Noise, such as Noise('normal')")
    return noise.stream


def rank(noise: Noise, shape: Sequence[int] | None, runs: npt.NDArray[np.int64]) -> int | None:
    """The rank of z of a parameter of that shape; None: each element has a z of its own."""
    if noise.rank is None:
        return None
    if shape is None:
        raise ValueError("shape is None, expected that of the whole parameter: low-rank noise depends on it")
    last = int((runs[:, 1] + runs[:, 2]).max(initial=0))
    if last > math.prod(shape):
        raise ValueError(f"shape is {list(shape)}, but runs reaches element {last}: expected the whole parameter's")
    return noise.rank_of(shape)


def storage(argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{argument} has dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{argument} is not contiguous, shape {list(tensor.shape)}: pass the stored shard itself")
    if tensor.device.type == "meta":
        raise ValueError(f"{argument} is on the meta device: it has no values to read")


def output(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    storage("out", out)
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {list(out.shape)}, expected {list(shape)}")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, expected {device}")


def runs(runs: npt.NDArray[np.int64], numel: int) -> npt.NDArray[np.int64]:
    runs = np.ascontiguousarray(runs)
    if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.int64:
        raise ValueError(f"runs is {runs.dtype} {list(runs.shape)}, expected int64 [n, 3]")
    offset, start, length = runs.T
    if (runs < 0).any() or (start > LAST - length).any():
        raise ValueError("runs holds a negative number, or an element beyond 2**63 - 1")
    if (length > numel - offset).any():
        bad = runs[np.argmax(length > numel - offset)]
        raise ValueError(f"runs reaches local element {bad[0] + bad[2]}, but the tensor holds {numel}")
    ends = offset + length
    if (offset[1:] < ends[:-1]).any():  # out of order, or overlapping
        order = np.lexsort((ends, offset))
        if (offset[order][1:] < ends[order][:-1]).any():
            raise ValueError("runs overlap: a local element may belong to one run only")
    return runs


def steps(
    seeds: npt.ArrayLike, alphas: npt.ArrayLike, decays: npt.ArrayLike
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    words = _u64(seeds)
    factors = np.ascontiguousarray(alphas, dtype=np.float32)
    if words.ndim != 2 or (words.shape[1] == 0 and words.shape[0] > 0):
        raise ValueError(f"seeds has shape {list(words.shape)}, expected [S, K] with K >= 1")
    if factors.shape != words.shape:
        raise ValueError(f"alphas has shape {list(factors.shape)}, expected that of seeds, {list(words.shape)}")
    decay = np.ascontiguousarray(decays, dtype=np.float32)
    if decay.shape != words.shape[:1]:
        raise ValueError(f"decays has shape {list(decay.shape)}, expected [{words.shape[0]}], one for each step")
    return words, factors, decay


def _u64(seeds: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    if isinstance(seeds, np.ndarray) and seeds.dtype == np.uint64:
        return np.ascontiguousarray(seeds)
    given = np.array(seeds, dtype=object)  # through Python's integers: NumPy would make floats of large ones
    if not all(isinstance(seed, (int, np.integer)) and 0 <= seed <= spec.M64 for seed in given.flat):
        raise ValueError("seeds holds a value that is not an integer of 64 bits without sign")
    return given.astype(np.uint64)


def remainder(remainder: Tensor | None, local: Tensor) -> None:
    if remainder is None:
        return
    if local.dtype != torch.bfloat16:
        raise ValueError(f"remainder goes with a bfloat16 local only, and local is {local.dtype}")
    if remainder.dtype != torch.int16 or remainder.shape != local.shape or not remainder.is_contiguous():
        raise ValueError(
            f"remainder is {remainder.dtype} {list(remainder.shape)}, expected contiguous int16 {list(local.shape)}"
        )
    if remainder.device != local.device:
        raise ValueError(f"remainder is on {remainder.device}, expected {local.device}")


def stochastic(rounding: str) -> bool:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is {rounding!r}, expected 'nearest' or 'stochastic'")
    return rounding == "stochastic"


def branches(branches: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The branches with scales rounded to float32."""
    if not len(branches):
        raise ValueError("branches is empty, expected at least one (seed, scale)")
    for seed, _ in branches:
        if not isinstance(seed, int) or not 0 <= seed <= spec.M64:
            raise ValueError(f"branches holds the seed {seed!r}, expected an integer of 64 bits without sign")
    return [(seed, float(np.float32(scale))) for seed, scale in branches]


def ids(ids: Tensor, count: int, table: Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] != count:
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [{count}, N], a row for each branch")
    if ids.device != table.device:
        raise ValueError(f"ids is on {ids.device}, expected {table.device}")
    readable = ids.device.type == "cpu" and not isinstance(ids, FakeTensor)
    if readable and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        raise ValueError(f"ids holds {int(ids.min())} .. {int(ids.max())}, but the table has {table.shape[0]} rows")
