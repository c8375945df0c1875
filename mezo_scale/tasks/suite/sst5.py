"""SST-5 (Socher et al., 2013): five grades of praise. Labels: 0 very negative to 4 very positive."""

from mezo_scale.tasks.posing import choice

TASK = choice(
    about="whether a sentence of a film review is good or bad, in five grades",
    template="{text} It was",
    candidates={0: " terrible", 1: " bad", 2: " okay", 3: " good", 4: " great"},
    cloze="{text} It was {mask}.",
    names=("very negative", "negative", "neutral", "positive", "very positive"),
    changes={"text": str.strip},
    aliases={"text": "sentence"},
)
