"""Language modelling: blocks of running text, every token of which is predicted from those before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import Batch, open_tokens, pad_right
from mezo_scale.tasks.example import Passage
from mezo_scale.tasks.kinds.decoding import reads_ahead
from mezo_scale.tasks.kinds.kind import Kind, Objective, refuse_temperature
from mezo_scale.tasks.logits import forward
from mezo_scale.tasks.perplexity import Perplexity
from mezo_scale.tasks.score import Score
from mezo_scale.tasks.splits import draw


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a text, at least two. All but the first are scored: nothing stands before that one."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Loss:
    """What a block came to: the sum of its tokens' losses in nats, and how many tokens that is of."""

    total: float
    tokens: int


class Modeling(Kind[Block, Loss]):
    """Blocks of `task.max_length` tokens, cut from the text without overlap; graded by perplexity.

    Objective: language_modeling, the mean loss over a block's tokens.
    """

    metrics = ("perplexity",)
    scores_all = True

    def __init__(self, tokenizer: Any, section: TaskSection) -> None:
        """Raises RecipeError for fields that this kind does not take."""
        refuse_temperature(section)
        self._tokenizer, self._max_length = tokenizer, section.max_length
        self.objectives: dict[str, Objective] = {
            "language_modeling": lambda model, batch: -self.log_probs(model, batch)
        }

    def encode_all(self, examples: Sequence[Passage]) -> list[Block]:
        """The blocks of texts. What is left at a text's end is a shorter one; as many as a text asks for are drawn.

        Raises:
            RecipeError: a text has less than two tokens.
        """
        rows: list[Block] = []
        for passage in examples:
            blocks = self._blocks(passage)
            rows += blocks if passage.most is None else draw(blocks, passage.most, passage.seed)
        return rows

    def encode(self, example: Passage) -> Block:
        """The first block of a text. Raises RecipeError as `encode_all` does."""
        return self._blocks(example)[0]

    def text(self, row: Block) -> str:
        """What a block says."""
        text: str = self._tokenizer.decode(row.tokens)
        return text

    def length(self, row: Block) -> int:
        return len(row.tokens)

    def scored(self, row: Block) -> list[tuple[int, ...]]:
        return [row.tokens[1:]]

    def collate(self, rows: Sequence[Block], objective: str | None = None, max_length: int | None = None) -> Batch:
        """input_ids, attention_mask: int64 [rows, tokens], padded on the right, where nothing is read any more."""
        longest = self._max_length if max_length is None else max_length
        ids, mask = pad_right([row.tokens for row in rows], self._tokenizer.pad_token_id, longest)
        return {"input_ids": ids, "attention_mask": mask}

    def predict(self, model: nn.Module, batch: Batch) -> list[Loss]:
        losses, scored = token_losses(model, batch)
        totals = losses.double().sum(1).tolist()
        return [Loss(total, count) for total, count in zip(totals, scored.sum(1).tolist(), strict=True)]

    def score(self, predictions: Sequence[Loss], rows: Sequence[Block]) -> Score:
        found = Perplexity.of([loss.total for loss in predictions], [loss.tokens for loss in predictions])
        return Score({"perplexity": found}, "perplexity")

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean log-probability of each block's tokens, float32 [rows]."""
        losses, scored = token_losses(model, batch)
        return -losses.sum(1) / scored.sum(1)

    def refusal(self, model: nn.Module, batch: Batch) -> str | None:
        if reads_ahead(model, batch["input_ids"]):
            return "reads the tokens after a position, as masked language models do, and has no perplexity"
        return None

    def _blocks(self, passage: Passage) -> list[Block]:
        tokens, size = open_tokens(self._tokenizer, passage.text)[0], self._max_length
        parts = (tokens[start : start + size] for start in range(0, len(tokens), size))
        blocks = [Block(tuple(part)) for part in parts if len(part) > 1]
        if not blocks:
            raise RecipeError(
                f"task.data: the text {passage.text.strip()!r:.60} has {len(tokens)} tokens to this model, expected 2 "
                "or more: give more text"
            )
        return blocks


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(losses, scored): of each token but a row's first, in nats, float32 [rows, tokens - 1], 0 where padding is; and
    which they are, bool."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = forward(model, ids, mask, ids.shape[1], use_cache=False).logits[:, :-1]
    # Row by row: all at once in float32 would take the memory of the logits twice more.
    losses = torch.stack(
        [F.cross_entropy(row.float(), right, reduction="none") for row, right in zip(logits, ids[:, 1:], strict=True)]
    )
    scored = mask[:, 1:].bool()
    return losses.masked_fill(~scored, 0.0), scored
