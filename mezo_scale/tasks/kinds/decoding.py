"""Decoding by forward passes, for whole batches: it runs inside a perturbed view, in all branches at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.tasks.logits import forward


@dataclass(frozen=True)
class Decoded:
    """What a model wrote.

    Attributes:
        tokens: of each row, up to and without the one that ended it.
        finite: whether all logits that a row's tokens were taken from are finite.
    """

    tokens: list[list[int]]
    finite: list[bool]


@torch.no_grad()
def greedy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    ends: Callable[[int], bool],
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Decoded:
    """Writes on after each row, the likeliest token every time, until a token that `ends` it.

    A key-value cache is kept if the model returns one: it holds all rows of the batch, those of every branch.
    One process alone stops when all rows have ended. Several always make `max_new_tokens` calls: sharded weights are
    gathered by all ranks together, and a number that is known beforehand needs no word between them, not even from a
    rank that fails on the way.

    Args:
        input_ids, attention_mask: int64 [rows, tokens], padded on the left.
        weigh: float32 logits [rows, vocabulary] -> what to take the largest of instead; called once per token.
    """
    rows = input_ids.shape[0]
    tokens: list[list[int]] = [[] for _ in range(rows)]
    open_, finite = [True] * rows, [True] * rows
    seen, cache = input_ids, None
    for _ in range(max_new_tokens):
        output = forward(model, seen, attention_mask, 1, use_cache=True, **_cached(cache))
        logits = output.logits[:, -1].float()
        chosen = (logits if weigh is None else weigh(logits)).argmax(-1)
        sound = logits.isfinite().all(-1).tolist()
        for row, token in enumerate(chosen.tolist()):
            finite[row] &= sound[row] or not open_[row]
            open_[row] &= finite[row] and not ends(token)
            if open_[row]:
                tokens[row].append(token)
        if not any(open_) and not collectives.is_distributed():
            break
        cache = _cache_of(output)
        seen = chosen[:, None] if cache is not None else torch.cat([seen, chosen[:, None]], 1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(rows, 1)], 1)
    return Decoded(tokens, finite)


def sampling(seeds: Sequence[int], temperature: float) -> Callable[[Tensor], Tensor]:
    """For `greedy`: adds Gumbel noise to logits, by which the largest is a sample; each row has its own, by its seed.

    Args:
        seeds: of the rows, in [0, 2**64). Branches that share a row's seed differ by their weights alone.
        temperature: above 0; what logits are divided by.
    """
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]  # on the CPU: the same bits everywhere

    def weigh(logits: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(logits.shape[-1], generator=generator) for generator in generators])
        gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        return logits / temperature + gumbel.to(logits.device)

    return weigh


def reads_ahead(model: nn.Module, input_ids: Tensor) -> bool:
    """Whether what a model says at a position depends on later tokens, as masked language models do: those can't write.

    Args:
        input_ids: int64 [1, tokens], at least two, without padding. The first few are looked at: among many tokens the
            others drown in a model that attends to all alike.
    """
    one = input_ids[:, :4]
    first = one[:, :1]
    other = torch.cat([first, torch.where(one[:, 1:] == first, (first == 0).long(), first)], 1)
    mask = torch.ones_like(one)
    with torch.no_grad():
        logits = [forward(model, ids, mask, one.shape[1], use_cache=False).logits[:, 0] for ids in (one, other)]
    # Rounding may differ: a mixture of experts sorts its tokens.
    least = max(1e-4, 2 * torch.finfo(logits[0].dtype).eps) * logits[0].abs().nan_to_num(0, 0, 0).max()
    return bool((logits[0] - logits[1]).abs().nan_to_num(0, 0, 0).max() > least)


def _cached(cache: Any) -> dict[str, Any]:
    return {} if cache is None else {"past_key_values": cache}


def _cache_of(output: Any) -> Any:
    """A cache that the model takes again; None where it has none, or a state of another form."""
    cache = getattr(output, "past_key_values", None)
    return cache if hasattr(cache, "get_seq_length") else None
