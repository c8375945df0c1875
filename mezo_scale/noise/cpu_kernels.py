"""The CPU's sweeps, compiled by Numba: every array is passed as raw 16-bit words, so each sweep compiles once.

Work goes tile by tile through small buffers that stay in the first-level cache, in loops over rows of 128 lanes, which
LLVM turns into full-width vector code. All that is compiled and may change is in this one file because Numba's cache
looks only at the file of the function it keeps; names of types and the compiler's options: `cpu_jit`.
"""

from __future__ import annotations

import numpy as np

from mezo_scale.noise import spec
from mezo_scale.noise.cpu_float16 import from_half, to_half
from mezo_scale.noise.cpu_jit import F32, I16, I64, U16, U32, U64, f32, i16, i32, inner, sweep, u16, u32, u64

FLOAT32, BFLOAT16, FLOAT16, MASTER = range(4)  # kinds of storage; MASTER is bfloat16 and a remainder

NORMAL, ROUNDING, RADEMACHER, FORM = spec.NORMAL, spec.ROUNDING, spec.RADEMACHER, spec.FORM
TILE, LANES = spec.TILE, spec.LANES
M0, M1 = map(u64, spec.MULTIPLIERS)
W0, W1 = map(u64, spec.WEYL)
LOW, HIGH = u64(spec.M32), u64(32)
ROUNDS = spec.ROUNDS
LN2 = f32(-2 * spec.LN2)
L0, L1, L2, L3, L4, L5, L6, L7 = (f32(-2 * coefficient) for coefficient in spec.LOG)
S0, S1, S2, S3 = map(f32, spec.SIN)
C0, C1, C2, C3 = map(f32, spec.COS)
ONE, P24, P32, PER_P24, P16 = f32(1), f32(2.0**-24), f32(2.0**-32), f32(2.0**24), f32(65536)


@inner
def _philox(words: U32, begin: int, end: int, low: u64, c1: u64, p0: u64, p1: u64, k0: u64, k1: u64) -> None:
    """Columns begin .. end - 1 of words [4, 128]: the blocks numbered from (low, c1) + begin."""
    w0, w1, w2, w3 = words[0, begin:end], words[1, begin:end], words[2, begin:end], words[3, begin:end]
    low += u64(begin)
    for i in range(end - begin):
        a0, a1, a2, a3, r0, r1 = low + u64(i), c1, p0, p1, k0, k1
        for _ in range(ROUNDS):
            x, y = M0 * a0, M1 * a2
            a0, a1, a2, a3 = (y >> HIGH) ^ a1 ^ r0, y & LOW, (x >> HIGH) ^ a3 ^ r1, x & LOW
            r0, r1 = (r0 + W0) & LOW, (r1 + W1) & LOW
        w0[i], w1[i], w2[i], w3[i] = u32(a0), u32(a1), u32(a2), u32(a3)


@inner
def _box_muller(x: U32, even: F32, odd: F32) -> None:
    """Two normals from each word, by the specification's steps less those that only move a power of two or a sign.

    The halves of a word become the odd integers 2h + 1 = 2^17 u and 2^32 f; -2 goes into LN2 and LOG.
    """
    for i in range(len(x)):
        b = i32(f32(i32(i32(x[i] >> u32(15)) | i32(1))).view(i32) - i32(0x47B504F3))
        exponent = f32(i32(b >> i32(23)))
        t = i32(i32(b & i32(0x7FFFFF)) + i32(0x3F3504F3)).view(f32) - ONE
        log = t * (((((((L7 * t + L6) * t + L5) * t + L4) * t + L3) * t + L2) * t + L1) * t + L0)
        radius = np.sqrt(exponent * LN2 + log)
        f = f32(i32(i32(i32(x[i] << u32(18)) ^ i32(-0x80000000)) | i32(1 << 17))) * P32
        y = f * f
        s = f * (((S3 * y + S2) * y + S1) * y + S0)
        c = ((C3 * y + C2) * y + C1) * y + C0
        # Quarters 2 and 3 are 0 and 1 with both signs turned.
        radius = i32(f32(radius).view(i32) ^ i32(i32(x[i] << u32(16)) & i32(-0x80000000))).view(f32)
        odd_quarter = (x[i] & u32(0x4000)) != 0
        even[i] = radius * (-s if odd_quarter else c)
        odd[i] = radius * (c if odd_quarter else s)


