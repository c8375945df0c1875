"""How many instructions a GPU issues for each element of a sweep: counted in the machine code for sm_90, without a GPU.

    python -m tools.kernel_sass [--arch 90] [--out tools/results/kernel_sass.csv]

Triton compiles the kernels with the options that they are launched with, and its cuobjdump shows what they became.
Counted are the instructions of one thread on the way that a whole tile takes, loops run once, over the elements that it
holds. It is no time: what an instruction takes, and what hides behind what, only a GPU says. Where all lanes issue at
every clock, a write of bfloat16 that keeps up with an H100's memory has 132 SMs x 128 lanes x 1.755 GHz / (3.0 TB/s / 4
bytes) = 39 instructions for an element.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mezo_scale.noise import cuda, spec, triton_kernels, triton_low_rank

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")


class Instruction(NamedTuple):
    at: int
    predicate: str | None
    name: str
    operands: str


@dataclass(frozen=True)
class Count:
    """A row of the table.

    Attributes:
        per_thread: instructions on a whole tile's way; per_element: of each element that the thread holds.
        shared: loads and stores of shared memory among them.
        registers: of a thread.
    """

    kernel: str
    warps: int
    per_thread: int
    per_element: float
    shared: int
    registers: int


def disassembled(cubin: bytes) -> tuple[list[Instruction], int]:
    """The instructions of a kernel in order, and the registers of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown, used = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = [Instruction(int(at, 16), *rest) for at, *rest in _LINE.findall(shown)]
    return found, int(re.findall(r"REG:(\d+)", used)[0])


def ways(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Every way from the first instruction to the end on which no instruction comes twice and nothing is called."""
    place = {instruction.at: number for number, instruction in enumerate(code)}
    open_ways: list[tuple[int, list[Instruction]]] = [(0, [])]
    while open_ways:
        number, way = open_ways.pop()
        while True:
            instruction = code[number]
            way.append(instruction)
            always = not instruction.predicate or instruction.predicate == "@PT"
            if instruction.name == "EXIT" and always:
                yield way
                break
            if instruction.name.startswith("CALL") and always:
                break
            if instruction.name == "BRA":
                to = place[int(re.findall(r"0x([0-9a-f]+)", instruction.operands)[-1], 16)]
                if to > number and not always:
                    open_ways.append((to, list(way)))
                elif always:
                    if to <= number:
                        break
                    number = to
                    continue
            number += 1


def of_a_whole_tile(code: list[Instruction]) -> list[Instruction]:
    """Of all ways the one that draws most, then masks least, then is shortest."""

    def rank(way: list[Instruction]) -> tuple[int, int, int]:
        masked = sum(bool(i.predicate) and i.name.startswith(("LDG", "STG")) for i in way)
        return -sum(i.name.startswith("MUFU.RSQ") for i in way), masked, len(way)

    return min(ways(code), key=rank)


PLACES = {"table": "*i64", "firsts": "*i64", "coarse": "*i32"}


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """(name, kernel, types of its arguments, constants) of what a step launches, and of some that it may."""
    numbers = {"seeds": "*i64", "alphas": "*fp32", "decays": "*fp32", "steps": "i32"}
    common = {"stream": spec.NORMAL, "single": True, "aligned": True, "ptx": True}
    write = {"directions": 1, "decayed": False, "kind": cuda.BFLOAT16, "stochastic": False, "one_step": True} | common
    one = {"local": "*bf16", "remainder": "*bf16"} | PLACES | numbers
    many = {"single": False}
    for name, types, constants in (
        ("write, bfloat16, one shard", one, {}),
        ("write, bfloat16, all shards", one, many),
        ("the same, other GPUs' instructions", one, many | {"ptx": False}),
        ("write, float32, all shards", one | {"local": "*fp32", "remainder": "*fp32"}, many | {"kind": cuda.FLOAT32}),
        ("write, master, all shards", one | {"local": "*i16", "remainder": "*i16"}, many | {"kind": cuda.MASTER}),
        ("write, bfloat16, 4 directions", one, many | {"directions": 4}),
        ("write, bfloat16, signs", one, many | {"stream": spec.RADEMACHER}),
        ("write, bfloat16, not aligned", one, many | {"aligned": False}),
    ):
        yield name, triton_kernels.write, types, write | constants
    factors = {"u": "*fp32", "v": "*fp32"}
    sides = {"m": "i32", "n": "i32", "scale": "fp32"}
    steps = {"steps": numbers.pop("steps")}
    low_rank = {"local": "*bf16", "remainder": "*bf16"} | PLACES | numbers | factors | steps | sides
    of_rank = {"rank": 1, "decayed": False, "kind": cuda.BFLOAT16, "stochastic": False, "single": True, "aligned": True}
    one_direction = of_rank | {"directions": 1, "ptx": True}  # several are a loop, which a straight way does not show
    yield "write, bfloat16, rank 1", triton_low_rank.write, low_rank, one_direction
    pointers = {"weight": "*bf16", "out": "*bf16"} | PLACES | {"seed": "*i64", "scales": "*fp32", "targets": "*i64"}
    view = {"branches": 2, "out_kind": cuda.BFLOAT16} | common
    yield "view, bfloat16, two sides", triton_kernels.view, pointers, view
    yield "view, bfloat16 of float32", triton_kernels.view, pointers | {"weight": "*fp32"}, view


def count(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, arch: int) -> Count:
    names = list(signature)
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = cuda.OPTIONS | {"num_warps": warps}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    code, registers = disassembled(built.asm["cubin"])
    way = of_a_whole_tile(code)
    shared = sum(i.name.startswith(("LDS", "STS", "LDSM", "STSM")) for i in way)
    return Count(name, warps, len(way), round(len(way) / (spec.TILE / 32 / warps), 1), shared, registers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--warps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernel_sass.csv")
    options = parser.parse_args()
    about = {"triton": triton.__version__, "arch": options.arch}
    rows = []
    for name, kernel, signature, constants in kernels():
        for warps in options.warps:
            found = count(name, kernel, signature, constants, warps, options.arch)
            rows.append(about | asdict(found))
            print(
                f"{found.kernel:36} {found.warps} warps {found.per_element:6.1f} instructions per element, "
                f"{found.shared} in shared memory, {found.registers} registers",
                flush=True,
            )
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
