"""The noise: z as a pure function of (seed, parameter, element), and the sweeps over memory that use it.

z at an element depends on nothing else: not on the sharding, the device, the dtype or the number of processes. So any
rank regenerates its own part alone, and a trajectory of seeds and scalars can be replayed bit for bit.

`runs` everywhere is int64 [n, 3] of rows (local offset, global start, length): elements local[o : o + length] of a
shard are the row-major flat elements global start .. global start + length - 1 of the whole parameter.

Every device returns the same bits: CPU tensors use the compiled kernels of `cpu`, GPUs those of `cuda` where Triton
is installed, anything else `reference`. A NaN stays a NaN, but its payload is not promised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mezo_scale.noise import check, reference, spec
from mezo_scale.noise.dispatch import draw_factors, kernels_of, kernels_on
from mezo_scale.noise.kind import NORMAL, Noise
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Branches, Part
from mezo_scale.noise.writing import write_all_

Runs = npt.NDArray[np.int64]


def normal(seed: int, param_id: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the elements start .. start + count - 1: float32 [count], standard normal (stream 0)."""
    return _span(seed, param_id, start, count, device, spec.NORMAL)


def rademacher(seed: int, param_id: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """z of the elements start .. start + count - 1: float32 [count], each 1 or -1 (stream 2)."""
    return _span(seed, param_id, start, count, device, spec.RADEMACHER)


def rounding_bits(seed: int, param_id: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The 16 random bits per element that stochastic rounding uses: int64 [count] in 0 .. 65535 (stream 1)."""
    check.identity(seed, param_id)
    check.span(start, count)
    return reference.span(seed, param_id, start, count, spec.ROUNDING, torch.device(device))


def _span(seed: int, param_id: int, start: int, count: int, device: torch.device | str, stream: int) -> Tensor:
    check.identity(seed, param_id)
    check.span(start, count)
    place = torch.device(device)
    drawn: Tensor = kernels_on(place.type).draw(
        np.array([seed], dtype=np.uint64), param_id, stream, start, count, place
    )
    return drawn[0]


def factors(weight: Tensor, param_id: int, seeds: Sequence[int], *, noise: Noise) -> Factors | None:
    """What z of a whole parameter is made of under low-rank noise, for each seed; None where each element has its own.

    weight: for its shape [m, n] and its device alone. Returns float32 U [len(seeds), r, m] and V [len(seeds), r, n].
    Raises ValueError: a rank that the matrix can't have.
    """
    for seed in seeds:
        check.identity(seed, param_id)
    check.stream(noise)
    words = np.array(seeds, dtype=np.uint64)
    return draw_factors(words, param_id, noise.rank_of(weight.shape), weight.shape, noise, weight)


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
    shape: Sequence[int] | None = None,
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
    shape: of the whole parameter, which low-rank noise must know.
    Raises ValueError, naming the argument, before anything is written.
    """
    seeds, alphas, decays = check.steps(seeds, alphas, decays)
    stochastic = check.stochastic(rounding)
    part = part_of(local, runs, param_id, remainder=remainder, noise=noise, shape=shape)
    write_all_([part], seeds, alphas[None], decays[None], stochastic=stochastic, noise=noise)


def part_of(
    local: Tensor,
    runs: Runs,
    param_id: int,
    *,
    remainder: Tensor | None = None,
    noise: Noise = NORMAL,
    shape: Sequence[int] | None = None,
    alphas: int = 0,
    decays: int = 0,
) -> Part:
    """A shard for `write_all_`, checked. Arguments, and what is raised, as for `write_`.

    alphas, decays: its rows of those that `write_all_` is given.
    """
    check.storage("local", local)
    check.identity(0, param_id)
    if local.dim() != 1:
        raise ValueError(f"local has {local.dim()} dimensions, expected 1: pass the flat shard")
    runs = check.runs(runs, local.numel())
    check.remainder(remainder, local)
    check.stream(noise)
    rank = check.rank(noise, shape, runs)
    return Part(local, runs, param_id, remainder, alphas, decays, tuple(shape or ()), rank)


@dataclass(frozen=True, eq=False, slots=True)
class Perturbed:
    """A parameter whose perturbed copies are made time and again: `view` without its checks.

    Attributes:
        runs: which elements the weight holds; is_whole: whether they are all of it.
    """

    param_id: int
    runs: Runs
    is_whole: bool
    noise: Noise
    shape: tuple[int, ...]
    rank: int | None
    numel: int

    @classmethod
    def of(
        cls,
        weight: Tensor,
        param_id: int,
        *,
        runs: Runs | None = None,
        noise: Noise = NORMAL,
        shape: Sequence[int] | None = None,
    ) -> Perturbed:
        """Arguments, and what is raised, as for `view`."""
        check.storage("weight", weight)
        check.identity(0, param_id)
        check.stream(noise)
        whole = np.array([[0, 0, weight.numel()]], dtype=np.int64)
        runs = whole if runs is None else check.runs(runs, weight.numel())
        shape = tuple(weight.shape if shape is None else shape)
        is_whole = int(runs[:, 2].sum()) == weight.numel()
        rank = check.rank(noise, shape, runs)
        return cls(param_id, runs, is_whole, noise, shape, rank, weight.numel())

    def filling(self, weight: Tensor, out: Tensor) -> Callable[[Tensor, Branches], None]:
        """`view` into one place: fill(weight, branches), for as long as both tensors lie where they lie."""
        kernels = kernels_of(weight)
        if self.is_whole and self.numel and self.rank is None and hasattr(kernels, "filling"):
            fill = kernels.filling(weight, self.runs, self.param_id, out, self.noise.stream)
            return lambda _, branches: fill(branches)
        return lambda weight, branches: self.view(weight, branches, out)

    def view(self, weight: Tensor, branches: Branches, out: Tensor) -> None:
        with torch.no_grad():
            if not self.is_whole:
                out.copy_(weight.expand_as(out))
            if not self.numel:
                return
            drawn = draw_factors(branches.seeds, self.param_id, self.rank, self.shape, self.noise, weight)
            kernels = kernels_of(weight)
            kernels.view(weight, self.runs, self.param_id, branches, out, self.noise.stream, drawn)


def view(
    weight: Tensor,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    out: Tensor,
    *,
    runs: Runs | None = None,
    noise: Noise = NORMAL,
    shape: Sequence[int] | None = None,
) -> None:
    """Fill out[b] with weight + scale_b * z(seed_b), from one read of the weight and one z for neighbours of one seed.

    The product and the sum are rounded to float32 each, the result to the nearest value of out's dtype.
    weight: contiguous; float32, bfloat16 or float16; the whole parameter, or with `runs` a part of it (elements that
        no run covers are copied). out: [len(branches), *weight.shape], contiguous; any of the three dtypes.
    branches: pairs (seed u64, scale float32).
    shape: of the whole parameter, which low-rank noise must know; None: the weight's.
    Raises ValueError, naming the argument, before anything is written.
    """
    perturbed = Perturbed.of(weight, param_id, runs=runs, noise=noise, shape=shape)
    named = branches if isinstance(branches, Branches) else Branches(branches)
    check.output(out, (len(named), *weight.shape), weight.device)
    perturbed.view(weight, named, out)


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
    named = branches if isinstance(branches, Branches) else Branches(branches)
    check.ids(ids, len(named), table)
    check.output(out, (*ids.shape, *table.shape[1:]), table.device)
    stream = check.stream(noise)
    rank = noise.rank_of(table.shape)
    with torch.no_grad():
        if out.numel():
            drawn = draw_factors(named.seeds, param_id, rank, table.shape, noise, table)
            kernels_of(table).rows(table, param_id, named, ids, out, stream, drawn)
