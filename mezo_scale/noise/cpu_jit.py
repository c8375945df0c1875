"""Types of the CPU's kernels by short names, the memory that they are given, and the two ways of compiling them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
F32 = npt.NDArray[np.float32]
I16 = npt.NDArray[np.int16]
I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

f32: TypeAlias = np.float32
i16: TypeAlias = np.int16
i32: TypeAlias = np.int32
u16: TypeAlias = np.uint16
u32: TypeAlias = np.uint32
u64: TypeAlias = np.uint64


def memory_of(tensor: Tensor, kind: str) -> npt.NDArray[Any]:
    """The memory of a contiguous tensor as integers, "u2" or "i4"; it lives as long as the tensor does.

    Not through Tensor.numpy(): that fixes the storage's size for good, and FSDP frees weights by resizing theirs.
    """
    count = tensor.numel() * tensor.element_size() // int(kind[1:])
    interface = {"version": 3, "typestr": f"={kind}", "shape": (count,), "data": (tensor.data_ptr(), False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """A part of a sweep, compiled into it."""
    compiled: Callable[P, R] = numba.njit(nogil=True)(function)
    return compiled


def sweep(function: Callable[P, R]) -> Callable[P, R]:
    """What Python calls, compiled once and kept on disk."""
    try:
        compiled: Callable[P, R] = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the installation nor the user's cache folder can be written
        return inner(function)
    return compiled
