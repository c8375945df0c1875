"""A step on whole tensors with plain torch operations: what the perturbed view and the write must come to."""

from functools import partial

import torch
from torch import Tensor, nn

import mezo_scale as ms


def perturb_(copy: nn.Module, plain: nn.Module, dtype: torch.dtype, branch: tuple[int, float] | None) -> None:
    """Give `copy` the weights of `plain`, as `dtype`, moved by scale * z in float32 and rounded to `dtype`.

    The weights that normalise are not rounded again: their modules compute in float32 if they are perturbed.
    """
    normalising = {
        id(parameter): module
        for module in copy.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    for module in normalising.values():
        module.__dict__.pop("forward", None)
    with torch.no_grad():
        for (name, target), source in zip(copy.named_parameters(), plain.parameters(), strict=True):
            weight = source.to(dtype)
            if branch is not None and source.requires_grad:
                seed, scale = branch
                moved = torch.tensor(scale, dtype=torch.float32) * noise(seed, name, source)
                module = normalising.get(id(target))
                weight = (weight.float() + moved).to(dtype if module is None else torch.float32)
                if module is not None:
                    module.__dict__["forward"] = partial(in_float32, module)
            target.data = weight.clone()


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = type(module).forward(module, x.float())
    return result.to(x.dtype)


def write_(plain: nn.Module, record: ms.StepRecord) -> None:
    """The write of docs/reference/noise.md, every operation rounded to float32 on its own."""
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if not parameter.requires_grad:
                continue
            theta = parameter.float()
            if parameter.dim() > 1 and record.decay != 1:  # biases and normalisation weights are vectors here
                theta = theta * torch.tensor(record.decay, dtype=torch.float32)
            total = torch.zeros_like(theta)
            for seed, alpha in zip(record.seeds, record.alphas, strict=True):
                total = total + torch.tensor(alpha, dtype=torch.float32) * noise(seed, name, parameter)
            parameter.copy_((theta + total).to(parameter.dtype))


def noise(seed: int, name: str, parameter: Tensor) -> Tensor:
    return ms.noise.normal(seed, ms.noise.param_id(name), 0, parameter.numel()).view(parameter.shape)
