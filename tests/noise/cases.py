"""Random work for the sweeps, done twice: by a set of kernels and by the reference. The answer is what differs."""

from __future__ import annotations

import importlib
import os
import warnings

import numpy as np
import numpy.typing as npt
import torch

from mezo_scale.noise import Noise, reference, spec
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Branches, Part

Runs = npt.NDArray[np.int64]
RAW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def interpret() -> None:
    """Make this process, which has not met Triton yet, interpret its kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")  # NumPy on the integers that are meant to overflow
    torch.set_num_threads(1)


def runs_of(pieces: list[tuple[int, int, int]], start: int) -> Runs:
    """Runs from (gap in the shard, gap in the parameter, length), the parameter's part beginning at `start`."""
    runs, at = [], 0
    for local_gap, global_gap, length in pieces:
        at, start = at + local_gap, start + global_gap
        runs.append((at, start, length))
        at, start = at + length, start + length
    return np.array(runs, dtype=np.int64).reshape(-1, 3)


def values(seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Values over many magnitudes, with zeros of both signs, float16's subnormals and its largest, and infinities."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (torch.rand(count, generator=generator) * 12 - 9)
    x = torch.randn(count, generator=generator) * magnitude
    special = torch.tensor([0.0, -0.0, 65504.0, -65519.0, 6.1e-5, -6e-8, 3e-8, float("inf"), -float("inf"), 1.0])
    x[: len(special)] = special[:count]
    return x[torch.randperm(count, generator=generator)].to(dtype)


def words(x: torch.Tensor) -> torch.Tensor:
    return x.view(RAW.get(x.dtype, x.dtype))


def differing(left: torch.Tensor, right: torch.Tensor) -> int:
    return int((words(left) != words(right)).sum())


def write_differs(
    kernels: str,
    dtype: torch.dtype,
    runs: Runs,
    *,
    seed: int = 0,
    steps: int = 1,
    directions: int = 1,
    decayed: bool = False,
    master: bool = False,
    stochastic: bool = False,
    distribution: str = "normal",
) -> int:
    """How many words of a shard, and of its remainder, `kernels` and the reference disagree on after a write."""
    count = int((runs[:, 0] + runs[:, 2]).max(initial=0)) + 3
    random = np.random.default_rng(seed)
    seeds = random.integers(0, 2**64, (steps, directions), dtype=np.uint64)
    alphas = (random.normal(size=(steps, directions)) * 10 ** random.uniform(-7, 0)).astype(np.float32)
    decays = random.uniform(0.9, 1, steps).astype(np.float32) if decayed else np.ones(steps, np.float32)
    low = torch.from_numpy(random.integers(-(2**15), 2**15, count).astype(np.int16))
    results = []
    for module in (reference, importlib.import_module(f"mezo_scale.noise.{kernels}")):
        local, remainder = values(seed, count, dtype), low.clone() if master else None
        stream = Noise(distribution).stream
        module.write_(local, runs, 2**63 + seed, seeds, alphas, decays, remainder, stochastic, stream)
        results.append((local, remainder if master else low))
    (expected, expected_low), (local, remainder) = results
    return differing(expected, local) + differing(expected_low, remainder)


def view_differs(
    kernels: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    runs: Runs,
    *,
    seed: int = 0,
    seeds: tuple[int, ...] = (7, 7),
    distribution: str = "normal",
) -> int:
    """How many words of the branches `kernels` and the reference disagree on."""
    count = int((runs[:, 0] + runs[:, 2]).max(initial=0)) + 3
    weight, branches = values(seed, count, dtype), branches_of(seeds, seed)
    results = []
    for module in (reference, importlib.import_module(f"mezo_scale.noise.{kernels}")):
        out = torch.full((len(branches), count), 5.0, dtype=out_dtype)
        module.view(weight, runs, 2**40 + seed, branches, out, Noise(distribution).stream)
        results.append(out)
    return differing(*results)


def rows_differ(
    kernels: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shape: tuple[int, ...],
    count: int,
    *,
    seed: int = 0,
    seeds: tuple[int, ...] = (7, 7),
    same: bool = True,
    distribution: str = "normal",
) -> int:
    """How many words of the rows looked up `kernels` and the reference disagree on."""
    table, branches = values(seed, int(np.prod(shape)), dtype).view(shape), branches_of(seeds, seed)
    ids = torch.randint(0, shape[0], (len(seeds), count), generator=torch.Generator().manual_seed(seed))
    ids = ids[:1].expand_as(ids).contiguous() if same else ids
    results = []
    for module in (reference, importlib.import_module(f"mezo_scale.noise.{kernels}")):
        out = torch.full((len(branches), count, *shape[1:]), 5.0, dtype=out_dtype)
        module.rows(table, seed, branches, ids, out, Noise(distribution).stream)
        results.append(out)
    return differing(*results)


MATRIX = (37, 61)
PARTS = np.array([[0, 50, 700], [705, 1000, 1], [706, 1100, 1157]])  # of the matrix, the last up to its end


def factors_of(seeds: npt.NDArray[np.uint64], param_id: int, shape: tuple[int, int], kind: Noise) -> Factors:
    """By the reference."""
    rank, place = kind.rank or 0, torch.device("cpu")
    u, v = (
        reference.draw(seeds.ravel(), param_id, kind.stream + side, 0, rank * size, place).view(seeds.size, rank, size)
        for side, size in zip((spec.LEFT, spec.RIGHT), shape, strict=True)
    )
    return Factors(u, v)


def low_rank_writes_differ(
    kernels: str,
    dtype: torch.dtype,
    kind: Noise,
    *,
    steps: int = 1,
    directions: int = 1,
    decayed: bool = False,
    master: bool = False,
    stochastic: bool = False,
) -> int:
    """As `write_differs`, of parts of a matrix whose z is of low rank, and of a vector and another matrix beside it."""
    random = np.random.default_rng(steps + directions)
    seeds = random.integers(0, 2**64, (steps, directions), dtype=np.uint64)
    alphas = random.normal(size=(2, steps, directions)).astype(np.float32)
    decays = random.uniform(0.9, 1, (1, steps)).astype(np.float32) if decayed else np.ones((1, steps), np.float32)
    shapes: list[tuple[int, ...]] = [MATRIX, (90,), (70, 8)]
    wrong, all_of = 0, [PARTS, np.array([[0, 0, 90]]), np.array([[0, 0, 560]])]
    results = []
    for module in (reference, importlib.import_module(f"mezo_scale.noise.{kernels}")):
        parts, made_of = [], []
        for number, (runs, shape) in enumerate(zip(all_of, shapes, strict=True)):
            local = values(number, 2000, dtype)
            low = torch.arange(2000).to(torch.int16) if master else None
            parts.append(Part(local, runs, 9 + number, low, number % 2))
            made_of.append(factors_of(seeds, 9 + number, shape, kind) if len(shape) == 2 else None)
        if hasattr(module, "write_all_"):
            module.write_all_(parts, seeds, alphas, decays, stochastic, kind.stream, made_of)
        else:
            for part, made in zip(parts, made_of, strict=True):
                work = (seeds, alphas[part.alphas], decays[0], part.remainder, stochastic, kind.stream, made)
                module.write_(part.local, part.runs, part.param_id, *work)
        results.append(parts)
    for one, other in zip(*results, strict=True):
        wrong += differing(one.local, other.local)
        wrong += differing(one.remainder, other.remainder) if master else 0
    return wrong


def low_rank_views_differ(kernels: str, dtype: torch.dtype, out_dtype: torch.dtype, kind: Noise) -> int:
    """As `view_differs` and `rows_differ`, of a matrix whose z is of low rank."""
    branches = branches_of((7, 7, 2**63), 1)
    seeds = np.array([seed for seed, _ in branches], dtype=np.uint64)
    made_of, weight = factors_of(seeds, 3, MATRIX, kind), values(1, MATRIX[0] * MATRIX[1], dtype)
    ids = torch.tensor([[0, 36, 5], [36, 36, 1], [2, 3, 4]])
    results = []
    for module in (reference, importlib.import_module(f"mezo_scale.noise.{kernels}")):
        out = torch.full((3, len(weight)), 5.0, dtype=out_dtype)
        module.view(weight, PARTS, 3, branches, out, kind.stream, made_of)
        found = torch.full((3, 3, MATRIX[1]), 5.0, dtype=out_dtype)
        module.rows(weight.view(MATRIX), 3, branches, ids, found, kind.stream, made_of)
        results.append(torch.cat([out.flatten(), found.flatten()]))
    return differing(*results)


def branches_of(seeds: tuple[int, ...], seed: int) -> Branches:
    scales = np.random.default_rng(seed).normal(size=len(seeds)).astype(np.float32)
    return Branches([(s, float(scale)) for s, scale in zip(seeds, scales, strict=True)])


def draw_differs(kernels: str, stream: int, start: int, count: int) -> int:
    """How many values of a stream `kernels` and the reference disagree on, for two seeds."""
    seeds, place = np.array([3, 2**63 + 5], dtype=np.uint64), torch.device("cpu")
    modules = (reference, importlib.import_module(f"mezo_scale.noise.{kernels}"))
    return differing(*(module.draw(seeds, 2**40, stream, start, count, place) for module in modules))


def kernel_box_muller_differs() -> int:
    """How many of the normals of all 65,536 radii and as many angles Triton's kernel and the reference disagree on."""
    from tests.noise import box_muller_kernel

    radii = torch.arange(1 << 16, dtype=torch.int64)
    word = (radii << 16) | (radii * 40503 % (1 << 16))
    even, odd = box_muller_kernel.normals(word)
    expected = reference._box_muller(word)
    return differing(expected[0], even) + differing(expected[1], odd)


def parts_differ(
    dtype: torch.dtype, *, master: bool = False, directions: int = 1, stochastic: bool = False, alone: bool = False
) -> int:
    """Several shards written in one call, each with multipliers of its own, against the reference one by one.

    alone: a call for each.
    """
    from mezo_scale.noise import cuda

    random = np.random.default_rng(directions)
    shards = [runs_of([(0, 0, 3000)], 5), runs_of([(0, 0, 70)], 0), runs_of([(0, 0, 66_000)], 2048)]
    shards.append(runs_of([(3, 700, 1024), (0, 5, 61), (1, 130, 1)], 16))
    seeds = random.integers(0, 2**64, (1, directions), dtype=np.uint64)
    alphas = random.normal(size=(2, 1, directions)).astype(np.float32)
    decays = np.array([[1.0], [0.9]], dtype=np.float32)
    parts, expected = [], []
    for number, runs in enumerate(shards):
        count = int((runs[:, 0] + runs[:, 2]).max()) + 2
        low = torch.from_numpy(random.integers(-(2**15), 2**15, count).astype(np.int16)) if master else None
        local, which = values(number, count, dtype), number % 2
        other, other_low = local.clone(), None if low is None else low.clone()
        reference.write_(other, runs, 9 + number, seeds, alphas[which], decays[which], other_low, stochastic, 0)
        parts.append(Part(local, runs, 9 + number, low, which, which))
        expected.append((other, other_low))
    for some in [[part] for part in parts] if alone else [parts]:
        cuda.write_all_(some, seeds, alphas, decays, stochastic, 0, [None] * len(some))
    wrong = 0
    for part, (other, other_low) in zip(parts, expected, strict=True):
        wrong += differing(other, part.local)
        wrong += 0 if other_low is None or part.remainder is None else differing(other_low, part.remainder)
    return wrong


def kept_tables_differ() -> int:
    """Two steps, on the same shard and then on another one of the same shape: what is kept must follow."""
    from mezo_scale.noise import cuda

    wrong, runs = 0, runs_of([(0, 0, 1100), (3, 4, 50)], 100)
    for seed in (1, 2):
        for _ in range(2):
            local = values(seed, 1200, torch.float32)
            expected = local.clone()
            step = np.array([[seed]], np.uint64), np.full((1, 1), seed, np.float32), np.ones(1, np.float32)
            for module, where in ((reference, expected), (cuda, local)):
                module.write_(where, runs, 3, *step, None, False, 0)
            wrong += differing(expected, local)
            out = [torch.empty(2, 1200) for _ in range(2)]
            for module, where in zip((reference, cuda), out, strict=True):
                where.zero_()
                module.view(local, runs, 3, Branches([(seed, 0.5), (seed, -0.25)]), where, 0)
            wrong += differing(*out)
    return wrong


def steps_differ(kernels: str, distribution: str = "normal") -> int:
    """How many words of a small model's losses and weights `kernels` and the reference disagree on after two steps, by
    way of all that an optimizer keeps from one to the next."""
    from torch import nn

    import mezo_scale as ms
    from mezo_scale.noise import dispatch

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(model(batch["ids"])).square().mean((1, 2))

    batch = {"ids": torch.tensor([[0, 1, 2], [3, 4, 5], [6, 0, 3], [1, 1, 2]])}
    taken, results = dispatch.kernels_on, []
    for module in (reference, importlib.import_module(f"mezo_scale.noise.{kernels}")):
        dispatch.kernels_on = lambda device, module=module: module  # type: ignore[assignment,misc]
        try:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4, bias=False))
            estimator = ms.estimators.Grouped(2)
            opt = ms.MeZO(model, lr=1e-2, eps=1e-2, distribution=distribution, estimator=estimator)
            losses = [opt.step(batch=batch, objective=objective) for _ in range(2)]
        finally:
            dispatch.kernels_on = taken
        assert opt.paired
        results.append(torch.cat([torch.tensor(losses), *(p.detach().flatten() for p in model.parameters())]))
    return differing(*results)
