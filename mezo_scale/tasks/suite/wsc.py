"""WSC, Winograd's schemas (Levesque et al., 2012; SuperGLUE, wsc.fixed). Labels: 1 if the pronoun means the noun."""

from mezo_scale.tasks.posing import NO_OR_YES, choice

TASK = choice(
    about="whether a pronoun (span2) refers to a noun (span1)",
    template='{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    candidates={0: "No", 1: "Yes"},
    names=NO_OR_YES,
    told_apart_by=("span1_index", "span2_index"),  # one pronoun may stand twice, and mean two
    changes={"span2_text": str.lower},
)
