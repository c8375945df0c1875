"""SQuAD (Rajpurkar et al., 2016): the answer is a span of the context, and may be given in several ways."""

from mezo_scale.tasks.posing import written

TASK = written(
    about="a question about a passage, answered in a few of its words",
    template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    answers=("answers", "text"),
    changes={"question": str.strip},
)
