"""RTE (Dagan et al., 2005, and later rounds; SuperGLUE). Labels: 0 entailment, 1 not_entailment."""

from mezo_scale.tasks.posing import choice
from mezo_scale.tasks.suite.snli import CLOZE, CLOZE_CHANGES

TASK = choice(
    about="whether a premise entails a hypothesis",
    template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    candidates={0: "Yes", 1: "No"},
    cloze=CLOZE,
    cloze_changes=CLOZE_CHANGES,
    names=("entailment", "not_entailment"),
    aliases={"premise": "sentence1", "hypothesis": "sentence2"},  # GLUE's names
)
