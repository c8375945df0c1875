"""DROP (Dua et al., 2019): the answer is a number, a date or a span; each span that is listed counts as right."""

from mezo_scale.tasks.posing import written

TASK = written(
    about="a question about a passage that takes counting or arithmetic",
    template="Passage: {passage}\nQuestion: {question}\nAnswer:",
    answers=("answers_spans", "spans"),
    changes={"question": str.strip},
)
