"""The GPU's sweeps in Triton. One program takes one tile of 1024 elements and keeps it in registers throughout.

A tile of normals is held as [128 columns, 2, 2, 2]: the word's two bits, then the parity; each of its eight lanes is
128 neighbours in memory, so every load and store is contiguous. A tile of signs is held as [1024].

Triton reads annotations as types of its own, so only its compile-time arguments carry one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl

from mezo_scale.noise import spec

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

FLOAT32, BFLOAT16, FLOAT16, MASTER = (tl.constexpr(kind) for kind in range(4))
ROUNDING, RADEMACHER = map(tl.constexpr, (spec.ROUNDING, spec.RADEMACHER))
M0, M1 = map(tl.constexpr, spec.MULTIPLIERS)
W0, W1 = map(tl.constexpr, spec.WEYL)
ROUNDS = tl.constexpr(spec.ROUNDS)
# -2 is folded into LN2 and LOG, as a power of two and a sign move through every rounding unchanged.
LN2 = tl.constexpr(-2 * spec.LN2)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(-2 * coefficient) for coefficient in spec.LOG)
S0, S1, S2, S3 = map(tl.constexpr, spec.SIN)
C0, C1, C2, C3 = map(tl.constexpr, spec.COS)
P16, P24, P32 = (tl.constexpr(2.0**-power) for power in (16, 24, 32))
UP16, UP24 = tl.constexpr(2.0**16), tl.constexpr(2.0**24)


@triton.jit
def _philox(low, c1, p0, p1, k0, k1):
    a0, a1, a2, a3 = low, c1, p0, p1
    for _ in tl.static_range(ROUNDS):
        x_high, x_low = tl.umulhi(a0, M0), a0 * M0
        y_high, y_low = tl.umulhi(a2, M1), a2 * M1
        a0, a1, a2, a3 = y_high ^ a1 ^ k0, y_low, x_high ^ a3 ^ k1, x_low
        k0, k1 = k0 + W0, k1 + W1
    return a0, a1, a2, a3


@triton.jit
def _words(columns, stream, seed, p0, p1, block):
    """The four words of the blocks block + columns, joined to [n, 2, 2]: word = second index + 2 * third."""
    low, high = block.to(tl.uint32), ((block >> 32) | (stream << 28)).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0, x1, x2, x3 = _philox(low + columns.to(tl.uint32), high, p0.to(tl.uint32), p1.to(tl.uint32), k0, k1)
    return tl.join(tl.join(x0, x1), tl.join(x2, x3))


@triton.jit
def _box_muller(x):
    """Two normals from each word: the specification's steps less those that only move a power of two or a sign."""
    b = ((x >> 15) | 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True) - 0x47B504F3
    exponent = (b >> 23).to(tl.float32)
    t = ((b & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    log = t * (((((((L7 * t + L6) * t + L5) * t + L4) * t + L3) * t + L2) * t + L1) * t + L0)
    radius = tl.sqrt_rn(exponent * LN2 + log)
    f = (((x << 18) ^ 0x80000000) | 0x20000).to(tl.int32, bitcast=True).to(tl.float32) * P32
    y = f * f
    s = f * (((S3 * y + S2) * y + S1) * y + S0)
    c = ((C3 * y + C2) * y + C1) * y + C0
    minus_s = (s.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.float32, bitcast=True)
    # Quarters 2 and 3 are 0 and 1 with both signs turned.
    radius = (radius.to(tl.uint32, bitcast=True) ^ ((x << 16) & 0x80000000)).to(tl.float32, bitcast=True)
    odd_quarter = (x & 0x4000) != 0
    return radius * tl.where(odd_quarter, minus_s, c), radius * tl.where(odd_quarter, c, s)


@triton.jit
def _draw(stream: tl.constexpr, seed, p0, p1, tile):
    if stream & 3 == RADEMACHER:
        words = _words(tl.arange(0, 8), stream, seed, p0, p1, tile * 8)
        words = tl.reshape(tl.permute(words, (0, 2, 1)), (32, 1))
        bits = tl.reshape((words >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1, (1024,))
        return 1.0 - 2.0 * bits.to(tl.int32).to(tl.float32)
    else:
        words = _words(tl.arange(0, 128), stream, seed, p0, p1, tile * 128)
        even, odd = _box_muller(words)
        return tl.join(even, odd)


@triton.jit
def _rounding_bits(stream: tl.constexpr, seed, p0, p1, tile):
    """int32 of 16 random bits each, in the order of `stream`'s tile."""
    words = _words(tl.arange(0, 128), ROUNDING, seed, p0, p1, tile * 128)
    bits = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    if stream & 3 == RADEMACHER:
        bits = tl.reshape(tl.permute(bits, (2, 1, 3, 0)), (1024,))
    return bits


@triton.jit
def _at(pointer, lane: tl.constexpr, lo, hi, inside: tl.constexpr):
    r = lane * 128 + tl.arange(0, 128)
    return tl.load(pointer + r) if inside else tl.load(pointer + r, mask=(r >= lo) & (r < hi), other=0)


@triton.jit
def _read_tile(pointer, lo, hi, stream: tl.constexpr, inside: tl.constexpr):
    if stream & 3 == RADEMACHER:
        r = tl.arange(0, 1024)
        return tl.load(pointer + r) if inside else tl.load(pointer + r, mask=(r >= lo) & (r < hi), other=0)
    else:
        e0, o0 = _at(pointer, 0, lo, hi, inside), _at(pointer, 1, lo, hi, inside)
        e1, o1 = _at(pointer, 2, lo, hi, inside), _at(pointer, 3, lo, hi, inside)
        e2, o2 = _at(pointer, 4, lo, hi, inside), _at(pointer, 5, lo, hi, inside)
        e3, o3 = _at(pointer, 6, lo, hi, inside), _at(pointer, 7, lo, hi, inside)
        even, odd = tl.join(tl.join(e0, e1), tl.join(e2, e3)), tl.join(tl.join(o0, o1), tl.join(o2, o3))
        return tl.join(even, odd)


@triton.jit
def _read(pointer, lo, hi, stream: tl.constexpr):
    if (lo == 0) & (hi == 1024):
        x = _read_tile(pointer, lo, hi, stream, True)
    else:
        x = _read_tile(pointer, lo, hi, stream, False)
    return x


@triton.jit
def _put(pointer, x, lane: tl.constexpr, lo, hi, inside: tl.constexpr):
    r = lane * 128 + tl.arange(0, 128)
    if inside:
        tl.store(pointer + r, x)
    else:
        tl.store(pointer + r, x, mask=(r >= lo) & (r < hi))


@triton.jit
def _write_tile(pointer, x, lo, hi, stream: tl.constexpr, inside: tl.constexpr):
    if stream & 3 == RADEMACHER:
        r = tl.arange(0, 1024)
        if inside:
            tl.store(pointer + r, x)
        else:
            tl.store(pointer + r, x, mask=(r >= lo) & (r < hi))
    else:
        even, odd = tl.split(x)
        even_low, even_high = tl.split(even)
        odd_low, odd_high = tl.split(odd)
        e0, e1 = tl.split(even_low)
        e2, e3 = tl.split(even_high)
        o0, o1 = tl.split(odd_low)
        o2, o3 = tl.split(odd_high)
        _put(pointer, e0, 0, lo, hi, inside)
        _put(pointer, o0, 1, lo, hi, inside)
        _put(pointer, e1, 2, lo, hi, inside)
        _put(pointer, o1, 3, lo, hi, inside)
        _put(pointer, e2, 4, lo, hi, inside)
        _put(pointer, o2, 5, lo, hi, inside)
        _put(pointer, e3, 6, lo, hi, inside)
        _put(pointer, o3, 7, lo, hi, inside)


@triton.jit
def _write(pointer, x, lo, hi, stream: tl.constexpr):
    if (lo == 0) & (hi == 1024):
        _write_tile(pointer, x, lo, hi, stream, True)
    else:
        _write_tile(pointer, x, lo, hi, stream, False)


@triton.jit
def _nearest(x, kind: tl.constexpr):
    """float32 to the storage's dtype, ties to even."""
    if kind == FLOAT32:
        return x
    elif kind == FLOAT16:
        return x.to(tl.float16)
    elif INTERPRETED:  # whose own conversion to bfloat16 truncates
        b = x.to(tl.uint32, bitcast=True)
        rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _stochastic(x, random, kind: tl.constexpr):
    """float32 to the storage's dtype, up with the probability of the part lost; random: int32 of 16 bits each."""
    b = x.to(tl.int32, bitcast=True)
    up = b + (random if kind == BFLOAT16 else random >> 3)
    finite = (b & 0x7F800000) != 0x7F800000
    if kind == BFLOAT16:
        return _nearest(tl.where(finite, up & -0x10000, b).to(tl.float32, bitcast=True), kind)
    else:
        steps = tl.abs(x) * UP24  # below 2^-14 float16 is evenly spaced by 2^-24
        whole = tl.floor(steps)
        magnitude = (whole + ((steps - whole) * UP16 >= (65536 - random).to(tl.float32)).to(tl.float32)) * P24
        small = magnitude.to(tl.int32, bitcast=True) | (b & -0x80000000)
        rounded = tl.where((b & 0x7FFFFFFF) < 0x38800000, small, up & -0x2000)
        return _nearest(tl.where(finite, rounded, b).to(tl.float32, bitcast=True), kind)


@triton.jit
def _tile_of_run(runs, tiles, aligned: tl.constexpr):
    """This program's part of its run: tile, the bounds lo .. hi - 1 in it, and the local index of its element 0."""
    pid = tl.program_id(0).to(tl.int64)
    run = runs + pid // tiles * 3
    at, start, length = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    tile = (start >> 10) + pid % tiles
    lo, hi = _bounds(tile, start, length)
    base = tile * 1024 - start + at
    return tile, lo, hi, tl.multiple_of(base, 16) if aligned else base


@triton.jit
def _bounds(tile, start, length):
    first = start - tile * 1024
    return tl.maximum(first, 0).to(tl.int32), tl.minimum(first + length, 1024).to(tl.int32)


@triton.jit(do_not_specialize=["p0", "p1", "tiles"])
def write(
    local,  # for a master, its int16 halves
    remainder,
    runs,  # int64 [n, 3], of at most `tiles` tiles each
    tiles,
    p0,
    p1,
    seeds,  # int64 [steps, directions]
    alphas,  # float32 [steps, directions]
    decays,  # float32 [steps]
    steps,
    directions,
    decayed: tl.constexpr,
    kind: tl.constexpr,
    stochastic: tl.constexpr,
    stream: tl.constexpr,
    aligned: tl.constexpr,
):
    tile, lo, hi, base = _tile_of_run(runs, tiles, aligned)
    if hi > lo:
        x = _read(local + base, lo, hi, stream)
        if kind == MASTER:
            low = _read(remainder + base, lo, hi, stream)
            theta = ((x.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            theta = x.to(tl.float32)
        for step in range(steps):
            acc = tl.zeros_like(theta)
            for k in range(directions):
                at = step * directions + k
                product = tl.load(alphas + at) * _draw(stream, tl.load(seeds + at), p0, p1, tile)
                # Not a sum from zero: -0 + -0 is -0.
                acc = tl.where(k == 0, product, acc + product)
            if decayed:
                theta = theta * tl.load(decays + step)
            theta = theta + acc
            if stochastic:
                random = _rounding_bits(stream, tl.load(seeds + step * directions), p0, p1, tile)
                theta = _stochastic(theta, random, kind).to(tl.float32)
            elif kind != MASTER:
                theta = _nearest(theta, kind).to(tl.float32)
        if kind == MASTER:
            bits = theta.to(tl.int32, bitcast=True)
            _write(local + base, ((bits + 0x8000) >> 16).to(tl.int16), lo, hi, stream)
            _write(remainder + base, bits.to(tl.int16), lo, hi, stream)
        else:
            _write(local + base, _nearest(theta, kind), lo, hi, stream)


@triton.jit(do_not_specialize=["p0", "p1", "tiles"])
def view(
    weight,
    out,
    runs,  # int64 [n, 3], of at most `tiles` tiles each
    tiles,
    p0,
    p1,
    seeds,  # int64 [groups]: one for each group of branches that share it
    ends,  # int64 [groups]: where each group ends in scales and targets
    scales,  # float32 [branches]
    targets,  # int64 [branches]: where each branch's output begins
    groups,
    out_kind: tl.constexpr,
    stream: tl.constexpr,
    aligned: tl.constexpr,
):
    tile, lo, hi, base = _tile_of_run(runs, tiles, aligned)
    if hi > lo:
        theta = _read(weight + base, lo, hi, stream).to(tl.float32)
        b = tl.zeros((), tl.int64)
        for group in range(groups):
            z = _draw(stream, tl.load(seeds + group), p0, p1, tile)
            end = tl.load(ends + group)
            while b < end:
                to = tl.load(targets + b)
                to = base + (tl.multiple_of(to, 16) if aligned else to)
                _write(out + to, _nearest(theta + tl.load(scales + b) * z, out_kind), lo, hi, stream)
                b += 1


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
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles
    b, found = row // count, tl.load(ids + row)
    known = (found >= 0) & (found < height)
    start = tl.where(known, found, 0) * width
    tile = (start >> 10) + pid % tiles
    lo, hi = _bounds(tile, start, width)
    if hi > lo:
        theta = _read(table + tile * 1024, lo, hi, stream).to(tl.float32)
        z = _draw(stream, tl.load(seeds + b), p0, p1, tile)
        total = theta + tl.load(scales + b) * z
        total = tl.where(known, total, float("nan"))
        _write(out + row * width + (tile * 1024 - start), _nearest(total, out_kind), lo, hi, stream)
