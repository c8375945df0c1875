"""Low-rank directions inside a product: y = x W^T + scale (x V) U^T / sqrt(r), with W as it is stored.

One product with the stored weight serves all rows of all branches. No perturbed weight is made, and a direction costs
r (m + n) numbers, and r (m + n) multiplications for each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        inputs = x.reshape(len(branches), -1, weight.shape[1]).to(y.dtype)
        unit = max(abs(scale) for _, scale in branches) or 1.0
        signs = [scale / unit for _, scale in branches]  # mostly 1 and -1, which 16 bits hold exactly
        u, v, factor = _factors(weights, tuned["weight"], weight, branches)
        left, right = torch.bmm(inputs, v.transpose(1, 2).to(y.dtype)), u * u.new_tensor(signs)[:, None, None]
        if bias is not None and "bias" in tuned:
            left = torch.cat((left, left.new_ones(*left.shape[:2], 1)), dim=2)  # a column of U whose input is 1
            parts = [(seed, sign / factor) for (seed, _), sign in zip(branches, signs, strict=True)]
            right = torch.cat((right, _dense(weights, tuned["bias"], bias, parts)[:, None]), dim=1)
        y.view(len(branches), -1, weight.shape[0]).baddbmm_(left, right.to(y.dtype), alpha=unit * factor)
        return y


def _factors(weights: Weights, site: Site, weight: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Tensor, float]:
    """U [B, r, m], V [B, r, n] and 1 / sqrt(r); drawn once for the branches of one seed."""
    names = list(dict.fromkeys(seed for seed, _ in branches))
    made = noise.factors(weight, site.param_id, names, noise=weights.noise)
    assert made is not None, "of a matrix"
    if len(names) == 1:
        return made.u.expand(len(branches), -1, -1), made.v.expand(len(branches), -1, -1), made.scale
    each = [names.index(seed) for seed, _ in branches]
    return made.u[each], made.v[each], made.scale


def _dense(weights: Weights, site: Site, bias: Tensor, branches: Sequence[Branch]) -> Tensor:
    """scale z of a vector: float32 [B, m]."""
    zero = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    out = zero.new_empty(len(branches), *bias.shape)
    noise.view(zero, site.param_id, branches, out, noise=weights.noise)
    return out
