"""The noise in Triton: a tile of 1024 values, drawn in registers.

A tile of normals is held as [128 columns, 2, 2, 2]: the word's two bits, then the parity; each of its eight lanes is
128 neighbours in memory. A tile of signs is held as [1024].

`ptx`: inline instructions for NVIDIA's GPUs, in the place of operations that give the same bits; Triton's interpreter
and other GPUs take those. Triton reads annotations as types of its own, so only its compile-time arguments carry one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mezo_scale.noise import spec

ROUNDING, RADEMACHER = map(tl.constexpr, (spec.ROUNDING, spec.RADEMACHER))
M0, M1 = map(tl.constexpr, spec.MULTIPLIERS)
W0, W1 = map(tl.constexpr, spec.WEYL)
ROUNDS = tl.constexpr(spec.ROUNDS)
# -2 is folded into LN2 and LOG, as a power of two and a sign move through every rounding unchanged. LN2 is also scaled
# for an exponent that is left where it lies in a float's bits.
LN2 = tl.constexpr(-2 * spec.LN2 * 2.0**-23)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(-2 * coefficient) for coefficient in spec.LOG)
S0, S1, S2, S3 = map(tl.constexpr, spec.SIN)
C0, C1, C2, C3 = map(tl.constexpr, spec.COS)

_WIDE = "{{ .reg .b64 w; mul.wide.u32 w, $2, {}; mov.b64 {{$1, $0}}, w; }}"
WIDE0, WIDE1 = (tl.constexpr(_WIDE.format(multiplier)) for multiplier in spec.MULTIPLIERS)
ROOT = tl.constexpr(
    "{ .reg .f32 r, y, n, h, e; rsqrt.approx.ftz.f32 r, $1; mul.rn.f32 y, $1, r; mul.rn.f32 h, r, 0f3F000000;"
    " neg.f32 n, y; fma.rn.f32 e, n, y, $1; fma.rn.f32 $0, e, h, y; }"
)


@triton.jit
def _wide0(a, ptx: tl.constexpr):
    """High and low half of a M0. As one instruction: Triton makes two of umulhi and the product."""
    if ptx:
        high, low = tl.inline_asm_elementwise(WIDE0, "=r,=r,r", [a], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)
        return high, low
    else:
        return tl.umulhi(a, M0), a * M0


@triton.jit
def _wide1(a, ptx: tl.constexpr):
    """As `_wide0`, of M1."""
    if ptx:
        high, low = tl.inline_asm_elementwise(WIDE1, "=r,=r,r", [a], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)
        return high, low
    else:
        return tl.umulhi(a, M1), a * M1


@triton.jit
def _root(x, ptx: tl.constexpr):
    """The square root, correctly rounded for every x that a radius is the root of: the short way without the range
    check of sqrt.rn, right for a reciprocal root that is off by up to 3 units in the last place."""
    if ptx:
        return tl.inline_asm_elementwise(ROOT, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _philox(low, c1, p0, p1, k0, k1, ptx: tl.constexpr):
    a0, a1, a2, a3 = low, c1, p0, p1
    for _ in tl.static_range(ROUNDS):
        x_high, x_low = _wide0(a0, ptx)
        y_high, y_low = _wide1(a2, ptx)
        a0, a1, a2, a3 = y_high ^ a1 ^ k0, y_low, x_high ^ a3 ^ k1, x_low
        k0, k1 = k0 + W0, k1 + W1
    return a0, a1, a2, a3


@triton.jit
def _words(columns, stream, seed, p0, p1, block, ptx: tl.constexpr):
    """The four words of the blocks block + columns, joined to [n, 2, 2]: word = second index + 2 * third."""
    low, high = block.to(tl.uint32), ((block >> 32) | (stream << 28)).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0, x1, x2, x3 = _philox(low + columns.to(tl.uint32), high, p0, p1, k0, k1, ptx)
    return tl.join(tl.join(x0, x1), tl.join(x2, x3))


@triton.jit
def _box_muller(x, ptx: tl.constexpr):
    """Two normals from each word: the specification's steps less those that only move a power of two or a sign, and
    with the four fused multiply-adds that it allows."""
    half = ((x >> 16) | 0x4B000000).to(tl.float32, bitcast=True) - 8388607.5  # u 2^16
    b = half.to(tl.int32, bitcast=True) - 0x473504F3
    exponent = b & -0x800000
    t = (b - exponent + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    log = t * ((((((tl.fma(t, L7, L6) * t + L5) * t + L4) * t + L3) * t + L2) * t + L1) * t + L0)
    radius = _root(tl.fma(exponent.to(tl.float32), LN2, log), ptx)
    f = ((x & 0x3FFF) | 0x44000000).to(tl.float32, bitcast=True) - 512.5 + 2.0**-15
    y = f * f
    s = f * ((tl.fma(y, S3, S2) * y + S1) * y + S0)
    c = (tl.fma(y, C3, C2) * y + C1) * y + C0
    minus_s = (s.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.float32, bitcast=True)
    # Quarters 2 and 3 are 0 and 1 with both signs turned.
    radius = (radius.to(tl.uint32, bitcast=True) ^ ((x << 16) & 0x80000000)).to(tl.float32, bitcast=True)
    odd_quarter = (x & 0x4000) != 0
    return radius * tl.where(odd_quarter, minus_s, c), radius * tl.where(odd_quarter, c, s)


@triton.jit
def draw(stream: tl.constexpr, seed, p0, p1, tile, ptx: tl.constexpr):
    if stream & 3 == RADEMACHER:
        words = _words(tl.arange(0, 8), stream, seed, p0, p1, tile * 8, ptx)
        words = tl.reshape(tl.permute(words, (0, 2, 1)), (32, 1))
        bits = tl.reshape((words >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1, (1024,))
        return 1.0 - 2.0 * bits.to(tl.int32).to(tl.float32)
    else:
        words = _words(tl.arange(0, 128), stream, seed, p0, p1, tile * 128, ptx)
        even, odd = _box_muller(words, ptx)
        return tl.join(even, odd)


@triton.jit
def rounding_bits(stream: tl.constexpr, seed, p0, p1, tile, ptx: tl.constexpr):
    """int32 of 16 random bits each, in the order of `stream`'s tile."""
    words = _words(tl.arange(0, 128), ROUNDING, seed, p0, p1, tile * 128, ptx)
    bits = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    if stream & 3 == RADEMACHER:
        bits = tl.reshape(tl.permute(bits, (2, 1, 3, 0)), (1024,))
    return bits
