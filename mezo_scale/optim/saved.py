"""Numbers and saved states that an optimizer is given, checked before it takes them, and the state that it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale.optim import groups

_DEFAULTS = {"estimator": "spsa", "rule": "sgd", "past": []}
"""What a state that was saved before there was a choice of these means."""


def check_options(lr: float, eps: float, weight_decay: float, seed: int) -> None:
    """Raise a ValueError that names the first number out of range."""
    for name, value in (("lr", lr), ("eps", eps)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: expected a finite number above 0")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay is {weight_decay}: expected a finite number, 0 or above")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: expected 0 to 2**64 - 1")


def check_still(eps: float, seed: int, param_groups: list[groups.Group]) -> None:
    """As `check_options`, of what may have been set since, by a scheduler for one, which may set a rate to 0."""
    check_options(1.0, eps, 0.0, seed)
    for number, group in enumerate(param_groups):
        for name in ("lr", "weight_decay"):
            value = float(group[name])
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} of parameter group {number} is {value}: expected a finite number, 0 or above")


def run_state(state_dict: Mapping[str, Any], mine: Mapping[str, Any], *, log_is_open: bool) -> dict[str, Any]:
    """Where a saved run stands.

    Args:
        state_dict: of `MeZO.state_dict`, or as torch.distributed.checkpoint gives it back.
        mine: where this run stands.
        log_is_open: whether this run's trajectory fixes that.

    Raises:
        ValueError: the saved run can't be this one's.
    """
    saved_groups = state_dict["param_groups"]
    found = state_dict.get("mezo", saved_groups[0].get("mezo") if saved_groups else None) or {}
    found = {**_DEFAULTS, **found}
    if found.keys() != mine.keys():
        raise ValueError("the state was not saved by MeZO.state_dict() of this release: give one that was")
    fixed = ["estimator", "rule", "num_directions", "distribution", "rounding"]
    if log_is_open:
        fixed += ["step_count", "seed", "eps"]
    for name in fixed:
        open_still = name == "num_directions" and mine[name] == 0
        if found[name] != mine[name] and not open_still:
            raise ValueError(
                f"the state was saved with {name} = {found[name]}, this run has {mine[name]}: make the two agree"
            )
    return found


def remainders(state_dict: Mapping[str, Any], mine: list[groups.Group]) -> dict[nn.Parameter, Tensor]:
    """The low bits of masters in a saved state, by this run's parameters."""
    names = groups.members(state_dict["param_groups"])
    params = dict(zip(names, groups.members(mine), strict=False))  # torch refuses another number
    saved = state_dict["state"].items()
    return {params[name]: entry["remainder"] for name, entry in saved if name in params and "remainder" in entry}


def publish_(optimizer: torch.optim.Optimizer, run: dict[str, Any], remainders: Mapping[nn.Parameter, Tensor]) -> None:
    """Put what a checkpoint must hold where torch looks: in the groups, the only part of a state that
    torch.distributed.checkpoint keeps besides the parameters' own."""
    for group in optimizer.param_groups:
        group["mezo"] = dict(run)
    optimizer.state.clear()
    if remainders:
        for param in groups.members(optimizer.param_groups):
            optimizer.state[param] = {"remainder": remainders[param]} if param in remainders else {}
