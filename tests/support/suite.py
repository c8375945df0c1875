"""Rows of the tasks that come along, in the hub's schema, and what each of them is asked as."""

import json
from pathlib import Path
from typing import Any

PASSAGE = "The lamp of Brem burns oil.\n@highlight\nBrem burns oil\n@highlight\nOrla keeps the lamp"
STORY = "The lamp of Brem burns oil.\n- Brem burns oil\n- Orla keeps the lamp\n-"
DROPPED = {"section_id": "s", "query_id": "q", "passage": "Orla scored 3, then 4.", "question": " How many in all? "}

# (task, row, prompt, candidates or right answers, the right candidate)
GOLDEN: list[tuple[str, dict[str, Any], str, list[str], str | None]] = [
    (
        "sst2",
        {"sentence": " a bright , quick film ", "label": 1, "idx": 0},
        "a bright , quick film It was",
        [" terrible", " great"],
        " great",
    ),
    (
        "rte",
        {"premise": "Orla keeps the lamp.", "hypothesis": "The lamp is kept.", "idx": 0, "label": 0},
        'Orla keeps the lamp.\nDoes this mean that "The lamp is kept." is true? Yes or No?\n',
        ["Yes", "No"],
        "Yes",
    ),
    (
        "cb",
        {"premise": "Orla may keep it.", "hypothesis": "Orla keeps it", "idx": 0, "label": 2},
        'Suppose Orla may keep it. Can we infer that "Orla keeps it"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        "Maybe",
    ),
    (
        "boolq",
        {"question": "does the lamp burn oil", "passage": "Lamp -- It burns gas.", "idx": 0, "label": 0},
        "Lamp -- It burns gas. Does the lamp burn oil?\n",
        ["Yes", "No"],
        "No",
    ),
    (
        "wsc",
        {
            "text": "Orla told Brem that She was late.",
            "span1_index": 0,
            "span2_index": 4,
            "span1_text": "Orla",
            "span2_text": "She",
            "idx": 0,
            "label": 1,
        },
        "Orla told Brem that She was late.\n"
        'In the previous sentence, does the pronoun "she" refer to Orla? Yes or No?\n',
        ["No", "Yes"],
        "Yes",
    ),
    (
        "wic",
        {
            "word": "lamp",
            "sentence1": "A lamp of oil.",
            "sentence2": "The lamps of his eyes.",
            "start1": 2,
            "start2": 4,
            "end1": 6,
            "end2": 9,
            "idx": 0,
            "label": 0,
        },
        'Does the word "lamp" have the same meaning in these two sentences? Yes, No?\n'
        "A lamp of oil.\nThe lamps of his eyes.\n",
        ["No", "Yes"],
        "No",
    ),
    (
        "multirc",
        {
            "paragraph": "Orla keeps the lamp.",
            "question": "Who keeps it?",
            "answer": "Orla",
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
            "label": 1,
        },
        'Orla keeps the lamp.\nQuestion: Who keeps it?\nI found this answer "Orla". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        "Yes",
    ),
    (
        "copa",
        {
            "premise": "The lamp went out. ",
            "choice1": "The oil was gone.",
            "choice2": "I lit it.",
            "question": "cause",
            "idx": 0,
            "label": 0,
        },
        "The lamp went out because",
        [" the oil was gone.", " I lit it."],
        " the oil was gone.",
    ),
    (
        "copa",
        {
            "premise": "Is the lamp out?",
            "choice1": "I'm late.",
            "choice2": "Orla went Home. ",
            "question": "effect",
            "idx": 1,
            "label": 1,
        },
        "Is the lamp out? so",
        [" i'm late.", " orla went Home."],
        " orla went Home.",
    ),
    (
        "record",
        {
            "passage": PASSAGE,
            "query": "'@placeholder burns oil', says @placeholder",
            "entities": ["Brem", "Orla"],
            "entity_spans": {"text": ["Brem"], "start": [12], "end": [16]},
            "answers": ["Orla"],
            "idx": {"passage": 0, "query": 0},
        },
        STORY,
        [" 'Brem burns oil', says Brem", " 'Orla burns oil', says Orla"],
        " 'Orla burns oil', says Orla",
    ),
    (
        "squad",
        {
            "id": "a",
            "title": "Lamp",
            "context": "Orla keeps it.",
            "question": " Who keeps it? ",
            "answers": {"text": ["Orla", "Orla ", "she"], "answer_start": [0, 0, 0]},
        },
        "Title: Lamp\nContext: Orla keeps it.\nQuestion: Who keeps it?\nAnswer:",
        ["Orla", "she"],
        None,
    ),
    (
        "drop",
        {**DROPPED, "answers_spans": {"spans": ["7", "seven"], "types": ["number", "span"]}},
        "Passage: Orla scored 3, then 4.\nQuestion: How many in all?\nAnswer:",
        ["7", "seven"],
        None,
    ),
    (
        "sst5",
        {"text": "a quick film ", "label": 2, "label_text": "neutral"},
        "a quick film It was",
        [" terrible", " bad", " okay", " good", " great"],
        " okay",
    ),
    (
        "trec",
        {"text": "Who keeps the lamp ?", "label": 3, "fine_label": 29},
        "Who keeps the lamp ?\nAnswer type:",
        [" abbreviation", " thing", " description", " person", " place", " number"],
        " person",
    ),
    (
        "snli",
        {"premise": "Orla keeps the lamp.", "hypothesis": "Nobody keeps it.", "label": 2},
        'Orla keeps the lamp.\nDoes this mean that "Nobody keeps it." is true? Yes, Maybe, or No?\n',
        ["Yes", "Maybe", "No"],
        "No",
    ),
    (
        "mnli",
        {"premise": "Orla may keep it.", "hypothesis": "Orla keeps it.", "label": 1, "idx": 4},
        'Orla may keep it.\nDoes this mean that "Orla keeps it." is true? Yes, Maybe, or No?\n',
        ["Yes", "Maybe", "No"],
        "Maybe",
    ),
    (
        "piqa",
        {"goal": "Light the lamp.", "sol1": "Use a match.", "sol2": "Use a spoon.", "label": 0},
        "Goal: Light the lamp.\nSolution:",
        [" Use a match.", " Use a spoon."],
        " Use a match.",
    ),
    (
        "aqua",
        {"question": "What is 2 + 2?", "options": ["A)3", "B)4", "C)5"], "rationale": "Count.", "correct": "B"},
        "Question: What is 2 + 2?\nOptions: A)3 B)4 C)5\nAnswer:",
        [" A", " B", " C"],
        " B",
    ),
]