@inner
def _draw(z: F32, words: U32, stream: int, seed: u64, param_id: u64, tile: int, begin: int, end: int) -> None:
    """Elements begin .. end - 1, and perhaps others, of z [1024] for one tile. Rounding bits come as int32 in z."""
    first, last = begin >> 7, (end - 1) >> 7  # lanes; for signs, blocks
    c, d, blocks, form = first, last + 1, 8, stream & FORM
    if form != RADEMACHER:  # whole groups of 32 columns: what the vector code takes at once
        c, d, blocks = begin & 127 & ~31, ((end - 1) & 127 | 31) + 1, LANES
        if first != last:
            c, d = 0, LANES
    block = u64(tile) * u64(blocks)
    high = block >> HIGH | u64(stream) << u64(28)
    _philox(words, c, d, block & LOW, high, param_id & LOW, param_id >> HIGH, seed & LOW, seed >> HIGH)
    if form == RADEMACHER:
        for column in range(c, d):
            for w in range(4):
                word, signs = words[w, column], z[column * 128 + w * 32 : column * 128 + w * 32 + 32]
                for i in range(32):
                    signs[i] = f32(i32(i32(1) - i32(i32(u32(word >> u32(i)) & u32(1)) << i32(1))))
        return
    for w in range(first >> 1, (last >> 1) + 1):
        x, even, odd = words[w, c:d], z[w * 256 + c : w * 256 + d], z[w * 256 + 128 + c : w * 256 + 128 + d]
        if form == NORMAL:
            _box_muller(x, even, odd)
        else:
            low_bits, high_bits = even.view(i32), odd.view(i32)
            for i in range(len(x)):
                low_bits[i], high_bits[i] = i32(x[i] & u32(0xFFFF)), i32(x[i] >> u32(16))


@inner
def _multiply(z: F32, u: F32, v: F32, scale: f32, start: int) -> None:
    """The elements from `start` of a matrix whose columns of U and V are the rows of u and v, times `scale`."""
    row, column, done = start // v.shape[1], start % v.shape[1], 0
    while done < len(z):
        count = min(len(z) - done, v.shape[1] - column)
        part = z[done : done + count]
        for j in range(len(u)):
            left, right = u[j, row], v[j, column : column + count]
            if j == 0:
                for i in range(count):
                    part[i] = left * right[i]
            else:
                for i in range(count):
                    part[i] = part[i] + left * right[i]
        if len(u) > 1:
            for i in range(count):
                part[i] = part[i] * scale
        row, column, done = row + 1, 0, done + count


@inner
def _to_bfloat(x: f32) -> u16:
    """The bits of the nearest bfloat16, ties to even."""
    bits = f32(x).view(i32)
    nearest = i32(bits + i32(0x7FFF) + i32(i32(bits >> i32(16)) & i32(1)))
    nan = i32(bits & i32(0x7FFFFFFF)) > i32(0x7F800000)
    return u16(i32((bits | i32(0x400000)) if nan else nearest) >> i32(16))


@inner
def _load(theta: F32, raw: U16, low: I16, kind: int, at: int) -> None:
    """theta from a 16-bit storage."""
    n = len(theta)
    bits, half = theta.view(i32), raw[at : at + n]
    if kind == MASTER:
        lower = low[at : at + n]
        for i in range(n):
            bits[i] = i32(i32(i32(half[i]) << i32(16)) + i32(lower[i]))
    elif kind == BFLOAT16:
        for i in range(n):
            bits[i] = i32(half[i]) << i32(16)
    else:
        for i in range(n):
            theta[i] = from_half(half[i])


@inner
def _store(theta: F32, raw: U16, low: I16, kind: int, at: int) -> None:
    """theta, rounded, into a 16-bit storage."""
    n = len(theta)
    bits, half = theta.view(i32), raw[at : at + n]
    if kind == MASTER:
        lower = low[at : at + n]
        for i in range(n):
            half[i] = u16(i32(bits[i] + i32(0x8000)) >> i32(16))
            lower[i] = i16(bits[i])
    elif kind == BFLOAT16:
        for i in range(n):
            half[i] = _to_bfloat(theta[i])
    else:
        for i in range(n):
            half[i] = to_half(theta[i])


