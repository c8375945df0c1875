"""Which tensors of a checkpoint are made from which parameters.

transformers keeps some weights in other names and shapes than their checkpoints do (experts in one tensor, say), and
turns a whole state dict back at once. Here the same is done piece by piece, each with as few parameters as it takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict


@dataclass(frozen=True)
class Piece:
    """Parameters that are turned back together.

    Attributes:
        sources: their names in the model.
        targets: what they become in the checkpoint, on the meta device.
        is_kept: whether the one parameter is saved as it is, if under another name.
    """

    sources: tuple[str, ...]
    targets: dict[str, Tensor]
    is_kept: bool

    def turned_back(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors, from the values of the `sources`."""
        if self.is_kept:
            return dict(zip(self.targets, tensors.values(), strict=True))
        turned: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
        return turned


def names_saved(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a state dict that a checkpoint has: of a tied weight's, the one that transformers expects.

    Args:
        names: every name in the state dict, with one that all names of the same weight have.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    marks = {name: torch.zeros(1) for name in names.values()}
    left = remove_tied_weights_from_state_dict({name: marks[owner] for name, owner in names.items()}, model)
    return {name: names[name] for name in left if name not in ignored}


def pieces(model: Any, state: Mapping[str, Tensor]) -> list[Piece]:
    """How a state dict is turned back, from its tensors on the meta device."""
    whole: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    names = {id(tensor): name for name, tensor in state.items()}
    kept = {target: names[id(tensor)] for target, tensor in whole.items() if id(tensor) in names}
    found = [Piece((source,), {target: state[source]}, is_kept=True) for target, source in kept.items()]
    rest = {name: tensor for name, tensor in state.items() if name not in set(kept.values())}
    changed = {target: tensor for target, tensor in whole.items() if target not in kept}
    return found + _separate(model, rest, changed)


def _separate(model: Any, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[Piece]:
    """Those that become parts of the same tensors are turned back together; all are, where that is not certain."""
    groups: list[tuple[list[str], set[str]]] = []
    together = [Piece(tuple(state), wanted, is_kept=False)] if state or wanted else []
    try:
        for name in state:
            sources, targets = [name], set(revert_weight_conversion(model, {name: state[name]}))
            for group in [group for group in groups if group[1] & targets]:
                groups.remove(group)
                sources, targets = group[0] + sources, group[1] | targets
            groups.append((sources, targets))
        made = [(names, revert_weight_conversion(model, {name: state[name] for name in names})) for names, _ in groups]
    except Exception:  # a conversion may fail in any way at a part of what it expects
        return together
    shapes = {name: (tensor.shape, tensor.dtype) for _, tensors in made for name, tensor in tensors.items()}
    if shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()}:
        return together
    return [Piece(tuple(names), tensors, is_kept=False) for names, tensors in made]
