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

from mezo_scale.noise import triton_kernels
from mezo_scale.noise.device_tables import constant, current, parts_table, runs_table
from mezo_scale.noise.parts import Branches, Part
from mezo_scale.noise.spec import M32, TILE
from mezo_scale.noise.triton_tiles import INTERPRETED

FLOAT32, BFLOAT16, FLOAT16, MASTER = range(4)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
TAKES_FACTORS = False  # whether the sweeps know low-rank noise
WARPS = 1  # a whole tile in one warp: the fewest instructions for an element (tools/kernel_sass.py)
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}  # no a * b + c contracted

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
) -> None:
    write_all_([Part(local, runs, param_id, remainder)], seeds, alphas[None], decays[None], stochastic, stream)


def write_all_(
    parts: Sequence[Part],
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    stochastic: bool,
    stream: int,
    factors: Sequence[None] = (),
) -> None:
    """`write_` of several shards, in one launch for all that are stored alike.

    alphas: [groups, S, K]; decays: [rows, S]; each part says which. factors: no kernel takes them yet.
    """
    kinds: dict[tuple[torch.device, int], list[Part]] = {}
    for part in parts:
        kind = KINDS[part.local.dtype] if part.remainder is None else MASTER
        kinds.setdefault((part.local.device, kind), []).append(part)
    steps, directions = seeds.shape
    for (device, kind), alike in kinds.items():
        here = [current(device, name, array) for name, array in (("s", seeds), ("a", alphas), ("d", decays))]
        for places in parts_table(alike):
            assert places.tensors is not None
            local, low = places.tensors
            with _current(device):
                triton_kernels.write[(places.programs,)](
                    local if kind != MASTER else local.view(torch.int16),
                    low if low is not None else local,
                    *places.arrays,
                    *here,
                    steps,
                    directions=directions,
                    decayed=bool((decays != 1).any()),
                    kind=kind,
                    stochastic=stochastic and kind in (BFLOAT16, FLOAT16),
                    stream=stream,
                    one_step=steps == 1,
                    single=places.single,
                    aligned=places.aligned,
                    ptx=_takes_ptx(device),
                    **OPTIONS,
                )


def draw(
    seeds: npt.NDArray[np.uint64], param_id: int, stream: int, start: int, count: int, device: torch.device
) -> Tensor:
    z = torch.zeros(len(seeds), count, dtype=torch.float32, device=device)  # 0 + 1 * z is z: no z is zero
    runs, one = np.array([[0, start, count]], dtype=np.int64), np.ones((1, 1), dtype=np.float32)
    for row, seed in zip(z, seeds, strict=True):
        write_(row, runs, param_id, np.full((1, 1), seed), one, one[0], None, False, stream)
    return z


def view(
    weight: Tensor, runs: Runs, param_id: int, branches: Sequence[tuple[int, float]], out: Tensor, stream: int
) -> None:
    """One launch for each seed; those of one seed that are neighbours share it."""
    first = 0
    while first < len(branches):
        last = first + 1
        while last < len(branches) and branches[last][0] == branches[first][0]:
            last += 1
        _view(weight, runs, param_id, branches[first:last], out[first:last], stream)
        first = last


def _view(
    weight: Tensor, runs: Runs, param_id: int, branches: Sequence[tuple[int, float]], out: Tensor, stream: int
) -> None:
    device, numel = weight.device, weight.numel()
    seed, scales = _uploaded(branches, device)
    targets = constant(device, tuple(numel * number for number in range(len(branches))))
    aligned = numel % 16 == 0 or len(branches) == 1
    for places in runs_table(runs, param_id, device):
        with _current(device):
            triton_kernels.view[(places.programs,)](
                weight,
                out,
                *places.arrays,
                seed,
                scales,
                targets,
                branches=len(branches),
                out_kind=KINDS[out.dtype],
                stream=stream,
                single=places.single,
                aligned=places.aligned and aligned,
                ptx=_takes_ptx(device),
                **OPTIONS,
            )


def _uploaded(branches: Sequence[tuple[int, float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds and scales of neighbours, in the buffer of all branches of the step where they are a part of those."""
    part = branches if isinstance(branches, Branches) else Branches(branches)
    seeds, scales = current(device, "seeds", part.whole.seeds), current(device, "scales", part.whole.scales)
    return seeds[part.first :], scales[part.first :]


def rows(
    table: Tensor, param_id: int, branches: Sequence[tuple[int, float]], ids: Tensor, out: Tensor, stream: int
) -> None:
    width = table[0].numel()
    tiles = (width + 2 * TILE - 2) // TILE  # the most that a row meets
    seeds, scales = _uploaded(branches, table.device)
    with _current(table.device):
        triton_kernels.rows[(ids.numel() * tiles,)](
            table,
            out,
            ids.contiguous(),
            tiles,
            *_identity(param_id),
            seeds,
            scales,
            table.shape[0],
            width,
            ids.shape[1],
            out_kind=KINDS[out.dtype],
            stream=stream,
            ptx=_takes_ptx(table.device),
            **OPTIONS,
        )
