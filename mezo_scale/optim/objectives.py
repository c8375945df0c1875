"""Objectives for batches as other libraries make them: per-row losses, as `MeZO.step` takes them."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["candidates", "labels", "log_probs", "preferences"]

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
    targets = _entry(batch, "labels", "labels")
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


def candidates(model: nn.Module, batch: Any) -> Tensor:
    """The loss of choosing the right one of a row's candidates, one per row.

    A candidate's score is the mean log-probability of its tokens; the loss is the cross-entropy over the scores.

    Args:
        model: a causal language model.
        batch: as for `log_probs`, and ``label``, int64 [rows]: which candidate is right.

    Returns:
        Losses, float32 [rows].

    Raises:
        KeyError: something of this is missing.
        ValueError: as `log_probs`; or ``label`` is not one number per row.
    """
    label = _entry(batch, "label", "candidates")
    scores = log_probs(model, batch) / _counted(batch).sum(-1)
    if label.shape != scores.shape[:1]:
        raise ValueError(
            f"label has shape {tuple(label.shape)}: expected one number per row, {tuple(scores.shape[:1])}"
        )
    return F.cross_entropy(scores, label, reduction="none")


def preferences(model: nn.Module, batch: Any, beta: float = 0.1) -> Tensor:
    """Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290, equation 7), one loss per row.

    Args:
        model: a causal language model.
        batch: as for `log_probs`, with two sequences per row, the preferred one first; and ``reference_log_probs``,
            float [rows, 2]: what `log_probs` gives with the reference model, once, before tuning begins.
        beta: how strongly the model is held to the reference, above 0.

    Returns:
        ``-log sigmoid(beta * ((chosen - its reference) - (rejected - its reference)))``, float32 [rows].

    Raises:
        KeyError: something of this is missing.
        ValueError: as `log_probs`; there are not two sequences per row; beta is not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a number above 0")
    reference = _entry(batch, "reference_log_probs", "preferences")
    found = log_probs(model, batch)
    if found.shape[1] != 2 or reference.shape != found.shape:
        raise ValueError(
            f"input_ids has {found.shape[1]} sequences per row and reference_log_probs the shape "
            f"{tuple(reference.shape)}: expected 2, the preferred one first, and {(len(found), 2)}"
        )
    margin = found - reference.float()
    return -F.logsigmoid(beta * (margin[:, 0] - margin[:, 1]))


def log_probs(model: nn.Module, batch: Any) -> Tensor:
    """The log-probability of each sequence's labelled tokens, summed.

    Args:
        model: a causal language model.
        batch: a mapping with ``input_ids`` and ``labels``, int64 [rows, sequences, tokens], labels -100 where a token
            does not count (the prompt, padding) and else the token itself; and ``attention_mask`` of that shape if
            there is padding.

    Returns:
        Log-probabilities, float32 [rows, sequences].

    Raises:
        KeyError: something of this is missing.
        ValueError: another shape; or a sequence has no label that counts.
    """
    ids, targets = (_entry(batch, name, "log_probs") for name in ("input_ids", "labels"))
    if ids.dim() != 3 or targets.shape != ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)} and labels {tuple(targets.shape)}: expected [rows, sequences, "
            "tokens] of both"
        )
    empty = (~_counted(batch).any(-1)).nonzero()
    if len(empty):
        row, sequence = empty[0].tolist()
        raise ValueError(f"sequence {sequence} of row {row} has no label that counts: all are {IGNORED}")
    # A row's sequences stand together, so that the rows of a step's branches stay blocks of the model's batch.
    inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask") if name in batch}
    logits = model(**inputs).logits.float()[:, :-1]
    shifted = targets.flatten(0, 1)[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), shifted, reduction="none", ignore_index=IGNORED)
    return -losses.sum(1).view(ids.shape[:2])


def _counted(batch: Any) -> Tensor:
    """Which tokens count, bool [rows, sequences, tokens - 1]: nothing predicts the first one."""
    counted: Tensor = batch["labels"][..., 1:] != IGNORED
    return counted


def _entry(batch: Any, name: str, wanted_by: str) -> Tensor:
    if name not in batch:
        raise KeyError(f"the batch has no {name}, only {', '.join(map(str, batch))}: objectives.{wanted_by} needs it")
    value: Tensor = batch[name]
    return value


def _is_causal(model: nn.Module) -> bool:
    """Whether position t's logits are of the token at t + 1: by the class's name, or by what only decoders offer."""
    names = [type(module).__name__ for module in model.modules()]
    named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return named or "logits_to_keep" in inspect.signature(model.forward).parameters
