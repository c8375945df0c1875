"""Whether a model gives the same numbers when a prompt is run once for all answers to it: measured, never assumed."""

import inspect
import warnings
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mezo_scale import collectives
from mezo_scale.errors import one_line
from mezo_scale.models import Loaded
from mezo_scale.tasks import Kind
from mezo_scale.tasks.encoding import Batch, to_device

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""What rounding may change of a mean log-probability, relative above 1."""


def share_prompts(loaded: Loaded, kind: Kind[Any, Any], rows: Sequence[Any]) -> None:
    """Lets a kind run the prompts of these rows once for all answers, if that gives what it gives with the prompt
    before each answer: compared on the longest rows and the widest, unless such were before. Where it does not, a line
    says so, once, and all rows keep the plain way.

    Every rank calls it, with the same rows.
    """
    sharing = kind.sharing
    probes = sharing.unmeasured(rows) if sharing is not None else []
    if sharing is None or not probes:
        return
    found, reason = _compare(loaded, kind, probes, max(map(sharing.width, rows)))
    found = _Found(collectives.max_integer(found))
    if found != _Found.NOTHING:
        sharing.settle(rows, same=found == _Found.SAME)
    if found == _Found.DIFFERENT and collectives.rank() == 0:
        warnings.warn(
            "the model can't run a prompt once for all answers to it, so each answer is run with the prompt before it: "
            f"{reason or 'another rank found so'}",
            stacklevel=2,
        )


class _Found(IntEnum):
    """What a comparison came to; over ranks the greatest counts."""

    SAME = 0
    NOTHING = 1  # no score is finite, which the evaluation will say
    DIFFERENT = 2


def _compare(loaded: Loaded, kind: Kind[Any, Any], rows: Sequence[Any], width: int) -> tuple[_Found, str]:
    """Whether both ways give the same, in trees of that width, and what is different."""
    if "position_ids" not in inspect.signature(loaded.model.forward).parameters:
        return _Found.DIFFERENT, "it takes no position_ids"
    tolerance = TOLERANCE[loaded.precision]
    for row in rows:
        plain = _log_probs(loaded, kind, kind.collate([row]))
        known = plain.isfinite()
        if not known.any():
            return _Found.NOTHING, ""
        try:
            shared = _log_probs(loaded, kind, kind.shared([row], width))
        except Exception as error:  # a model that takes no such mask raises anything, on all ranks alike
            return _Found.DIFFERENT, f"{type(error).__name__}: {one_line(error)}"
        difference = float(((shared - plain).abs() / plain.abs().clamp(min=1))[known].max())
        if not difference <= tolerance:  # NaN is no agreement
            return _Found.DIFFERENT, f"scores differ by {difference:.2g}, expected {tolerance:g} at most"
    return _Found.SAME, ""


def _log_probs(loaded: Loaded, kind: Kind[Any, Any], batch: Batch) -> Tensor:
    with torch.no_grad(), loaded.compute():
        return kind.log_probs(loaded.model, to_device(batch, loaded.device))
