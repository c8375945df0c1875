"""What tasks make of their rows: a prompt, and what is right after it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question with answers to choose from.

    Attributes:
        prompt: the text before the answer.
        candidates: the answers to choose from, each with its leading space if it has one.
        label: index of the right candidate.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int

    def contradicts(self, other: "Example") -> str | None:
        """What one prompt can't have both of, in words; None if the examples agree."""
        return f"the labels {self.label} and {other.label}" if self.label != other.label else None


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

    def contradicts(self, other: "Question") -> str | None:
        """Never: a question may have several right answers."""
        return None
