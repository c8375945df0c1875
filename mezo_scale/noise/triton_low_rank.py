"""Low-rank noise in Triton: the sweeps that multiply factors in registers, a tile of 1024 neighbours at a time.

u, v: float32 [directions, rank, m] and [directions, rank, n], as `low_rank.Factors` has them. Every product and every
sum is rounded on its own, in the order of the directions and of the rank.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mezo_scale.noise import spec
from mezo_scale.noise.triton_draw import rounding_bits
from mezo_scale.noise.triton_kernels import identity, job
from mezo_scale.noise.triton_tiles import MASTER, nearest, put, read, rounded_up_or_down

FLAT = tl.constexpr(spec.RADEMACHER)  # the stream whose tiles are held as [1024]


@triton.jit
def _places(tile, n):
    """In a matrix with n columns the row of a tile's first element, and how many rows further and in which column each
    element is."""
    first = tile * 1024
    row = first // n
    column = (first - row * n).to(tl.int32) + tl.arange(0, 1024)
    further = column // n
    return row, further, column - further * n


@triton.jit
def _product(u, v, row, column, known, m, n, scale, rank: tl.constexpr):
    """z of one direction; row: from the one that u begins with; known: which elements are in the matrix."""
    z = tl.load(u + row, mask=known, other=0.0) * tl.load(v + column)
    for _ in range(1, rank):
        u += m
        v += n
        z = z + tl.load(u + row, mask=known, other=0.0) * tl.load(v + column)
    if rank > 1:
        z = z * scale
    return z


@triton.jit(do_not_specialize=["steps", "m", "n"])
def write(
    local,  # for masters, their int16 halves
    remainder,
    table,  # as `triton_kernels.job` takes it; the numbers are rows of alphas and of decays
    firsts,
    coarse,
    seeds,  # int64 [steps, directions]
    alphas,  # float32 [parameter groups, steps, directions]
    decays,  # float32 [rows, steps]
    u,  # of all steps
    v,
    steps,
    m,
    n,
    scale,
    directions: tl.constexpr,
    rank: tl.constexpr,
    decayed: tl.constexpr,
    kind: tl.constexpr,
    stochastic: tl.constexpr,
    single: tl.constexpr,
    aligned: tl.constexpr,
    ptx: tl.constexpr,
):
    tile, lo, hi, run, at, low_at = job(table, firsts, coarse, single, aligned)
    p0, p1 = identity(run)
    alphas += tl.load(run + 5) * steps * directions
    decays += tl.load(run + 6) * steps
    local, remainder = local + at, remainder + low_at
    first, row, column = _places(tile, n)
    known = tl.arange(0, 1024) < hi
    u += first
    x = read(local, lo, hi, FLAT, False)
    if kind == MASTER:
        low = read(remainder, lo, hi, FLAT, False)
        theta = ((x.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        theta = x.to(tl.float32)
    for step in range(steps):
        acc = tl.load(alphas) * _product(u, v, row, column, known, m, n, scale, rank)
        for k in range(1, directions):  # not from zero, as -0 + -0 is -0
            z = _product(u + k * rank * m, v + k * rank * n, row, column, known, m, n, scale, rank)
            acc = acc + tl.load(alphas + k) * z
        if decayed:
            theta = theta * tl.load(decays + step)
        theta = theta + acc
        if stochastic:
            random = rounding_bits(FLAT, tl.load(seeds), p0, p1, tile, ptx)
            theta = rounded_up_or_down(theta, random, kind).to(tl.float32)
        elif kind != MASTER:
            theta = nearest(theta, kind).to(tl.float32)
        seeds, alphas = seeds + directions, alphas + directions
        u, v = u + directions * rank * m, v + directions * rank * n
    if kind == MASTER:
        bits = theta.to(tl.int32, bitcast=True)
        put(local, ((bits + 0x8000) >> 16).to(tl.int16), lo, hi, FLAT, False)
        put(remainder, bits.to(tl.int16), lo, hi, FLAT, False)
    else:
        put(local, nearest(theta, kind), lo, hi, FLAT, False)


@triton.jit(do_not_specialize=["m", "n"])
def view(
    weight,
    out,
    table,  # as `triton_kernels.job` takes it
    firsts,
    coarse,
    u,  # of the seed of all branches here
    v,
    scales,  # float32 [branches]
    targets,  # int64 [branches]: where each branch's output begins
    m,
    n,
    scale,
    branches: tl.constexpr,
    rank: tl.constexpr,
    out_kind: tl.constexpr,
    single: tl.constexpr,
    aligned: tl.constexpr,
):
    tile, lo, hi, _, at, _ = job(table, firsts, coarse, single, aligned)
    first, row, column = _places(tile, n)
    theta = read(weight + at, lo, hi, FLAT, False).to(tl.float32)
    z = _product(u + first, v, row, column, tl.arange(0, 1024) < hi, m, n, scale, rank)
    for b in tl.static_range(branches):
        total = theta + tl.load(scales + b) * z
        put(out + at + tl.load(targets + b), nearest(total, out_kind), lo, hi, FLAT, False)


@triton.jit(do_not_specialize=["parts", "height", "width", "count"])
def rows(
    table,
    out,
    ids,  # int64 [branches, count]
    u,  # of each branch
    v,
    scales,  # float32 [branches]
    parts,  # programs for a row
    height,
    width,
    count,
    scale,
    rank: tl.constexpr,
    out_kind: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    place = pid // parts
    b, found = place // count, tl.load(ids + place)
    known = (found >= 0) & (found < height)
    row = tl.where(known, found, 0)
    column = (pid % parts).to(tl.int32) * 1024 + tl.arange(0, 1024)
    inside = column < width
    theta = tl.load(table + row * width + column, mask=inside, other=0).to(tl.float32)
    u, v = u + b * rank * height + row, v + b * rank * width
    z = _product(u, v, tl.zeros((1024,), tl.int32), tl.where(inside, column, 0), inside, height, width, scale, rank)
    total = tl.where(known, theta + tl.load(scales + b) * z, float("nan"))
    tl.store(out + place * width + column, nearest(total, out_kind), mask=inside)
