"""TREC (Voorhees and Tice, 2000; Li and Roth, 2002): what a question asks for. Labels: the six coarse ones."""

from mezo_scale.tasks.posing import choice

TASK = choice(
    about="what a question asks for: an abbreviation, a thing, a description, a person, a place or a number",
    template="{text}\nAnswer type:",
    candidates={0: " abbreviation", 1: " thing", 2: " description", 3: " person", 4: " place", 5: " number"},
    cloze="{mask}: {text}",
    words={0: " Expression", 1: " Entity", 2: " Description", 3: " Human", 4: " Location", 5: " Number"},
    names=("abbr", "enty", "desc", "hum", "loc", "num"),
    changes={"text": str.strip},
    aliases={"label": "coarse_label"},
)
