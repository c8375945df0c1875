"""Objectives for batches as other libraries make them: per-row losses, as `MeZO.step` takes them."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["labels"]

IGNORED = -100
"""The label of a position that counts for nothing, as in torch's cross-entropy."""


def labels(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a Hugging Face language model on a batch with ``labels``, one per row instead of one for all.

    Args:
        model: takes the batch's other entries by name and returns ``logits`` [rows, tokens, classes], or [rows,
            classes] for labels [rows].
        batch: a mapping with ``labels``, int64 [rows, tokens], -100 where a position does not count. They are shifted
            for causal models, as the models' own loss does: a position predicts the next one's label. Masked and
            encoder-decoder models predict their own.

    Returns:
        Mean cross-entropy over each row's labels, float32 [rows].

    Raises:
        KeyError: the batch has no labels.
        ValueError: a row has no label that counts, or logits and labels do not fit.
    """
    if "labels" not in batch:
        raise KeyError(f"the batch has no labels, only {', '.join(map(str, batch))}: objectives.labels needs them")
    targets = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["labels"] = targets  # the decoder's inputs are made from them
    logits = model(**inputs).logits.float()
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(targets.shape)} do not fit: expected a label per position"
        )
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    if _is_causal(model):
        logits, targets = logits[:, :-1], targets[:, 1:]
    counted = (targets != IGNORED).sum(1)
    if bool((counted == 0).any()):
        row = int((counted == 0).nonzero()[0, 0])
        raise ValueError(f"row {row} has no label that counts: all are {IGNORED}")
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    mean: Tensor = losses.sum(1) / counted
    return mean


def _is_causal(model: nn.Module) -> bool:
    """Whether position t's logits are of the token at t + 1: by the class's name, or by what only decoders offer."""
    names = [type(module).__name__ for module in model.modules()]
    named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return named or "logits_to_keep" in inspect.signature(model.forward).parameters
