"""The GPU's sweeps in Triton. One program takes one tile of 1024 elements and keeps it in registers throughout."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mezo_scale.noise.triton_draw import draw, rounding_bits
from mezo_scale.noise.triton_tiles import MASTER, nearest, put, read, rounded_up_or_down


@triton.jit
def job(table, firsts, coarse, single: tl.constexpr, aligned: tl.constexpr):
    """This program's tile, the bounds lo .. hi - 1 in it, the row of its run, and where element 0 lies in both tensors.

    table: int64 [n, 8], a row for each run: (place of its first element in the first and the second tensor, first
        element in the parameter, elements, param_id, and two numbers for the kernel). A place is counted in elements
        from the pointer that the kernel has, and may lie in another tensor.
    firsts: int64 [n + 1], each run's first program, and how many there are; coarse: int32, the run of every 64th one.
    single: there is one run.
    """
    pid = tl.program_id(0).to(tl.int64)
    run = table
    if not single:
        number = tl.load(coarse + (pid >> 6)).to(tl.int64)
        while tl.load(firsts + number + 1) <= pid:
            number += 1
        pid -= tl.load(firsts + number)
        run = table + number * 8
    start, length = tl.load(run + 2), tl.load(run + 3)
    tile = (start >> 10) + pid
    lo, hi = bounds(tile, start, length)
    here = tile * 1024 - start
    one, other = here + tl.load(run), here + tl.load(run + 1)
    if aligned:
        one, other = tl.multiple_of(one, 16), tl.multiple_of(other, 16)
    return tile, lo, hi, run, one, other


@triton.jit
def identity(run):
    """The halves of a run's param_id."""
    param_id = tl.load(run + 4)
    return param_id.to(tl.uint32), (param_id >> 32).to(tl.uint32)


@triton.jit
def bounds(tile, start, length):
    first = start - tile * 1024
    return tl.maximum(first, 0).to(tl.int32), tl.minimum(first + length, 1024).to(tl.int32)


@triton.jit
def _combined(seeds, alphas, directions: tl.constexpr, stream: tl.constexpr, p0, p1, tile, ptx: tl.constexpr):
    """The sum over directions, in order, of alpha z. Four of them without a loop, which would carry the sum in another
    layout than z has, through shared memory at every turn. Not a sum from zero, as -0 + -0 is -0."""
    first: tl.constexpr = (directions - 1) % 4 + 1
    acc = tl.load(alphas) * draw(stream, tl.load(seeds), p0, p1, tile, ptx)
    for k in tl.static_range(1, first):
        acc = acc + tl.load(alphas + k) * draw(stream, tl.load(seeds + k), p0, p1, tile, ptx)
    for k in range(first, directions, 4):
        for j in tl.static_range(4):
            acc = acc + tl.load(alphas + k + j) * draw(stream, tl.load(seeds + k + j), p0, p1, tile, ptx)
    return acc


@triton.jit
def _stepped(
    theta,
    seeds,
    alphas,
    decays,
    p0,
    p1,
    tile,
    directions: tl.constexpr,
    decayed: tl.constexpr,
    kind: tl.constexpr,
    stochastic: tl.constexpr,
    stream: tl.constexpr,
    ptx: tl.constexpr,
):
    """theta after one step, as float32 of what is stored."""
    acc = _combined(seeds, alphas, directions, stream, p0, p1, tile, ptx)
    if decayed:
        theta = theta * tl.load(decays)
    theta = theta + acc
    if stochastic:
        random = rounding_bits(stream, tl.load(seeds), p0, p1, tile, ptx)
        theta = rounded_up_or_down(theta, random, kind).to(tl.float32)
    elif kind != MASTER:
        theta = nearest(theta, kind).to(tl.float32)
    return theta


@triton.jit(do_not_specialize=["steps"])
def write(
    local,  # for masters, their int16 halves
    remainder,
    table,  # as `job` takes it; the numbers are rows of alphas and of decays
    firsts,
    coarse,
    seeds,  # int64 [steps, directions]
    alphas,  # float32 [parameter groups, steps, directions]
    decays,  # float32 [rows, steps]
    steps,
    directions: tl.constexpr,
    decayed: tl.constexpr,
    kind: tl.constexpr,
    stochastic: tl.constexpr,
    stream: tl.constexpr,
    one_step: tl.constexpr,
    single: tl.constexpr,
    aligned: tl.constexpr,
    ptx: tl.constexpr,
):
    tile, lo, hi, run, at, low_at = job(table, firsts, coarse, single, aligned)
    p0, p1 = identity(run)
    alphas += tl.load(run + 5) * steps * directions
    decays += tl.load(run + 6) * steps
    local, remainder = local + at, remainder + low_at
    # The whole of it twice, so that a whole tile computes no bounds.
    if (lo == 0) & (hi == 1024):
        _write_tile(
            local, remainder, lo, hi, True, seeds, alphas, decays, steps, p0, p1, tile, directions, decayed, kind,
            stochastic, stream, one_step, ptx,
        )  # fmt: skip
    else:
        _write_tile(
            local, remainder, lo, hi, False, seeds, alphas, decays, steps, p0, p1, tile, directions, decayed, kind,
            stochastic, stream, one_step, ptx,
        )  # fmt: skip


