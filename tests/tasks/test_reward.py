"""Objectives of one's own by their name, and the accuracy of what is chosen: scores of texts, no gradient."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mezo_scale as ms
from mezo_scale import tasks
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection, parse
from mezo_scale.tasks import Example, Question
from mezo_scale.tasks.kinds.candidates import Candidates, Choice, accuracy_loss, candidate_scores
from mezo_scale.tasks.kinds.generation import Generation
from mezo_scale.tasks.reward import Reward
from tests.support import material

ASKED = [("the plot is", ("dull", "a bore")), ("its cast is", ("superb",))]
SOURCE = """
import json

calls = []

def brevity(rows):
    calls.append(json.loads(json.dumps(rows)))
    rows[0].clear()
    return [-len(row.get("text", "")) for row in rows]

def first(rows): return [1.0]
def none(rows): return None
def words(rows): return ["good" for row in rows]
def nan(rows): return [1.0, float("nan")][:len(rows)]
def broken(rows):
    return [helper(row) for row in rows]

def helper(row):
    raise KeyError("gold\\nen")

def elsewhere(rows): return json.loads("{")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with rewards.py in it."""
    (tmp_path / "rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("rewards", "bad", "needy"):
            del sys.modules[name]


def writing(**fields: Any) -> Generation:
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    return Generation(tokenizer, TaskSection(name="squad", data="d", max_length=64, max_new_tokens=3, **fields))


def choosing(**fields: Any) -> Candidates:
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    return Candidates(tokenizer, TaskSection(data="d", max_length=64, **fields))


def test_a_function_of_the_current_directory_is_given_rows_and_gives_scores(here: Path) -> None:
    reward = Reward.load("rewards:brevity")
    assert reward.of(["four", None, "six six"], [*ASKED, ASKED[0]]) == pytest.approx([0, math.nan, -7], nan_ok=True)
    assert sys.modules["rewards"].calls == [
        [
            {"prompt": "the plot is", "text": "four", "gold": ["dull", "a bore"]},
            {"prompt": "the plot is", "text": "six six", "gold": ["dull", "a bore"]},
        ]
    ]
    assert reward.of([], []) == []
    assert len(sys.modules["rewards"].calls) == 1


def test_the_digest_is_of_the_source(here: Path) -> None:
    one = Reward.load("rewards:brevity").digest
    assert Reward.load("rewards:first").digest == one
    (here / "rewards.py").write_text(f"{SOURCE}\n# another\n")
    assert Reward.load("rewards:brevity").digest != one


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rewards:first", "rewards:first returned 1 scores for 2 rows: expected one each"),
        ("rewards:none", "rewards:none returned None, expected a list of 2 numbers"),
        ("rewards:words", "rewards:words returned ['good', 'good'], expected a list of 2 numbers"),
        ("rewards:nan", "rewards:nan gave nan for row 2 of 2, text 'so' after 'its cast is': expected a finite number"),
        ("rewards:broken", "rewards:broken raised KeyError: 'gold\\nen' ({here}/rewards.py:19)"),
        ("rewards:elsewhere", "(char 1) ({here}/rewards.py:21)"),
    ],
)
def test_a_function_that_gives_no_score_for_each_row_is_told_of_in_one_line(here: Path, name: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        Reward.load(name).of(["dull", "so"], ASKED)
    assert said.replace("{here}", str(here)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reward:brevity", "there is no module 'reward' for reward:brevity, expected a Python file in {here} or an"),
        ("rewards:brevty", "there is no function 'brevty' in rewards ({here}/rewards.py), which has brevity, broken,"),
        ("rewards:calls", "there is no function 'calls' in rewards"),
        ("rewards:", "found 'rewards:', expected module:function, as in rewards:brevity"),
        ("a/b.py:f", "found 'a/b.py:f', expected module:function"),
        ("bad:f", "bad:f can't be imported: SyntaxError: "),
        ("bad:f", "({here}/bad.py:1)"),
        ("needy:f", "needy:f can't be imported: it needs 'surely_not_there'"),
    ],
)
def test_a_name_that_names_no_function_is_refused_in_one_line(here: Path, name: str, said: str) -> None:
    (here / "bad.py").write_text("def f(:\n")
    (here / "needy.py").write_text("import surely_not_there\n")
    with pytest.raises(RecipeError) as error:
        Reward.load(name)
    assert said.replace("{here}", str(here)) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_kind_of_the_recipe_learns_of_its_reward(here: Path) -> None:
    recipe = parse({"model": {"name": "m"}, "task": {"data": "d"}, "train": {"objective": "rewards:brevity"}})
    kind = choosing()
    assert tasks.objective_of(recipe, kind) == "rewards:brevity"
    assert "rewards:brevity" in kind.objectives
    assert kind.score([], []).main == "reward"
    assert "rewards:brevity" not in choosing().objectives


def test_a_kind_without_texts_refuses_a_reward(here: Path) -> None:
    class Plain(tasks.Kind[Any, Any]):
        objectives = {"loss": lambda model, batch: batch}  # noqa: RUF012

    recipe = parse({"model": {"name": "m"}, "task": {"data": "d"}, "train": {"objective": "rewards:brevity"}})
    with pytest.raises(RecipeError, match="gives no texts that a function could score; expected loss"):
        tasks.objective_of(recipe, Plain())  # type: ignore[abstract]


@torch.no_grad()
def test_what_is_minimised_is_minus_the_score_of_what_is_written_and_it_is_a_metric(here: Path) -> None:
    kind, model = writing(), material.build("llama")
    kind.learn_from(Reward.load("rewards:brevity"))
    rows = [kind.encode(Question(prompt, (" x",))) for prompt in ("the plot is", "its cast")]
    batch = kind.collate(rows, "rewards:brevity")
    texts = kind.predict(model, batch)
    scores = [0.0, -float(len(str(texts[1])))]
    assert kind.objectives["rewards:brevity"](model, batch).tolist() == [-score for score in scores]
    score = kind.score(texts, rows)
    assert score.main == "reward"
    assert score.metrics["reward"].value == sum(scores) / 2
    assert {"f1", "exact_match"} < score.metrics.keys()
    assert sys.modules["rewards"].calls[0][1] == {"prompt": "its cast", "text": texts[1], "gold": ["x"]}


@torch.no_grad()
def test_a_reward_is_given_the_text_of_the_candidate_that_is_chosen(here: Path) -> None:
    kind, model = choosing(metric="accuracy"), material.build("llama")
    kind.learn_from(Reward.load("rewards:brevity"))
    rows = [kind.encode(Example(prompt, (" terrible", " great"), 1)) for prompt in ("the plot is", "its cast")]
    batch = kind.collate(rows, "rewards:brevity")
    chosen = [("terrible", "great")[int(n)] for n in candidate_scores(model, batch).argmax(1)]
    assert kind.objectives["rewards:brevity"](model, batch).tolist() == [0, len(chosen[1])]
    assert sys.modules["rewards"].calls[0][1] == {"prompt": "its cast", "text": chosen[1], "gold": ["great"]}
    assert kind.score(kind.predict(model, batch), rows).main == "accuracy"


@torch.no_grad()
def test_the_accuracy_objective_is_1_where_a_wrong_candidate_is_chosen() -> None:
    kind, model = choosing(), material.build("llama")
    answers = (" terrible", " great", " moving")
    examples = [Example(f"{thing} is", answers, 0) for thing in material.THINGS]
    best = candidate_scores(model, kind.collate([kind.encode(example) for example in examples])).argmax(1).tolist()
    rows = [
        kind.encode(Example(e.prompt, answers, (n + shift) % 3, also))
        for e, n, shift, also in zip(examples, best, [0, 1, 2, 1] * 2, [(), (), (), tuple(best[3:4])] * 2, strict=True)
    ]
    losses = kind.objectives["accuracy"](model, kind.collate(rows, "accuracy"))
    assert losses.dtype == torch.float32
    expected = [float(not row.is_right(n)) for row, n in zip(rows, best, strict=True)]
    assert losses.tolist() == expected
    assert set(expected) == {0.0, 1.0}


@torch.no_grad()
def test_scores_that_are_not_finite_have_no_accuracy() -> None:
    kind, model = choosing(), material.build("llama-untied")
    rows = [kind.encode(Example(text, (" terrible", " great"), 0)) for text in ("the plot is", "a remake is")]
    lone = (set(rows[1].prompt) - set(rows[0].prompt)).pop()
    model.get_input_embeddings().weight[lone] = float("nan")
    first, second = accuracy_loss(model, kind.collate(rows)).tolist()
    assert first in (0.0, 1.0)
    assert math.isnan(second)


@pytest.mark.parametrize(
    ("objective", "make"), [("accuracy", choosing), ("rewards:brevity", choosing), ("rewards:brevity", writing)]
)
def test_a_step_evaluates_both_branches_in_one_batch(here: Path, objective: str, make: Callable[[], Any]) -> None:
    kind, model = make(), material.build("llama")
    kind.learn_from(Reward.load("rewards:brevity"))
    one: Any = (
        Question("the plot is", (" x",)) if make is writing else Example("the plot is", (" terrible", " great"), 0)
    )
    batch = kind.collate([kind.encode(one)] * 3, objective)
    optimizer = ms.MeZO(model, eps=1e-3)
    optimizer.step(batch=batch, objective=kind.objectives[objective])
    assert optimizer.paired
    optimizer.step(batch=batch, objective=kind.objectives[objective], micro_batch=2)
    if objective != "accuracy":
        assert {len(rows) for rows in sys.modules["rewards"].calls} == {6, 4, 2}


@pytest.mark.parametrize(
    ("metric", "value", "majority"),
    # By hand: of the classes 0, 1, 2 are right 1, 2, 0; found 2, 3, 0; there 3, 2, 1. The majority says 0 six times.
    [
        ("macro_f1", (2 / 5 + 4 / 5 + 0) / 3, (6 / 9 + 0 + 0) / 3),
        ("balanced_accuracy", (1 / 3 + 1 + 0) / 3, (1 + 0 + 0) / 3),
    ],
)
def test_a_metric_over_classes_is_the_mean_of_theirs(metric: str, value: float, majority: float) -> None:
    answers = (" a", " b", " c")
    kind = choosing(metric=metric, candidates=answers)
    rows = [kind.encode(Example(f"t{n}", answers, label)) for n, label in enumerate([0, 0, 0, 1, 1, 2])]
    found = [Choice(label, 1.0) for label in (0, 1, 2, 1, 1, 0)]
    found[2] = Choice(2, math.nan)  # none could be chosen
    score = kind.score(found, rows)
    assert (score.main, score.count, score.not_finite) == (metric, 6, 1)
    assert score.as_dict()[metric] == pytest.approx(value)
    parts = [kind.score(found[:2], rows[:2]), kind.score([], []), kind.score(found[2:], rows[2:])]
    assert (parts[0] + parts[1] + parts[2]).metrics[metric] == score.metrics[metric]
    assert score.over_ranks().metrics[metric] == score.metrics[metric]
    assert kind.score([], []).metrics[metric].value is None
    assert kind.baselines(rows, rows)["majority"].metrics[metric].value == pytest.approx(majority)
