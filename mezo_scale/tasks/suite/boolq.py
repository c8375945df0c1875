"""BoolQ (Clark et al., 2019), as in SuperGLUE (`label`: 0 no, 1 yes) or by itself (`answer`: false, true)."""

from mezo_scale.tasks.posing import NO_OR_YES, choice


def as_sentence(question: str) -> str:
    """The question with a capital letter and a question mark."""
    return question[0].upper() + question[1:] + ("" if question.endswith("?") else "?")


TASK = choice(
    about="a question about a passage, answered by yes or no",
    template="{passage} {question}\n",
    candidates={1: "Yes", 0: "No"},
    names=NO_OR_YES,
    changes={"question": as_sentence},
    aliases={"label": "answer"},
)
