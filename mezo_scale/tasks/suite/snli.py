"""SNLI (Bowman et al., 2015). Labels: 0 entailment, 1 neutral, 2 contradiction; rows with -1, none, are left out."""

import string

from mezo_scale.tasks.posing import choice


def without_end(sentence: str) -> str:
    """The sentence without the punctuation mark that it ends in: another follows."""
    stripped = sentence.strip()
    return stripped[:-1] if stripped[-1] in string.punctuation else stripped


def going_on(sentence: str) -> str:
    """The sentence as it goes on after a comma, its first letter in lower case."""
    stripped = sentence.strip()
    return stripped[0].lower() + stripped[1:]


CLOZE = "{premise}? {mask}, {hypothesis}"
CLOZE_CHANGES = {"premise": without_end, "hypothesis": going_on}

TASK = choice(
    about="whether one sentence follows from another, may be true beside it, or can't be",
    template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes, Maybe, or No?\n',
    candidates={0: "Yes", 1: "Maybe", 2: "No"},
    cloze=CLOZE,
    cloze_changes=CLOZE_CHANGES,
    names=("entailment", "neutral", "contradiction"),
    unlabelled=(-1, "-1", "-"),
)
