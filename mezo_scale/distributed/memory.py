"""Peak memory of a stretch of a run: of the accelerator where there is one, else of the process."""

import ctypes
import gc
import platform
import re
from pathlib import Path

import torch

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
            libc.malloc_trim(0)  # what loading has freed goes back to the system, or it would count
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
