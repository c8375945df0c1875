"""A tile's memory in Triton: read, rounded to what is stored, written; each lane of it is contiguous."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl

from mezo_scale.noise import spec

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

FLOAT32, BFLOAT16, FLOAT16, MASTER = (tl.constexpr(kind) for kind in range(4))
RADEMACHER = tl.constexpr(spec.RADEMACHER)
P24, UP16, UP24 = (tl.constexpr(2.0**power) for power in (-24, 16, 24))


@triton.jit
def _load(pointer, lane: tl.constexpr, lo, hi, inside: tl.constexpr):
    r = lane * 128 + tl.arange(0, 128)
    return tl.load(pointer + r) if inside else tl.load(pointer + r, mask=(r >= lo) & (r < hi), other=0)


@triton.jit
def read(pointer, lo, hi, stream: tl.constexpr, inside: tl.constexpr):
    if stream & 3 == RADEMACHER:
        r = tl.arange(0, 1024)
        return tl.load(pointer + r) if inside else tl.load(pointer + r, mask=(r >= lo) & (r < hi), other=0)
    else:
        e0, o0 = _load(pointer, 0, lo, hi, inside), _load(pointer, 1, lo, hi, inside)
        e1, o1 = _load(pointer, 2, lo, hi, inside), _load(pointer, 3, lo, hi, inside)
        e2, o2 = _load(pointer, 4, lo, hi, inside), _load(pointer, 5, lo, hi, inside)
        e3, o3 = _load(pointer, 6, lo, hi, inside), _load(pointer, 7, lo, hi, inside)
        even, odd = tl.join(tl.join(e0, e1), tl.join(e2, e3)), tl.join(tl.join(o0, o1), tl.join(o2, o3))
        return tl.join(even, odd)


@triton.jit
def _store(pointer, x, lane: tl.constexpr, lo, hi, inside: tl.constexpr):
    r = lane * 128 + tl.arange(0, 128)
    if inside:
        tl.store(pointer + r, x)
    else:
        tl.store(pointer + r, x, mask=(r >= lo) & (r < hi))


@triton.jit
def put(pointer, x, lo, hi, stream: tl.constexpr, inside: tl.constexpr):
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
        _store(pointer, e0, 0, lo, hi, inside)
        _store(pointer, o0, 1, lo, hi, inside)
        _store(pointer, e1, 2, lo, hi, inside)
        _store(pointer, o1, 3, lo, hi, inside)
        _store(pointer, e2, 4, lo, hi, inside)
        _store(pointer, o2, 5, lo, hi, inside)
        _store(pointer, e3, 6, lo, hi, inside)
        _store(pointer, o3, 7, lo, hi, inside)


@triton.jit
def nearest(x, kind: tl.constexpr):
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
def rounded_up_or_down(x, random, kind: tl.constexpr):
    """float32 to the storage's dtype, up with the probability of the part lost; random: int32 of 16 bits each."""
    b = x.to(tl.int32, bitcast=True)
    up = b + (random if kind == BFLOAT16 else random >> 3)
    finite = (b & 0x7F800000) != 0x7F800000
    if kind == BFLOAT16:
        return nearest(tl.where(finite, up & -0x10000, b).to(tl.float32, bitcast=True), kind)
    else:
        steps = tl.abs(x) * UP24  # below 2^-14 float16 is evenly spaced by 2^-24
        whole = tl.floor(steps)
        magnitude = (whole + ((steps - whole) * UP16 >= (65536 - random).to(tl.float32)).to(tl.float32)) * P24
        small = magnitude.to(tl.int32, bitcast=True) | (b & -0x80000000)
        rounded = tl.where((b & 0x7FFFFFFF) < 0x38800000, small, up & -0x2000)
        return nearest(tl.where(finite, rounded, b).to(tl.float32, bitcast=True), kind)
