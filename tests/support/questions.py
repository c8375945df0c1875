"""Questions with a short answer, small enough for a tiny model: rows in the schema of SQuAD."""

import gzip
import json
from pathlib import Path
from typing import Any

PLACES = ("Orla", "Brem", "Tusk", "Lenn", "Vash", "Quill")


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Different questions about who keeps a lighthouse, one to three right answers each."""
    made = []
    for number in range(first, first + count):
        place, keeper = PLACES[number % 6], PLACES[number // 6 % 6]
        context = f"In year {number} the light of {place} was kept by {keeper}."
        answers = [keeper, f"the {keeper}", keeper][: 1 + number % 3]
        made.append(
            {
                "title": place,
                "context": context,
                "question": "Who kept it?",
                "answers": {"text": answers, "answer_start": [context.rindex(keeper)] * len(answers)},
            }
        )
    return made


def write(folder: Path) -> Path:
    """A folder of splits: 24 questions to train on, 8 to validate, 10 to test."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, first in (("train", 24, 0), ("validation", 8, 24), ("test", 10, 32)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count, first))
    return folder
