"""Runs on data of one's own, and towards an objective of one's own."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from mezo_scale.distributed.preflight import RankInfo
from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError, RecipeError, SharedError
from mezo_scale.recipe import Recipe, TaskSection
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.runs.splits import check_same_reward
from mezo_scale.tasks.kinds.candidates import Candidates
from mezo_scale.tasks.reward import Reward
from tests.support import material
from tests.support.pool import Ranks

MakeRecipe = Callable[..., Recipe]
CHOICE = ("task.name=choice", 'task.template="{text} It was"', 'candidates=[" terrible", " great"]')
REWARD = "def praise(rows):\n    return [float(row['text'] in row['gold']) for row in rows]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with scores.py in it."""
    (tmp_path / "scores.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("scores", None)


def again(here: Path, source: str) -> None:
    """The next session finds another scores.py."""
    (here / "scores.py").write_text(source)
    sys.modules.pop("scores", None)


def results(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.directory / "evaluation.json").read_text())
    return found


def steps(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.directory / "metrics.jsonl").open()]


def test_a_csv_with_words_as_labels_is_tuned_on_by_lines_of_a_recipe(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "mood"), *((text, ("sad", "glad")[n]) for text, n in material.reviews())])
    own = ("label_column=mood", "labels=[sad, glad]", "metric=macro_f1", "k_per_class=8")
    recipe = make_recipe(f"task.data={tmp_path / 'mine.csv'}", *CHOICE, *own)
    train(recipe)
    shown = capsys.readouterr().out
    found = results(recipe)
    best = found.pop("best")
    assert (best["metric"], best["step"] in (2, 4), found.pop("ended")) == ("macro_f1", True, {"step": 4})
    assert found.keys() == {"zero_shot", "majority", "tuned"}
    assert {entry["main"] for entry in found.values()} == {"macro_f1"}
    assert 0 < found["majority"]["macro_f1"] < found["majority"]["accuracy"]
    assert "zero-shot macro_f1 on test: " in shown
    assert (
        "| test split | macro f1 | 95% interval | accuracy | 95% interval | examples |"
        in (recipe.directory / "report.md").read_text()
    )
    assert [line["step"] for line in steps(recipe) if "dev_macro_f1" in line] == [2, 4]
    assert evaluate_recipe(recipe, "dev", None)[0].count == 16


def write_chats(path: Path) -> Path:
    with path.open("w") as file:
        for text, label in material.reviews():
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ("terrible", "great")[label]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def test_chats_are_tuned_on_and_without_a_template_nothing_is_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    own = ["task.name=chat", f"task.data={write_chats(tmp_path / 'chats.jsonl')}", "max_new_tokens=4", "max_length=96"]
    with pytest.raises(MezoError, match="its tokenizer has no chat template, which task.name=chat is posed by"):
        train(make_recipe(*own))
    assert not make_recipe().directory.exists()
    material.write_model("llama", tmp_path / "model")
    material.chat_tokenizer().save_pretrained(tmp_path / "model")
    recipe = make_recipe(
        *own, f"model.name={tmp_path / 'model'}", "steps=40", "batch_size=12", "lr=2e-3", "eval_every=0"
    )
    train(recipe)
    losses = [line["loss"] for line in steps(recipe)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert results(recipe)["tuned"]["main"] == "f1"


def test_a_masked_language_model_is_not_asked_to_write_ones_own_answers(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("bert", vocab_size=material.VOCABULARY + 1, max_position_embeddings=128, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    material.tokenizer().save_pretrained(tmp_path / "bert")
    own = ("task.name=answer", 'task.template="{text}\\nLabel:"', "answer_column=label", "max_length=96")
    recipe = make_recipe(*own, f"model.name={tmp_path / 'bert'}")
    with pytest.raises(SharedError, match="bert reads the tokens after a position, as masked language models do"):
        train(recipe)
    assert not recipe.directory.exists()


def test_accuracy_itself_is_an_objective(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("objective=accuracy", "batch_size=8", "num_directions=2", "lr=1e-4")
    train(recipe)
    losses = [line["loss"] for line in steps(recipe) if "loss" in line]
    assert all((loss * 32).is_integer() and 0 <= loss <= 1 for loss in losses)  # 8 rows in 4 branches


def test_a_function_is_what_a_run_learns_from_and_it_is_reported(
    make_recipe: MakeRecipe, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(*CHOICE, "objective=scores:praise")
    train(recipe)
    found = results(recipe)
    best, dev = found.pop("best"), [line["dev_reward"] for line in steps(recipe) if "dev_reward" in line]
    assert (found.pop("ended"), best["metric"], best["value"]) == ({"step": 4}, "reward", max(dev))
    assert {entry["main"] for entry in found.values()} == {"reward"}
    assert all(entry["more_is_better"] and not entry["bounded"] for entry in found.values())
    for entry in found.values():
        assert entry["reward"] == entry["accuracy"]
    assert "zero-shot reward on test: " in capsys.readouterr().out
    assert "| test split | reward |" in (recipe.directory / "report.md").read_text()
    assert all(-1 <= line["loss"] <= 0 for line in steps(recipe) if "loss" in line)
    assert evaluate_recipe(recipe, "test", None)[0].as_dict()["reward"] == found["tuned"]["reward"]


def test_a_run_does_not_go_on_with_another_function(make_recipe: MakeRecipe, here: Path) -> None:
    recipe = make_recipe(*CHOICE, "objective=scores:praise")
    train(recipe)
    log = (recipe.directory / "trajectory.mezo").read_bytes()
    again(here, REWARD + "# of another mind\n")
    with pytest.raises(MezoError, match="objective has fingerprint [0-9a-f]{16}, this run's [0-9a-f]{16}"):
        train(make_recipe(*CHOICE, "objective=scores:praise", "steps=6"))
    assert (recipe.directory / "trajectory.mezo").read_bytes() == log
    again(here, REWARD)
    train(make_recipe(*CHOICE, "objective=scores:praise", "steps=6"))
    assert results(recipe)["tuned"]["step"] == 6


def test_a_function_that_fails_is_found_before_anything_is_written(make_recipe: MakeRecipe, here: Path) -> None:
    again(here, "def praise(rows):\n    return [1 / len(row['gone']) for row in rows]\n")
    recipe = make_recipe(*CHOICE, "objective=scores:praise")
    with pytest.raises(RecipeError, match=r"scores:praise raised KeyError: 'gone' \(.*/scores\.py:2\)$"):
        train(recipe)
    with pytest.raises(RecipeError, match="there is no module 'score' for score:praise"):
        train(make_recipe(*CHOICE, "objective=score:praise"))
    assert not recipe.directory.exists()


def compared(folder: str) -> str | None:
    """What a rank hears if the function of the last one is another."""
    rank, size = dist.get_rank(), dist.get_world_size()
    kind = Candidates(material.tokenizer(), TaskSection(data="d"))
    kind.learn_from(Reward("scores:praise", len, f"{folder}/scores.py", f"{2 * (rank // (size - 1)):016x}"))
    infos = tuple(RankInfo("host", n, "cpu", "", 0.0, "", {}) for n in range(size))
    try:
        check_same_reward(kind, World(rank, rank, size, size, torch.device("cpu"), ranks=infos))
    except SharedError as error:
        return str(error)
    return None


def test_ranks_with_another_function_are_named(ranks: Ranks) -> None:
    said = (
        "train.objective: rank 2 on host found another scores:praise than rank 0 on host: give all nodes the same file"
    )
    assert ranks(3, compared, folder="/") == [said] * 3
