"""What is minimised: per-row losses from a batch of `tasks.encoding.collate`, float32, for any causal language model.

The optimizer repeats a batch once per branch along dim 0; each row keeps its candidates inside, so the branches stay
contiguous blocks when rows and candidates are flattened into the model's batch dim.
"""

import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mezo_scale.tasks.encoding import Batch

Objective = Callable[[nn.Module, Batch], Tensor]


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The mean log-probability of each candidate's tokens, float32 [rows, candidates]; -inf where there is none."""
    if "candidate_ids" in batch:
        candidate_ids = batch["candidate_ids"]
        logits = _last_logits(model, batch["input_ids"], batch["attention_mask"], keep=1)[:, 0]
        chosen = logits.gather(1, candidate_ids.clamp(min=0)) - logits.logsumexp(1, keepdim=True)
        return chosen.masked_fill(candidate_ids < 0, float("-inf"))
    rows, candidates, _ = batch["input_ids"].shape
    input_ids = batch["input_ids"].flatten(0, 1)
    candidate_mask = batch["candidate_mask"].flatten(0, 1)
    longest = int(candidate_mask.sum(1).max())
    # Padding is on the left: the candidates are the last tokens, each predicted at the position before it.
    logits = _last_logits(model, input_ids, batch["attention_mask"].flatten(0, 1), keep=longest + 1)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, -longest:].flatten(), reduction="none")
    counted = candidate_mask[:, -longest:]
    lengths = counted.sum(1)
    scores = -(losses.view(-1, longest) * counted).sum(1) / lengths
    return scores.masked_fill(lengths == 0, float("-inf")).view(rows, candidates)


def candidates_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the candidates' scores, float32 [rows]."""
    return F.cross_entropy(candidate_scores(model, batch), batch["label"], reduction="none")


def language_modeling_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss over the right candidate's tokens, float32 [rows]."""
    return -candidate_scores(model, batch).gather(1, batch["label"][:, None])[:, 0]


OBJECTIVES: dict[str, Objective] = {"candidates": candidates_loss, "language_modeling": language_modeling_loss}


def _last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """Logits at the last `keep` positions, float32 [rows, keep, vocabulary]."""
    inputs: dict[str, Tensor | int | bool] = {"use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        # Counted from the first real token, one row per row: a model's own table would count the padding too.
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0) + _first_position(model)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
    return logits[:, -keep:].float()


def _first_position(model: nn.Module) -> int:
    """What a model calls the position of a text's first token: RoBERTa and its kin count from behind a padding row."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0
