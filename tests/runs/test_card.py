"""A checkpoint says what it is, carries what rebuilds it, and goes to the hub as it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file, save_file

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.runs import card, publish
from mezo_scale.runs.on_dev import OnDev
from mezo_scale.runs.session import train
from tests.runs.test_session import same, weights

MakeRecipe = Callable[..., Recipe]
LORA = ("tune.what=lora", "tune.r=2", "tune.alpha=4")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hub's client, which takes everything."""
    api = mock.create_autospec(HfApi, instance=True)
    api.create_repo.return_value = RepoUrl("https://huggingface.co/somebody/tuned")
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    monkeypatch.setattr(publish, "get_token", lambda: "hf_of_a_test")
    return api


def test_a_checkpoint_has_a_card_and_the_log_that_rebuilds_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("steps=3")
    train(recipe)
    checkpoint = recipe.directory / "checkpoint"
    text = (checkpoint / "README.md").read_text()
    made = ModelCard(text)
    (result,) = made.data.eval_results
    tuned = json.loads((recipe.directory / "evaluation.json").read_text())["tuned"]
    assert (result.metric_type, result.metric_value) == ("accuracy", tuned["accuracy"])
    assert made.data.library_name == "transformers"
    assert "in 3 steps of 6 examples by MeZO" in text
    assert "| tuned, 3 steps |" in text
    assert str(tmp_path) not in text  # where things lie is nobody's business
    assert str(Path(recipe.model.name).parent) not in text
    publish.rebuild(recipe.model.name, checkpoint / "steps.mezo", tmp_path / "rebuilt", None)
    assert same(weights(tmp_path / "rebuilt"), weights(checkpoint))


def test_the_card_of_an_earlier_step_says_how_far_the_log_is_to_be_replayed(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnDev, "best", property(lambda self: (2, 0.5)))
    recipe = make_recipe("steps=4", "eval_every=2", "checkpoint=best")
    train(recipe)
    checkpoint = recipe.directory / "checkpoint"
    assert "--trajectory steps.mezo --until 2 --out tuned" in (checkpoint / "README.md").read_text()
    publish.rebuild(recipe.model.name, checkpoint / "steps.mezo", tmp_path / "rebuilt", 2)
    assert same(weights(tmp_path / "rebuilt"), weights(checkpoint))


def test_an_adapter_is_not_merged_into_other_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("steps=1", *LORA)
    train(recipe)
    base = Path(shutil.copytree(recipe.model.name, tmp_path / "base"))
    (file,) = base.glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match="tuned an adapter of other weights than .*base has"):
        publish.merge(recipe.directory, tmp_path / "other", str(base))
    assert not (tmp_path / "other").exists()


def test_so_has_an_adapter_with_what_it_began_with(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("steps=3", *LORA)
    train(recipe)
    checkpoint = recipe.directory / "checkpoint"
    assert ModelCard.load(checkpoint / "README.md").data.library_name == "peft"
    log, begun = checkpoint / "steps.mezo", checkpoint / "adapter_init"
    publish.rebuild(recipe.model.name, log, tmp_path / "rebuilt", None, begun)
    assert same(*(load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "rebuilt", checkpoint)))


def test_a_baseline_s_has_no_log(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("steps=2", "method.name=adamw")
    train(recipe)
    names = {path.name for path in (recipe.directory / "checkpoint").iterdir()}
    assert "README.md" in names
    assert "steps.mezo" not in names


def test_the_card_names_the_licence_of_the_base(make_recipe: MakeRecipe, model_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    recipe = make_recipe("steps=1", f"model.name={base}")
    train(recipe)
    assert ModelCard.load(recipe.directory / "checkpoint" / "README.md").data.license == "apache-2.0"


def test_push_uploads_the_checkpoint(make_recipe: MakeRecipe, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("steps=1")
    train(recipe)
    monkeypatch.setattr(card, "_licence_of", lambda base: "mit")
    assert publish.push(recipe.directory, "somebody/tuned", private=True) == "https://huggingface.co/somebody/tuned"
    hub.create_repo.assert_called_once_with("somebody/tuned", private=True, exist_ok=True)
    (call,) = hub.upload_folder.call_args_list
    assert call.kwargs["repo_id"] == "somebody/tuned"
    assert call.kwargs["folder_path"] == recipe.directory / "checkpoint"
    found = ModelCard.load(recipe.directory / "checkpoint" / "README.md")
    assert found.data.license == "mit"
    assert "in 1 steps" in found.text
    (recipe.directory / "checkpoint" / "README.md").unlink()  # as of before there were cards
    publish.push(recipe.directory, "somebody/tuned", private=False)
    assert hub.upload_folder.call_count == 2


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_checkpoint_of_before_the_last_steps_is_not_taken_for_theirs(
    make_recipe: MakeRecipe, hub: Any, tmp_path: Path, tune: str
) -> None:
    train(make_recipe("steps=1", f"tune.what={tune}"))
    recipe = make_recipe("steps=2", f"tune.what={tune}", "checkpoint=false")
    train(recipe)
    for publication in (
        lambda: publish.push(recipe.directory, "somebody/tuned", private=True),
        lambda: publish.merge(recipe.directory, tmp_path / "merged", None),
    ):
        with pytest.raises(RecipeError, match="has taken 2 steps, but its checkpoint was made after 1: let the run"):
            publication()
    hub.create_repo.assert_not_called()
    assert not (tmp_path / "merged").exists()


def test_what_can_not_be_pushed_is_one_line(
    make_recipe: MakeRecipe, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="has no checkpoint: expected the directory of a run that has ended"):
        publish.push(tmp_path, "somebody/tuned", private=False)
    recipe = make_recipe("steps=1")
    train(recipe)
    hub.create_repo.side_effect = OSError("no route\nto the hub")
    with pytest.raises(RecipeError, match=r"push: the hub does not take somebody/tuned \(no route to the hub\)"):
        publish.push(recipe.directory, "somebody/tuned", private=False)
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(
        RecipeError, match="there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN"
    ):
        publish.push(recipe.directory, "somebody/tuned", private=False)
    hub.upload_folder.assert_not_called()
