"""Whose arithmetic serves a tensor: the compiled kernels of its device, or the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mezo_scale.noise import fake, reference, spec
from mezo_scale.noise.kind import Noise
from mezo_scale.noise.low_rank import Factors


def kernels_of(tensor: Tensor) -> ModuleType:
    return fake if isinstance(tensor, FakeTensor) else kernels_on(tensor.device.type)


@cache
def kernels_on(device: str) -> ModuleType:
    """By a device's type."""
    # Imported on first use: Numba and Triton each take a second to import.
    if device == "cpu" and importlib.util.find_spec("numba"):
        from mezo_scale.noise import cpu

        return cpu
    if device in ("cuda", "xpu") and importlib.util.find_spec("triton"):
        from mezo_scale.noise import cuda

        return cuda
    return reference


def draw_factors(
    seeds: npt.NDArray[np.uint64],
    param_id: int,
    rank: int | None,
    shape: Sequence[int],
    noise: Noise,
    tensor: Tensor,
) -> Factors | None:
    """Factors of a whole parameter of that shape, on a tensor's device; None: it has none."""
    if rank is None:
        return None
    draw, device = kernels_of(tensor).draw, tensor.device
    u, v = (
        draw(seeds, param_id, noise.stream + side, 0, rank * size, device).view(len(seeds), rank, size)
        for side, size in zip((spec.LEFT, spec.RIGHT), shape, strict=True)
    )
    return Factors(u, v)
