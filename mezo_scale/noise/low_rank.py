"""The factors of low-rank directions: z = (U V^T) / sqrt(r) of a matrix, in operations whose bits IEEE-754 fixes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """Of several directions of one matrix [m, n].

    Attributes:
        u: float32 [directions, r, m], contiguous: column j of U is u[:, j].
        v: float32 [directions, r, n], contiguous, on the same device.
    """

    u: Tensor
    v: Tensor

    @property
    def scale(self) -> float:
        """1 / sqrt(r), rounded to float32: what the sum over r is multiplied by."""
        return float(np.float32(1 / math.sqrt(self.u.shape[1])))

    def product(self, position: int, elements: Tensor) -> Tensor:
        """z of one direction at row-major `elements`, int64 of any shape: float32. The sum goes over r in order; every
        product and every sum is rounded on its own."""
        u, v = self.u[position], self.v[position]
        columns = v.shape[1]
        row, column = elements // columns, elements % columns
        z = u[0][row] * v[0][column]
        for left, right in zip(u[1:], v[1:], strict=True):
            z = z + left[row] * right[column]
        return z * self.scale
