"""A Triton kernel that makes normals of given words: to hold `triton_draw._box_muller` to every radius and angle."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mezo_scale.noise.cuda import OPTIONS, _takes_ptx
from mezo_scale.noise.triton_draw import _box_muller


@triton.jit
def box_muller(words, even, odd, ptx: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    one, other = _box_muller(tl.load(words + at).to(tl.uint32), ptx)
    tl.store(even + at, one)
    tl.store(odd + at, other)


def normals(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """words: int64 [n * 1024]. Returns float32 of the same shape, twice, on their device."""
    even, odd = (torch.empty(len(words), device=words.device) for _ in range(2))
    box_muller[(len(words) // 1024,)](words, even, odd, ptx=_takes_ptx(words.device), **OPTIONS)
    return even, odd
