"""Parameter groups: which of torch's groups each tuned weight is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mezo_scale.errors import ShardingError
from mezo_scale.sharding import Layout

Group = dict[str, Any]


def listed(layout: Layout) -> list[nn.Parameter]:
    """The tuned parameters, each once, in the model's order."""
    return list(dict.fromkeys(layout.parameters.values()))


def members(groups: Iterable[Group]) -> list[Any]:
    """What the groups hold, one after the other: parameters, or in a saved state their names."""
    return [param for group in groups for param in group["params"]]


def check_owned(params: Iterable[Tensor], layout: Layout) -> None:
    """Raise ShardingError for a parameter that the model does not tune."""
    owned = set(layout.parameters.values())
    if any(param not in owned for param in params):
        raise ShardingError(
            "a parameter group holds a parameter that is not one of the model's own trainable ones (sharding may have "
            "replaced it): build the groups from the sharded model's parameters"
        )


def added(params: Any, layout: Layout) -> list[Any]:
    """The parameters of a group that is added: one, several, or (name, parameter) pairs. Raises ValueError."""
    given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    try:
        check_owned([param[1] if isinstance(param, tuple) else param for param in given], layout)
    except ShardingError as error:
        raise ValueError(str(error)) from None
    return given


def check_unedited(groups: Sequence[Group], layout: Layout, known: Mapping[str, int]) -> None:
    """Raise ShardingError where a group's list was edited, which changes nothing of what is tuned.

    Args:
        layout: of the model.
        known: the group of each of its names.
    """
    held = {param: number for number, group in enumerate(groups) for param in group["params"]}
    moved = next((name for name, param in layout.parameters.items() if held.get(param) != known[name]), None)
    if moved is not None or len(held) > len(set(layout.parameters.values())):
        what = f"no longer holds {moved}" if moved is not None else "holds what the model does not tune"
        raise ShardingError(
            f"a parameter group {what}, for its list was edited: freeze a parameter (requires_grad_(False)) to tune it "
            "no more, add one with add_param_group, and give groups of their own when the optimizer is made"
        )


def numbers(groups: Sequence[Group], layout: Layout, known: dict[str, int]) -> dict[str, int]:
    """Parameter group of each shard's name.

    Args:
        groups: the optimizer's.
        layout: of the model as it is now.
        known: groups of the names that the model had before it was looked at again: for parameters that replaced
            others. New names then join the group, if there is but one.

    Raises:
        ShardingError: a tuned weight is in no group.
    """
    held = {param: number for number, group in enumerate(groups) for param in group["params"]}
    found: dict[str, int] = {}
    for name, param in layout.parameters.items():
        number = held.get(param, known.get(name, 0 if known and len(groups) == 1 else None))
        if number is None:
            raise ShardingError(f"{name} is trainable but in no parameter group: add it, or freeze it")
        found[name] = number
    return found


def fill_(groups: Sequence[Group], layout: Layout, numbers: dict[str, int]) -> None:
    """Give each group the parameters that the layout has now."""
    for number, group in enumerate(groups):
        mine = {param: None for name, param in layout.parameters.items() if numbers[name] == number}
        group["params"] = list(mine)
