"""Compiles the CPU's kernels for this machine, ahead of a first run; they are kept on disk, beside the package.

    python -m tools.compile_kernels

A run compiles what it does not find there. That takes seconds, and memory that stays with the process.
"""

import numpy as np
import torch

from mezo_scale import noise
from mezo_scale.sharding.digest import digest


def main() -> None:
    runs, weight = np.array([[0, 0, 64]]), torch.zeros(64)
    noise.view(weight, 1, [(1, 1e-3), (1, -1e-3)], torch.empty(2, 64))
    noise.write_(weight, runs, 1, np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.float32), np.ones(1, np.float32))
    digest(weight, runs, 0)


if __name__ == "__main__":
    main()
