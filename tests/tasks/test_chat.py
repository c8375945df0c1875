"""Chats through the tokenizer's chat template: what is asked, what is learned, where an answer ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from mezo_scale import tasks
from mezo_scale.errors import MezoError, ModelError, RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks import Dialogue
from mezo_scale.tasks.kinds.chat import Chat
from tests.support import material

ASKED = {"role": "user", "content": "how is the plot"}
DIALOGUE = Dialogue((("user", "how is the plot"),), "it is a mess\nand dull")


def kind(template: str | None = material.CHAT_TEMPLATE, max_length: int = 96, **fields: Any) -> Chat:
    tokenizer = material.tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, TaskSection(name="chat", data="d", max_length=max_length, **fields))


def read(path: Path, *rows: Any, **fields: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks.examples(TaskSection(name="chat", data=str(path), **fields))["all"]


def test_all_turns_but_the_last_ask(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, ASKED, {"role": "assistant", "content": " dull\n"}]
    (found,) = read(tmp_path / "c.jsonl", {"messages": turns, "source": "x"})
    assert found == Dialogue((("system", "be brief"), ("user", "how is the plot")), "dull")
    assert found.as_dict() == {
        "prompt": "system: be brief\nuser: how is the plot",
        "candidates": [],
        "gold": ["dull"],
    }


def test_the_prompt_is_the_templates_and_the_answer_with_the_end_of_its_turn_is_learned() -> None:
    asker = kind()
    row = asker.encode(DIALOGUE)
    decode = asker._tokenizer.decode
    assert decode(row.prompt) == "<user>how is the plot</s>\n<assistant>" == asker.posed(DIALOGUE)
    assert decode(row.whole[-row.scored :]) == "it is a mess\nand dull</s>"
    assert decode(row.whole) == "<user>how is the plot</s>\n<assistant>it is a mess\nand dull</s>"
    assert row.asked == ("<user>how is the plot</s>\n<assistant>", ("it is a mess\nand dull",))


def test_an_answer_goes_on_over_lines_and_ends_with_its_turn() -> None:
    asker = kind()
    tokens = asker._tokenizer("a joy\n moving</s>")["input_ids"]
    ends = [asker._ends(token) for token in tokens]
    assert ends == [False] * (len(tokens) - 1) + [True]
    assert asker._text(tokens[:-1]) == "a joy\n moving"


def test_what_a_template_writes_before_each_answer_is_asked_with() -> None:
    thinking = material.CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message['role'] == 'assistant' %}(.){% endif %}{{ message['content'] }}",
    )
    row = kind(thinking).encode(DIALOGUE)
    assert kind()._tokenizer.decode(row.prompt) == "<user>how is the plot</s>\n<assistant>(.)"


@pytest.mark.parametrize("ending", ["", " ###", "\n"])
def test_where_a_turn_has_no_special_token_at_its_end_the_text_ends_with_it(ending: str) -> None:
    asker = kind(material.CHAT_TEMPLATE.replace("</s>\n", ending))
    row = asker.encode(DIALOGUE)
    assert asker._tokenizer.decode(row.whole[-row.scored :]) == f"{DIALOGUE.answer}{ending.rstrip()}</s>"


def test_a_long_prompt_loses_its_beginning_but_not_the_token_that_begins_the_text() -> None:
    begun = "</s>" + material.CHAT_TEMPLATE
    tokenizer = material.tokenizer()
    tokenizer.chat_template = begun
    tokenizer.bos_token = "</s>"
    asker = Chat(tokenizer, TaskSection(name="chat", data="d", max_length=24, max_new_tokens=8))
    row = asker.encode(Dialogue((("user", "how is the plot " * 9),), "dull"))
    assert len(row.prompt) == 16
    assert row.prompt[0] == row.whole[0] == tokenizer.bos_token_id
    assert row.prompt[1] != row.prompt[0]
    assert tokenizer.decode(row.prompt).endswith("lot </s>\n<assistant>")
    assert len(row.whole) <= 24


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "line 1 of c.jsonl has no column 'messages'; it has text"),
        ({"messages": "hello"}, "has the messages 'hello', expected a list of at least two turns"),
        ({"messages": [ASKED]}, "expected a list of at least two turns, each with role and content"),
        ({"messages": [ASKED, ASKED]}, "ends with a turn of 'user', expected the assistant's, which is learned"),
        ({"messages": [ASKED, "hello"]}, "turn 2 of line 1 of c.jsonl is 'hello', expected role and content"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "turn 2 of line 1 of c.jsonl has no column 'content'"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": " "}]},
            "turn 2 of line 1 of c.jsonl has no text in content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}, ASKED]},
            "turn 1 of line 1 of c.jsonl has a list in",
        ),
    ],
)
def test_a_row_that_is_no_chat_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Any, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        read(Path("c.jsonl"), row)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"template": "{messages}"}, {"candidates": (" a", " b")}])
def test_a_chat_takes_neither_template_nor_candidates(tmp_path: Path, fields: dict[str, Any]) -> None:
    turns = {"messages": [ASKED, {"role": "assistant", "content": "dull"}]}
    with pytest.raises(RecipeError, match=f"task.{next(iter(fields))} is given, but task.name is chat"):
        read(tmp_path / "c.jsonl", turns, **fields)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "its tokenizer has no chat template, which task.name=chat is posed by: give an instruction model"),
        ("{{ raise_exception('no\nsuch role') }}", r"its chat template can't take turns of user \(no such role\)"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
            "does not write one after it",
        ),
        ("nothing", "asks for a turn with 'nothing', but does not write one after it"),
    ],
)
def test_a_tokenizer_that_can_not_pose_a_chat_is_refused(template: str | None, said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        kind(template)
    assert "\n" not in str(error.value)


def test_a_chat_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MezoError, match="leaves no room for its prompt in task.max_length"):
        kind(max_length=24).encode(Dialogue((("user", "how"),), "it is a mess " * 9))
