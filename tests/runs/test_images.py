"""Image classifiers: trained, evaluated, gone on with, verified and saved as language models are; what they can not."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mezo_scale import tasks
from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError, RecipeError
from mezo_scale.models import heads
from mezo_scale.models.units import units
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs import session
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.first_recipe import first_recipe
from mezo_scale.runs.generate import generate
from mezo_scale.runs.publish import merge
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.trajectory import Trajectory
from tests.runs.test_session import metrics, same, weights
from tests.support import pictures
from tests.support.pool import Ranks

Make = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The recipe of a tiny ViT on images of three colours, with overrides."""
    model, data = pictures.write_model(tmp_path / "vit"), pictures.write_data(tmp_path / "data")
    path = tmp_path / "colours.yaml"
    tree = {
        "model": {"name": str(model)},
        "task": {"name": "cifar10", "data": str(data)},
        "train": {"steps": 4, "batch_size": 6, "eval_every": 2},
        "optimizer": {"lr": 1e-2},
        "output": {"dir": str(tmp_path / "run")},
    }

    def made(*overrides: str, **sections: Any) -> Recipe:
        path.write_text(yaml.safe_dump(tree | sections))
        return load(path, overrides)

    return made


def test_a_run_leaves_a_classifier_with_its_processor(make: Make) -> None:
    recipe = make()
    train(recipe)
    results = json.loads((recipe.directory / "evaluation.json").read_text())
    assert results.keys() == {"zero_shot", "majority", "tuned", "ended", "best"}
    assert (results["tuned"]["main"], results["tuned"]["count"]) == ("accuracy", 24)
    folder = recipe.directory / "checkpoint"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(pictures.NAMES))
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").to_dict() == (
        AutoImageProcessor.from_pretrained(recipe.model.name, backend="pil").to_dict()
    )
    assert ModelCard.load(folder / "README.md").data.eval_results[0].task_type == "image-classification"
    header = Trajectory.open(recipe.directory / "trajectory.mezo").header
    assert set(header.fingerprints) == {"data", "config", "image processor"}
    assert any("bit for bit what 4 replayed steps give" in line for line in verify(load(recipe.directory)))
    found, steps = evaluate_recipe(load(recipe.directory), "test", None)
    assert (steps, found.metrics["accuracy"].value) == (4, results["tuned"]["accuracy"])
    saved, _ = evaluate_recipe(
        make("method.name=zero_shot", model={"name": str(folder)}, train={}, optimizer={}), "test", 0
    )
    assert saved.metrics["loss"].value == pytest.approx(results["tuned"]["loss"], rel=1e-5)


def test_a_run_in_two_sessions_is_the_run_in_one(make: Make, tmp_path: Path) -> None:
    train(make("snapshot_every=2", "steps=2"))
    train(make("snapshot_every=2"))
    train(make(f"output.dir={tmp_path / 'whole'}"))
    assert same(weights(tmp_path / "run" / "checkpoint"), weights(tmp_path / "whole" / "checkpoint"))
    processor = Path(make().model.name) / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("0.5", "0.4"))
    with pytest.raises(MezoError, match="image processor"):
        train(make("steps=6"))


@pytest.mark.parametrize("overrides", [(), ("method.name=adamw", "lr=1e-3")])
def test_it_learns(make: Make, overrides: tuple[str, ...]) -> None:
    recipe = make("steps=60", "batch_size=24", "lr=3e-3", "eval_every=0", "output.checkpoint=false", *overrides)
    train(recipe)
    losses = [line["loss"] for line in metrics(recipe.directory) if "loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective=accuracy",),
        ("train.balance=labels",),
        ("task.metric=balanced_accuracy",),
        ("micro_batch=2",),
        ("tune.what=lora", "tune.target_modules=[all-linear]"),
        ("tune.what=names", "tune.names=['classifier.*']"),
        ("optimizer.distribution=low_rank",),
        ("model.dtype=bfloat16", "optimizer.rounding=stochastic"),
        ("model.compute_dtype=bfloat16",),
    ],
)
def test_what_a_recipe_can_say_of_other_models_it_can_say_of_these(make: Make, overrides: tuple[str, ...]) -> None:
    recipe = make("steps=2", *overrides)
    train(recipe)
    lines = [line for line in metrics(recipe.directory) if "loss" in line]
    assert all(line["loss"] is not None and not line["skipped"] for line in lines)
    assert any(line["projected_grads"] != [0.0] for line in lines) or "objective=accuracy" in overrides
    assert any("bit for bit" in line for line in verify(load(recipe.directory)))


