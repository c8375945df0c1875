"""What tasks make of their rows: a prompt, and what is right after it."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 400  # characters of a text


@dataclass(frozen=True)
class Example:
    """A question with answers to choose from.

    Attributes:
        prompt: the text before the answer.
        candidates: the answers to choose from, each with its leading space if it has one.
        label: index of the right candidate; of the first one, where several are right. A loss is taken of it.
        also: indices of the other candidates that are right.
        which: what tells the question from others of the same prompt and candidates.
        neutral: the prompt without what is asked, for `task.calibrate`; None: nothing is calibrated.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    also: tuple[int, ...] = ()
    which: tuple[str, ...] = ()
    neutral: str | None = None

    @property
    def asked(self) -> Hashable:
        """What tells the question from others: in some tasks all that differs are the answers to choose from."""
        return self.prompt.strip(), self.candidates, self.which

    def contradicts(self, other: "Example") -> str | None:
        """What one question can't have both of, in words; None if the examples agree."""
        if {self.label, *self.also} == {other.label, *other.also}:
            return None
        return f"the labels {self.label} and {other.label}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: prompt, candidates, gold (the text of the right one); also, if there are more that are right;
        neutral, if there is such a prompt."""
        found: dict[str, Any] = {
            "prompt": self.prompt,
            "candidates": list(self.candidates),
            "gold": self.candidates[self.label],
        }
        found |= {"also": [self.candidates[index] for index in self.also]} if self.also else {}
        return found | ({} if self.neutral is None else {"neutral": self.neutral})


@dataclass(frozen=True)
class Cloze(Example):
    """A question whose answer is a word that is missing in a text.

    Attributes:
        prompt: the whole text, with {mask} where the word is missing.
        before, after: what stands around it, in parts: each a text, and whether it is the row's own and may be cut.
    """

    before: tuple[tuple[str, bool], ...] = ()
    after: tuple[tuple[str, bool], ...] = ()

    def around(self, characters: int | None = None) -> tuple[str, str]:
        """The texts before the mask and after it; of each of the row's own only so many characters, if given."""

        def cut(text: str, own: bool) -> str:
            is_long = own and characters is not None and len(text) > characters
            return text[:characters].rstrip() if is_long else text

        before, after = ("".join(cut(*part) for part in side) for side in (self.before, self.after))
        return before, after

    @property
    def longest(self) -> int:
        """Characters of the longest part that may be cut."""
        return max((len(text) for text, own in (*self.before, *self.after) if own), default=1)


@dataclass(frozen=True)
class Question:
    """A question whose answer is written.

    Attributes:
        prompt: the text before the answer.
        answers: texts that are right, at least one, each with its leading space if it has one. The first is what a
            loss on tokens is taken of.
    """

    prompt: str
    answers: tuple[str, ...]

    @property
    def asked(self) -> Hashable:
        """What tells the question from others."""
        return self.prompt.strip()

    def contradicts(self, other: "Question") -> str | None:
        """Never: a question may have several right answers."""
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: prompt, candidates (none), gold (all texts that are right)."""
        return {"prompt": self.prompt, "candidates": [], "gold": [answer.strip() for answer in self.answers]}


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose last turn is written.

    Attributes:
        turns: (role, content) of the turns before it, at least one.
        answer: the last turn, the assistant's, without white space around it.
    """

    turns: tuple[tuple[str, str], ...]
    answer: str

    @property
    def asked(self) -> Hashable:
        """What tells the dialogue from others."""
        return self.turns

    def contradicts(self, other: "Dialogue") -> str | None:
        """Never: much may be said to one thing."""
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: prompt (the turns, one after the other), candidates (none), gold (the answer)."""
        prompt = "\n".join(f"{role}: {content}" for role, content in self.turns)
        return {"prompt": prompt, "candidates": [], "gold": [self.answer]}


@dataclass(frozen=True)
class Passage:
    """Running text.

    Attributes:
        most: blocks of it that are used at most; None: all.
        seed: of the permutation that they are drawn by, where there are more.
    """

    text: str
    most: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: prompt (the beginning of the text), candidates and gold (none)."""
        return {"prompt": self.text.strip()[:_SHOWN], "candidates": [], "gold": []}


@dataclass(frozen=True)
class Picture:
    """An image, and what it shows.

    Attributes:
        data: its file.
        label: the number of its class, or the class' name.
        place: where a person finds it.
    """

    data: bytes = field(repr=False)
    label: int | str
    place: str = field(default="", compare=False)

    @property
    def asked(self) -> Hashable:
        """What tells the image from others."""
        return hashlib.sha256(self.data).digest()

    def contradicts(self, other: "Picture") -> str | None:
        """What one image can't be both of, in words; None if they agree."""
        return None if self.label == other.label else f"the labels {self.label} and {other.label}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: prompt (what is known of the file), candidates (none), gold (the label)."""
        about = f"{self.place}: an image of {len(self.data):,} bytes"
        return {"prompt": about, "candidates": [], "gold": [str(self.label)]}
