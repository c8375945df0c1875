"""Whether a model can do what its task asks of it: answer in the way of its kind, and leave padding out of account, as
batches of different lengths need it to."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.errors import MezoError, SharedError, one_line
from mezo_scale.models import Loaded
from mezo_scale.recipe import Recipe
from mezo_scale.tasks import Kind
from mezo_scale.tasks.encoding import Batch, to_device

Answer = TypeVar("Answer")
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # what rounding may change, relative above 1
_PADDED_ROWS = 4  # a leak may show at some lengths and places of a mask only


def check_model(loaded: Loaded, kind: Kind[Any, Any], rows: Sequence[Any], recipe: Recipe) -> None:
    """Runs the model on a row of a split, before anything is written; every rank calls it.

    Args:
        rows: of a split, the same on every rank.

    Raises:
        SharedError: on every rank, if the model can't run, can't do this kind of task or takes padding for text.
    """
    reason = _run(loaded, kind.refusal, kind.collate(rows[:1], max_length=1), recipe)
    if collectives.max_integer(int(reason is not None)):
        raise SharedError(
            f"model.name: {recipe.model.name} {reason or 'was refused by another rank'}: give a model that task.name="
            f"{recipe.task.name} can be posed to"
        )
    _check_padding(loaded, kind, rows, recipe)


def _check_padding(loaded: Loaded, kind: Kind[Any, Any], rows: Sequence[Any], recipe: Recipe) -> None:
    """Scores a few rows with and without padding.

    Models that take no position_ids and count positions from the left edge (the BART family), or have a state that
    padding changes (RWKV), give an example other scores in other company: neither a grade nor a step is made of them.
    """
    tolerance = _TOLERANCE[recipe.model.compute_dtype or recipe.model.dtype]
    pairs = ((kind.collate([row]), kind.collate([row], max_length=1)) for row in rows)
    padded = ((wide, narrow) for wide, narrow in pairs if _shapes(wide) != _shapes(narrow))
    for wide, narrow in islice(padded, _PADDED_ROWS):
        among, alone = (_run(loaded, kind.log_probs, batch, recipe) for batch in (wide, narrow))
        # Scores that are not finite are for the evaluation to judge.
        difference = ((among - alone).abs() / alone.abs().clamp(min=1)).nan_to_num(0, 0, 0).max()
        if collectives.max_integer(int(difference > tolerance)):
            raise SharedError(
                f"model.name: {recipe.model.name} takes padding for text: an example's scores change by "
                f"{float(difference):.2g} when it is padded, expected rounding only: give a model that takes "
                "position_ids"
            )


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: leaf.shape for name, leaf in batch.items() if isinstance(leaf, Tensor)}


def _run(loaded: Loaded, ask: Callable[[nn.Module, Batch], Answer], batch: Batch, recipe: Recipe) -> Answer:
    """What the model answers: these are its first forward passes, where a configuration that is at odds shows."""
    try:
        with torch.no_grad(), loaded.compute():
            return ask(loaded.model, to_device(batch, loaded.device))
    except MezoError:
        raise
    except Exception as error:  # a model raises anything; all ranks run the same row
        name = next(iter(_shapes(batch)), "")
        raise SharedError(
            f"model.name: {recipe.model.name} can't run a row of task.name={recipe.task.name} ({name} "
            f"{list(_shapes(batch).get(name, ()))}), though it was loaded: {type(error).__name__}: {one_line(error)}: "
            "mind its configuration, or give another model"
        ) from error
