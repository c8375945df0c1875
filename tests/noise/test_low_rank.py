"""Noise version 2: z of a matrix is U V^T / sqrt(r), whoever makes which part of it, and in which way."""

from __future__ import annotations

import hashlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mezo_scale import noise
from mezo_scale.noise import Noise, dispatch, reference, spec, writing
from mezo_scale.noise.api import part_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = [Noise("low_rank"), Noise("low_rank", 1, "normal"), Noise("low_rank", 4), Noise("low_rank", 3, "normal")]
SHAPE = (37, 61)
SEEDS = [[3, 2**64 - 1], [5, 3]]
ALPHAS = [[0.1, -0.03], [0.7, 0.01]]
Q_PROJ = "model.decoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture(params=NOISES, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Noise:
    return request.param


def z_of(seed: int, param_id: int, shape: tuple[int, ...], kind: Noise) -> Tensor:
    """z of a whole parameter, as a write of one direction gives it."""
    z = torch.zeros(math.prod(shape))
    noise.write_(z, np.array([[0, 0, len(z)]]), param_id, [[seed]], [[1.0]], [1.0], noise=kind, shape=shape)
    return z.view(shape)


def by_hand(seed: int, param_id: int, shape: tuple[int, int], kind: Noise) -> Tensor:
    """z by the specification's formula, from values of single streams."""
    rank, place = kind.rank or 0, torch.device("cpu")
    rows, columns = shape
    u = reference.span(seed, param_id, 0, rank * rows, kind.stream + 4, place)
    v = reference.span(seed, param_id, 0, rank * columns, kind.stream + 8, place)
    z = torch.zeros(shape)
    for i in range(rows):
        for k in range(columns):
            total = u[i] * v[k]
            for j in range(1, rank):
                total = total + u[j * rows + i] * v[j * columns + k]
            z[i, k] = total * torch.tensor(1 / math.sqrt(rank), dtype=torch.float32)
    return z


def test_z_of_a_matrix_is_the_specifications_formula(kind: Noise) -> None:
    assert torch.equal(z_of(42, 7, (9, 13), kind), by_hand(42, 7, (9, 13), kind))


def test_the_signs_of_the_factors_are_the_bits_of_their_streams() -> None:
    made = noise.factors(torch.empty(200, 300), 4, [3], noise=Noise("low_rank", 2))
    assert made is not None
    assert made.u.shape == (1, 2, 200)
    assert made.v.shape == (1, 2, 300)
    for factor, stream in ((made.u, 6), (made.v, 10)):
        word = spec.philox((1, stream << 28, 4, 0), (3, 0))[2]  # of the elements 192 to 223
        assert factor.flatten()[192:224].tolist() == [1 - 2 * (word >> bit & 1) for bit in range(32)]