@inner
def _round_stochastic(theta: F32, random: F32, kind: int) -> None:
    """theta, in place, to a value of its storage, up with the probability of the part lost; random: 16 bits as int32.

    That is: up where the part lost, in 65536ths of the spacing, reaches 65536 - random.
    """
    bits, r = theta.view(i32), random.view(i32)
    for i in range(len(theta)):
        b = bits[i]
        if kind == BFLOAT16:
            rounded = i32(i32(b + r[i]) & i32(-0x10000))
        else:
            steps = abs(theta[i]) * PER_P24  # below 2^-14 float16 is evenly spaced by 2^-24
            whole = np.floor(steps)
            up = ONE if (steps - whole) * P16 >= f32(i32(i32(65536) - r[i])) else f32(0)
            small = i32(f32((whole + up) * P24).view(i32) | i32(b & i32(-0x80000000)))
            large = i32(i32(b + i32(r[i] >> i32(3))) & i32(-0x2000))
            rounded = small if i32(b & i32(0x7FFFFFFF)) < i32(0x38800000) else large
        bits[i] = b if i32(b & i32(0x7F800000)) == i32(0x7F800000) else rounded


@inner
def _segment(start: int, left: int) -> int:
    """How many of `left` elements from `start` are taken at once: never across a tile; a few never across a lane."""
    n = min(left, TILE - (start & (TILE - 1)))
    return min(n, LANES - (start & (LANES - 1))) if n < LANES else n


@inner
def _add(acc: F32, z: F32, alpha: f32, first: bool) -> None:
    """One direction of a step."""
    if first:
        for i in range(len(acc)):
            acc[i] = alpha * z[i]
    else:
        for i in range(len(acc)):
            acc[i] = acc[i] + alpha * z[i]


@inner
def _add_rank_1(acc: F32, u: F32, v: F32, alphas: F32, start: int) -> None:
    """All directions of a step on the elements from `start` of a matrix, without a z in memory: z = u v^T, where
    u [>= directions, 1, m], v [.., 1, n]."""
    row, column, done = start // v.shape[2], start % v.shape[2], 0
    while done < len(acc):
        count = min(len(acc) - done, v.shape[2] - column)
        total = acc[done : done + count]
        for k in range(len(alphas)):
            left, right, alpha = u[k, 0, row], v[k, 0, column : column + count], alphas[k]
            if k == 0:
                for i in range(count):
                    total[i] = alpha * (left * right[i])
            else:
                for i in range(count):
                    total[i] = total[i] + alpha * (left * right[i])
        row, column, done = row + 1, 0, done + count


@sweep
def write(
    local: U16,
    remainder: I16,
    kind: int,
    runs: I64,
    begin: int,
    end: int,
    param_id: u64,
    seeds: U64,
    alphas: F32,
    decays: F32,
    stochastic: bool,
    stream: int,
    u: F32,
    v: F32,
    scale: f32,
) -> None:
    """All steps on the elements begin .. end - 1 of the runs laid end to end. u [steps * directions, r, m], v: factors
    of z; of r = 0, z is drawn."""
    words, directions = np.empty((4, LANES), u32), seeds.shape[1]
    z_tile, theta_tile, acc_tile = np.empty(TILE, f32), np.empty(TILE, f32), np.empty(TILE, f32)
    stored = local.view(f32) if kind == FLOAT32 else theta_tile
    position = 0
    for run in range(len(runs)):
        if position >= end:
            break
        skipped, left = max(begin - position, 0), min(end - position, runs[run, 2])
        position += runs[run, 2]
        at, start, left = runs[run, 0] + skipped, runs[run, 1] + skipped, left - skipped
        while left > 0:
            n = _segment(start, left)
            tile, r = start >> 10, start & (TILE - 1)
            acc, z = acc_tile[r : r + n], z_tile[r : r + n]
            theta = stored[at : at + n] if kind == FLOAT32 else theta_tile[r : r + n]
            for step in range(len(seeds)):  # what is stored and loaded again here is still in the cache
                if kind != FLOAT32:
                    _load(theta, local, remainder, kind, at)
                one, decay = step * directions, decays[step]
                if u.shape[1] == 1:
                    _add_rank_1(acc, u[one:], v[one:], alphas[step], start)
                for k in range(directions if u.shape[1] != 1 else 0):
                    if u.shape[1]:
                        _multiply(z, u[one + k], v[one + k], scale, start)
                    else:
                        _draw(z_tile, words, stream, seeds[step, k], param_id, tile, r, r + n)
                    _add(acc, z, alphas[step, k], k == 0)
                for i in range(n):  # a decay of 1 changes nothing
                    theta[i] = theta[i] * decay + acc[i]
                if stochastic and kind in (BFLOAT16, FLOAT16):
                    _draw(z_tile, words, ROUNDING, seeds[step, 0], param_id, tile, r, r + n)
                    _round_stochastic(theta, z, kind)
                if kind != FLOAT32:
                    _store(theta, local, remainder, kind, at)
            at, start, left = at + n, start + n, left - n


