"""Every sweep of the noise on a device, held to the CPU's kernels bit for bit.

    python -m tools.gpu_bits [--large]
    TRITON_INTERPRET=1 python -m tools.gpu_bits --device cpu      # the same kernels in Triton's interpreter, small

--large adds a shard of 2^31 + 4096 elements, whose local offsets do not fit in 32 bits: 4.3 GB on the device, twice
that on the host. Ends with an error if one bit differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mezo_scale.noise import Noise, cpu, cuda, reference, spec
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Branches, Part
from tests.noise import box_muller_kernel, cases

KINDS = ("normal", "rademacher")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def differing(expected: Tensor, found: Tensor) -> int:
    return int((cases.words(expected) != cases.words(found.cpu())).sum())


def normals(device: torch.device) -> Iterator[tuple[str, int]]:
    """All radii and angles."""
    words = torch.arange(1 << 16, dtype=torch.int64)
    words = (words << 16) | (words * 40503 % (1 << 16))
    found, expected = box_muller_kernel.normals(words.to(device)), reference._box_muller(words)
    yield "65,536 radii and angles", sum(map(differing, expected, found))


def writes(device: torch.device, count: int) -> Iterator[tuple[str, int]]:
    random = np.random.default_rng(0)
    runs = cases.runs_of([(0, 700, count), (5, 3, 61), (1, 130, 1)], (1 << 43) - 500)
    size = count + 80
    for dtype in DTYPES:
        for directions, steps, kind, stochastic, master in (
            (1, 1, "normal", False, False),
            (1, 1, "rademacher", False, False),
            (4, 1, "normal", False, False),
            (5, 3, "normal", False, False),
            (1, 2, "normal", True, False),
            (1, 1, "rademacher", True, False),
            (2, 2, "normal", False, True),
        ):
            if master and dtype != torch.bfloat16:
                continue
            seeds = random.integers(0, 2**64, (steps, directions), dtype=np.uint64)
            alphas = (random.normal(size=(steps, directions)) * 1e-3).astype(np.float32)
            decays = random.uniform(0.9, 1, steps).astype(np.float32)
            local = cases.values(directions, size, dtype)
            low = torch.zeros(size, dtype=torch.int16) if master else None
            there, there_low = local.to(device, copy=True), None if low is None else low.to(device, copy=True)
            work = (seeds, alphas, decays)
            cpu.write_(local, runs, 2**63 + 1, *work, low, stochastic, Noise(kind).stream)
            cuda.write_(there, runs, 2**63 + 1, *work, there_low, stochastic, Noise(kind).stream)
            wrong = differing(local, there)
            if low is not None and there_low is not None:
                wrong += differing(low, there_low)
            yield f"write {dtype} K={directions} S={steps} {kind} stochastic={stochastic} master={master}", wrong


def parts(device: torch.device, count: int) -> Iterator[tuple[str, int]]:
    """Shards of several shapes and alignments in one launch."""
    sizes = [count, 70, 3, 2 * count + 9]
    step = np.array([[7]], np.uint64), np.array([[[0.5]], [[-0.25]]], np.float32), np.array([[1.0], [0.9]], np.float32)
    shards, here = [], []
    for number, size in enumerate(sizes):
        runs, local, which = np.array([[0, 13 * number, size]]), cases.values(number, size, torch.bfloat16), number % 2
        shards.append(Part(local.to(device, copy=True), runs, number, None, which, which))
        cpu.write_(local, runs, number, step[0], step[1][which], step[2][which], None, False, 0)
        here.append(local)
    cuda.write_all_(shards, *step, False, 0, [None] * len(shards))
    yield "write of four shards at once", sum(differing(a, part.local) for a, part in zip(here, shards, strict=True))


def views(device: torch.device, count: int) -> Iterator[tuple[str, int]]:
    branches = Branches([(9, 0.5), (9, -0.5), (3, 0.25), (3, -0.25)])
    for kind in KINDS:
        stream = Noise(kind).stream
        for dtype in DTYPES:
            for out_dtype in DTYPES:
                weight, runs = cases.values(1, count, dtype), np.array([[0, 0, count]])
                out = [torch.empty(4, count, dtype=out_dtype, device=place) for place in ("cpu", device)]
                cpu.view(weight, runs, 5, branches, out[0], stream)
                cuda.view(weight.to(device), runs, 5, branches, out[1], stream)
                yield f"view {dtype} -> {out_dtype} {kind}", differing(*out)
        table, ids = cases.values(2, 50 * 96, torch.bfloat16).view(50, 96), torch.randint(50, (4, 11))
        out = [torch.empty(4, 11, 96, dtype=torch.bfloat16, device=place) for place in ("cpu", device)]
        cpu.rows(table, 5, branches, ids, out[0], stream)
        cuda.rows(table.to(device), 5, branches, ids.to(device), out[1], stream)
        yield f"rows {kind}", differing(*out)


def low_rank(device: torch.device) -> Iterator[tuple[str, int]]:
    shape, seeds = (70, 300), np.array([[1, 2**63]], np.uint64)
    runs, branches = np.array([[0, 0, 70 * 300]]), Branches([(1, 0.5), (2**63, -0.5)])
    step, ids = (seeds, np.array([[0.5, -0.25]], np.float32), np.array([0.99], np.float32)), torch.randint(70, (2, 9))
    for entries in ("signs", "normal"):
        noise, found = Noise("low_rank", 4, entries), []
        for module, place in ((cpu, torch.device("cpu")), (cuda, device)):
            u, v = (
                module.draw(seeds.ravel(), 11, noise.stream + side, 0, 4 * size, place).view(2, 4, size)
                for side, size in zip((spec.LEFT, spec.RIGHT), shape, strict=True)
            )
            found.append(Factors(u, v))
        yield f"factors of {noise.name}", differing(found[0].u, found[1].u) + differing(found[0].v, found[1].v)
        for dtype in DTYPES:
            made = []
            for module, place, of in ((cpu, torch.device("cpu"), found[0]), (cuda, device, found[1])):
                local = cases.values(3, 70 * 300, dtype).to(place, copy=True)
                module.write_(local, runs, 11, *step, None, False, noise.stream, of)
                out = torch.empty(2, 70 * 300, dtype=dtype, device=place)
                module.view(local, runs, 11, branches, out, noise.stream, of)
                looked_up = torch.empty(2, 9, 300, dtype=dtype, device=place)
                module.rows(local.view(shape), 11, branches, ids.to(place), looked_up, noise.stream, of)
                made.append((local, out, looked_up))
            wrong = [differing(one, other) for one, other in zip(*made, strict=True)]
            yield f"write, view and rows of {noise.name}, {dtype}", sum(wrong)


def large(device: torch.device) -> Iterator[tuple[str, int]]:
    count = (1 << 31) + 4096
    runs, step = np.array([[0, 77, count]]), (np.array([[5]], np.uint64), np.full((1, 1), 0.5, np.float32))
    there = torch.zeros(count, dtype=torch.bfloat16, device=device)
    cuda.write_(there, runs, 3, *step, np.ones(1, np.float32), None, False, 0)
    here = torch.zeros(count, dtype=torch.bfloat16)
    cpu.write_(here, runs, 3, *step, np.ones(1, np.float32), None, False, 0)
    wrong = sum(differing(one, other) for one, other in zip(here.split(1 << 28), there.split(1 << 28), strict=True))
    yield "write of 2^31 + 4096 elements", wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    count = 2500 if device.type == "cpu" else 1 << 20
    checks = [normals(device), writes(device, count), parts(device, count), views(device, count), low_rank(device)]
    checks += [large(device)] if options.large else []
    total = wrong = 0
    for check in checks:
        for name, bad in check:
            print(f"{'ok   ' if not bad else 'WRONG'} {name}{f': {bad} words differ' if bad else ''}", flush=True)
            total, wrong = total + 1, wrong + bool(bad)
    print(f"{total - wrong} of {total} have the CPU's bits")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
