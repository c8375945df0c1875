"""The bits of noise version 1, as published: nothing here may ever change."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from mezo_scale import noise
from mezo_scale.noise import reference, spec

Q_PROJ = "model.decoder.layers.0.self_attn.q_proj.weight"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((spec.M32,) * 4, (spec.M32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_vectors_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert spec.philox(counter, key) == words


def test_param_id_is_the_blake2b_of_the_name() -> None:
    assert noise.param_id(Q_PROJ) == 0xA66B2055DD66A9BF


def test_direction_seeds_are_words_of_philox_under_the_run_seed() -> None:
    seed = (7 << 32) | 5
    words = spec.philox((3, 1, 2, 0x4D655A4F), (5, 7))
    assert noise.direction_seed(seed, (1 << 32) | 3, 2) == words[0] | words[1] << 32


@pytest.mark.parametrize(
    ("seed", "name", "expected"),
    [
        (0, None, ("0x1.2a9966p-2", "-0x1.bc9dbcp-4", "-0x1.663bcep+1", "0x1.017508p-2")),
        (42, Q_PROJ, ("-0x1.e8caa6p-3", "-0x1.736ab0p-3", "0x1.969c64p-2", "-0x1.6b14fap+0")),
    ],
)
def test_the_first_normals_are_the_published_ones(seed: int, name: str | None, expected: tuple[str, ...]) -> None:
    param_id = 0 if name is None else noise.param_id(name)
    values = [float.fromhex(value) for value in expected]
    assert noise.normal(seed, param_id, 0, 4).tolist() == values
    assert reference.span(seed, param_id, 0, 4, spec.NORMAL, CPU).tolist() == values


@pytest.mark.parametrize("source", ["kernel", "reference"])
def test_a_million_normals_have_the_published_digest(source: str) -> None:
    param_id, count = noise.param_id(Q_PROJ), 1 << 20
    if source == "kernel":
        z = noise.normal(42, param_id, 0, count)
    else:
        z = reference.span(42, param_id, 0, count, spec.NORMAL, CPU)
    digest = hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "662fc875133c723aae4c1e8299f068edb46f24dac2aed55c88665ecfc61481e1"


def test_an_element_beyond_32_bits_of_blocks_carries_into_the_second_counter_word() -> None:
    element = (1 << 43) + 777  # its block number takes 41 bits
    block = (element >> 10) * 128 + (element & 127)
    words = spec.philox((block & spec.M32, block >> 32, 5, 0), (9, 0))
    x = words[(element & 1023) >> 8]
    radius = math.sqrt(-2 * math.log(((x >> 16) + 0.5) / 65536))
    angle = 2 * math.pi * ((x & 0xFFFF) + 0.5) / 65536 - math.pi / 4
    lane = (element & 1023) >> 7
    expected = radius * (math.sin(angle) if lane & 1 else math.cos(angle))
    assert noise.normal(9, 5, element, 1).item() == pytest.approx(expected, rel=1e-6)


def test_the_normals_are_standard_normal() -> None:
    z = noise.normal(123, 456, 0, 1 << 20).double()
    assert abs(z.mean().item()) < 4e-3
    assert abs(z.var().item() - 1) < 6e-3
    assert abs((z**4).mean().item() - 3) < 0.04
    assert z.abs().max().item() <= 4.8546
    ordered = torch.sort(z).values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(1, len(z) + 1, dtype=torch.float64) / len(z)
    assert (cdf - steps).abs().max().item() < 1.95 / 2**10  # Kolmogorov-Smirnov at the 0.1% level


def test_the_rademacher_signs_are_even_and_follow_the_bits() -> None:
    z = noise.rademacher(3, 4, 0, 1 << 18)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean().item()) < 8e-3
    word = spec.philox((1, spec.RADEMACHER << 28, 4, 0), (3, 0))[2]
    assert z[128 + 64 : 128 + 96].tolist() == [1 - 2 * (word >> bit & 1) for bit in range(32)]


def test_the_rounding_bits_are_the_halves_of_stream_1() -> None:
    bits = noise.rounding_bits(3, 4, 1024, 1024)
    words = spec.philox((128 + 5, spec.ROUNDING << 28, 4, 0), (3, 0))
    assert [int(bits[lane * 128 + 5]) for lane in range(8)] == [
        half for word in words for half in (word & 0xFFFF, word >> 16)
    ]
