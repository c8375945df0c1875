"""The tasks that come along: what they ask of a row, to the character, and which rows they refuse."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.models.vision import ImageReader
from mezo_scale.recipe import Recipe, TaskSection
from mezo_scale.tasks import Example, NamedKind
from mezo_scale.tasks.example import Cloze
from mezo_scale.tasks.kinds.candidates import Candidates, candidate_scores
from tests.support import material
from tests.support.fixtures import ROOT
from tests.support.suite import CLOZES, GOLDEN, ROWS, write


def examples(path: Path, name: str, *rows: dict[str, Any], **fields: Any) -> Any:
    data = str(write(path / "data.jsonl", *rows))
    return tasks.examples(TaskSection.model_validate({"name": name, "data": data, **fields}))["all"]


def pose(path: Path, name: str, **changes: Any) -> Any:
    """The example of the task's row with some columns changed, or without those that are changed to `...`."""
    row = {key: value for key, value in (ROWS[name] | changes).items() if value is not ...}
    return examples(path, name, row)[0]


@pytest.mark.parametrize(("name", "row", "prompt", "answers", "gold"), GOLDEN)
def test_a_row_is_posed_as_mezo_s_authors_pose_it(
    tmp_path: Path, name: str, row: dict[str, Any], prompt: str, answers: list[str], gold: str | None
) -> None:
    (example,) = examples(tmp_path, name, row)
    if gold is None:
        assert example.as_dict() == {"prompt": prompt, "candidates": [], "gold": answers}
        assert example.answers == tuple(f" {answer}" for answer in answers)
    else:
        assert example.as_dict() == {"prompt": prompt, "candidates": answers, "gold": gold}


def test_white_space_before_the_whole_prompt_is_dropped_and_no_other(tmp_path: Path) -> None:
    assert pose(tmp_path, "rte", premise=" \nIt is. ").prompt.startswith("It is. \nDoes this mean")
    assert pose(tmp_path, "cb", premise="  It is.").prompt.startswith("Suppose   It is. Can we")


@pytest.mark.parametrize(
    ("name", "changes", "gold"),
    [
        ("boolq", {"label": ..., "answer": True}, "Yes"),
        ("boolq", {"label": ..., "answer": False}, "No"),
        ("boolq", {"label": 1}, "Yes"),
        ("boolq", {"question": "is it so?", "label": "0"}, "No"),
        ("wic", {"label": True}, "Yes"),
        ("wsc", {"label": "False"}, "No"),
        ("rte", {"label": "not_entailment"}, "No"),
        ("rte", {"premise": ..., "hypothesis": ..., "sentence1": "a", "sentence2": "b"}, "Yes"),
        ("cb", {"label": "contradiction"}, "No"),
        ("sst2", {"sentence": ..., "text": "a film", "label": "negative"}, " terrible"),
    ],
)
def test_copies_of_the_data_that_name_things_otherwise_are_read(
    tmp_path: Path, name: str, changes: dict[str, Any], gold: str
) -> None:
    assert pose(tmp_path, name, **changes).as_dict()["gold"] == gold


def test_answers_may_be_a_list_of_structs(tmp_path: Path) -> None:
    found = pose(tmp_path, "squad", answers=[{"text": "Orla", "answer_start": 0}, {"text": "she", "answer_start": 3}])
    assert found.answers == (" Orla", " she")


OWN = {"sentiment", "choice", "answer", "chat", "text", "wikitext", "image", "cifar10"}  # tested elsewhere
COLUMNS = [(name, column) for name, task in tasks.known().items() for column in task.columns if name not in OWN]


@pytest.mark.parametrize(("name", "column"), COLUMNS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, name: str, column: str) -> None:
    wanted = column.split(" ")[0].split(".")[0]
    nearest = rf"did you mean '{wanted}s'\?"
    with pytest.raises(RecipeError, match=rf"line 1 of .* has no column '{wanted}' \({nearest}\); it has ") as refused:
        pose(tmp_path, name, **{wanted: ..., f"{wanted}s": ROWS[name][wanted]})
    assert "\n" not in str(refused.value)


TEXTS = [(name, column) for name, column in COLUMNS if isinstance(ROWS[name].get(column.split(" ")[0]), str)]