@triton.jit
def _write_tile(
    local, remainder, lo, hi, inside: tl.constexpr, seeds, alphas, decays, steps, p0, p1, tile,
    directions: tl.constexpr, decayed: tl.constexpr, kind: tl.constexpr, stochastic: tl.constexpr,
    stream: tl.constexpr, one_step: tl.constexpr, ptx: tl.constexpr,
):  # fmt: skip
    x = read(local, lo, hi, stream, inside)
    if kind == MASTER:
        low = read(remainder, lo, hi, stream, inside)
        theta = ((x.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        theta = x.to(tl.float32)
    if one_step:
        theta = _stepped(theta, seeds, alphas, decays, p0, p1, tile, directions, decayed, kind, stochastic, stream, ptx)
    else:
        for step in range(steps):
            here = step * directions
            theta = _stepped(
                theta,
                seeds + here,
                alphas + here,
                decays + step,
                p0,
                p1,
                tile,
                directions,
                decayed,
                kind,
                stochastic,
                stream,
                ptx,
            )
    if kind == MASTER:
        bits = theta.to(tl.int32, bitcast=True)
        put(local, ((bits + 0x8000) >> 16).to(tl.int16), lo, hi, stream, inside)
        put(remainder, bits.to(tl.int16), lo, hi, stream, inside)
    else:
        put(local, nearest(theta, kind), lo, hi, stream, inside)


@triton.jit
def view(
    weight,
    out,
    table,  # as `job` takes it
    firsts,
    coarse,
    seed,  # int64, of all branches here
    scales,  # float32 [branches]
    targets,  # int64 [branches]: where each branch's output begins
    branches: tl.constexpr,
    out_kind: tl.constexpr,
    stream: tl.constexpr,
    single: tl.constexpr,
    aligned: tl.constexpr,
    ptx: tl.constexpr,
):
    tile, lo, hi, run, at, _ = job(table, firsts, coarse, single, aligned)
    p0, p1 = identity(run)
    weight, out = weight + at, out + at
    if (lo == 0) & (hi == 1024):
        _view_tile(
            weight, out, lo, hi, True, seed, scales, targets, p0, p1, tile, branches, out_kind, stream, aligned, ptx
        )
    else:
        _view_tile(
            weight, out, lo, hi, False, seed, scales, targets, p0, p1, tile, branches, out_kind, stream, aligned, ptx
        )


@triton.jit
def _view_tile(
    weight, out, lo, hi, inside: tl.constexpr, seed, scales, targets, p0, p1, tile, branches: tl.constexpr,
    out_kind: tl.constexpr, stream: tl.constexpr, aligned: tl.constexpr, ptx: tl.constexpr,
):  # fmt: skip
    theta = read(weight, lo, hi, stream, inside).to(tl.float32)
    z = draw(stream, tl.load(seed), p0, p1, tile, ptx)
    for b in tl.static_range(branches):
        to = tl.load(targets + b)
        to = tl.multiple_of(to, 16) if aligned else to
        put(out + to, nearest(theta + tl.load(scales + b) * z, out_kind), lo, hi, stream, inside)


@triton.jit(do_not_specialize=["p0", "p1", "start", "count"])
def values(
    out,  # [directions, count]
    seeds,  # int64 [directions]
    p0,
    p1,
    start,
    count,
    stream: tl.constexpr,
    ptx: tl.constexpr,
):
    """z itself, of each direction in the grid's second dim."""
    begin, direction = start.to(tl.int64), tl.program_id(1).to(tl.int64)
    tile = (begin >> 10) + tl.program_id(0)
    lo, hi = bounds(tile, begin, count)
    z = draw(stream, tl.load(seeds + direction), p0.to(tl.uint32), p1.to(tl.uint32), tile, ptx)
    put(out + direction * count + (tile * 1024 - begin), z, lo, hi, stream, False)


@triton.jit(do_not_specialize=["p0", "p1", "tiles", "height", "count"])
def rows(
    table,
    out,
    ids,  # int64 [branches, count]
    tiles,
    p0,
    p1,
    seeds,  # int64 [branches]
    scales,  # float32 [branches]
    height,
    width,
    count,
    out_kind: tl.constexpr,
    stream: tl.constexpr,
    ptx: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles
    b, found = row // count, tl.load(ids + row)
    known = (found >= 0) & (found < height)
    start = tl.where(known, found, 0) * width
    tile = (start >> 10) + pid % tiles
    lo, hi = bounds(tile, start, width)
    if hi > lo:  # always masked: a row is narrow, and seldom begins where a tile does
        theta = read(table + tile * 1024, lo, hi, stream, False).to(tl.float32)
        z = draw(stream, tl.load(seeds + b), p0.to(tl.uint32), p1.to(tl.uint32), tile, ptx)
        total = theta + tl.load(scales + b) * z
        total = tl.where(known, total, float("nan"))
        put(out + row * width + (tile * 1024 - start), nearest(total, out_kind), lo, hi, stream, False)
