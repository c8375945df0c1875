"""float16 on the CPU: by the processor where it can, else in integers. The same bits either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba.extending import intrinsic

from mezo_scale.noise.cpu_jit import f32, i32, inner, u16

HALF, P24 = f32(0.5), f32(2.0**-24)

# On x86 where F16C is missing LLVM would call a function that is not there; other processors are not asked.
HALF_IN_HARDWARE = bool(binding.get_host_cpu_features().get("f16c", False))


def _extend(typing: Any, half: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return numba.float32(numba.uint16), generate


def _truncate(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return numba.uint16(numba.float32), generate


_from_half_in_hardware: Callable[[u16], f32] = intrinsic(_extend)
_to_half_in_hardware: Callable[[f32], u16] = intrinsic(_truncate)


@inner
def from_half(half: u16) -> f32:
    """The value of a float16's bits."""
    if HALF_IN_HARDWARE:
        return _from_half_in_hardware(half)
    return from_half_in_software(half)


@inner
def to_half(x: f32) -> u16:
    """The bits of the nearest float16, ties to even."""
    if HALF_IN_HARDWARE:
        return _to_half_in_hardware(x)
    return to_half_in_software(x)


@inner
def from_half_in_software(half: u16) -> f32:
    """`from_half` for processors that don't know float16."""
    h = i32(half)
    magnitude = i32(h & i32(0x7FFF))
    small = f32(magnitude) * P24  # below 2^-14
    large = i32(i32(magnitude << i32(13)) + (i32(0x70000000) if magnitude >= i32(0x7C00) else i32(0x38000000)))
    bits = f32(small).view(i32) if magnitude < i32(0x0400) else large
    return i32(bits | i32(i32(h & i32(0x8000)) << i32(16))).view(f32)


@inner
def to_half_in_software(x: f32) -> u16:
    """`to_half` for processors that don't know float16."""
    bits = f32(x).view(i32)
    magnitude = i32(bits & i32(0x7FFFFFFF))
    small = i32(f32(abs(x) + HALF).view(i32) - i32(0x3F000000))  # 0.5 is spaced as float16 is below 2^-14
    even = i32(i32(magnitude >> i32(13)) & i32(1))
    large = min(i32(i32(magnitude - i32(0x38000000 - 0x0FFF) + even) >> i32(13)), i32(0x7C00))
    h = small if magnitude < i32(0x38800000) else (i32(0x7E00) if magnitude > i32(0x7F800000) else large)
    return u16(h | i32(i32(bits >> i32(16)) & i32(0x8000)))
