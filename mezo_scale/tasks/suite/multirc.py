"""MultiRC (Khashabi et al., 2018; SuperGLUE), one row per answer. Labels: 1 if the answer is right."""

from mezo_scale.tasks.posing import NO_OR_YES, choice

TASK = choice(
    about="whether an answer to a question about a paragraph is right",
    template=('{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'),
    candidates={0: "No", 1: "Yes"},
    names=NO_OR_YES,
)
