"""A question with answers to choose from, in tokens."""

from dataclasses import dataclass, field, replace
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.tasks.encoding import common_prefix, open_tokens, shorten
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.reward import Asked


@dataclass(frozen=True, repr=False)
class Encoded:
    """An example in tokens: prompt + candidates[label] is the sequence a model would have to write; candidates[n] for
    an n in `also` would be as good. `example` is the same in words, `neutral` the prompt that is compared with; `cut`:
    whether one of the two lost tokens."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    also: tuple[int, ...] = ()
    example: Example | None = field(default=None, compare=False)
    neutral: tuple[int, ...] | None = None
    cut: bool = field(default=False, compare=False)

    def __repr__(self) -> str:
        # Digests are taken of it: a row with one right candidate keeps the one that it always had.
        also = f", also={self.also!r}" if self.also else ""
        also += "" if self.neutral is None else f", neutral={self.neutral!r}"
        return f"Encoded(prompt={self.prompt!r}, candidates={self.candidates!r}, label={self.label!r}{also})"

    @property
    def gold(self) -> "Encoded":
        """The example with the right candidate only: all that a loss on its tokens needs."""
        return replace(self, candidates=(self.candidates[self.label],), label=0, also=())

    @property
    def unasked(self) -> "Encoded":
        """The candidates after the neutral prompt."""
        assert self.neutral is not None, "of a task that calibrates"
        return Encoded(self.neutral, self.candidates, 0)

    def is_right(self, candidate: int) -> bool:
        """Whether a candidate of this number is one of those that are right."""
        return candidate == self.label or candidate in self.also

    @property
    def asked(self) -> Asked:
        """For a reward."""
        assert self.example is not None, "made by `encode`"
        right = [text.strip() for n, text in enumerate(self.example.candidates) if self.is_right(n)]
        return self.example.prompt, tuple(right)

    def text(self, candidate: int) -> str:
        """The text of a candidate."""
        assert self.example is not None, "made by `encode`"
        return self.example.candidates[candidate].strip()

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
    alone, lead = open_tokens(tokenizer, example.prompt)
    wholes = [open_tokens(tokenizer, example.prompt + text)[0] for text in example.candidates]
    names = [f"{text:.40}" for text in example.candidates[:12]]  # of a line that can be read
    if any(whole == alone for whole in wholes):
        none = example.candidates[wholes.index(alone)]
        raise RecipeError(
            f"task.candidates {names}: {none!r} adds no tokens to the prompt, expected at least 1: change it"
        )
    if len({tuple(whole) for whole in wholes}) < len(wholes):
        raise RecipeError(f"task.candidates {names}: two of them are the same tokens to this model: change one")
    shared = min(common_prefix([alone, *wholes]), min(map(len, wholes)) - 1)
    if shared < 1:
        raise RecipeError(
            f"task.template gives the prompt {example.prompt!r:.60}, which has no tokens that stay the same before "
            f"{names}: give it a longer one"
        )
    candidates = [whole[shared:] for whole in wholes]
    room = max_length - max(map(len, candidates))
    if room < 2:
        raise RecipeError(
            f"task.candidates {names} have up to {max(map(len, candidates))} tokens, expected between "
            f"1 and task.max_length ({max_length}) - 2: change the one or the other"
        )
    prompt = shorten(alone[:shared], room, lead, tokenizer)
    texts = tuple(prompt), tuple(map(tuple, candidates))
    return Encoded(*texts, example.label, example.also, example, cut=len(prompt) < shared)
