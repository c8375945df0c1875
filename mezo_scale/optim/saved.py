"""Numbers and saved states that an optimizer is given, checked before it takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless a number is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: expected a finite number above 0")


def check_saved(found: Mapping[str, Any], mine: Mapping[str, Any], *, log_is_open: bool) -> None:
    """Raise ValueError if a saved run can't be this one's.

    Args:
        found, mine: run states, as `MeZO.state_dict` has them under "mezo".
        log_is_open: whether this run's trajectory fixes where it stands.
    """
    if found.keys() != mine.keys():
        raise ValueError("the state was not saved by MeZO.state_dict() of this release: give one that was")
    fixed = ["num_directions", "distribution", "rounding"]
    if log_is_open:
        fixed += ["step_count", "seed", "eps"]
    for name in fixed:
        if found[name] != mine[name]:
            raise ValueError(
                f"the state was saved with {name} = {found[name]}, this run has {mine[name]}: make the two agree"
            )
