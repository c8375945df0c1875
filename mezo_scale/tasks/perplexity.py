"""Perplexity over blocks of a text, and how sure one can be of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mezo_scale.tasks.estimate import Estimate, Z

_MOST = 700.0  # nats per token: what is above has no number


@dataclass(frozen=True)
class Perplexity(Estimate):
    """exp of the mean loss over all tokens of the blocks, each token counting alike. Less is better.

    Metrics of different blocks add up.

    Attributes:
        n: blocks, those without a finite loss among them: as long as there is one, there is no value.
        not_finite: those.
        loss, tokens: sums over the others, of their tokens' losses in nats and of their tokens.
        loss_loss, loss_tokens, tokens_tokens: sums over them of a block's loss squared, times its tokens, and of its
            tokens squared: what the interval is made of.
    """

    n: int = 0
    not_finite: int = 0
    loss: float = 0.0
    tokens: int = 0
    loss_loss: float = 0.0
    loss_tokens: float = 0.0
    tokens_tokens: float = 0.0

    bounded: ClassVar[bool] = False
    more_is_better: ClassVar[bool] = False

    @classmethod
    def of(cls, losses: Sequence[float], tokens: Sequence[int]) -> "Perplexity":
        """The metric of these blocks: the sum of each one's losses in nats, NaN or infinity where it has none, and its
        tokens."""
        pairs = [(loss, count) for loss, count in zip(losses, tokens, strict=True) if math.isfinite(loss)]
        return cls(
            len(losses),
            len(losses) - len(pairs),
            math.fsum(loss for loss, _ in pairs),
            sum(count for _, count in pairs),
            math.fsum(loss * loss for loss, _ in pairs),
            math.fsum(loss * count for loss, count in pairs),
            math.fsum(count * count for _, count in pairs),
        )

    @property
    def value(self) -> float | None:
        """None over no tokens, and as long as a block has no finite loss."""
        if self.tokens == 0 or self.not_finite or self.loss / self.tokens > _MOST:
            return None
        return math.exp(self.loss / self.tokens)

    @property
    def _interval(self) -> tuple[float, float] | None:
        """exp of the normal interval of the mean loss, a ratio of two sums over blocks, whose variance is that of its
        residuals (Cochran, 1977, section 6.4): sum (loss - mean tokens)^2 n / (n - 1) over the tokens squared. Blocks
        are taken to be independent; those of one article are less so than it says."""
        if self.value is None or self.n < 2:
            return None
        mean = self.loss / self.tokens
        residual = self.loss_loss - 2 * mean * self.loss_tokens + mean * mean * self.tokens_tokens
        spread = Z * math.sqrt(max(0.0, residual) * self.n / (self.n - 1)) / self.tokens
        return (math.exp(mean - spread), math.exp(mean + spread)) if mean + spread < _MOST else None

    @property
    def parts(self) -> list[float]:
        """What adds up over ranks."""
        return [
            self.n,
            self.not_finite,
            self.loss,
            self.tokens,
            self.loss_loss,
            self.loss_tokens,
            self.tokens_tokens,
        ]

    def of_parts(self, parts: Sequence[float]) -> "Perplexity":
        """The same metric over the blocks that these are the sums of."""
        blocks, not_finite, loss, tokens, *rest = parts
        return Perplexity(round(blocks), round(not_finite), loss, round(tokens), *rest)

    def __str__(self) -> str:
        return "none" if self.value is None else f"{self.value:.4f}"
