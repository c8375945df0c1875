"""Peak memory of a stretch of a run: of the accelerator where there is one, else of the process."""

import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_LARGE = 2 << 20  # bytes of a block from which on it is mapped by itself: those that torch puts into huge pages
_TOP = 64 << 20  # free bytes at the heap's end from which on they go back to the system
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory used since the last `reset`, in bytes.

    On CUDA what torch's allocator held (`max_memory_allocated`). On a CPU the resident set's high-water mark (VmHWM),
    which belongs to this process alone (`ru_maxrss` is inherited from whoever started it); it is reset through
    /proc/self/clear_refs, and where that is not allowed it covers the time from the process's start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        if (libc := _glibc()) is not None:
            libc.malloc_trim(0)  # what loading has freed would count
        if _CLEAR.exists():
            try:
                _CLEAR.write_text("5")
            except OSError:
                return

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM")

    def now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status("VmRSS")


@contextmanager
def collecting_only_new_garbage() -> Iterator[None]:
    """Inside, Python's collector looks at objects that were made inside only.

    It looks at all of them otherwise, each time that a phase begins: the half million of torch, transformers and
    DeepSpeed take it a quarter of a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_memory_steady() -> None:
    """Keeps this process from growing step by step (glibc); for before its first tensor.

    glibc before 2.38 can't give the hole that an aligned block leaves to another block of its size, so gathered weights
    and activations take new memory again and again. Here large blocks are mapped and unmapped one by one instead; in
    huge pages, for mapping in small ones costs more than computing. An environment that says otherwise is left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first block
    libc = _glibc()
    if libc is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc.mallopt(-8, 1)  # M_ARENA_MAX: each thread's own heap would keep holes of its own
    libc.mallopt(-3, _LARGE)  # M_MMAP_THRESHOLD: fixed from here on
    libc.mallopt(-1, _TOP)  # M_TRIM_THRESHOLD


def keep_freed_memory() -> None:
    """From here on (glibc): mapping it anew costs more than a forward pass on some virtual machines."""
    if (libc := _glibc()) is not None:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never by mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never back to the system


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _status(field: str) -> int:
    """Bytes; 0 where the system has no /proc."""
    text = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0
