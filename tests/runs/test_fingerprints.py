"""A run goes on with the configuration and the tokenizer that it was begun with, or not at all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer

from mezo_scale.errors import TrajectoryError
from mezo_scale.models.fingerprints import of_config, of_tokenizer
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs.session import train
from mezo_scale.trajectory import Trajectory

MakeRecipe = Callable[..., Recipe]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def norm(folder: Path) -> None:
    edit(folder / "config.json", lambda tree: tree.update(rms_norm_eps=1e-2))


def rope(folder: Path) -> None:
    edit(folder / "config.json", lambda tree: tree["rope_parameters"].update(rope_theta=5.0))


def chat(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def added(folder: Path) -> None:
    """A token that no sentence of the data needs: the data's tokens stay as they are."""
    edit(folder / "tokenizer.json", lambda tree: tree["added_tokens"].append(_token(len(tree["model"]["vocab"]))))


def _token(number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": "<never>", "special": True, **flags}


def shuffled(folder: Path) -> None:
    def swap(tree: dict[str, Any]) -> None:
        vocabulary = tree["model"]["vocab"]
        for one in range(60, 200, 2):
            first, second = sorted(vocabulary, key=vocabulary.get)[one : one + 2]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(folder / "tokenizer.json", swap)


CHANGES = {
    norm: ["config"],
    rope: ["config"],
    chat: ["tokenizer"],
    added: ["tokenizer"],
    shuffled: ["data", "tokenizer"],
}


@pytest.mark.parametrize(("change", "names"), CHANGES.items())
def test_another_config_or_tokenizer_under_the_same_name_is_refused_by_its_name(
    make_recipe: MakeRecipe, tmp_path: Path, change: Callable[[Path], None], names: list[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_recipe().model.name, model)
    train(make_recipe("train.steps=1", f"model.name={model}"))
    log = tmp_path / "run" / "trajectory.mezo"
    said = Trajectory.open(log).header.fingerprints
    assert said is not None
    assert sorted(said) == ["config", "data", "tokenizer"]
    before = log.read_bytes()
    change(model)
    with pytest.raises(TrajectoryError) as error:
        train(load(tmp_path / "run", ["train.steps=2"]))
    both = "; ".join(f"{name} has fingerprint {said[name]}, this run's [0-9a-f]{{16}}" for name in names)
    assert re.search(rf"was made with other {' and '.join(names)} \({both}\)", str(error.value))
    assert log.read_bytes() == before


def test_a_config_is_the_same_wherever_it_lies_and_whatever_it_is_stored_in(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    names = {"dtype": "bfloat16", "transformers_version": "4.0.0", "_name_or_path": "elsewhere"}
    edit(tmp_path / "model" / "config.json", lambda tree: tree.update(names))
    one, other = (of_config(AutoConfig.from_pretrained(folder)) for folder in (model_folder, tmp_path / "model"))
    assert one == other


def test_a_tokenizer_is_the_same_after_use(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    before = of_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    again = AutoTokenizer.from_pretrained(model_folder)
    again(["a", "a film"], truncation=True, max_length=2)
    assert of_tokenizer(again) == before
    assert of_tokenizer(ByT5Tokenizer()) == of_tokenizer(ByT5Tokenizer()) != of_tokenizer(ByT5Tokenizer(extra_ids=7))
