"""What the GPU's kernels compute in another way than the specification says: the same bits, over the whole domain.

No GPU: its fused multiply-add, its reciprocal square root and the inline PTX are carried out in NumPy. How far
rsqrt.approx may be off is what NVIDIA says of it, 2^-22.9 of the value: less than 3 units in the last place.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mezo_scale.noise import reference, spec

pytest.importorskip("triton")
from mezo_scale.noise import triton_draw

F, S, U = np.float32, np.int32, np.uint32
Floats = npt.NDArray[np.float32]
WORDS = np.arange(1 << 16, dtype=np.uint64)
ALL = ((WORDS << np.uint64(16)) | (WORDS * np.uint64(40503) % np.uint64(1 << 16))).astype(U)
"""A word for each of the 65,536 radii, with each of the 65,536 angles once (40503 is odd)."""


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Floats:
    """a b + c, rounded once: a product of float32 is exact in float64; the sum is rounded to odd there (Boldo and
    Melquiond, 2008), so that rounding it again to float32 is as rounding once."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(even, bits + toward, bits).view(np.float64).astype(F)


def horner(coefficients: tuple[float, ...], x: Floats, fused: int) -> Floats:
    """Horner's rule, its first `fused` steps rounded once."""
    value = np.full_like(x, coefficients[-1])
    for number, coefficient in enumerate(coefficients[-2::-1]):
        value = fma(value, x, F(coefficient)) if number < fused else value * x + F(coefficient)
    return value


def by_the_specification(word: npt.NDArray[np.uint32]) -> tuple[Floats, Floats, Floats, Floats]:
    """What is under the root, half of it as radius, and sine and cosine of an angle: every operation on its own."""
    u = ((word >> U(16)).astype(F) + F(0.5)) * F(2**-16)
    b = u.view(S) + S(0x3F800000 - 0x3F3504F3)
    t = ((b & S(0x7FFFFF)) + S(0x3F3504F3)).view(F) - F(1)
    radicand = F(-2) * (((b >> S(23)) - S(127)).astype(F) * F(spec.LN2) + t * horner(spec.LOG, t, 0))
    f = ((word & U(0x3FFF)).astype(F) + F(0.5)) * F(2**-14) - F(0.5)
    return radicand, np.sqrt(radicand), f * horner(spec.SIN, f * f, 0), horner(spec.COS, f * f, 0)


def as_on_the_gpu(word: npt.NDArray[np.uint32], fused: int = 1) -> tuple[Floats, Floats, Floats]:
    """The same in `triton_draw._box_muller`'s steps, with four fused multiply-adds."""
    half = ((word >> U(16)) | U(0x4B000000)).view(F) - F(8388607.5)
    b = half.view(S) - S(0x473504F3)
    exponent = b & S(-0x800000)
    t = (b - exponent + S(0x3F3504F3)).view(F) - F(1)
    log = t * horner(tuple(-2 * c for c in spec.LOG), t, fused)
    radicand = fma(exponent.astype(F), F(-2 * spec.LN2 * 2.0**-23), log)
    f = ((word & U(0x3FFF)) | U(0x44000000)).view(F) - F(512.5) + F(2**-15)
    return radicand, f * horner(spec.SIN, f * f, fused), horner(spec.COS, f * f, fused)


def same(one: Floats, other: Floats) -> bool:
    return bool(np.array_equal(one.view(S), other.view(S)))


def test_four_fused_steps_change_no_bit_of_any_radius_or_angle() -> None:
    _, radius, sine, cosine = by_the_specification(ALL)
    found = as_on_the_gpu(ALL)
    assert len(np.unique(ALL >> U(16))) == len(np.unique(ALL & U(0xFFFF))) == 1 << 16
    assert same(np.sqrt(found[0]), radius)  # under the root some differ in the last bit
    assert same(found[1], sine)
    assert same(found[2], cosine)


def test_a_second_step_of_any_polynomial_would_change_some() -> None:
    _, radius, sine, cosine = by_the_specification(ALL)
    found = as_on_the_gpu(ALL, fused=2)
    assert not same(np.sqrt(found[0]), radius)
    assert not same(found[1], sine)
    assert not same(found[2], cosine)


def run_ptx(text: str, operands: list[npt.NDArray[np.generic]], off: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """Carries out the inline PTX of `triton_draw`; rsqrt.approx is `off` units from the float32 nearest to it."""
    held = {f"${number}": value for number, value in enumerate(operands) if value is not None}

    def of(name: str) -> npt.NDArray[np.generic]:
        if name.startswith("0f"):
            return np.array([int(name[2:], 16)], U).view(F)
        return np.array([int(name)], np.uint64) if name.isdecimal() else held[name]

    for line in filter(None, map(str.strip, text.strip("{} ").split(";"))):
        name, rest = line.split(" ", 1)
        arguments = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        match name:
            case ".reg":
                continue
            case "mul.wide.u32":
                held[arguments[0]] = of(arguments[1]).astype(np.uint64) * of(arguments[2]).astype(np.uint64)
            case "mov.b64":
                low, high = re.findall(r"\$\d", arguments[0])
                held[low], held[high] = of(arguments[1]).astype(U), (of(arguments[1]) >> np.uint64(32)).astype(U)
            case "rsqrt.approx.ftz.f32":
                exact = (1 / np.sqrt(of(arguments[1]).astype(np.float64))).astype(F)
                held[arguments[0]] = (exact.view(S) + S(off)).view(F)
            case "mul.rn.f32":
                held[arguments[0]] = of(arguments[1]) * of(arguments[2])
            case "neg.f32":
                held[arguments[0]] = -of(arguments[1])
            case "fma.rn.f32":
                held[arguments[0]] = fma(of(arguments[1]), of(arguments[2]), of(arguments[3]))
            case _:
                raise AssertionError(f"unknown instruction {name}")
    return held


@pytest.mark.parametrize("off", range(-3, 4))
def test_the_short_root_is_correctly_rounded_for_every_radius(off: int) -> None:
    radius = by_the_specification(ALL)[1]
    found = run_ptx(triton_draw.ROOT.value, [None, as_on_the_gpu(ALL)[0]], off)["$0"]  # type: ignore[list-item]
    assert same(found, radius)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1])
def test_the_wide_product_gives_both_halves(number: int) -> None:
    words = np.append(np.random.default_rng(0).integers(0, 1 << 32, 5000), [0, 1, (1 << 32) - 1]).astype(np.uint64)
    text = (triton_draw.WIDE0, triton_draw.WIDE1)[number].value
    held = run_ptx(text, [None, None, words])  # type: ignore[list-item]
    product = words * np.uint64(spec.MULTIPLIERS[number])
    assert np.array_equal(held["$0"], product >> np.uint64(32))
    assert np.array_equal(held["$1"], product & np.uint64(spec.M32))


def test_the_reference_has_the_specification_s_bits_here() -> None:
    """What the others are compared with is what all other tests compare with."""
    _, radius, sine, cosine = by_the_specification(ALL)
    quarter = (ALL & U(0xFFFF)) >> U(14)
    even = np.choose(quarter, [cosine, -sine, -cosine, sine])
    odd = np.choose(quarter, [sine, cosine, -sine, -cosine])
    found = reference._box_muller(torch.from_numpy(ALL.astype(np.int64)))
    assert same(found[0].numpy(), radius * even)
    assert same(found[1].numpy(), radius * odd)
