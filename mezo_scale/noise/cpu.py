"""Noise on the CPU: the compiled sweeps, spread over threads in chunks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mezo_scale.noise import cpu_kernels
from mezo_scale.noise.cpu_jit import memory_of
from mezo_scale.noise.cpu_kernels import BFLOAT16, FLOAT16, FLOAT32, MASTER
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Branches, Part

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
CHUNK = 1 << 16  # draws below which a thread is not worth its start, about 0.1 ms

Runs = npt.NDArray[np.int64]
Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], np.float32]

_NOTHING = np.empty((0, 0, 0), np.float32)
_DENSE: Arrays = (_NOTHING, _NOTHING, np.float32(1))


@lru_cache(maxsize=1)
def _pool(pid: int, helpers: int) -> ThreadPoolExecutor:
    """One pool for each process: a forked child inherits the object but none of its threads."""
    return ThreadPoolExecutor(helpers, thread_name_prefix="mezo-noise")


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """A sweep over runs laid end to end.

    Attributes:
        draws: values generated for each element.
        sweep: sweep(first run, begin, end), on a part of them; begin and end are counted from that run.
    """

    runs: Runs
    draws: int
    sweep: Callable[[int, int, int], None]

    def parts(self, size: int) -> Iterator[Callable[[], None]]:
        """The sweep cut into parts of `size` elements."""
        ends = np.cumsum(self.runs[:, 2])
        bounds = np.append(np.arange(0, ends[-1], size), ends[-1])
        first = np.searchsorted(ends, bounds[:-1], side="right")
        before = ends[first] - self.runs[first, 2]
        places = (first, bounds[:-1] - before, bounds[1:] - before)
        for place in zip(*(array.tolist() for array in places), strict=True):
            yield partial(self.sweep, *place)

    @property
    def total(self) -> int:
        return int(self.runs[0, 2]) if len(self.runs) == 1 else int(self.runs[:, 2].sum())


def _spread(*jobs: Job) -> None:
    """Run all jobs, in parts on as many threads as torch has.

    The calling thread works too, and whoever is free takes the next part: helpers that wake late, because torch's own
    threads still spin after the last product or another process holds their core, are not waited for.
    """
    threads, totals = torch.get_num_threads(), [job.total for job in jobs]
    draws = sum(total * job.draws for total, job in zip(totals, jobs, strict=True))
    if threads == 1 or draws < 2 * CHUNK:
        for total, job in zip(totals, jobs, strict=True):
            job.sweep(0, 0, total)
        return
    size = max(CHUNK, draws // (8 * threads))
    parts = deque(part for job in jobs for part in job.parts(max(size // job.draws, 1)))

    def work() -> None:
        with suppress(IndexError):
            while True:
                parts.popleft()()

    pool = _pool(os.getpid(), threads - 1)
    helpers = [pool.submit(work) for _ in range(min(threads, len(parts)) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


def write_(
    local: Tensor,
    runs: Runs,
    param_id: int,
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    remainder: Tensor | None,
    stochastic: bool,
    stream: int,
    factors: Factors | None = None,
) -> None:
    part = Part(local, runs, param_id, remainder)
    _spread(_writing(part, seeds, alphas, decays, stochastic, stream, factors))


def write_all_(
    parts: Sequence[Part],
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    stochastic: bool,
    stream: int,
    factors: Sequence[Factors | None],
) -> None:
    """`write_` of several shards, one after the other, without a wait in between.

    alphas: [groups, S, K]; decays: [rows, S]; each part says which. factors: of each part.
    """
    jobs = (
        _writing(part, seeds, alphas[part.alphas], decays[part.decays], stochastic, stream, made_of)
        for part, made_of in zip(parts, factors, strict=True)
    )
    _spread(*jobs)


def _writing(
    part: Part,
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    stochastic: bool,
    stream: int,
    factors: Factors | None,
) -> Job:
    words, low, kind = memory_of(part.local, "u2"), np.empty(0, np.int16), KINDS[part.local.dtype]
    if part.remainder is not None:
        low, kind = memory_of(part.remainder, "i2"), MASTER
    key, made_of = np.uint64(part.param_id), _arrays(factors)

    def sweep(first: int, begin: int, end: int) -> None:
        runs = part.runs[first:]
        cpu_kernels.write(words, low, kind, runs, begin, end, key, seeds, alphas, decays, stochastic, stream, *made_of)

    return Job(part.runs, seeds.size, sweep)


def draw(
    seeds: npt.NDArray[np.uint64], param_id: int, stream: int, start: int, count: int, device: torch.device
) -> Tensor:
    out, key = np.empty((len(seeds), count), np.float32), np.uint64(param_id)

    def sweep(first: int, begin: int, end: int) -> None:
        cpu_kernels.draw(out, seeds, key, stream, start, begin, end)

    if out.size < 2 * CHUNK:  # as factors mostly are, of which a step draws hundreds
        sweep(0, 0, count)
    else:
        _spread(Job(np.array([[0, start, count]], dtype=np.int64), len(seeds), sweep))
    return torch.from_numpy(out)


def _arrays(factors: Factors | None) -> Arrays:
    """The factors as the sweeps take them."""
    if factors is None:
        return _DENSE
    return factors.u.numpy(), factors.v.numpy(), np.float32(factors.scale)


def view(
    weight: Tensor,
    runs: Runs,
    param_id: int,
    branches: Branches,
    out: Tensor,
    stream: int,
    factors: Factors | None = None,
) -> None:
    _filling(weight, runs, runs[:, 0].copy(), param_id, out, stream, _arrays(factors))(branches)


def filling(weight: Tensor, runs: Runs, param_id: int, out: Tensor, stream: int) -> Callable[[Branches], None]:
    """`view` with all but its branches given: it may be called for as long as both tensors lie where they lie."""
    return _filling(weight, runs, runs[:, 0].copy(), param_id, out, stream, _DENSE)


def rows(
    table: Tensor,
    param_id: int,
    branches: Branches,
    ids: Tensor,
    out: Tensor,
    stream: int,
    factors: Factors | None = None,
) -> None:
    width, count = table[0].numel(), ids.shape[1]
    targets = np.arange(count) * width
    same = bool((ids == ids[0]).all())  # as when every branch sees the same batch: one z for all
    for b in range(1 if same else len(branches)):
        start = ids[b].numpy() * width
        runs = np.stack((start, start, np.full(count, width)), axis=1)
        part = slice(None) if same else slice(b, b + 1)
        u, v, scale = _arrays(factors)
        _filling(table, runs, targets, param_id, out[part], stream, (u[part], v[part], scale))(branches[part])


def _filling(
    weight: Tensor,
    runs: Runs,
    targets: npt.NDArray[np.int64],
    param_id: int,
    out: Tensor,
    stream: int,
    made_of: Arrays,
) -> Callable[[Branches], None]:
    words, kind, filled, out_kind = memory_of(weight, "u2"), KINDS[weight.dtype], memory_of(out, "u2"), KINDS[out.dtype]
    key, numel = np.uint64(param_id), out.numel() // len(out)

    def fill(branches: Branches) -> None:
        seeds, scales, leaders = branches.seeds, branches.scales, branches.leaders

        def sweep(first: int, begin: int, end: int) -> None:
            place = (words, kind, runs[first:], begin, end)
            target = (filled, out_kind, targets[first:], numel)
            cpu_kernels.view(*place, key, seeds, scales, leaders, *target, stream, *made_of)

        _spread(Job(runs, len(set(leaders.tolist())), sweep))

    return fill
