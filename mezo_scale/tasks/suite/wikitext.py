"""WikiText-2 (Merity et al., 2016), as the hub has it: a row is a line, an empty one where a line is blank."""

from mezo_scale.tasks.passages import running_text

TASK = running_text("articles of Wikipedia, by perplexity")
