"""What must hold for any work: the kernels' bits, and that how the work is cut up does not matter."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mezo_scale import noise
from mezo_scale.noise import reference
from tests.noise.cases import differing, rows_differ, runs_of, values, view_differs, words, write_differs

settings.register_profile("noise", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
PROFILE = settings(settings.get_profile("noise"), max_examples=60)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
distributions = st.sampled_from(["normal", "rademacher"])
u64 = st.integers(0, 2**64 - 1)
starts = st.one_of(st.integers(0, 5000), st.integers(0, 2**50), st.sampled_from([1023, 1024, (1 << 42) - 3]))
lengths = st.one_of(st.integers(0, 40), st.integers(0, 3000), st.sampled_from([127, 128, 129, 576, 1024]))
pieces = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2000), lengths), max_size=6)
strided = st.builds(  # the shard of a tensor-parallel column: many like runs
    lambda count, gap, length: [(0, gap, length)] * count, st.integers(1, 40), st.integers(0, 500), st.integers(1, 90)
)
some_runs = st.builds(runs_of, st.one_of(pieces, strided), starts)


@PROFILE
@given(
    dtype=dtypes,
    runs=some_runs,
    seed=st.integers(0, 2**20),
    steps=st.integers(1, 3),
    directions=st.integers(1, 3),
    decayed=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic", "master"]),
    distribution=distributions,
)
def test_any_write_has_the_references_bits(
    dtype: torch.dtype,
    runs: npt.NDArray[np.int64],
    seed: int,
    steps: int,
    directions: int,
    decayed: bool,
    rounding: str,
    distribution: str,
) -> None:
    master = rounding == "master"
    different = write_differs(
        "cpu",
        torch.bfloat16 if master else dtype,
        runs,
        seed=seed,
        steps=steps,
        directions=directions,
        decayed=decayed,
        master=master,
        stochastic=rounding == "stochastic",
        distribution=distribution,
    )
    assert different == 0


@PROFILE
@given(
    dtype=dtypes,
    out_dtype=dtypes,
    runs=some_runs,
    seed=st.integers(0, 2**20),
    seeds=st.lists(st.sampled_from([0, 1, 2**64 - 1]), min_size=1, max_size=4),
    distribution=distributions,
)
def test_any_view_has_the_references_bits(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    runs: npt.NDArray[np.int64],
    seed: int,
    seeds: list[int],
    distribution: str,
) -> None:
    assert view_differs("cpu", dtype, out_dtype, runs, seed=seed, seeds=tuple(seeds), distribution=distribution) == 0


@PROFILE
@given(
    dtype=dtypes,
    out_dtype=dtypes,
    shape=st.sampled_from([(5, 576), (7, 3, 50), (9, 1), (6,), (3, 2048)]),
    count=st.integers(0, 7),
    seed=st.integers(0, 2**20),
    seeds=st.lists(st.sampled_from([0, 1, 2**64 - 1]), min_size=1, max_size=4),
    same=st.booleans(),
    distribution=distributions,
)
def test_any_rows_have_the_references_bits(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shape: tuple[int, ...],
    count: int,
    seed: int,
    seeds: list[int],
    same: bool,
    distribution: str,
) -> None:
    work = {"seed": seed, "seeds": tuple(seeds), "same": same, "distribution": distribution}
    assert rows_differ("cpu", dtype, out_dtype, shape, count, **work) == 0


@PROFILE
@given(seed=u64, param_id=u64, start=starts, count=st.integers(0, 3000), data=st.data())
def test_a_parameter_cut_anywhere_has_the_bits_of_the_whole(
    seed: int, param_id: int, start: int, count: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5), label="cuts"))
    whole = values(3, count + 10, torch.bfloat16)[:count]
    parts = whole.clone()
    step = ([[seed, seed ^ 1]], [[1e-2, -3e-3]], [0.99])
    noise.write_(whole, np.array([[0, start, count]]), param_id, *step, rounding="stochastic")
    for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
        # Each part as a shard of its own, as on a rank of its own.
        shard = parts[begin:end].clone()
        runs = np.array([[0, start + begin, end - begin]])
        noise.write_(shard, runs, param_id, *step, rounding="stochastic")
        parts[begin:end] = shard
    assert differing(whole, parts) == 0


@PROFILE
@given(
    seed=u64,
    dtype=dtypes,
    rounding=st.sampled_from(["nearest", "stochastic"]),
    master=st.booleans(),
    steps=st.integers(1, 5),
)
def test_steps_in_one_sweep_are_the_steps_one_after_the_other(
    seed: int, dtype: torch.dtype, rounding: str, master: bool, steps: int
) -> None:
    random = np.random.default_rng(seed)
    seeds = random.integers(0, 2**64, (steps, 2), dtype=np.uint64)
    alphas = random.normal(size=(steps, 2)).astype(np.float32) * np.float32(1e-3)
    decays = random.uniform(0.99, 1, steps).astype(np.float32)
    dtype = torch.bfloat16 if master else dtype
    together, runs = values(1, 700, dtype), np.array([[2, 900, 690]])
    together_low = torch.zeros(700, dtype=torch.int16) if master else None
    apart, apart_low = together.clone(), together_low.clone() if together_low is not None else None
    noise.write_(together, runs, 5, seeds, alphas, decays, remainder=together_low, rounding=rounding)
    for t in range(steps):
        step = slice(t, t + 1)
        noise.write_(apart, runs, 5, seeds[step], alphas[step], decays[step], remainder=apart_low, rounding=rounding)
    assert differing(together, apart) == 0
    if together_low is not None and apart_low is not None:
        assert torch.equal(together_low, apart_low)


@PROFILE
@given(seed=u64, bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_a_master_keeps_every_bit_of_float32(seed: int, bits: list[int]) -> None:
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    master = torch.where(master.isfinite(), master, 1.0)
    rounded = (words(master) + 0x8000) >> 16
    local, remainder = rounded.to(torch.int16).view(torch.bfloat16), words(master).to(torch.int16)
    step = (np.array([[0, 7, len(bits)]]), 3, [[seed]], [[1e-4]], [0.999])
    noise.write_(master, *step)
    noise.write_(local, *step, remainder=remainder)
    kept = (words(local).int() << 16) + remainder.int()
    assert torch.equal(kept, words(master))
    assert torch.equal(words(local), ((words(master) + 0x8000) >> 16).to(torch.int16))


@PROFILE
@given(seed=u64, param_id=u64, start=starts, count=st.integers(0, 2500))
def test_every_element_is_the_same_alone_and_in_company(seed: int, param_id: int, start: int, count: int) -> None:
    device = torch.device("cpu")
    company = noise.normal(seed, param_id, start, count)
    assert torch.equal(company, reference.span(seed, param_id, start, count, 0, device))
    for offset in range(0, count, 499):
        assert noise.normal(seed, param_id, start + offset, 1).item() == company[offset].item()


@PROFILE
@given(
    left=st.tuples(u64, u64, st.integers(0, 2**53 - 1)),
    right=st.tuples(u64, u64, st.integers(0, 2**53 - 1)),
)
def test_another_seed_parameter_or_tile_has_another_z(left: tuple[int, int, int], right: tuple[int, int, int]) -> None:
    a, b = (noise.normal(seed, param_id, tile * 1024, 64) for seed, param_id, tile in (left, right))
    assert torch.equal(a, b) == (left == right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    local = torch.full((1 << 18,), 1.0, dtype=dtype)
    step = torch.finfo(dtype).eps / 10  # a tenth of the spacing above 1: rounding to nearest would lose it
    still = local.clone()
    work = (np.array([[0, 0, local.numel()]]), 1, [[4]], [[step]], [1.0])
    noise.write_(local, *work, rounding="stochastic", noise=noise.RADEMACHER)
    noise.write_(still, *work, noise=noise.RADEMACHER)
    z = noise.rademacher(4, 1, 0, local.numel())
    moved = (local.double() - 1) * z
    assert moved.mean().item() == pytest.approx(step, rel=0.02)
    assert still[z > 0].eq(1).all()
