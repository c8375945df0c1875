"""The compiled kernels against the plain-torch reference: the same bits, whatever the work.

Triton's kernels run in its interpreter, in a process of its own because the choice is made at import.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numba.core import caching

from mezo_scale import noise
from mezo_scale.noise import cpu, cpu_float16, cpu_jit, dispatch, reference
from tests.noise import cases as noise_cases
from tests.noise.cases import runs_of

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A tile crossed, a whole tile, a gap in each numbering, a lane's part, one element, none.
PIECES = [(0, 0, 1500), (3, 700, 1024), (0, 5, 61), (1, 130, 1), (0, 0, 0)]
SMALL = [(0, 0, 1061), (2, 40, 100)]  # for the interpreter, which takes 10 ms for a tile

Differ = Callable[..., int]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=noise_cases.interpret) as process:
        yield process


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runs(kernels: str) -> noise_cases.Runs:
    return runs_of(PIECES if kernels == "cpu" else SMALL, start=37)


@pytest.fixture
def differ(kernels: str, interpreter: ProcessPoolExecutor) -> Differ:
    """Calls one of `noise_cases` where the kernels can run."""

    def call(function: Differ, *arguments: object, **options: object) -> int:
        if kernels == "cpu":
            return function(kernels, *arguments, **options)
        return interpreter.submit(function, kernels, *arguments, **options).result()

    return call


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_of_one_direction_has_the_references_bits(
    differ: Differ, runs: noise_cases.Runs, dtype: torch.dtype, distribution: str
) -> None:
    assert differ(noise_cases.write_differs, dtype, runs, distribution=distribution) == 0


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_of_several_steps_and_directions_has_the_references_bits(
    differ: Differ, runs: noise_cases.Runs, dtype: torch.dtype, stochastic: bool
) -> None:
    work = {"steps": 2, "directions": 2, "decayed": True, "stochastic": stochastic, "seed": 1}
    assert differ(noise_cases.write_differs, dtype, runs, **work) == 0


def test_a_write_of_signs_rounds_stochastically_with_the_references_bits(
    differ: Differ, runs: noise_cases.Runs
) -> None:
    work = {"stochastic": True, "distribution": "rademacher", "seed": 2}
    assert differ(noise_cases.write_differs, torch.bfloat16, runs, **work) == 0


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_write_to_a_master_has_the_references_bits(differ: Differ, runs: noise_cases.Runs, distribution: str) -> None:
    work = {"steps": 2, "directions": 2, "decayed": True, "master": True, "distribution": distribution, "seed": 3}
    assert differ(noise_cases.write_differs, torch.bfloat16, runs, **work) == 0


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_has_the_references_bits_and_leaves_the_rest_alone(
    differ: Differ, runs: noise_cases.Runs, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    assert differ(noise_cases.view_differs, dtype, out_dtype, runs, seeds=(9, 3, 9)) == 0


@pytest.mark.parametrize("same", [True, False], ids=["same-ids", "ids-per-branch"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_rows_looked_up_have_the_references_bits(differ: Differ, distribution: str, same: bool) -> None:
    work = {"seeds": (9, 3, 9), "same": same, "distribution": distribution}
    assert differ(noise_cases.rows_differ, torch.bfloat16, torch.float16, (11, 9, 8), 4, **work) == 0


@pytest.mark.parametrize("stream", [4, 6, 8, 10], ids=["U-normal", "U-signs", "V-normal", "V-signs"])
def test_the_factors_of_low_rank_noise_have_the_references_bits(differ: Differ, stream: int) -> None:
    assert differ(noise_cases.draw_differs, stream, 0, 1100) == 0
    assert differ(noise_cases.draw_differs, stream, 900, 200) == 0


LOW_RANK = [noise.Noise("low_rank"), noise.Noise("low_rank", 3, "normal")]


@pytest.mark.parametrize("kind", LOW_RANK, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("dtype", "work"),
    [
        (torch.float32, {"directions": 3}),
        (torch.bfloat16, {"steps": 2, "directions": 2, "decayed": True}),
        (torch.bfloat16, {"steps": 2, "directions": 2, "decayed": True, "master": True}),
        (torch.bfloat16, {"stochastic": True}),
        (torch.float16, {"steps": 2, "stochastic": True}),
    ],
)
def test_a_write_of_low_rank_has_the_references_bits(
    differ: Differ, kind: noise.Noise, dtype: torch.dtype, work: dict[str, Any]
) -> None:
    assert differ(noise_cases.low_rank_writes_differ, dtype, kind, **work) == 0


@pytest.mark.parametrize("kind", LOW_RANK, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32)]
)
def test_views_and_rows_of_low_rank_have_the_references_bits(
    differ: Differ, kind: noise.Noise, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    assert differ(noise_cases.low_rank_views_differ, *dtypes, kind) == 0


def test_an_element_far_into_a_parameter_has_the_references_bits(differ: Differ) -> None:
    assert differ(noise_cases.write_differs, torch.float32, runs_of(SMALL, start=(1 << 43) - 500)) == 0


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("stretch", [1, 7])
def test_threads_change_no_bit(threads: int, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK", 500)  # so that a small shard is spread, and a run is cut anywhere
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    runs = runs_of([(1, stretch, 61)] * 90 + [(0, 0, 3000)], start=11)
    assert noise_cases.write_differs("cpu", torch.bfloat16, runs, steps=2, directions=2) == 0
    assert noise_cases.view_differs("cpu", torch.bfloat16, torch.float32, runs) == 0
    assert noise_cases.rows_differ("cpu", torch.bfloat16, torch.bfloat16, (40, 61), 30) == 0


def test_a_forked_process_makes_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = noise.normal(1, 2, 3, 5000).sum().item()
    answer, question = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        question.send(noise.normal(1, 2, 3, 5000).sum().item())
        os._exit(0)
    assert answer.poll(60), "the child waits for threads that only its parent has"
    assert answer.recv() == expected
    os.waitpid(child, 0)


def test_where_no_folder_can_be_written_only_the_cache_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])

    def successor(number: int) -> int:
        return number + 1

    assert cpu_jit.sweep(successor)(1) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_nan_stays_a_nan(dtype: torch.dtype, rounding: str) -> None:
    patterns = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)
    local = patterns.view(torch.float32).to(dtype)
    runs = np.array([[0, 0, 5]])
    noise.write_(local, runs, 1, [[5]], [[1e-3]], [0.9], rounding=rounding)
    assert local.isnan().all()


def test_float16_is_the_same_where_the_processor_does_not_know_it() -> None:
    to_half, from_half = np.vectorize(cpu_float16.to_half_in_software), np.vectorize(cpu_float16.from_half_in_software)
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[~np.isnan(halves.view(np.float16))]
    exact = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(from_half(halves).astype(np.float32).view(np.int32), exact.view(np.int32))
    with np.errstate(over="ignore"):
        beside = (exact[:, None].view(np.int32) + np.array([-0x1001, -0x1000, -1, 0, 1, 0x1000, 0x1001])).astype(
            np.int32
        )
        near = beside.view(np.float32).ravel()[::7]
        near = near[~np.isnan(near)]
        assert np.array_equal(to_half(near), near.astype(np.float16).view(np.uint16))


def test_an_empty_shard_is_no_work() -> None:
    empty = torch.empty(0)
    noise.write_(empty, np.empty((0, 3), np.int64), 1, [[5]], [[1.0]], [1.0])
    noise.view(empty, 1, [(1, 1.0)], torch.empty(1, 0))
    assert noise.normal(1, 2, 3, 0).shape == (0,)


def test_many_short_runs_take_no_python_loop() -> None:
    runs = np.stack((np.arange(50_000) * 4, np.arange(50_000) * 9, np.full(50_000, 4)), axis=1)
    local = torch.zeros(200_000)
    noise.write_(local, runs, 1, [[5]], [[1.0]], [1.0])
    elements = torch.from_numpy((runs[:, 1:2] + np.arange(4)).ravel())
    assert torch.equal(local, reference.values(5, 1, elements))


def test_other_devices_use_triton_where_it_serves_them_and_else_the_reference() -> None:
    modules = {kind: dispatch.kernels_on(kind).__name__ for kind in ("cpu", "cuda", "xpu", "mps")}
    assert {kind: name.rpartition(".")[2] for kind, name in modules.items()} == {
        "cpu": "cpu",
        "cuda": "cuda",
        "xpu": "cuda",
        "mps": "reference",
    }


@pytest.mark.parametrize("directions", [3, 4, 5, 9])
def test_directions_that_are_drawn_in_fours_have_the_references_bits(differ: Differ, directions: int) -> None:
    assert differ(noise_cases.write_differs, torch.bfloat16, runs_of(SMALL, start=37), directions=directions) == 0


def test_interpreted_normals_of_every_radius_and_angle_have_the_references_bits(
    interpreter: ProcessPoolExecutor,
) -> None:
    assert interpreter.submit(noise_cases.kernel_box_muller_differs).result() == 0


@pytest.mark.parametrize(
    "work",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "alone": True},
        {"dtype": torch.bfloat16, "master": True, "directions": 2},
        {"dtype": torch.float32, "stochastic": True},
        {"dtype": torch.float16, "stochastic": True},
    ],
)
def test_shards_written_in_one_launch_have_the_references_bits(interpreter: ProcessPoolExecutor, work: Any) -> None:
    assert interpreter.submit(noise_cases.parts_differ, **work).result() == 0


def test_what_is_kept_on_the_device_follows_step_and_shard(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(noise_cases.kept_tables_differ).result() == 0


def test_compiled_for_a_gpu_only_what_the_specification_allows_is_fused() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    from mezo_scale.noise.cuda import OPTIONS, WARPS
    from tools.kernel_sass import kernels

    pairs = 1024 // 2 // (32 * WARPS)  # of normals in a thread, in code for whole tiles and in code for others
    for fused, (_, kernel, signature, constants) in zip(
        (2 * pairs * 6, 2 * pairs * 4), list(kernels())[1:3], strict=True
    ):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        try:
            ptx = compile_for(source, GPUTarget("cuda", 90, 32), dict(OPTIONS)).asm["ptx"]
        except (RuntimeError, FileNotFoundError) as error:  # a Triton built without NVIDIA's tools
            pytest.skip(f"Triton can't compile for CUDA here: {error}")
        fused = 6 if constants["ptx"] else 4  # two are inside the short root
        assert ptx.count("fma.rn.f32") == ptx.count("fma") == 2 * pairs * fused
        assert ("sqrt.rn" in ptx) is not constants["ptx"]
        assert ptx.count(".approx") == ptx.count("rsqrt.approx.ftz.f32") == 2 * pairs * constants["ptx"]


def test_compiled_for_a_gpu_nothing_of_low_rank_is_fused() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    from mezo_scale.noise import triton_low_rank
    from mezo_scale.noise.cuda import BFLOAT16, MASTER, OF_LOW_RANK
    from tools.kernel_sass import kernels

    ((written, write, known),) = [parts for name, *parts in kernels() if "rank 1" in name]
    factors = {"u": "*fp32", "v": "*fp32", "scales": "*fp32"}
    view = {"weight": "*bf16", "out": "*bf16", "table": "*i64", "firsts": "*i64", "coarse": "*i32", **factors}
    view |= {"targets": "*i64", "m": "i32", "n": "i32", "scale": "fp32"}
    rows = {"table": "*bf16", "out": "*bf16", "ids": "*i64", **factors}
    rows |= dict.fromkeys(("parts", "height", "width", "count"), "i32") | {"scale": "fp32"}
    of_rank = {"rank": 2, "out_kind": BFLOAT16}
    for kernel, signature, constants in (
        (written, write, known),
        (written, write, known | {"rank": 3, "directions": 4, "decayed": True, "stochastic": True}),
        (written, write | {"local": "*i16", "remainder": "*i16"}, known | {"kind": MASTER, "single": False}),
        (triton_low_rank.view, view, of_rank | {"branches": 2, "single": True, "aligned": True}),
        (triton_low_rank.rows, rows, of_rank),
    ):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        try:
            ptx = compile_for(source, GPUTarget("cuda", 90, 32), dict(OF_LOW_RANK)).asm["ptx"]
        except (RuntimeError, FileNotFoundError) as error:  # a Triton built without NVIDIA's tools
            pytest.skip(f"Triton can't compile for CUDA here: {error}")
        assert "mul.f32" in ptx or "mul.rn.f32" in ptx
        assert "fma" not in ptx


@pytest.mark.parametrize("distribution", ["normal", "low_rank"])
def test_steps_by_way_of_the_view_have_the_references_bits(differ: Differ, distribution: str) -> None:
    assert differ(noise_cases.steps_differ, distribution) == 0