# As MeZO's authors ask RoBERTa: (task, changes to its row, prompt, candidates, the right one)
CLOZES: list[tuple[str, dict[str, Any], str, list[str], str]] = [
    ("sentiment", {}, " a film  It was {mask}.", [" terrible", " great"], " great"),
    ("sst2", {}, "a bright , quick film It was {mask}.", [" terrible", " great"], " great"),
    (
        "sst5",
        {},
        "a quick film It was {mask}.",
        [" terrible", " bad", " okay", " good", " great"],
        " okay",
    ),
    (
        "trec",
        {},
        "{mask}: Who keeps the lamp ?",
        [" Expression", " Entity", " Description", " Human", " Location", " Number"],
        " Human",
    ),
    ("snli", {}, "Orla keeps the lamp? {mask}, nobody keeps it.", ["Yes", "Maybe", "No"], "No"),
    (
        "mnli",
        {"premise": "Orla may keep it"},
        "Orla may keep it? {mask}, orla keeps it.",
        ["Yes", "Maybe", "No"],
        "Maybe",
    ),
    ("rte", {"premise": " Is it? "}, "Is it? {mask}, the lamp is kept.", ["Yes", "No"], "Yes"),
]

ROWS = {task: row for task, row, *_ in reversed(GOLDEN)}
"""One row of each task."""


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
