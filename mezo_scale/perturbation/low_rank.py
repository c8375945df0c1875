"""Low-rank directions inside a product: y = x W^T + scale (x V) U^T / sqrt(r), with W as it is stored.

One product with the stored weight serves all rows of all branches. No perturbed weight is made, and a direction costs
r (m + n) numbers, and r (m + n) multiplications for each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mezo_scale import noise
from mezo_scale.perturbation.weights import Branch, Weights
from mezo_scale.sharding import Site


def linear(
    weights: Weights,
    held: Mapping[str, Tensor | None],
    tuned: Mapping[str, Site],
    x: Tensor,
    branches: Sequence[Branch],
) -> Tensor:
    """x W^T + b with the weights of each branch for its rows.

    Args:
        held: "weight" [m, n] and "bias" [m] or None, as they are stored.
        tuned: the sites of those that are perturbed; "weight" is.
        x: [rows, ..., n], the branches' rows one after the other.
    """
    with torch._C.DisableTorchFunction():
        weight, bias = (None if param is None else param.detach() for param in (held["weight"], held["bias"]))
        assert weight is not None
        x = x.contiguous()  # torch copies the weight for each row of an input that is not
        y = F.linear(x, weight, bias)
        seeds, unit, signs = _pattern(tuple(branches))
        made = noise.factors(weight, tuned["weight"].param_id, seeds, noise=weights.noise)
        assert made is not None, "of a matrix"
        u, v = made.u.to(y.dtype), made.v.to(y.dtype)
        left = _product(x.reshape(len(seeds), -1, weight.shape[1]).to(y.dtype), v.transpose(1, 2))
        if bias is not None and "bias" in tuned:
            left = torch.cat((left, left.new_ones(*left.shape[:2], 1)), dim=2)  # a column of U whose input is 1
            z = _dense(weights, tuned["bias"], bias, [(seed, 1 / made.scale) for seed in seeds])
            u = torch.cat((u, z.to(y.dtype)[:, None]), dim=1)
        left.view(len(branches), -1, left.shape[2]).mul_(left.new_tensor(signs)[:, None, None])
        y.view(len(seeds), -1, weight.shape[0]).baddbmm_(left, u, alpha=unit * made.scale)
        return y


@lru_cache(maxsize=8)
def _pattern(branches: tuple[Branch, ...]) -> tuple[list[int], float, list[float]]:
    """The seeds, each of equally many neighbours, or else one for each branch; the size of scales; each one's sign."""
    seeds = list(dict.fromkeys(seed for seed, _ in branches))
    neighbours = [seed for seed in seeds for _ in range(len(branches) // len(seeds))]
    if neighbours != [seed for seed, _ in branches]:
        seeds = [seed for seed, _ in branches]
    unit = max(abs(scale) for _, scale in branches) or 1.0
    return seeds, unit, [scale / unit for _, scale in branches]  # mostly 1 and -1, which 16 bits hold exactly


def _product(x: Tensor, v: Tensor) -> Tensor:
    """[G, rows, n] times [G, n, r]; where there is one seed as a plain product, which takes half the time."""
    return torch.mm(x[0], v[0])[None] if len(x) == 1 else torch.bmm(x, v)


def _dense(weights: Weights, site: Site, bias: Tensor, branches: Sequence[Branch]) -> Tensor:
    """scale z of a vector: float32 [B, m]."""
    zero = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    out = zero.new_empty(len(branches), *bias.shape)
    noise.view(zero, site.param_id, branches, out, noise=weights.noise)
    return out