@pytest.mark.parametrize(
    ("kind", "first", "digest"),
    [
        (Noise("low_rank"), (1, 1, -1, -1), "91fb65e2d1c9a0638610310bfe5cf9d1846592fcc0e9196e64e7ad93e2a3ce9c"),
        (Noise("low_rank", 4), (1, 0, 1, 0), "ecfa62cce826963b74669c0eaf9db7df3b9529f9a5549635123a9438ea94677c"),
        (
            Noise("low_rank", 4, "normal"),
            ("0x1.cef4c8p+0", "-0x1.8f9622p+0", "-0x1.a241bcp-1", "-0x1.8126dcp-1"),
            "2aecd67d450c6af7436b91b2e74db5102cf85a1bd6763ceaeab8a9e822ac100f",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Noise) else "",
)
def test_low_rank_noise_has_the_published_bits(kind: Noise, first: tuple[Any, ...], digest: str) -> None:
    z = z_of(42, noise.param_id(Q_PROJ), (768, 768), kind)
    assert z[1, :4].tolist() == [float.fromhex(str(value)) for value in first]
    assert hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest() == digest


def test_rank_1_of_signs_is_one_or_minus_one() -> None:
    z = z_of(1, 2, (300, 200), Noise("low_rank"))
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert torch.linalg.matrix_rank(z) == 1


def test_a_matrix_of_rank_r_has_that_rank_and_entries_of_variance_1(kind: Noise) -> None:
    z = torch.stack([z_of(seed, 2, (40, 50), kind) for seed in range(300)]).double()
    assert torch.linalg.matrix_rank(z[0].float()) == kind.rank
    assert abs(z.mean().item()) < 0.01
    # Of rank 1 in normals |u|^2 |v|^2 moves the variance of one matrix by 0.3, that of the mean over 300 by 0.017.
    assert abs(z.var().item() - 1) < (0.06 if (kind.rank, kind.entries) == (1, "normal") else 0.03)
    flat = z.flatten(1)
    products = flat.T @ flat / len(flat)  # of any two elements 0 in the mean
    rms = (products - torch.eye(len(products))).square().mean().sqrt().item()
    assert rms < 2.5 / math.sqrt(300)


@pytest.mark.parametrize("shape", [(50,), (4, 5, 6), ()], ids=str)
def test_what_is_no_matrix_has_a_z_for_each_element(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    assert torch.equal(z_of(1, 2, shape, Noise("low_rank", 9)).flatten(), noise.rademacher(1, 2, 0, count))
    assert torch.equal(z_of(1, 2, shape, Noise("low_rank", 9, "normal")).flatten(), noise.normal(1, 2, 0, count))


def written(runs: list[list[int]], local: Tensor, kind: Noise, **options: Any) -> Tensor:
    work = (SEEDS, ALPHAS, [0.99, 1.0])
    noise.write_(local, np.array(runs), 7, *work, noise=kind, shape=SHAPE, **options)
    return local


def weights(dtype: torch.dtype) -> Tensor:
    return torch.randn(math.prod(SHAPE), generator=torch.Generator().manual_seed(0)).to(dtype)


def use_the_reference(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    """From now on in the place of compiled kernels; `taken` has the devices that it was asked for."""

    def instead(device: str) -> ModuleType:
        taken.append(device)
        return reference

    monkeypatch.setattr(dispatch, "kernels_on", instead)


@pytest.mark.parametrize("storage", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shards_part_has_the_bits_of_the_whole(dtype: torch.dtype, storage: str, kind: Noise) -> None:
    if storage == "master" and dtype != torch.bfloat16:
        pytest.skip("masters are of bfloat16")
    rounding = "nearest" if storage == "master" else storage
    count = math.prod(SHAPE)
    lows = [torch.zeros(count, dtype=torch.int16) if storage == "master" else None for _ in range(2)]
    whole = written([[0, 0, count]], weights(dtype), kind, rounding=rounding, remainder=lows[0])
    pieces = [[0, 0, 700], [700, 700, 3], [703, 703, count - 703]]
    order = [pieces[2], pieces[0], pieces[1]]  # what lies where, as in a shard that begins in the middle of a row
    at, runs = 0, []
    for _, start, length in order:
        runs.append([at, start, length])
        at += length
    source = torch.cat([weights(dtype)[start : start + length] for _, start, length in order])
    mine = written(runs, source, kind, rounding=rounding, remainder=lows[1])
    back = torch.cat([mine[count - 703 : count - 3], mine[count - 3 :], mine[: count - 703]])
    assert torch.equal(back, whole)
    if storage == "master":
        low = lows[1]
        assert torch.equal(torch.cat([low[count - 703 :], low[: count - 703]]), lows[0])


@pytest.mark.parametrize("storage", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_writes_the_references_bits(
    dtype: torch.dtype, storage: str, kind: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    if storage == "master" and dtype != torch.bfloat16:
        pytest.skip("masters are of bfloat16")
    rounding = "nearest" if storage == "master" else storage
    runs = [[0, 50, 700], [705, 1000, 1], [706, 1100, 900]]
    results, taken = [], list[str]()
    for _ in ("kernel", "reference"):
        low = torch.arange(math.prod(SHAPE)).to(torch.int16) if storage == "master" else None
        results.append((written(runs, weights(dtype), kind, rounding=rounding, remainder=low), low))
        use_the_reference(monkeypatch, taken)
    (kernel, kernel_low), (wanted, wanted_low) = results
    assert taken, "the second time the reference was asked"
    assert torch.equal(kernel, wanted)
    assert storage != "master" or torch.equal(kernel_low, wanted_low)
    assert not torch.equal(kernel, weights(dtype))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_rows_have_the_references_bits(
    dtype: torch.dtype, out_dtype: torch.dtype, kind: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = [(9, 1e-2), (3, -0.5), (9, -1e-2)]
    table, ids = weights(dtype).view(SHAPE), torch.tensor([[0, 36, 5], [1, 2, 3], [36, 36, 0]])
    results, taken = [], list[str]()
    for _ in ("kernel", "reference"):
        view = torch.empty(3, *SHAPE, dtype=out_dtype)
        rows = torch.empty(3, 3, SHAPE[1], dtype=out_dtype)
        noise.view(table, 7, branches, view, noise=kind)
        noise.rows(table, 7, branches, ids, rows, noise=kind)
        results.append((view, rows))
        use_the_reference(monkeypatch, taken)
    assert taken, "the second time the reference was asked"
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1], torch.stack([part[at] for part, at in zip(results[0][0], ids, strict=True)]))


def test_a_view_is_the_weight_plus_scale_times_z(kind: Noise) -> None:
    weight, out = weights(torch.float32).view(SHAPE), torch.empty(2, *SHAPE)
    noise.view(weight, 7, [(9, 0.5), (3, -2.0)], out, noise=kind)
    assert torch.equal(out[0], weight + z_of(9, 7, SHAPE, kind) * 0.5)
    assert torch.equal(out[1], weight + z_of(3, 7, SHAPE, kind) * -2.0)


def test_a_view_of_a_part_knows_the_whole_parameters_shape(kind: Noise) -> None:
    weight, out = weights(torch.float32).view(SHAPE), torch.empty(1, *SHAPE)
    noise.view(weight, 7, [(9, 0.5)], out, noise=kind)
    part = weight[:, 20:40].contiguous()
    runs = np.array([[row * 20, row * SHAPE[1] + 20, 20] for row in range(SHAPE[0])])
    made = torch.empty(1, *part.shape)
    noise.view(part, 7, [(9, 0.5)], made, runs=runs, noise=kind, shape=SHAPE)
    assert torch.equal(made[0], out[0, :, 20:40])


def test_many_steps_in_one_call_give_the_bits_of_many_calls(kind: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, together = [[0, 0, math.prod(SHAPE)]], weights(torch.bfloat16)
    monkeypatch.setattr(writing, "FACTORS", 1)  # a step at a time
    apart = written(runs, weights(torch.bfloat16), kind)
    monkeypatch.undo()
    assert torch.equal(written(runs, together, kind), apart)


@pytest.mark.parametrize("factors", [1, 1200, 1 << 22])
def test_many_shards_at_once_get_the_bits_of_one_after_the_other(
    kind: Noise, factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [SHAPE, (61,), (12, 40), SHAPE, (8, 9)]
    locals_ = [torch.arange(math.prod(shape)).remainder(97).float() for shape in shapes]
    apart = [local.clone() for local in locals_]
    seeds, alphas, decays = np.array(SEEDS, np.uint64), np.array(ALPHAS, np.float32), np.array([0.99, 1.0], np.float32)
    parts = []
    for number, (local, shape) in enumerate(zip(locals_, shapes, strict=True)):
        runs = np.array([[0, 0, local.numel()]])
        parts.append(part_of(local, runs, number, noise=kind, shape=shape))
        noise.write_(apart[number], runs, number, seeds, alphas, decays, noise=kind, shape=shape)
    monkeypatch.setattr(writing, "FACTORS", factors)
    writing.write_all_(parts, seeds, alphas[None], decays[None], noise=kind)
    assert all(map(torch.equal, locals_, apart))
    assert not torch.equal(locals_[0], locals_[3])


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("rank is 0: expected", lambda: Noise("low_rank", 0)),
        ("rank is True: expected", lambda: Noise("low_rank", True)),
        ("entries is 'uniform': expected 'signs' or 'normal'", lambda: Noise("low_rank", 1, "uniform")),
        ("rank is 2 and entries None, but distribution is 'normal'", lambda: Noise("normal", 2)),
        ("only 'low_rank' has them", lambda: Noise("rademacher", entries="signs")),
        ("distribution is 'low_rank of rank 0 in signs'", lambda: Noise.of("low_rank of rank 0 in signs")),
        ("rank is 38, but a matrix of 37 x 61 has rank 37 at most", lambda: z_of(1, 2, SHAPE, Noise("low_rank", 38))),
        ("shape is None", lambda: noise.write_(torch.ones(6), [[0, 0, 6]], 1, [[1]], [[1]], [1], noise=NOISES[0])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_low_rank_noise_can_not_be_is_refused_in_words(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_shape_that_is_smaller_than_the_shard_is_refused() -> None:
    local = torch.ones(6)
    with pytest.raises(ValueError, match=r"shape is \[2, 2\], but runs reaches element 6"):
        noise.write_(local, np.array([[0, 0, 6]]), 1, [[1]], [[1.0]], [1.0], noise=NOISES[0], shape=(2, 2))
    assert local.tolist() == [1] * 6


@pytest.mark.parametrize("kind", [Noise("normal"), Noise("rademacher"), *NOISES], ids=lambda kind: kind.name)
def test_a_noises_name_says_all_of_it(kind: Noise) -> None:
    assert Noise.of(kind.name) == kind
    assert Noise.of(kind) is kind
    assert kind.version == (1 if kind.rank is None else 2)
