"""The noise in plain torch: the meaning of the specification, on any device torch runs on.

Slow (every operation is a pass over memory) and obvious. The CPU and Triton kernels are held to its bits; devices
without a kernel use it as it is. Only exactly specified IEEE-754 operations appear, each as an operation of its
own, so nothing can be contracted into a fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mezo_scale.noise import spec
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.spec import COS, LANES, LN2, LOG, M32, SIN, TILE

CHUNK = 1 << 20  # elements worked on at once; bounds the memory of the intermediates (about 100 bytes each)


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x; split, because 32 x 32 bits overflow int64."""
    low = x * (constant & 0xFFFF)
    high = x * (constant >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def _words(seed: int, param_id: int, stream: int, block: Tensor) -> Tensor:
    """Philox words int64 [n, 4, m] for block numbers int64 [n, m]."""
    c0, c1 = block & M32, block >> 32 | stream << 28
    c2, c3 = torch.full_like(block, param_id & M32), torch.full_like(block, param_id >> 32)
    k0, k1 = seed & M32, seed >> 32
    for _ in range(spec.ROUNDS):
        high0, low0 = _multiply(spec.MULTIPLIERS[0], c0)
        high1, low1 = _multiply(spec.MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + spec.WEYL[0]) & M32, (k1 + spec.WEYL[1]) & M32
    return torch.stack((c0, c1, c2, c3), dim=1)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _box_muller(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals, float32, from each 32-bit word (int64)."""
    u = ((x >> 16).float() + 0.5) * 2.0**-16
    b = u.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    exponent = ((b >> 23) - 127).float()
    t = ((b & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    squared = (exponent * LN2 + t * _horner(LOG, t)) * -2.0
    radius = squared.double().sqrt().float()  # torch's float32 sqrt on the CPU is not correctly rounded
    a = x & 0xFFFF
    f = ((a & 0x3FFF).float() + 0.5) * 2.0**-14 - 0.5
    y = f * f
    s, c, quarter = f * _horner(SIN, y), _horner(COS, y), a >> 14
    cosine = torch.where(quarter % 2 == 0, c, s)
    cosine = torch.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    sine = torch.where(quarter % 2 == 0, s, c)
    sine = torch.where(quarter >= 2, -sine, sine)
    return radius * cosine, radius * sine


def _tiles(seed: int, param_id: int, stream: int, tile: Tensor) -> Tensor:
    """The values [n, 1024] of the tiles int64 [n]: float32, or int64 for the rounding bits."""
    form = stream & spec.FORM
    if form == spec.RADEMACHER:
        block = tile[:, None] * 8 + torch.arange(8, device=tile.device)
        words = _words(seed, param_id, stream, block).transpose(1, 2)
        bits = words[..., None] >> torch.arange(32, device=tile.device) & 1
        return (1 - 2 * bits).float().reshape(-1, TILE)
    words = _words(seed, param_id, stream, tile[:, None] * LANES + torch.arange(LANES, device=tile.device))
    pair = (words & 0xFFFF, words >> 16) if form == spec.ROUNDING else _box_muller(words)
    return torch.stack(pair, dim=2).reshape(-1, TILE)


def values(seed: int, param_id: int, elements: Tensor, stream: int = spec.NORMAL) -> Tensor:
    """The values at `elements`, int64 of any shape, of one stream: float32, or int64 for the rounding bits."""
    # MPS has no float64, which the correctly rounded square root needs.
    here = elements.cpu() if elements.device.type == "mps" else elements
    tile, inverse = torch.unique(here >> 10, return_inverse=True)
    found = _tiles(seed, param_id, stream, tile).flatten()[inverse * TILE + (here & (TILE - 1))]
    return found.to(elements.device)


def span(seed: int, param_id: int, start: int, count: int, stream: int, device: torch.device) -> Tensor:
    """`values` at the elements start .. start + count - 1."""
    elements = torch.arange(start, start + count, device=device)
    return torch.cat([values(seed, param_id, part, stream) for part in elements.split(CHUNK)])


def draw(
    seeds: npt.NDArray[np.uint64], param_id: int, stream: int, start: int, count: int, device: torch.device
) -> Tensor:
    return torch.stack([span(int(seed), param_id, start, count, stream, device) for seed in seeds])


def _pieces(runs: npt.NDArray[np.int64], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The runs as pairs (local index, global element), int64, about CHUNK at a time."""
    ends = np.cumsum(runs[:, 2])
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, CHUNK):
        position = np.arange(begin, min(begin + CHUNK, total))
        run = np.searchsorted(ends, position, side="right")
        within = position - (ends[run] - runs[run, 2])
        yield (
            torch.from_numpy(runs[run, 0] + within).to(device),
            torch.from_numpy(runs[run, 1] + within).to(device),
        )


def _round_stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 rounded to `dtype` away from zero where its lost part, in 65536ths of a step, reaches 65536 - bits."""
    if dtype == torch.float32:
        return x
    if dtype == torch.bfloat16:
        rounded = (x.view(torch.int32).long() + bits & ~0xFFFF).to(torch.int32).view(torch.float32)
    else:
        normal = (x.view(torch.int32).long() + (bits >> 3) & ~0x1FFF).to(torch.int32).view(torch.float32)
        steps = x.abs() * 2.0**24  # below 2^-14 float16 is evenly spaced by 2^-24
        whole = steps.floor()
        up = ((steps - whole) * 65536.0 >= (65536 - bits).float()).float()
        subnormal = torch.copysign((whole + up) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal, normal)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)


def _z(seed: int, param_id: int, elements: Tensor, stream: int, factors: Factors | None, position: int) -> Tensor:
    """z of one direction; with factors that of their `position`."""
    return values(seed, param_id, elements, stream) if factors is None else factors.product(position, elements)


def write_(
    local: Tensor,
    runs: npt.NDArray[np.int64],
    param_id: int,
    seeds: npt.NDArray[np.uint64],
    alphas: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    remainder: Tensor | None,
    stochastic: bool,
    stream: int,
    factors: Factors | None = None,
) -> None:
    for index, element in _pieces(runs, local.device):
        if remainder is None:
            theta = local[index].float()
        else:
            high = local.view(torch.int16)[index].int() << 16
            theta = (high + remainder[index].int()).view(torch.float32)
        for step, (step_seeds, step_alphas, decay) in enumerate(zip(seeds, alphas, decays, strict=True)):
            first = step * len(step_seeds)
            products = (
                _z(int(seed), param_id, element, stream, factors, first + k) * float(alpha)
                for k, (seed, alpha) in enumerate(zip(step_seeds, step_alphas, strict=True))
            )
            acc = next(products)
            for product in products:
                acc = acc + product
            if decay != 1:
                theta = theta * float(decay)
            theta = theta + acc
            if remainder is None and stochastic:
                bits = values(int(step_seeds[0]), param_id, element, spec.ROUNDING)
                theta = _round_stochastic(theta, bits, local.dtype).float()
            elif remainder is None:
                theta = theta.to(local.dtype).float()
        if remainder is None:
            local[index] = theta.to(local.dtype)
        else:
            master = theta.view(torch.int32)
            local.view(torch.int16)[index] = (master + 0x8000 >> 16).to(torch.int16)
            remainder[index] = master.to(torch.int16)


def view(
    weight: Tensor,
    runs: npt.NDArray[np.int64],
    param_id: int,
    branches: Sequence[tuple[int, float]],
    out: Tensor,
    stream: int,
    factors: Factors | None = None,
) -> None:
    flat, out = weight.reshape(-1), out.view(len(branches), -1)
    for index, element in _pieces(runs, weight.device):
        theta = flat[index].float()
        names = [seed for seed, _ in branches]
        z = {seed: _z(seed, param_id, element, stream, factors, names.index(seed)) for seed in set(names)}
        for b, (seed, scale) in enumerate(branches):
            out[b, index] = (theta + z[seed] * scale).to(out.dtype)


def rows(
    table: Tensor,
    param_id: int,
    branches: Sequence[tuple[int, float]],
    ids: Tensor,
    out: Tensor,
    stream: int,
    factors: Factors | None = None,
) -> None:
    flat = table.reshape(table.shape[0], -1)
    width = flat.shape[1]
    column = torch.arange(width, device=table.device)
    at_once = max(1, CHUNK // max(1, width))
    for b, (seed, scale) in enumerate(branches):
        target = out[b].view(ids.shape[1], width)
        for part, row in zip(target.split(at_once), ids[b].split(at_once), strict=True):
            z = _z(seed, param_id, row[:, None] * width + column, stream, factors, b)
            part.copy_(flat[row].float() + z * scale)
