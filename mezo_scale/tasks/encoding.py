"""From text to tokens and tensors: what all kinds of tasks share."""

from collections.abc import Sequence
from typing import Any

import torch

from mezo_scale.errors import ModelError

Batch = dict[str, Any]
"""Tensors with rows along dim 0, and lists of one entry per row."""

WIDTH = 16
"""Tokens that a batch's width is a multiple of: where each has one of its own, what one frees fits no other, and memory
creeps."""


def open_tokens(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """A text's tokens, and how many of them the tokenizer puts before it. Those after it are dropped: it goes on.

    Raises:
        ModelError: the tokenizer puts tokens inside the text.
    """
    tokens = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for end in range(len(tokens), len(plain) - 1, -1):
        if tokens[end - len(plain) : end] == plain:
            return tokens[:end], end - len(plain)
    raise ModelError(f"the tokenizer has special tokens inside {text!r:.60}, expected around it: give another model")


def shorten(prompt: Sequence[int], room: int, lead: int, tokenizer: Any) -> list[int]:
    """A prompt of at most `room` (>= 2) tokens: it loses its beginning, but not the `lead` tokens before the text nor a
    BOS token, and never its end."""
    if len(prompt) <= room:
        return list(prompt)
    head = prompt[: min(lead or int(prompt[0] == tokenizer.bos_token_id), room - 1)]
    return [*head, *prompt[len(prompt) - room + len(head) :]]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, max_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), int64 [sequences, tokens], padded on the left to a multiple of 16 tokens, or to
    max_length if that comes first; the longest sequence always has room."""
    return _pad(sequences, pad_id, max_length, on_left=True)


def pad_right(
    sequences: Sequence[Sequence[int]], pad_id: int, max_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pad_left`, on the right."""
    return _pad(sequences, pad_id, max_length, on_left=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {name: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for name, leaf in batch.items()}


def _pad(
    sequences: Sequence[Sequence[int]], pad_id: int, max_length: int | None, *, on_left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    length = -(-longest // WIDTH) * WIDTH
    if max_length is not None:  # a table of positions may end there
        length = max(longest, min(length, max_length))
    input_ids = torch.full((len(sequences), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        start = length - len(sequence) if on_left else 0
        input_ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask[row, start : start + len(sequence)] = 1
    return input_ids, attention_mask
