"""The perturbed view: a model computes as if its weights were theta + scale * z(seed), and no weight is written.

Under ``with perturbed(model, branches)`` the batch is taller: its rows are repeated once per branch along dim 0. Every
module that owns trainable parameters makes perturbed weights in scratch, runs its rows of each branch with them, and
concatenates. Everything between (attention, masks, caches, frozen modules) sees a taller batch and nothing else. The
weights that FSDP or ZeRO-3 gather for a module are gathered once, for all branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mezo_scale.noise import Noise
from mezo_scale.perturbation.pairing import PairingError
from mezo_scale.perturbation.view import View
from mezo_scale.perturbation.weights import Branch

__all__ = ["Branch", "PairingError", "View", "perturbed"]


@contextmanager
def perturbed(
    model: nn.Module,
    branches: Sequence[Branch],
    *,
    dtype: torch.dtype | None = None,
    distribution: str | Noise = "normal",
) -> Iterator[None]:
    """Make ``model`` compute with theta + scale * z(seed) for each (seed, scale) of ``branches``.

    Args:
        model: as for `mezo_scale.shards`; it is neither wrapped nor copied, and is as before afterwards.
        branches: (seed, scale) pairs. With several, every call of the model takes a batch whose rows are repeated once
            per branch along dim 0 (branch 0's rows first) and returns results in that order. With one, any code may
            run inside: ``generate()``, a metric, a custom loop.
        dtype: dtype of the perturbed copies of matrices, for computing in 16 bits from float32 weights under
            ``torch.autocast``; vectors (normalisation, biases) keep theirs. None: the weights' own.
        distribution: "normal"; "rademacher" for z of +1 and -1; "low_rank" for matrices of rank 1, or a
            `mezo_scale.noise.Noise` that says more.

    In a loop, keep a `View` and open ``view.branches(...)``: looking at the model takes two small forwards with several
    branches, and is then done once.

    Raises:
        ViewError: a model whose rows can't be divided among several branches.
        ShardingError, ModelError: as for `mezo_scale.shards`; a matrix that can't have the noise's rank.
    """
    with View(model, dtype=dtype, noise=Noise.of(distribution)).branches(branches):
        yield
