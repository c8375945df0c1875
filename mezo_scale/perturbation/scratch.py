"""Scratch memory for perturbed weights: one buffer per dtype and device, reused for every module of every step."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

ALIGN = 64  # elements; keeps every piece on a cache line and a vector boundary


class Scratch:
    """Pieces are taken one after the other and given back together when the module that took them has run.

    The first step finds out how much is needed; from then on the buffer has that size and nothing is allocated.

    Attributes:
        notes: whatever a user of pieces keeps with them; gone when they are.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._used: dict[tuple[torch.device, torch.dtype], int] = {}
        self._peak: dict[tuple[torch.device, torch.dtype], int] = {}
        self.notes: dict[Any, Any] = {}
        self._pieces: dict[tuple[torch.device, torch.dtype, int, tuple[int, ...]], Tensor] = {}

    def frame(self) -> AbstractContextManager[None]:
        """What is taken inside is free again afterwards."""
        return _Frame(self._used)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor, valid until the enclosing frame ends."""
        key = (device, dtype)
        start = self._used.get(key, 0)
        numel = math.prod(shape)
        end = start + -(-numel // ALIGN) * ALIGN
        self._used[key] = end
        self._peak[key] = max(self._peak.get(key, 0), end)
        buffer = self._buffers.get(key)
        if start == 0 and (buffer is None or buffer.numel() < self._peak[key]):
            self._buffers.pop(key, None)  # freed before its successor is made
            self._pieces.clear()
            self.notes.clear()
            buffer = None
            buffer = self._buffers[key] = _empty(self._peak[key], dtype, device)
        if buffer is None or end > buffer.numel():
            return _empty(shape, dtype, device)  # the first step only: the peak was not known yet
        piece = self._pieces.get((device, dtype, start, shape))
        if piece is None:
            piece = self._pieces[device, dtype, start, shape] = buffer[start : start + numel].view(shape)
        return piece

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