def test_a_rehearsal_counts_images(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(), dry_run=True)
    shown = capsys.readouterr().out
    assert "train: 48 images\ndev: 12 images\ntest: 24 images\n" in shown
    assert "a forward pass of 6 images takes" in shown
    assert "tokens" not in shown


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("task.name=sentiment",),
            "model.name is an image classifier, but task.name is sentiment, which is for a lang",
        ),
        (("task.name=wikitext",), "model.name is an image classifier, but task.name is wikitext"),
        (("tune.what=prefix",), "tune.what is prefix, but .* is an image classifier"),
        (("tune.what=head",), "tune.what is head, but this model has no output embedding: set tune.what to names"),
        (("train.objective=candidates",), "train.objective: found 'candidates' for task.name=cifar10"),
        (("train.objective=mine:reward",), "train.objective: "),
        (("task.k_per_class=9",), "k_per_class is 9, which takes 9 rows of each class, but '0' has 4 of 12 outside"),
    ],
)
def test_what_an_image_model_can_not_do_is_one_line_before_anything_is_written(
    make: Make, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(MezoError, match=said) as refused:
        train(make(*overrides))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_few_images_of_each_class_are_enough(make: Make) -> None:
    found = tasks.load(make("task.k_per_class=3").task)
    for part in (found.train, found.dev):
        assert Counter(image.label for image in part) == {0: 3, 1: 3, 2: 3}
    assert found.test == tasks.load(make().task).test


def test_images_that_all_show_one_thing_are_refused(make: Make, tmp_path: Path) -> None:
    alike = pictures.write_rows(tmp_path / "alike.jsonl", *(pictures.row(number, label=1) for number in range(30)))
    with pytest.raises(
        RecipeError, match="task.data: all 30 examples for training have the label of '1', expected sev"
    ):
        tasks.load(make(f"task.data={alike}", "task.train=10", "task.dev=10", "task.test=10").task)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("icl", "are no prompts that can follow one another"),
        ("linear_probe", "do not all choose among the same answers"),
    ],
)
def test_methods_for_texts_are_refused(make: Make, method: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        train(make(f"method.name={method}", train={}, optimizer={}))


def test_commands_for_texts_are_refused(make: Make, tmp_path: Path) -> None:
    recipe = make()
    with pytest.raises(MezoError, match="is a ViTForImageClassification, which can't write text"):
        generate(recipe.model.name, ["a"], 1, 0.0, 0, None)
    with pytest.raises(RecipeError, match="is an image classifier, and init writes recipes for language models"):
        first_recipe(recipe.model.name, recipe.task.data)


def test_an_adapter_of_a_classifier_is_not_merged(make: Make, tmp_path: Path) -> None:
    recipe = make("steps=1", "eval_every=0", "tune.what=lora", "tune.target_modules=[all-linear]")
    train(recipe)
    with pytest.raises(MezoError, match="merge adds adapters to language models; it is a vit model") as refused:
        merge(recipe.directory, tmp_path / "merged", None)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "merged").exists()


def test_the_class_of_an_image_is_shown(make: Make, run: Run, model_folder: Path, reviews_file: Path) -> None:
    recipe = make()
    arguments = ("tasks", "show", "cifar10", "--data", recipe.task.data, "-n", "1", "--model", recipe.model.name)
    code, out, _ = run(*arguments)
    assert (code, "line 1 of " in out, "  * '0'\n" in out, "tokens" in out) == (0, True, True, False)
    code, _, err = run("tasks", "show", "cifar10", "--data", recipe.task.data, "--model", model_folder)
    assert (code, err.count("\n"), "which is for an image classifier" in err) == (2, 1, True)
    code, _, err = run("tasks", "show", "sentiment", "--data", reviews_file, "--model", recipe.model.name)
    assert (code, err.count("\n"), "which is for a language model" in err) == (2, 1, True)


def test_a_language_model_is_shown_no_images(make: Make, model_folder: Path) -> None:
    with pytest.raises(
        RecipeError, match="model.name is a language model, but task.name is cifar10, which is for an im"
    ):
        train(make(model={"name": str(model_folder)}))


def test_the_layers_are_units() -> None:
    assert [(unit.kind, unit.name) for unit in units(pictures.build())] == [
        ("root", ""),
        ("layer", "vit.layers.0"),
        ("layer", "vit.layers.1"),
    ]
    assert heads.is_image(pictures.config())
    assert heads.called(pictures.config()) == "an image classifier"


def go(recipe: str, overrides: list[str]) -> list[float]:
    """A session on the ranks of this world; the losses of its steps as rank 0 wrote them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, size, size, torch.device("cpu"))
    asked, kind = session.prepare(load(recipe, overrides))
    splits = session.EncodedSplits.read(asked, kind)
    session.Trainer(asked, world, session.RunDirectory(asked.directory), kind, splits).go(0)
    dist.barrier()
    return [line["loss"] for line in metrics(asked.directory) if "loss" in line]


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("zero3", 2)])
def test_every_strategy_goes_the_way_of_one_process(
    ranks: Ranks, make: Make, tmp_path: Path, strategy: str, size: int
) -> None:
    recipe = make(f"output.dir={tmp_path / 'one'}")
    train(recipe)
    alone = [line["loss"] for line in metrics(recipe.directory) if "loss" in line]
    out = tmp_path / "many"
    options = [f"output.dir={out}", f"strategy={strategy}", "train.snapshot_every=2"]
    for losses in ranks(size, go, recipe=str(tmp_path / "colours.yaml"), overrides=options):
        assert losses == pytest.approx(alone, abs=1e-4)
    one, many = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (recipe.directory, out))
    assert one.keys() == many.keys()
    assert all(torch.allclose(one[name], many[name], atol=1e-3) for name in one)
    assert (out / "checkpoint" / "preprocessor_config.json").is_file()
    assert all("bit for bit" in line for line in list(verify(load(out)))[2:])
