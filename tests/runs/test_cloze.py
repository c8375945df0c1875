"""A recipe that names a masked language model and a task of the suite: asked at the mask, tuned, graded and gone on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, RobertaConfig

from mezo_scale import recipe as recipes
from mezo_scale.errors import MezoError
from mezo_scale.recipe import Recipe, parse
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.publish import merge
from mezo_scale.runs.session import train
from mezo_scale.trajectory import Trajectory
from tests.support import masked, material

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A recipe with other sections besides."""
    folder, rows = masked.write_model("roberta", tmp_path / "model"), masked.write_rows(tmp_path / "rows.jsonl")

    def of(name: str = "run", **sections: Any) -> Recipe:
        task = {"name": "sst2", "data": str(rows), "train": 40, "dev": 8, "test": 16, "max_length": 24}
        tree: dict[str, Any] = {
            "model": {"name": str(folder)},
            "task": task | sections.pop("task", {}),
            "output": {"dir": str(tmp_path / name)},
        }
        return parse(tree | sections)

    return of


STEPS = {"steps": 4, "batch_size": 8, "eval_every": 4, "log_every": 4}


def test_a_masked_model_is_asked_the_task_s_cloze_and_its_run_goes_on(make: Make) -> None:
    optimizer = {"lr": 1e-2, "eps": 1e-2}
    train(make(train=STEPS, optimizer=optimizer))
    recipe = make(train=STEPS | {"steps": 6}, optimizer=optimizer)
    train(recipe)
    assert recipes.load(recipe.directory).task.template == "{sentence} It was {mask}."
    results = json.loads((recipe.directory / "evaluation.json").read_text())
    assert results["tuned"]["loss"] != results["zero_shot"]["loss"]
    score, steps = evaluate_recipe(recipes.load(recipe.directory), "test", None)
    assert (score.as_dict()["accuracy"], steps) == (results["tuned"]["accuracy"], 6)
    assert len(Trajectory.open(recipe.directory / "trajectory.mezo")) == 6
    _, report = AutoModelForMaskedLM.from_pretrained(recipe.directory / "checkpoint", output_loading_info=True)
    assert not report["missing_keys"]


def test_an_adapter_of_a_masked_model_is_one_of_peft_and_can_be_merged(make: Make, tmp_path: Path) -> None:
    recipe = make(train=STEPS, optimizer={"lr": 1e-2}, tune={"what": "lora", "r": 2, "alpha": 4})
    train(recipe)
    merge(recipe.directory, tmp_path / "merged", None)
    text = torch.arange(5, 13)[None]
    with torch.no_grad():
        base = AutoModelForMaskedLM.from_pretrained(recipe.model.name).eval()
        bare = base(input_ids=text).logits
        tuned = PeftModel.from_pretrained(base, recipe.directory / "checkpoint").eval()(input_ids=text).logits
        whole = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").eval()(input_ids=text).logits
    assert (tuned - bare).abs().max() > 1e-6
    torch.testing.assert_close(whole, tuned, rtol=1e-4, atol=1e-5)


def test_a_linear_probe_of_a_masked_model_reads_the_mask(make: Make) -> None:
    recipe = make(method={"name": "linear_probe"})
    train(recipe)
    report = (recipe.directory / "report.md").read_text()
    assert "Logistic regression on 24 features of the prompt's mask" in report
    assert json.loads((recipe.directory / "evaluation.json").read_text())["linear_probe"]["accuracy"] >= 0.75


def test_random_weights_of_a_masked_shape_are_asked_clozes_in_bytes(make: Make, tmp_path: Path) -> None:
    RobertaConfig(vocab_size=400, max_position_embeddings=130, **masked.SIZES).save_pretrained(tmp_path / "shape")
    random = {"name": f"random:{tmp_path / 'shape'}"}
    fields = {"template": "{sentence}: {mask}", "candidates": ["a", "b"], "max_length": 48}
    recipe = make(model=random, task=fields, train=STEPS | {"steps": 1}, optimizer={"lr": 1e-3})
    train(recipe)
    assert len(Trajectory.open(recipe.directory / "trajectory.mezo")) == 1


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"task": {"template": "{sentence} It was"}}, "task.template is .*, but model.name is a masked language model"),
        ({"task": {"name": "answer", "template": "{sentence}"}}, "task.name is answer, which can't be asked so"),
        ({"task": {"candidates": [" a mess", " great"]}}, "' a mess' is 2 tokens to this model, expected one token"),
        ({"tune": {"what": "prefix"}}, "a roberta model does not keep plain keys and values .*: set tune.what to lora"),
        ({"method": {"name": "icl"}}, "method.name is icl, but the examples .* are no prompts that can follow"),
    ],
)
def test_what_a_masked_model_can_not_do_is_one_line_before_anything_is_written(
    make: Make, sections: dict[str, Any], said: str
) -> None:
    recipe = make(**sections)
    with pytest.raises(MezoError, match=said) as refused:
        train(recipe)
    assert "\n" not in str(refused.value)
    assert not recipe.directory.exists()


def test_a_causal_model_is_not_asked_a_cloze(make: Make, tmp_path: Path) -> None:
    causal = {"name": str(material.write_model("llama", tmp_path / "causal"))}
    with pytest.raises(MezoError, match="has a mask, but model.name is a causal language model"):
        train(make(model=causal, task={"template": "{sentence} It was {mask}."}))
