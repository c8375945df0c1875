"""Scratch memory for perturbed weights: one buffer per dtype and device, reused for every module of every step."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ALIGN = 64  # elements; keeps every slot on a cache line and a vector boundary

Key = tuple[torch.device, torch.dtype]


class Slot:
    """Uninitialised memory for a weight in several branches.

    Attributes:
        whole: [branches, *weight.shape], contiguous.
        parts: of each branch, with a count of its own of what writes it.
    """

    __slots__ = ("parts", "whole")

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.parts = [part.data for part in whole]


class Scratch:
    """Slots are taken one after the other and given back together when the module that took them has run.

    The first step finds out how much is needed; from then on the buffer has that size and nothing is allocated. A
    module that keeps a weight, or a view of it, for others to read keeps the whole buffer: the next gets a new one.

    Attributes:
        notes: whatever a user of slots keeps with them; gone when they are.
    """

    def __init__(self) -> None:
        self._buffers: dict[Key, Tensor] = {}
        self._used: dict[Key, int] = {}
        self._peak: dict[Key, int] = {}
        self._uses: dict[Key, int] = {}  # how many tensors lie in a buffer when nobody has kept one
        self._taken: dict[Key, list[tuple[int, Slot]]] = defaultdict(list)  # by their place; some were given back since
        self.notes: dict[Any, Any] = {}
        self._slots: dict[Key, dict[tuple[int, tuple[int, ...]], Slot]] = defaultdict(dict)

    def frame(self) -> AbstractContextManager[None]:
        """What is taken inside is free again afterwards."""
        return _Frame(self._used)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Slot:
        """A slot of that shape, valid until the enclosing frame ends, which nothing has written through its parts."""
        key = (device, dtype)
        start = self._used.get(key, 0)
        numel = math.prod(shape)
        end = start + -(-numel // ALIGN) * ALIGN
        self._used[key] = end
        self._peak[key] = max(self._peak.get(key, 0), end)
        buffer = self._buffers.get(key)
        if buffer is not None and (self._is_kept(key, start) or (start == 0 and buffer.numel() < self._peak[key])):
            buffer = None
            del self._buffers[key], self._uses[key]  # freed before its successor is made
            self._slots.pop(key, None)
            self._taken.pop(key, None)
            self.notes.clear()
        if buffer is None and start == 0:
            buffer = self._buffers[key] = _empty(self._peak[key], dtype, device)
            self._uses[key] = _tensors_in(buffer)
        if buffer is None or end > buffer.numel():
            return Slot(
                _empty(shape, dtype, device)
            )  # the peak was not known yet, or the buffer is somebody else's now
        slot = self._slots[key].get((start, shape))
        if slot is None or any(part._version for part in slot.parts):
            made = Slot(buffer[start : start + numel].view(shape))
            self._uses[key] += 1 + len(made.parts) if slot is None else 0
            slot = self._slots[key][start, shape] = made
        self._taken[key].append((start, slot))
        return slot

    def _is_kept(self, key: Key, start: int) -> bool:
        """Whether somebody still has what was given back: a part of a slot, or another tensor in the same memory."""
        if isinstance(self._buffers[key], FakeTensor):
            return False  # has no numbers, and who measures a dry run holds tensors of it
        kept, taken = _tensors_in(self._buffers[key]) != self._uses[key], self._taken[key]
        while taken and taken[-1][0] >= start:
            _, slot = taken.pop()
            kept = kept or _references(slot.parts) > _OWN
        return kept

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lives in this scratch, and so must be copied to outlast its frame."""
        storage = tensor.untyped_storage()._cdata  # not its address: a fake tensor has none
        return any(buffer.untyped_storage()._cdata == storage for buffer in self._buffers.values())


class _Frame(AbstractContextManager[None]):
    """A class and no generator, which takes longer: every module opens one."""

    __slots__ = ("_before", "_used")

    def __init__(self, used: dict[tuple[torch.device, torch.dtype], int]) -> None:
        self._used, self._before = used, dict(used)

    def __exit__(self, *error: object) -> None:
        for key in self._used:
            self._used[key] = self._before.get(key, 0)


def _empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # there tensors do not count what is written to them
        return torch.empty(shape, dtype=dtype, device=device)


def _tensors_in(buffer: Tensor) -> int:
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))


def _references(parts: list[Tensor]) -> int:
    return max(sys.getrefcount(part) for part in parts)


_OWN = _references([torch.empty(0)])  # a list's, and what it takes to count
