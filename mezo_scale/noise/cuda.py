"""Noise on GPUs, through Triton: the same kernels for CUDA, ROCm and XPU.

Nothing here waits for the device. What the kernels read besides the tensors is uploaded once and kept
(`device_tables`): where elements lie for as long as they lie there, a step's seeds and multipliers in buffers that stay
where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mezo_scale.noise import triton_kernels, triton_low_rank
from mezo_scale.noise.device_tables import constant, current, parts_table, runs_table
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Branches, Part
from mezo_scale.noise.spec import M32, TILE
from mezo_scale.noise.triton_tiles import INTERPRETED

FLOAT32, BFLOAT16, FLOAT16, MASTER = range(4)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
WARPS = 1  # a whole tile in one warp: the fewest instructions for an element (tools/kernel_sass.py)
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}  # no a * b + c contracted
OF_LOW_RANK = OPTIONS | {"num_warps": 4}  # a quarter of the registers: little is computed, and more is waited for

Runs = npt.NDArray[np.int64]


def _identity(param_id: int) -> tuple[int, int]:
    """The halves of the identity as int32, so that every value has one type."""
    low, high = np.array([param_id & M32, param_id >> 32], dtype=np.uint32).view(np.int32)
    return int(low), int(high)


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device; "cpu" is its interpreter."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _takes_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and not INTERPRETED.value


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
    write_all_([part], seeds, alphas[None], decays[None], stochastic, stream, [factors])


def write_all_(
    parts: Sequence[Part],
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    stochastic: bool,
    stream: int,
    factors: Sequence[Factors | None],
) -> None:
    """`write_` of several shards, in one launch for all that are stored alike; with factors, in one for each.

    alphas: [groups, S, K]; decays: [rows, S]; each part says which. factors: of each part.
    """
    kinds: dict[tuple[torch.device, int, Factors | None], list[Part]] = {}
    for part, made_of in zip(parts, factors, strict=True):
        kind = KINDS[part.local.dtype] if part.remainder is None else MASTER
        kinds.setdefault((part.local.device, kind, made_of), []).append(part)
    steps, directions = seeds.shape
    for (device, kind, made_of), alike in kinds.items():
        here = [current(device, name, array) for name, array in (("s", seeds), ("a", alphas), ("d", decays))]
        shared = {
            "directions": directions,
            "decayed": bool((decays != 1).any()),
            "kind": kind,
            "stochastic": stochastic and kind in (BFLOAT16, FLOAT16),
            "ptx": _takes_ptx(device),
            **(OPTIONS if made_of is None else OF_LOW_RANK),
        }
        for places in parts_table(alike):
            assert places.tensors is not None
            local, low = places.tensors
            tensors = local if kind != MASTER else local.view(torch.int16), low if low is not None else local
            shared |= {"single": places.single, "aligned": places.aligned}
            with _current(device):
                if made_of is None:
                    triton_kernels.write[(places.programs,)](
                        *tensors, *places.arrays, *here, steps, one_step=steps == 1, stream=stream, **shared
                    )
                else:
                    given, of_rank = _multiplied(made_of)
                    triton_low_rank.write[(places.programs,)](
                        *tensors, *places.arrays, *here, made_of.u, made_of.v, steps, *given, **of_rank, **shared
                    )


def _multiplied(factors: Factors) -> tuple[tuple[int, int, float], dict[str, int]]:
    """What a kernel is told of factors: their sides and scale, and their rank."""
    return (factors.u.shape[2], factors.v.shape[2], factors.scale), {"rank": factors.u.shape[1]}


def draw(
    seeds: npt.NDArray[np.uint64], param_id: int, stream: int, start: int, count: int, device: torch.device
) -> Tensor:
    out = torch.empty(len(seeds), count, dtype=torch.float32, device=device)
    tiles = (start + count - 1 >> 10) - (start >> 10) + 1
    if out.numel():
        with _current(device):
            triton_kernels.values[(tiles, len(seeds))](
                out,
                current(device, "drawn", seeds),
                *_identity(param_id),
                start,
                count,
                stream=stream,
                ptx=_takes_ptx(device),
                **OPTIONS,
            )
    return out


def view(
    weight: Tensor,
    runs: Runs,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    out: Tensor,
    stream: int,
    factors: Factors | None = None,
) -> None:
    """One launch for each seed; those of one seed that are neighbours share it."""
    first = 0
    while first < len(branches):
        last = first + 1
        while last < len(branches) and branches[last][0] == branches[first][0]:
            last += 1
        own = None if factors is None else Factors(factors.u[first:last], factors.v[first:last])
        _view(weight, runs, param_id, branches[first:last], out[first:last], stream, own)
        first = last


def _view(
    weight: Tensor,
    runs: Runs,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    out: Tensor,
    stream: int,
    factors: Factors | None,
) -> None:
    device, numel = weight.device, weight.numel()
    seed, scales = _uploaded(branches, device)
    targets = constant(device, tuple(numel * number for number in range(len(branches))))
    aligned = numel % 16 == 0 or len(branches) == 1
    options = OPTIONS if factors is None else OF_LOW_RANK
    shared = {"branches": len(branches), "out_kind": KINDS[out.dtype], **options}
    for places in runs_table(runs, param_id, device):
        shared |= {"single": places.single, "aligned": places.aligned and aligned}
        with _current(device):
            if factors is None:
                triton_kernels.view[(places.programs,)](
                    weight, out, *places.arrays, seed, scales, targets, stream=stream, ptx=_takes_ptx(device), **shared
                )
            else:
                given, of_rank = _multiplied(factors)
                triton_low_rank.view[(places.programs,)](
                    weight, out, *places.arrays, factors.u, factors.v, scales, targets, *given, **of_rank, **shared
                )


def _uploaded(branches: Sequence[tuple[int, float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds and scales of neighbours, in the buffer of all branches of the step where they are a part of those."""
    part = branches if isinstance(branches, Branches) else Branches(branches)
    seeds, scales = current(device, "seeds", part.whole.seeds), current(device, "scales", part.whole.scales)
    return seeds[part.first :], scales[part.first :]


def rows(
    table: Tensor,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    ids: Tensor,
    out: Tensor,
    stream: int,
    factors: Factors | None = None,
) -> None:
    width, ids = table[0].numel(), ids.contiguous()
    seeds, scales = _uploaded(branches, table.device)
    sides = table.shape[0], width, ids.shape[1]
    shared = {"out_kind": KINDS[out.dtype], **(OPTIONS if factors is None else OF_LOW_RANK)}
    with _current(table.device):
        if factors is None:
            tiles = (width + 2 * TILE - 2) // TILE  # the most that a row meets
            given = (tiles, *_identity(param_id), seeds, scales)
            triton_kernels.rows[(ids.numel() * tiles,)](
                table, out, ids, *given, *sides, stream=stream, ptx=_takes_ptx(table.device), **shared
            )
        else:
            parts, (*_, scale), of_rank = -(-width // TILE), *_multiplied(factors)
            made_of = (factors.u, factors.v, scales, parts)
            triton_low_rank.rows[(ids.numel() * parts,)](table, out, ids, *made_of, *sides, scale, **of_rank, **shared)
