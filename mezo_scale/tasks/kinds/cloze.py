"""Cloze questions for masked language models: a text with a mask in it, and the words that may stand there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import Batch, common_prefix, open_tokens, pad_right
from mezo_scale.tasks.example import Cloze
from mezo_scale.tasks.kinds.candidates import Candidates, token_ids
from mezo_scale.tasks.kinds.encoded import Encoded


@dataclass(frozen=True, repr=False)
class EncodedCloze(Encoded):
    """A cloze in tokens: `prompt` stands before the mask and `after` behind it, with the tokens that the tokenizer puts
    around a text; each candidate is one token."""

    after: tuple[int, ...] = field(default=(), kw_only=True)

    def __repr__(self) -> str:
        return f"{super().__repr__()} + {self.after!r}"

    @property
    def length(self) -> int:
        return len(self.prompt) + 1 + len(self.after)

    def with_mask(self, mask_id: int) -> tuple[int, ...]:
        """What is run."""
        return (*self.prompt, mask_id, *self.after)


class ClozeChoice(Candidates):
    """A choice among words at a mask: the one of the best log-probability there; graded by accuracy.

    A row is padded on the right: so every model's own positions are those of the text alone.
    """

    calibrates = False

    def __init__(self, tokenizer: Any, section: TaskSection) -> None:
        """Raises ModelError if the tokenizer has no mask token; RecipeError as `Candidates` does."""
        super().__init__(tokenizer, section)
        mask_id: int | None = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise ModelError(
                "model.name: its tokenizer has no mask token, expected one for the {mask} of task.template: give the "
                "tokenizer that the masked language model was trained with"
            )
        self._mask_id = mask_id
        self.sharing.refused = True  # a mask stands once in its text as it is

    def encode(self, example: Cloze) -> EncodedCloze:  # type: ignore[override]
        """Tokenizes a cloze. The words are tokens as they are in the text, whole; the mask takes their place.

        Of a text that is too long every column keeps the same number of characters from its beginning, as many as fit:
        so the longest loses first. What the template itself says stays whole.

        Raises:
            RecipeError: there is no room, a word is not one token of its own, or the text holds the mask token.
        """
        before, after = self._around(example)
        cut = (before, after) != example.around()
        words = _in_place(before, example.candidates)
        wholes = [tuple(self._tokenizer(before + word + after)["input_ids"]) for word in words]
        if any(self._mask_id in whole for whole in wholes):
            raise RecipeError(
                f"task.data: the text {before + after!r:.60} holds the mask token {self._tokenizer.mask_token}, "
                "expected no other than the template's: leave the row out"
            )
        opened = [open_tokens(self._tokenizer, before + word)[0] for word in words]
        at = common_prefix([open_tokens(self._tokenizer, before)[0], *opened])
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        for word, tokens in zip(example.candidates, opened, strict=True):
            if len(tokens) != at + 1 or tokens[at] == unknown:
                what = "unknown" if tokens[at:] == [unknown] else f"{len(tokens) - at} tokens"
                raise RecipeError(
                    f"task.candidates: {word!r:.40} is {what} to this model, expected one token that fills the mask of "
                    "task.template: take another word, or mind the space before it"
                )
        behind = wholes[0][at + 1 :]
        bare = before.rstrip()
        joins = bool(bare) and at < len(open_tokens(self._tokenizer, bare)[0])
        if joins or any(whole != (*tokens, *behind) for whole, tokens in zip(wholes, opened, strict=True)):
            raise RecipeError(
                f"task.template: the tokenizer joins one of {words} with what stands around the mask in "
                f"{example.prompt[-60:]!r}: put spaces there"
            )
        candidates = tuple((tokens[at],) for tokens in opened)
        if len(set(candidates)) < len(candidates):
            raise RecipeError(f"task.candidates {words}: two of them are the same token to this model: change one")
        return EncodedCloze(wholes[0][:at], candidates, example.label, example.also, example, cut=cut, after=behind)

    def posed(self, example: Cloze) -> str:
        """The prompt as the model gets it, but for what is cut off."""
        before, after = example.around()
        return f"{before}{self._tokenizer.mask_token}{after}"

    def _tensors(self, rows: Sequence[Encoded], max_length: int) -> Batch:
        """input_ids, attention_mask: int64 [rows, tokens]; mask_at: int64 [rows], where the mask is; candidate_ids:
        int64 [rows, candidates], -1 where none is; label: int64 [rows]."""
        clozes = [row for row in rows if isinstance(row, EncodedCloze)]
        sequences = [row.with_mask(self._mask_id) for row in clozes]
        input_ids, attention_mask = pad_right(sequences, self._tokenizer.pad_token_id, max_length)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mask_at": torch.tensor([len(row.prompt) for row in clozes]),
            "candidate_ids": token_ids(rows),
            "label": torch.tensor([row.label for row in rows]),
        }

    def _around(self, example: Cloze) -> tuple[str, str]:
        """The texts before and behind the mask, cut so that they fit with a word between them."""

        def fits(characters: int) -> bool:
            before, after = example.around(characters)
            (word,) = _in_place(before, example.candidates[:1])
            return len(self._tokenizer(before + word + after)["input_ids"]) <= self._max_length

        least, most = 1, example.longest
        if fits(most):
            return example.around()
        if not fits(least):
            raise RecipeError(
                f"task.max_length is {self._max_length}, which leaves no room for the columns beside the template's "
                f"own words in {example.prompt!r:.60}: ask for more, or give a shorter task.template"
            )
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return example.around(least)


def _in_place(before: str, words: Sequence[str]) -> list[str]:
    """The words as they follow what stands before the mask: one space is enough."""
    return [word.lstrip() for word in words] if before[-1:].isspace() else list(words)