@sweep
def view(
    weight: U16,
    kind: int,
    runs: I64,
    begin: int,
    end: int,
    param_id: u64,
    seeds: U64,
    scales: F32,
    leaders: I64,
    out: U16,
    out_kind: int,
    targets: I64,
    branch_numel: int,
    stream: int,
    u: F32,
    v: F32,
    factor: f32,
) -> None:
    """The elements begin .. end - 1 of the runs laid end to end, each perturbed for every branch.

    targets [n]: where in a branch's output, of branch_numel elements, each run goes. leaders [B]: the first branch
    with the same seed, whose z a branch shares. u [B, r, m], v, factor: as for `write`.
    """
    words, no_low = np.empty((4, LANES), u32), np.empty(0, i16)
    z_tile, theta_tile, sum_tile = np.empty(TILE, f32), np.empty(TILE, f32), np.empty(TILE, f32)
    stored = weight.view(f32) if kind == FLOAT32 else theta_tile
    filled = out.view(f32) if out_kind == FLOAT32 else sum_tile
    position = 0
    for run in range(len(runs)):
        if position >= end:
            break
        skipped, left = max(begin - position, 0), min(end - position, runs[run, 2])
        position += runs[run, 2]
        at, start, left = runs[run, 0] + skipped, runs[run, 1] + skipped, left - skipped
        target = targets[run] + skipped
        while left > 0:
            n = _segment(start, left)
            tile, r = start >> 10, start & (TILE - 1)
            z = z_tile[r : r + n]
            theta = stored[at : at + n] if kind == FLOAT32 else theta_tile[r : r + n]
            if kind != FLOAT32:
                _load(theta, weight, no_low, kind, at)
            for leader in range(len(seeds)):
                if leaders[leader] != leader:
                    continue
                if u.shape[1]:
                    _multiply(z, u[leader], v[leader], factor, start)
                else:
                    _draw(z_tile, words, stream, seeds[leader], param_id, tile, r, r + n)
                for b in range(leader, len(seeds)):
                    if leaders[b] != leader:
                        continue
                    to, scale = b * branch_numel + target, scales[b]
                    total = filled[to : to + n] if out_kind == FLOAT32 else sum_tile[r : r + n]
                    for i in range(n):
                        total[i] = theta[i] + scale * z[i]
                    if out_kind != FLOAT32:
                        _store(total, out, no_low, out_kind, to)
            at, start, target, left = at + n, start + n, target + n, left - n


@sweep
def draw(out: F32, seeds: U64, param_id: u64, stream: int, start: int, begin: int, end: int) -> None:
    """Columns begin .. end - 1 of out [directions, n]: the elements start + begin .. start + end - 1 of a stream."""
    words, z_tile = np.empty((4, LANES), u32), np.empty(TILE, f32)
    while begin < end:
        n = _segment(start + begin, end - begin)
        r = start + begin & (TILE - 1)
        for k in range(len(seeds)):
            _draw(z_tile, words, stream, seeds[k], param_id, start + begin >> 10, r, r + n)
            out[k, begin : begin + n] = z_tile[r : r + n]
        begin += n
