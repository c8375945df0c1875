"""MeZO as a textbook has it: float64, whole tensors, weights that are moved and moved back. Only z is the project's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mezo_scale import noise


def projected_gradients(
    model: nn.Module,
    losses: Callable[[nn.Module, int], Tensor],
    steps: int,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    num_directions: int,
    seed: int,
) -> list[list[float]]:
    """Train `model` for `steps` steps; `losses(model, step)` gives the per-row losses of all rows of a step.

    Returns the projected gradients, [steps][directions]. Decay skips vectors: biases and normalisation weights.
    """
    model = model.double()
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def move(direction: int, scale: float) -> None:
        for name, weight in weights.items():
            z = noise.normal(direction, noise.param_id(name), 0, weight.numel()).view(weight.shape)
            weight.add_(z.double(), alpha=scale)

    gradients: list[list[float]] = []
    with torch.no_grad():
        for step in range(steps):
            directions: Sequence[int] = [noise.direction_seed(seed, step, k) for k in range(num_directions)]
            gradients.append([])
            for direction in directions:
                move(direction, eps)
                plus = losses(model, step).mean().item()
                move(direction, -2 * eps)
                minus = losses(model, step).mean().item()
                move(direction, eps)
                gradients[-1].append((plus - minus) / (2 * eps))
            for weight in weights.values():
                if weight.dim() > 1:
                    weight.mul_(1 - lr * weight_decay)
            for direction, gradient in zip(directions, gradients[-1], strict=True):
                move(direction, -lr * gradient / num_directions)
    return gradients
