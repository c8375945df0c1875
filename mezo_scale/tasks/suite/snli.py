"""SNLI (Bowman et al., 2015). Labels: 0 entailment, 1 neutral, 2 contradiction; rows with -1, none, are left out."""

from mezo_scale.tasks.posing import choice

TASK = choice(
    about="whether one sentence follows from another, may be true beside it, or can't be",
    template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes, Maybe, or No?\n',
    candidates={0: "Yes", 1: "Maybe", 2: "No"},
    names=("entailment", "neutral", "contradiction"),
    unlabelled=(-1, "-1", "-"),
)
