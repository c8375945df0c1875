"""Memory of a process: peaks between resets, and that it does not grow with every block that is freed."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import torch

from mezo_scale.distributed.memory import PeakMemory, collecting_only_new_garbage

ROOT = Path(__file__).parents[2]
# As in a step: large blocks come and go, and small ones that stay are made in between.
STEPS = """
import torch
from mezo_scale.distributed.memory import PeakMemory, keep_memory_steady
keep_memory_steady()
memory, kept = PeakMemory(torch.device("cpu")), []
for step in range(40):
    for size in (3, 7, 20, 54, 108):
        block = torch.ones(size << 18)  # MiB
        kept.append(torch.ones(1000))
        del block
    if step == 4:
        before = memory.now()
print((memory.now() - before) >> 20, memory.peak() >> 20)
"""


FAULTS = """
import resource
import torch
from mezo_scale.distributed.memory import keep_memory_steady
keep_memory_steady()
for size in (300, 700, 1100, 1500, 1900, 2040):
    torch.ones(size << 8)  # KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(size << 8)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 50)
"""


def printed_by(program: str) -> list[int]:
    """The numbers that a program prints which runs alone, in an environment that leaves the allocator as it is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_a_peak_is_that_of_the_stretch_since_the_reset() -> None:
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(1 << 26)  # 256 MiB
    assert memory.peak() >= memory.now() - (1 << 20) >= block.nbytes
    before = memory.now()
    del block
    memory.reset()
    assert memory.peak() < before - (200 << 20)


def test_a_process_does_not_grow_with_the_blocks_that_it_frees() -> None:
    grown_mib, _ = printed_by(STEPS)
    assert grown_mib < 64


def test_blocks_too_small_for_huge_pages_are_not_mapped_anew_each_time() -> None:
    """A step of a small batch has thousands of them, and to fault them in page by page took a quarter of its time."""
    assert max(printed_by(FAULTS)) < 20  # faults for each block; 1,900 KiB are 475 pages


def test_inside_the_collector_looks_at_what_was_made_inside_and_afterwards_at_all() -> None:
    class Knot:
        """Holds itself."""

        def __init__(self) -> None:
            self.me = self

    gc.collect()
    outside, inside = weakref.ref(Knot()), None
    with collecting_only_new_garbage():
        assert outside() is None  # garbage of before is collected, not kept
        frozen, inside = gc.get_freeze_count(), weakref.ref(Knot())
        gc.collect()
        assert inside() is None
    assert frozen > 10_000
    assert gc.get_freeze_count() == 0