@pytest.mark.parametrize(("name", "column"), TEXTS)
@pytest.mark.parametrize("value", ["", "  ", None, ["a"], {}])
def test_a_column_without_text_is_refused(tmp_path: Path, name: str, column: str, value: Any) -> None:
    wanted = column.split(" ")[0]
    with pytest.raises(RecipeError, match=f"line 1 of .* has (no text|a list|a dict) in {wanted}, expected text"):
        pose(tmp_path, name, **{wanted: value})


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("sst2", {"label": -1}, "has the label -1, expected 0 to 1, the number of a candidate"),
        ("rte", {"label": 2}, "has the label 2, expected 0 to 1, .*, or its name: entailment, not_entailment"),
        ("rte", {"label": True}, "has the label True, expected 0 to 1"),
        ("rte", {"label": None}, "has the label None, expected 0 to 1"),
        ("cb", {"label": "maybe"}, "has the label 'maybe', expected 0 to 2"),
        ("boolq", {"label": "yes"}, "has the label 'yes', expected 0 to 1, .*: false, true"),
        ("wic", {"label": 1.0}, r"has the label '1.0', expected 0 to 1"),
        ("copa", {"label": 2}, "has the label 2, expected 0 to 1"),
        ("copa", {"question": "reason"}, "has the question 'reason', expected cause or effect"),
        ("copa", {"choice2": "the oil was gone."}, "has one text as choice1 and choice2"),
        ("copa", {"premise": "."}, "has no text in premise"),
        ("record", {"query": "Nobody burns oil"}, "has the query 'Nobody burns oil', expected @placeholder in it"),
        ("record", {"answers": ["Lenn"]}, r"has the answer 'Lenn', expected one of its entities \(Brem, Orla\)"),
        ("record", {"answers": []}, "has no answer, expected at least one"),
        ("record", {"entities": []}, "has no entity, expected at least one"),
        ("record", {"entities": ["Brem", " "]}, "has the entity ' ', expected text"),
        ("record", {"entities": "Brem"}, "has the entities 'Brem', expected a list of texts"),
        ("drop", {"answers_spans": {"spans": []}}, "has no answer, expected at least one"),
        ("drop", {"answers_spans": {"spans": [7]}}, "has the answer 7, expected text"),
        (
            "drop",
            {"answers_spans": {"text": ["7"]}},
            "has the answers_spans .*, expected a struct whose `spans` is a list of texts",
        ),
        ("squad", {"answers": [{"text": "Orla"}, {}]}, "has the answer None, expected text"),
        ("trec", {"label": 6}, "has the label 6, expected 0 to 5"),
        ("piqa", {"sol2": "Use a match."}, "has one text as sol1 and sol2"),
        ("aqua", {"correct": "F"}, "has 'F' as correct, expected the letter of one of its options"),
        ("aqua", {"options": ["A)1", "A)2"]}, "has 'B' as correct, expected the letter of one of its options"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^task\.data: line 1 of .*data\.jsonl {said}") as refused:
        pose(tmp_path, name, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["copa", "record", "piqa", "aqua"])
def test_answers_that_are_in_the_rows_are_not_given_in_the_recipe(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"task\.candidates is given, but task\.name is {name}, which finds them in"):
        examples(tmp_path, name, ROWS[name], candidates=(" a", " b"))


@pytest.mark.parametrize("name", ["sentiment", "rte"])
@pytest.mark.parametrize("candidates", [("Yes", " "), ("Yes", "Yes")])
def test_own_candidates_that_are_empty_or_the_same_are_refused(
    tmp_path: Path, name: str, candidates: tuple[str, ...]
) -> None:
    row = {"text": "a film", "label": 0} if name == "sentiment" else ROWS[name]
    with pytest.raises(RecipeError, match=r"task\.candidates: found \['Yes', .*expected texts that differ"):
        examples(tmp_path, name, row, candidates=candidates)


def test_template_and_candidates_can_be_ones_own(tmp_path: Path) -> None:
    own = {"template": " {question}|{passage}", "candidates": (" no", " yes")}
    (example,) = examples(tmp_path, "boolq", ROWS["boolq"], **own)
    assert example == Example(" Does the lamp burn oil?|Lamp -- It burns gas.", (" no", " yes"), 0)
    (example,) = examples(tmp_path, "copa", ROWS["copa"], template="{conjunction}: {premise}")
    assert example.prompt == "because: The lamp went out"


def test_rows_of_one_prompt_are_different_questions_where_their_answers_or_places_are(tmp_path: Path) -> None:
    other = {"query": "@placeholder keeps it", "answers": ["Orla"]}
    assert len(examples(tmp_path, "record", ROWS["record"], ROWS["record"] | other, ROWS["record"])) == 2
    place = {"span2_index": 5, "label": 0}
    assert [one.label for one in examples(tmp_path, "wsc", ROWS["wsc"], ROWS["wsc"] | place, ROWS["wsc"])] == [1, 0]
    with pytest.raises(RecipeError, match="line 1 of .* and line 2 of .* ask the same, but the labels 1 and 0"):
        examples(tmp_path, "wsc", ROWS["wsc"], ROWS["wsc"] | {"label": 0})
    with pytest.raises(RecipeError, match="ask the same, but the labels 1 and 0"):
        examples(tmp_path, "record", ROWS["record"], ROWS["record"] | {"answers": ["Brem"]})


def test_any_of_several_right_candidates_counts_and_the_first_is_learned(tmp_path: Path) -> None:
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    kind = Candidates(tokenizer, TaskSection(name="record", data="d"))
    names = {"entities": ["Brem", "Orla", "Lenn"], "answers": ["Lenn", "Brem"]}
    example = pose(tmp_path, "record", passage="It is.", **names)
    assert (example.label, example.also) == (2, (0,))
    assert example.as_dict()["also"] == [" 'Brem burns oil', says Brem"]
    row = kind.encode(example)
    assert repr(row) != repr(replace(row, also=()))
    batch = kind.collate([row] * 3)
    found = kind.predict(material.build("opt"), batch)
    answers = [type(one)(number, one.loss) for number, one in enumerate(found)]
    assert kind.score(answers, [row] * 3).metrics["accuracy"].total == 2
    assert kind.collate([row], "language_modeling")["input_ids"].shape[:2] == (1, 1)
    assert batch["label"].tolist() == [2, 2, 2]


@torch.no_grad()
def test_thirty_sentences_after_one_passage_are_scored_from_their_first_token_to_their_last(tmp_path: Path) -> None:
    tokenizer, model = material.tokenizer(), material.build("opt")
    tokenizer.pad_token_id = 0
    kind = Candidates(tokenizer, TaskSection(name="record", data="d"))
    names = [f"{first}{second}" for first in ("Orla", "Brem", "Tusk") for second in "abcdefghij"]
    many = pose(tmp_path, "record", passage="It is.", query="@placeholder is it", entities=names, answers=names[:1])
    few = pose(tmp_path, "record", passage="It is.", query="so @placeholder is", entities=names[:2], answers=names[1:2])
    scores = candidate_scores(model, kind.collate([kind.encode(many), kind.encode(few)]))
    assert scores.shape == (2, 30)
    assert torch.isinf(scores[1, 2:]).all()
    for row, example in enumerate((many, few)):
        start = len(tokenizer(example.prompt)["input_ids"])
        for number, candidate in enumerate(example.candidates):
            whole = torch.tensor([tokenizer(example.prompt + candidate)["input_ids"]])
            logs = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
            expected = logs.gather(1, whole[0, 1:, None])[start - 1 :].mean()
            assert scores[row, number].item() == pytest.approx(expected.item(), abs=1e-4)


def test_every_task_says_what_it_is_and_its_metric_is_the_main_one_of_its_kind() -> None:
    tokenizer, reader = material.chat_tokenizer(), ImageReader(None, ("cat", "dog"), 3)
    for name, task in tasks.known().items():
        assert isinstance(task.kind, NamedKind)
        kind = task.kind(reader if task.kind.reads_images else tokenizer, TaskSection(name=name, data="d"))
        assert kind.score([], []).main == task.kind.metric
        assert task.about
        assert task.columns


@pytest.mark.parametrize(("name", "changes", "prompt", "answers", "gold"), CLOZES)
def test_a_masked_model_is_asked_as_mezo_s_authors_ask_it(
    tmp_path: Path, name: str, changes: dict[str, Any], prompt: str, answers: list[str], gold: str
) -> None:
    row = {"text": " a film ", "label": 1} if name == "sentiment" else ROWS[name]
    section = tasks.posed_to(TaskSection(name=name, data="d"), masked=True)
    (example,) = examples(tmp_path, name, row | changes, template=section.template)
    assert isinstance(example, Cloze)
    assert example.as_dict() == {"prompt": prompt, "candidates": answers, "gold": gold}
    assert "{mask}".join(example.around()) == prompt
    (line,) = re.findall(rf"^cloze {name} +(.*)$", PAGE, re.MULTILINE)
    assert line == section.template
    (own,) = examples(tmp_path, name, row | changes, template="{mask} " + str(section.template).replace("{mask}", "x"))
    assert own.around()[0] == ""
    assert own.candidates == example.candidates


def test_a_cloze_can_be_one_s_own_where_all_rows_have_the_same_answers(tmp_path: Path) -> None:
    own = {"template": "{word!r:>6}: {mask}? {sentence1}", "candidates": (" no", " yes")}
    (example,) = examples(tmp_path, "wic", ROWS["wic"], **own)
    assert (example.before, example.after) == (
        (("'lamp'", True), (": ", False)),
        (("? ", False), ("A lamp of oil.", True)),
    )
    assert example.as_dict()["gold"] == " no"
    fields = {"template": "{mask} {text}", "candidates": (" sad", " glad"), "label_column": "mood"}
    (example,) = examples(tmp_path, "choice", {"text": "a film", "mood": "glad"}, **fields)
    assert (example.prompt, example.label) == ("{mask} a film", 1)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text} {mask} {mask}", "has 2 masks and 1 columns, expected one {mask} and a column in braces"),
        ("It was {mask}.", "has 1 masks and 0 columns, expected one {mask} and a column in braces"),
        ("{texts} It was {mask}", r"has no column 'texts' \(did you mean 'text'\?\)"),
    ],
)
def test_a_cloze_that_is_none_is_refused_in_one_line(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        examples(tmp_path, "trec", ROWS["trec"], template=template)
    assert "\n" not in str(refused.value)


PAGE = (ROOT / "docs" / "reference" / "tasks.md").read_text()


@pytest.mark.parametrize(("name", "row", "prompt"), [case[:3] for case in GOLDEN])
def test_the_prompt_on_the_page_is_the_one_that_is_asked(
    tmp_path: Path, name: str, row: dict[str, Any], prompt: str
) -> None:
    (template,) = re.findall(rf"^{name} +(.*)$", PAGE, re.MULTILINE)
    (example,) = examples(tmp_path, name, row, template=template.replace("\\n", "\n"))
    assert example.prompt == prompt


@pytest.mark.parametrize("name", tasks.known())
def test_the_columns_and_candidates_on_the_page_are_those_of_the_task(name: str) -> None:
    line, *_ = re.findall(rf"^\| `{name}` \|(.*)$", PAGE, re.MULTILINE)  # tables of figures come after
    columns, candidates, *_ = line.split(" | ")
    named = [name for words in tasks.known()[name].columns for name in words.rstrip(")").split(" (or ")]
    assert sorted(re.findall(r"`(.*?)`", columns)) == sorted(named)
    fixed = [case[3] for case in GOLDEN if case[0] == name and "`" in candidates]
    assert all(re.findall(r"`(.*?)`", candidates) == answers for answers in fixed)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("sst2", "candidates"),
        ("copa", "language_modeling"),
        ("record", "language_modeling"),
        ("drop", "language_modeling"),
    ],
)
def test_where_every_row_has_its_own_candidates_the_right_one_is_learned_unless_the_recipe_says_otherwise(
    make_recipe: Callable[..., Recipe], name: str, objective: str
) -> None:
    recipe = make_recipe(f"task.name={name}")
    kind = tasks.kind_of(recipe.task, material.tokenizer())
    assert tasks.objective_of(recipe, kind) == objective
    other = next(other for other in kind.objectives if other != objective)
    assert tasks.objective_of(make_recipe(f"task.name={name}", f"objective={other}"), kind) == other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": "@placeholder is it" * 80}, r"tokens, expected between 1 and task\.max_length \(256\) - 2"),
        (
            {"entities": ["Brem", "Brem"] + [f"Orla {n}" for n in range(40)], "query": "@placeholder is" * 70},
            "tokens, ",
        ),
    ],
)
def test_many_long_candidates_that_do_not_fit_are_named_in_a_line_that_can_be_read(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    kind = Candidates(material.tokenizer(), TaskSection(name="record", data="d"))
    with pytest.raises(RecipeError, match=said) as refused:
        kind.encode(pose(tmp_path, "record", **changes | {"answers": ["Brem"]}))
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize("name", ["snli", "mnli"])
@pytest.mark.parametrize("label", [-1, "-1"])
def test_rows_without_a_label_that_people_agree_on_are_left_out(tmp_path: Path, name: str, label: object) -> None:
    without = ROWS[name] | {"hypothesis": "It rains.", "label": label}
    assert len(examples(tmp_path, name, without, ROWS[name])) == 1
