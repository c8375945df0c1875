"""SST-2 (Socher et al., 2013; GLUE). Labels: 0 negative, 1 positive."""

from mezo_scale.tasks.posing import choice

TASK = choice(
    about="whether a sentence of a film review is positive",
    template="{sentence} It was",
    candidates={0: " terrible", 1: " great"},
    cloze="{sentence} It was {mask}.",
    names=("negative", "positive"),
    changes={"sentence": str.strip},
    aliases={"sentence": "text"},
)
