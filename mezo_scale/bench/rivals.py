"""What MeZO over shards is compared with, each as short as it can be written: no options of the product.

Each takes a model and has `step(batch, objective) -> loss`, where `objective(model, batch)` gives per-row losses.

- `Published`: MeZO as its paper has it (Malladi et al., 2023, algorithm 1), on one device.
- `NaiveFSDP`: the same on a model sharded by FSDP2: each rank perturbs its shards in place and the weights are gathered
  once per forward pass.
- `AdamW`: full fine-tuning by backpropagation, on a model sharded by FSDP2; activations are kept, not recomputed.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

Objective = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Published:
    """Four sweeps over the weights per step, all in place: +eps, -2 eps, +eps, and the update.

    z is drawn anew in each sweep, parameter after parameter, from torch's generator seeded with the step's seed.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-6, eps: float = 1e-3, seed: int = 0) -> None:
        self.model, self.lr, self.eps = model, lr, eps
        self._seeds = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, batch: dict[str, Tensor], objective: Objective) -> float:
        seed = int(torch.randint(2**31, (1,), generator=self._seeds))
        self.add_(seed, self.eps)
        plus = _mean(objective(self.model, batch))
        self.add_(seed, -2 * self.eps)
        minus = _mean(objective(self.model, batch))
        self.add_(seed, self.eps)
        self.add_(seed, -self.lr * (plus - minus) / (2 * self.eps))
        return (plus + minus) / 2

    def add_(self, seed: int, scale: float) -> None:
        """theta += scale * z(seed)."""
        torch.manual_seed(seed)
        for weight in self.weights():
            z = torch.normal(0.0, 1.0, weight.shape, device=weight.device, dtype=weight.dtype)
            weight.add_(z, alpha=scale)

    def weights(self) -> Iterator[Tensor]:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield parameter.data


class NaiveFSDP(Published):
    """`Published` on shards. The ranks draw different numbers, so z depends on how many there are."""

    def add_(self, seed: int, scale: float) -> None:
        super().add_(seed * dist.get_world_size() + dist.get_rank(), scale)

    def weights(self) -> Iterator[Tensor]:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield parameter.to_local()  # type: ignore[attr-defined]


class AdamW:
    """torch's AdamW: gradients and two moments of every weight, in the weights' dtype."""

    def __init__(self, model: nn.Module, lr: float = 1e-6) -> None:
        self.model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(self, batch: dict[str, Tensor], objective: Objective) -> float:
        loss = objective(self.model, batch).mean()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return _mean(loss[None].detach())


RIVALS: dict[str, type[Published] | type[AdamW]] = {"published": Published, "naive": NaiveFSDP, "adamw": AdamW}


def _mean(losses: Tensor) -> float:
    """Over rows, and over ranks with equally many."""
    mean = losses.double().mean()
    if dist.is_initialized():
        dist.all_reduce(mean, op=dist.ReduceOp.AVG if mean.is_cuda else dist.ReduceOp.SUM)
        if not mean.is_cuda:  # gloo has no average
            mean /= dist.get_world_size()
    return float(mean)
