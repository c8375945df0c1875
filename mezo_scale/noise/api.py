"""Noise, version 1: z as a pure function of (seed, parameter, element), and the sweeps over memory that use it.

z at an element depends on nothing else: not on the sharding, the device, the dtype or the number of processes. So any
rank regenerates its own part alone, and a trajectory of seeds and scalars can be replayed bit for bit.

`runs` everywhere is int64 [n, 3] of rows (local offset, global start, length): elements local[o : o + length] of a
shard are the row-major flat elements global start .. global start + length - 1 of the whole parameter.

Every device returns the same bits: CPU tensors use the compiled kernels of `cpu`, GPUs those of `cuda` where Triton
is installed, anything else `reference`. A NaN stays a NaN, but its payload is not promised.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mezo_scale.noise import check, fake, reference, spec
from mezo_scale.noise.kind import NORMAL, RADEMACHER, Noise

Runs = npt.NDArray[np.int64]


def _kernels_for(tensor: Tensor) -> ModuleType:
    return fake if isinstance(tensor, FakeTensor) else _kernels(tensor.device)


def _kernels(device: torch.device) -> ModuleType:
    # Imported on first use: Numba and Triton each take a second to import.
    if device.type == "cpu" and importlib.util.find_spec("numba"):
        from mezo_scale.noise import cpu

        return cpu
    if device.type in ("cuda", "xpu") and importlib.util.find_spec("triton"):
        from mezo_scale.noise import cuda

        return cuda
    return reference


def normal(seed: int, param_id: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the elements start .. start + count - 1: float32 [count], standard normal (stream 0)."""
    return _generate(seed, param_id, start, count, device, NORMAL)


def rademacher(seed: int, param_id: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the elements start .. start + count - 1: float32 [count], each 1 or -1 (stream 2)."""
    return _generate(seed, param_id, start, count, device, RADEMACHER)


def rounding_bits(seed: int, param_id: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The 16 random bits per element that stochastic rounding uses: int64 [count] in 0 .. 65535 (stream 1)."""
    check.identity(seed, param_id)
    check.span(start, count)
    return reference.span(seed, param_id, start, count, spec.ROUNDING, torch.device(device))


def _generate(seed: int, param_id: int, start: int, count: int, device: torch.device | str, noise: Noise) -> Tensor:
    check.identity(seed, param_id)
    check.span(start, count)
    z = torch.zeros(count, dtype=torch.float32, device=device)  # 0 + 1 * z is z: no z is zero
    runs = np.array([[0, start, count]], dtype=np.int64)
    one = np.ones((1, 1), dtype=np.float32)
    seeds = np.full((1, 1), seed, dtype=np.uint64)
    write_(z, runs, param_id, seeds, one, one[0], noise=noise)
    return z


def write_(
    local: Tensor,
    runs: Runs,
    param_id: int,
    seeds: npt.ArrayLike,
    alphas: npt.ArrayLike,
    decays: npt.ArrayLike,
    *,
    remainder: Tensor | None = None,
    rounding: str = "nearest",
    noise: Noise = NORMAL,
) -> None:
    """Apply S steps of K directions to a shard, in place, in one read and one write of memory.

    Each step is theta = theta * decay + sum over k, in order, of alpha_k z_k, every operation rounded to float32, and
    theta rounded to its storage after each step: S steps in one call give the bits of S calls with one step.

    local: 1-D, contiguous; float32, bfloat16 or float16. Elements that no run covers are left alone.
    seeds, alphas: [S, K], u64 and float32. decays: [S], float32.
    remainder: int16 [numel], for a bfloat16 `local` only: the low half of a float32 master, whose bits are
        (bits of local << 16) + remainder. Then steps are rounded to float32 only, and `local` is the master rounded
        to the nearest bfloat16, ties away from zero.
    rounding: "nearest" (ties to even) or "stochastic" (stream 1 under the step's first seed); for 16-bit storage
        without a remainder.
    noise: how z is drawn.
    Raises ValueError, naming the argument, before anything is written.
    """
    check.storage("local", local)
    check.identity(0, param_id)
    if local.dim() != 1:
        raise ValueError(f"local has {local.dim()} dimensions, expected 1: pass the flat shard")
    runs = check.runs(runs, local.numel())
    seeds, alphas, decays = check.steps(seeds, alphas, decays)
    check.remainder(remainder, local)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is {rounding!r}, expected 'nearest' or 'stochastic'")
    stream = check.stream(noise)
    stochastic = rounding == "stochastic"
    if not len(runs) or not len(decays):
        return
    with torch.no_grad():
        kernels = _kernels_for(local)
        kernels.write_(local, runs, param_id, seeds, alphas, decays, remainder, stochastic, stream)


def view(
    weight: Tensor,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    out: Tensor,
    *,
    runs: Runs | None = None,
    noise: Noise = NORMAL,
) -> None:
    """Fill out[b] with weight + scale_b * z(seed_b), from one read of the weight and one z per distinct seed.

    The product and the sum are rounded to float32 each, the result to the nearest value of out's dtype.
    weight: contiguous; float32, bfloat16 or float16; the whole parameter, or with `runs` a part of it (elements that
        no run covers are copied). out: [len(branches), *weight.shape], contiguous; any of the three dtypes.
    branches: pairs (seed u64, scale float32).
    Raises ValueError, naming the argument, before anything is written.
    """
    check.storage("weight", weight)
    check.identity(0, param_id)
    branches = check.branches(branches)
    check.output(out, (len(branches), *weight.shape), weight.device)
    stream = check.stream(noise)
    whole = np.array([[0, 0, weight.numel()]], dtype=np.int64)
    runs = whole if runs is None else check.runs(runs, weight.numel())
    with torch.no_grad():
        if int(runs[:, 2].sum()) < weight.numel():
            out.copy_(weight.expand_as(out))
        if weight.numel():
            _kernels_for(weight).view(weight, runs, param_id, branches, out, stream)


def rows(
    table: Tensor,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    ids: Tensor,
    out: Tensor,
    *,
    noise: Noise = NORMAL,
) -> None:
    """Fill out[b, i] with row ids[b, i] of the perturbed table, as `view` would, touching only the rows looked up.

    table: [V, *rest], the whole parameter. ids: int64 [len(branches), N] in 0 .. V - 1.
    out: [len(branches), N, *rest], contiguous. Dtypes as for `view`.
    Raises ValueError, naming the argument, before anything is written; but on a GPU, where looking at the ids would
    wait for the device, a row whose id is out of range is filled with NaN instead.
    """
    check.storage("table", table)
    check.identity(0, param_id)
    if table.dim() < 1:
        raise ValueError("table has no dimensions, expected at least 1")
    branches = check.branches(branches)
    check.ids(ids, len(branches), table)
    check.output(out, (*ids.shape, *table.shape[1:]), table.device)
    stream = check.stream(noise)
    with torch.no_grad():
        if out.numel():
            _kernels_for(table).rows(table, param_id, branches, ids, out, stream)
