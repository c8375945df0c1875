"""Models that take padding for text are refused before anything is graded or written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mezo_scale.errors import MezoError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.session import train
from tests.support import material

MakeRecipe = Callable[..., Recipe]
SIZES = {
    "d_model": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 80,
    "is_decoder": True,
}


def write(family: str, folder: Path) -> Path:
    """A small model of a family whose forward pass takes no position_ids."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=material.VOCABULARY + 1, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    material.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bart", "rwkv"])
def test_a_model_that_takes_padding_for_text_is_refused(make_recipe: MakeRecipe, tmp_path: Path, family: str) -> None:
    recipe = make_recipe(f"model.name={write(family, tmp_path / family)}")
    for start in (train, lambda recipe: evaluate_recipe(recipe, "test", None)):
        with pytest.raises(MezoError, match=f"{family} takes padding for text: an example's scores change by"):
            start(recipe)
    assert not Path(recipe.output.dir).exists()


@pytest.mark.parametrize("family", ["bloom", "mpt", "mamba"])
def test_a_model_without_position_ids_that_minds_the_mask_is_not(
    make_recipe: MakeRecipe, tmp_path: Path, family: str
) -> None:
    found, _ = evaluate_recipe(make_recipe(f"model.name={write(family, tmp_path / family)}"), "test", None)
    assert found.not_finite == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_not_taken_for_it(make_recipe: MakeRecipe, dtype: str) -> None:
    found, _ = evaluate_recipe(make_recipe(f"model.dtype={dtype}"), "test", None)
    assert found.not_finite == 0
