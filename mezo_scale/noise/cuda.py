"""Noise on GPUs, through Triton: the same kernels for CUDA, ROCm and XPU.

Nothing here waits for the device: what the kernels read besides the tensors is uploaded once and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mezo_scale.noise import triton_kernels
from mezo_scale.noise.spec import M32, TILE

FLOAT32, BFLOAT16, FLOAT16, MASTER = range(4)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
TAKES_FACTORS = False  # whether the sweeps know low-rank noise
WARPS = 2  # 16 elements of a tile in each thread's registers
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}  # no a * b + c contracted

Runs = npt.NDArray[np.int64]


@lru_cache(maxsize=1024)
def _upload(data: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device, non_blocking=True)


def _on(device: torch.device, array: npt.NDArray[np.generic]) -> Tensor:
    """The array on the device: int64 for any integers. The same few arrays come again for every parameter and step."""
    return _upload(array.tobytes(), torch.float32 if array.dtype == np.float32 else torch.int64, device)


def _identity(param_id: int) -> tuple[int, int]:
    """The halves of the identity as int32, so that every value has one type."""
    low, high = np.array([param_id & M32, param_id >> 32], dtype=np.uint32).view(np.int32)
    return int(low), int(high)


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device; "cpu" is its interpreter."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _launches(runs: Runs) -> Iterator[tuple[Runs, int]]:
    """The runs in classes of like length, each with the most tiles a run of it meets, so that few programs idle."""
    runs = runs[runs[:, 2] > 0]
    tiles = (runs[:, 1] + runs[:, 2] - 1 >> 10) - (runs[:, 1] >> 10) + 1
    size = np.frexp(tiles.astype(np.float64))[1]
    for each in np.unique(size):
        yield runs[size == each], int(tiles[size == each].max())


def _aligned(runs: Runs) -> bool:
    """Whether all addresses of a tile's lanes are multiples of 16 elements, given that the tensors' are."""
    return not ((runs[:, 0] - runs[:, 1]) % 16).any()


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
    kind = KINDS[local.dtype] if remainder is None else MASTER
    storage = local if remainder is None else local.view(torch.int16)
    steps = [_on(local.device, array) for array in (seeds, alphas, decays)]
    for part, tiles in _launches(runs):
        with _current(local.device):
            triton_kernels.write[(len(part) * tiles,)](
                storage,
                remainder if remainder is not None else storage,
                _on(local.device, part),
                tiles,
                *_identity(param_id),
                *steps,
                *seeds.shape,
                decayed=bool((decays != 1).any()),
                kind=kind,
                stochastic=stochastic and kind in (BFLOAT16, FLOAT16),
                stream=stream,
                aligned=_aligned(part),
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
    names = [seed for seed, _ in branches]
    order = sorted(range(len(names)), key=lambda b: names.index(names[b]))
    seeds, counts = zip(*((seed, names.count(seed)) for seed in dict.fromkeys(names)), strict=True)
    targets = np.array(order, dtype=np.int64) * weight.numel()
    arrays = (
        np.array(seeds, dtype=np.uint64),
        np.cumsum(counts),
        np.array([branches[b][1] for b in order], dtype=np.float32),
        targets,
    )
    groups = [_on(weight.device, array) for array in arrays]
    for part, tiles in _launches(runs):
        with _current(weight.device):
            triton_kernels.view[(len(part) * tiles,)](
                weight,
                out,
                _on(weight.device, part),
                tiles,
                *_identity(param_id),
                *groups,
                len(seeds),
                out_kind=KINDS[out.dtype],
                stream=stream,
                aligned=_aligned(part) and not (targets % 16).any(),
                **OPTIONS,
            )


def rows(
    table: Tensor, param_id: int, branches: Sequence[tuple[int, float]], ids: Tensor, out: Tensor, stream: int
) -> None:
    width = table[0].numel()
    tiles = (width + 2 * TILE - 2) // TILE  # the most that a row meets
    seeds = np.array([seed for seed, _ in branches], dtype=np.uint64)
    scales = np.array([scale for _, scale in branches], dtype=np.float32)
    with _current(table.device):
        triton_kernels.rows[(ids.numel() * tiles,)](
            table,
            out,
            ids.contiguous(),
            tiles,
            *_identity(param_id),
            _on(table.device, seeds),
            _on(table.device, scales),
            table.shape[0],
            width,
            ids.shape[1],
            out_kind=KINDS[out.dtype],
            stream=stream,
            **OPTIONS,
        )
