"""Words in context (Pilehvar and Camacho-Collados, 2019; SuperGLUE). Labels: 1 if the word has one meaning in both."""

from mezo_scale.tasks.posing import NO_OR_YES, choice

TASK = choice(
    about="whether a word means the same in two sentences",
    template=(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
    ),
    candidates={0: "No", 1: "Yes"},
    names=NO_OR_YES,
)
