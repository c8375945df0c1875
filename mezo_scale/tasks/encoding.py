"""From examples to batches: tokens, tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.tasks.example import Example

Batch = dict[str, torch.Tensor]

_WIDTH = 16  # tokens. Where every batch has a width of its own, what one frees fits no other, and memory creeps


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: prompt + candidates[label] is the sequence a model would have to write."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int

    @property
    def gold(self) -> "Encoded":
        """The example with the right candidate only: all that a loss on its tokens needs."""
        return replace(self, candidates=(self.candidates[self.label],), label=0)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt) + max(map(len, self.candidates))


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenizes an example. A long prompt loses its beginning (but not a BOS token), never its end.

    What is scored are always the tokens of the whole text, prompt and candidate in one: where a tokenizer joins the end
    of a prompt with what follows, the boundary moves back to the last place that all candidates and the prompt share.

    Raises:
        RecipeError: if a candidate adds no tokens, has too many for max_length, or has those of another; or if prompt
            and candidates share no beginning.
    """
    alone, lead = _open_tokens(tokenizer, example.prompt)
    wholes = [_open_tokens(tokenizer, example.prompt + text)[0] for text in example.candidates]
    names = list(example.candidates)
    if any(whole == alone for whole in wholes):
        none = names[wholes.index(alone)]
        raise RecipeError(
            f"task.candidates {names}: {none!r} adds no tokens to the prompt, expected at least 1: change it"
        )
    if len({tuple(whole) for whole in wholes}) < len(wholes):
        raise RecipeError(f"task.candidates {names}: two of them are the same tokens to this model: change one")
    shared = min(_common_prefix([alone, *wholes]), min(map(len, wholes)) - 1)
    if shared < 1:
        raise RecipeError(
            f"task.template gives the prompt {example.prompt!r:.60}, which has no tokens that stay the same before "
            f"{names}: give it a longer one"
        )
    prompt, candidates = alone[:shared], [whole[shared:] for whole in wholes]
    room = max_length - max(map(len, candidates))
    if room < 2:
        raise RecipeError(
            f"task.candidates {names} have {sorted(map(len, candidates))} tokens, expected between "
            f"1 and task.max_length ({max_length}) - 2: change the one or the other"
        )
    if shared > room:
        head = prompt[: min(lead or int(prompt[0] == tokenizer.bos_token_id), room - 1)]
        prompt = head + prompt[shared - room + len(head) :]
    return Encoded(tuple(prompt), tuple(map(tuple, candidates)), example.label)


def collate(examples: Sequence[Encoded], pad_id: int, max_length: int | None = None) -> Batch:
    """One row per example, padded on the left to a multiple of 16 tokens, or to max_length if that comes first.

    Where every candidate is one token, the prompt alone is run and the next token scores them all:
        input_ids, attention_mask: int64 [rows, tokens]; candidate_ids: int64 [rows, candidates], -1 where none is.
    Otherwise each candidate is written out after the prompt:
        input_ids, attention_mask: int64 [rows, candidates, tokens]; candidate_mask: bool [rows, candidates, tokens],
        true on the candidate's own tokens, nowhere for a candidate that only fills up the row.
    Always: label: int64 [rows].
    """
    label = torch.tensor([example.label for example in examples])
    width = max(len(example.candidates) for example in examples)
    if all(len(candidate) == 1 for example in examples for candidate in example.candidates):
        input_ids, attention_mask = _pad_left([example.prompt for example in examples], pad_id, max_length)
        candidate_ids = torch.full((len(examples), width), -1)
        for row, example in enumerate(examples):
            candidate_ids[row, : len(example.candidates)] = torch.tensor(example.candidates).squeeze(1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "candidate_ids": candidate_ids,
            "label": label,
        }
    answers: list[tuple[int, ...]] = []  # what is scored
    sequences: list[tuple[int, ...]] = []  # what is run
    for example in examples:
        missing = width - len(example.candidates)
        answers += [*example.candidates, *[()] * missing]
        sequences += [example.prompt + answer for answer in (*example.candidates, *example.candidates[:1] * missing)]
    input_ids, attention_mask = _pad_left(sequences, pad_id, max_length)
    candidate_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        candidate_mask[row, input_ids.shape[1] - len(answer) :] = True
    shape = (len(examples), width, -1)
    return {
        "input_ids": input_ids.view(shape),
        "attention_mask": attention_mask.view(shape),
        "candidate_mask": candidate_mask.view(shape),
        "label": label,
    }


def _open_tokens(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """A text's tokens, and how many of them the tokenizer puts before it. Those after it are dropped: it goes on."""
    tokens = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for end in range(len(tokens), len(plain) - 1, -1):
        if tokens[end - len(plain) : end] == plain:
            return tokens[:end], end - len(plain)
    raise ModelError(f"the tokenizer has special tokens inside {text!r:.60}, expected around it: give another model")


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def _pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, max_length: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    length = -(-longest // _WIDTH) * _WIDTH
    if max_length is not None:  # a table of positions may end there
        length = max(longest, min(length, max_length))
    input_ids = torch.full((len(sequences), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, length - len(sequence) :] = torch.tensor(sequence)
        attention_mask[row, length - len(sequence) :] = 1
    return input_ids, attention_mask
