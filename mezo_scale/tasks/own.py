"""Tasks for data of one's own, declared by a recipe alone: a choice, an answer, a chat's last turn, a text, images."""

from collections.abc import Mapping, Sequence
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Dialogue, Example, Question
from mezo_scale.tasks.passages import running_text
from mezo_scale.tasks.pictures import pictures
from mezo_scale.tasks.posing import cloze_of, own_candidates, refuse_candidates
from mezo_scale.tasks.rows import column, fill, has_mask, text_of, unlike_text
from mezo_scale.tasks.tables import Row, shown
from mezo_scale.tasks.task import CHATTING, CHOOSING, WRITING, Task

_RENAME = "rename the one that is meant"


def pose_choice(section: TaskSection, row: Row) -> Example:
    """The recipe's template, its candidates, and the one that the row's label means."""
    if section.candidates is None:
        raise RecipeError(
            "task.candidates is missing, and task.name is choice: give the answers, as in "
            'task.candidates=[" bad", " good"]'
        )
    candidates = own_candidates(section)
    name = section.label_column or "label"
    value = column(row, name, "name the one that is meant in task.label_column")
    label = _meant(section, candidates, value, name, row)
    if has_mask(section.template):
        return cloze_of(section, row, candidates, label)
    return Example(_prompt(section, row), candidates, label)


def pose_answer(section: TaskSection, row: Row) -> Question:
    """The template, and the texts that are right after it, each after a space where the prompt ends in none."""
    prompt = _prompt(section, row)
    space = "" if prompt[-1].isspace() else " "
    name = section.answer_column or "answer"
    answers = _answers(column(row, name, "name the one that is meant in task.answer_column"), name, row)
    return Question(prompt, tuple(f"{space}{answer}" for answer in answers))


def pose_chat(section: TaskSection, row: Row) -> Dialogue:
    """All turns but the last ask; the last one is the assistant's, and right."""
    refuse_candidates(section)
    if section.template is not None:
        raise RecipeError(
            "task.template is given, but task.name is chat, which is posed by the tokenizer's chat template: leave it "
            "out"
        )
    turns = column(row, "messages", _RENAME)
    if not isinstance(turns, list) or len(turns) < 2:
        raise RecipeError(
            f"task.data: {row.place} has the messages {turns!r:.60}, expected a list of at least two turns, each with "
            "role and content"
        )
    messages = tuple(_turn(turn, number, row) for number, turn in enumerate(turns, 1))
    role, answer = messages[-1]
    if role != "assistant":
        raise RecipeError(
            f"task.data: {row.place} ends with a turn of {role!r:.60}, expected the assistant's, which is learned: "
            "leave out what follows it"
        )
    return Dialogue(messages[:-1], answer.strip())


def _prompt(section: TaskSection, row: Row) -> str:
    if section.template is None:
        raise RecipeError(
            f"task.template is missing, and task.name is {section.name}: give the prompt, with columns in braces; the "
            f"data has {shown(list(row.fields))}"
        )
    return fill(section.template, row)


def _meant(section: TaskSection, candidates: Sequence[str], value: Any, name: str, row: Row) -> int:
    """The number of the candidate that a label means."""
    found = _written(value)
    names = _names(section, candidates)
    if found is None or found not in names:
        raise RecipeError(
            f"task.data: {row.place} has the label {value!r:.60} in {name}, expected one of {shown(list(names))}: "
            "mend it, or say in task.labels what the column holds, in the order of task.candidates"
        )
    return names[found]


def _names(section: TaskSection, candidates: Sequence[str]) -> Mapping[str, int]:
    """What a label may be, and the candidate that it means. Raises RecipeError if that is not clear."""
    if section.labels is not None:
        labels = [str(label) for label in section.labels]
        if len(labels) != len(candidates) or len(set(labels)) < len(labels):
            raise RecipeError(
                f"task.labels: found {labels}, expected {len(candidates)} that differ, one for each of task.candidates"
            )
        return {label: number for number, label in enumerate(labels)}
    texts = [candidate.strip() for candidate in candidates]
    numbers = {str(number): number for number in range(len(candidates))}
    if len(set(texts)) < len(texts):
        raise RecipeError(
            f"task.candidates {list(candidates)}: two of them differ in white space only, which labels don't have: "
            "change one, or say in task.labels what the column holds"
        )
    if any(numbers.get(text, n) != n for n, text in enumerate(texts)):
        raise RecipeError(
            f"task.candidates {list(candidates)} can be labels by their texts and by their numbers, and mean different "
            "ones: say in task.labels what the column holds"
        )
    return numbers | {text: number for number, text in enumerate(texts)}


def _written(value: Any) -> str | None:
    """A label as text: a file of text has no other, and 1 in JSON is "1" in CSV."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int) else None


def _answers(value: Any, name: str, row: Row) -> tuple[str, ...]:
    """The right answers of a row, at least one, without white space around them."""
    found = value if isinstance(value, list) else [value]
    if not found:
        raise RecipeError(f"task.data: {row.place} has no answer in {name}, expected at least one: leave the row out")
    for answer in found:
        if problem := unlike_text(answer):
            raise RecipeError(
                f"task.data: {row.place} has {problem} in {name}, expected a text or a list of texts: fill it in, or "
                "leave the row out"
            )
    texts = tuple(dict.fromkeys(str(answer).strip() for answer in found))
    broken = [text for text in texts if len(text.splitlines()) > 1]
    if broken:
        raise RecipeError(
            f"task.data: {row.place} has the answer {broken[0]!r:.60}, but an answer ends with its line: write it in "
            "one line, or take task.name=chat"
        )
    return texts


def _turn(turn: Any, number: int, row: Row) -> tuple[str, str]:
    """(role, content) of a message."""
    if not isinstance(turn, Mapping):
        raise RecipeError(f"task.data: turn {number} of {row.place} is {turn!r:.60}, expected role and content")
    one = Row(turn, f"turn {number} of {row.place}")
    return text_of(one, "role"), text_of(one, "content")


CHOICE = Task.of_rows(
    pose_choice,
    CHOOSING,
    "your own data: one of a few answers, by task.template and task.candidates",
    ("label",),
    takes=("label_column", "labels"),
    cloze="",
)
ANSWER = Task.of_rows(
    pose_answer,
    WRITING,
    "your own data: an answer that is written, by task.template",
    ("answer",),
    takes=("answer_column",),
)
CHAT = Task.of_rows(
    pose_chat, CHATTING, "your own chats: the assistant's last turn, by the tokenizer's chat template", ("messages",)
)
TEXT = running_text("your own text: every token is predicted, by perplexity", takes=("text_column",))
IMAGE = pictures(
    "your own images: one of the model's classes", "image", takes=("image_column", "label_column", "labels")
)
