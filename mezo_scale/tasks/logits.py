"""What a causal language model says at the end of sequences that are padded on the left, and a masked one at a mask."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def answer_log_probs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> Tensor:
    """The mean log-probability of each row's last tokens, float32 [rows]; -inf for a row that has none.

    Args:
        input_ids, attention_mask: int64 [rows, tokens].
        scored: bool [rows, tokens], true on the tokens that count: the last ones of a row.
    """
    longest = int(scored.sum(1).max())
    # Padding is on the left: what is scored are the last tokens, each predicted at the position before it.
    logits = last_logits(model, input_ids, attention_mask, keep=longest + 1)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, -longest:].flatten(), reduction="none")
    counted = scored[:, -longest:]
    lengths = counted.sum(1)
    log_probs = -(losses.view(-1, longest) * counted).sum(1) / lengths
    return log_probs.masked_fill(lengths == 0, float("-inf"))


def last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """Logits at the last `keep` positions, float32 [rows, keep, vocabulary]."""
    logits: Tensor = forward(model, input_ids, attention_mask, keep, use_cache=False).logits
    return logits[:, -keep:].float()


def tree_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor, attends: Tensor, keep: int) -> Tensor:
    """Logits at the last `keep` places of sequences that branch, float32 [rows, keep, vocabulary].

    Args:
        input_ids, position_ids: int64 [rows, tokens]; positions are counted from 0.
        attends: bool [rows, tokens, tokens], [.., q, k]: whether q attends to k; at least to itself.
    """
    # As a number that is added to attention's scores: all ways of computing attention take that, a bool only some.
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    mask = mask.masked_fill_(~attends, torch.finfo(dtype).min)[:, None]
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids + _first_position(model),
        use_cache=False,
        **options,
    ).logits
    return logits[:, -keep:].float()


def mask_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, at: Tensor) -> Tensor:
    """Logits of a masked language model at one position of each row, float32 [rows, vocabulary].

    Rows are padded on the right, so that positions are counted as the model itself counts them. Where a model keeps its
    head apart, as transformers' do, the head runs at these positions alone.

    Args:
        input_ids, attention_mask: int64 [rows, tokens].
        at: int64 [rows].
    """
    rows = torch.arange(len(at), device=at.device)

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        states = getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor) and states.shape[:2] == input_ids.shape:
            output.last_hidden_state = states[rows, at][:, None]
        return output

    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    hook = body.register_forward_hook(keep) if isinstance(body, nn.Module) else None
    try:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    finally:
        if hook is not None:
            hook.remove()
    return (logits[:, 0] if logits.shape[1] == 1 else logits[rows, at]).float()


def forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, **options: Any) -> Any:
    """One call of the model, told where each row's text begins, if it takes that, and which logits are needed.

    Args:
        input_ids: int64 [rows, tokens], the last ones of those that the mask covers.
        attention_mask: int64 [rows, all tokens so far].
        keep: positions at the end whose logits are needed; a model may give more.
    """
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        # Counted from the first real token, one row per row: a model's own table would count the padding too.
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        options["position_ids"] = positions + _first_position(model)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep
    return model(input_ids=input_ids, attention_mask=attention_mask, **options)


def _first_position(model: nn.Module) -> int:
    """What a model calls the position of a text's first token: RoBERTa and its kin count from behind a padding row."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0
