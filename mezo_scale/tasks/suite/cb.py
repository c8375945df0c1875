"""CommitmentBank (de Marneffe et al., 2019; SuperGLUE). Labels: 0 entailment, 1 contradiction, 2 neutral."""

from mezo_scale.tasks.posing import choice

TASK = choice(
    about="whether a premise entails a hypothesis, contradicts it, or neither",
    template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    candidates={0: "Yes", 1: "No", 2: "Maybe"},
    names=("entailment", "contradiction", "neutral"),
)
