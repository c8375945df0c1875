"""Whether a model can do what its task asks of it: answer in the way of its kind, and leave padding out of account, as
batches of different lengths need it to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mezo_scale import collectives
from mezo_scale.errors import SharedError
from mezo_scale.models import Loaded
from mezo_scale.recipe import Recipe
from mezo_scale.tasks import Kind
from mezo_scale.tasks.encoding import Batch, to_device

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # what rounding may change, relative above 1


def check_model(loaded: Loaded, kind: Kind[Any, Any], rows: Sequence[Any], recipe: Recipe) -> None:
    """Runs the model on a row of a split, before anything is written; every rank calls it.

    Args:
        rows: of a split, the same on every rank.

    Raises:
        SharedError: on every rank, if the model can't do this kind of task or takes padding for text.
    """
    with torch.no_grad(), loaded.compute():
        reason = kind.refusal(loaded.model, to_device(kind.collate(rows[:1], max_length=1), loaded.device))
    if collectives.max_integer(int(reason is not None)):
        raise SharedError(
            f"model.name: {recipe.model.name} {reason or 'was refused by another rank'}: give a model that task.name="
            f"{recipe.task.name} can be posed to"
        )
    _check_padding(loaded, kind, rows, recipe)


def _check_padding(loaded: Loaded, kind: Kind[Any, Any], rows: Sequence[Any], recipe: Recipe) -> None:
    """Scores one row with and without padding.

    Models that take no position_ids and count positions from the left edge (the BART family), or have a state that
    padding changes (RWKV), give an example other scores in other company: neither a grade nor a step is made of them.
    """
    for row in rows:
        wide, narrow = kind.collate([row]), kind.collate([row], max_length=1)
        if _shapes(wide) != _shapes(narrow):
            break
    else:
        return
    padded, alone = _log_probs(loaded, kind, wide), _log_probs(loaded, kind, narrow)
    tolerance = _TOLERANCE[recipe.model.compute_dtype or recipe.model.dtype]
    # Scores that are not finite are for the evaluation to judge.
    difference = ((padded - alone).abs() / alone.abs().clamp(min=1)).nan_to_num(0, 0, 0).max()
    if collectives.max_integer(int(difference > tolerance)):
        raise SharedError(
            f"model.name: {recipe.model.name} takes padding for text: an example's scores change by "
            f"{float(difference):.2g} when it is padded, expected rounding only: give a model that takes "
            "position_ids"
        )


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: leaf.shape for name, leaf in batch.items() if isinstance(leaf, Tensor)}


def _log_probs(loaded: Loaded, kind: Kind[Any, Any], batch: Batch) -> Tensor:
    with torch.no_grad(), loaded.compute():
        return kind.log_probs(loaded.model, to_device(batch, loaded.device))
