"""A model beside a copy of it whose weights were really moved: what a branch of a view must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mezo_scale as ms

BRANCHES = [(11, 0.1), (11, -0.1)]


def moved(model: nn.Module, seed: int, scale: float) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in copied.named_parameters():
            if param.requires_grad:
                z = ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel())
                param.add_(z.view_as(param), alpha=scale)
    return copied


def make(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(3, 6)
