"""Whether a model leaves padding out of account, as batches of different lengths need it to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mezo_scale import collectives
from mezo_scale.errors import SharedError
from mezo_scale.models import Loaded
from mezo_scale.recipe import Recipe
from mezo_scale.tasks.encoding import Encoded, collate
from mezo_scale.tasks.objectives import candidate_scores

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # what rounding may change, relative above 1


def check_padding(loaded: Loaded, examples: Sequence[Encoded], recipe: Recipe) -> None:
    """Scores one example with and without padding on its left; every rank calls it.

    Models that take no position_ids and count positions from the left edge (the BART family), or have a state that
    padding changes (RWKV), give an example other scores in other company: neither a grade nor a step is made of them.

    Args:
        examples: of a split, the same on every rank.

    Raises:
        SharedError: on every rank, if the scores differ by more than rounding.
    """
    for example in examples:
        wide, narrow = (
            collate([example], loaded.tokenizer.pad_token_id, width)
            for width in (recipe.task.max_length, example.length)
        )
        if wide["input_ids"].shape != narrow["input_ids"].shape:
            break
    else:
        return
    padded, alone = _scores(loaded, wide), _scores(loaded, narrow)
    tolerance = _TOLERANCE[recipe.model.compute_dtype or recipe.model.dtype]
    # Scores that are not finite are for the evaluation to judge.
    difference = ((padded - alone).abs() / alone.abs().clamp(min=1)).nan_to_num(0, 0, 0).max()
    if collectives.max_integer(int(difference > tolerance)):
        raise SharedError(
            f"model.name: {recipe.model.name} takes padding for text: an example's scores change by "
            f"{float(difference):.2g} when it is padded on the left, expected rounding only: give a model that takes "
            "position_ids"
        )


def _scores(loaded: Loaded, batch: dict[str, Tensor]) -> Tensor:
    batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
    with torch.no_grad(), loaded.compute():
        return candidate_scores(loaded.model, batch)
