"""Models that take padding for text are refused before anything is graded or written."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mezo_scale.errors import MezoError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.fitness import check_model
from mezo_scale.runs.session import train
from mezo_scale.tasks import Kind
from mezo_scale.tasks.encoding import Batch
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


class LeaksFrom(Kind[int, Any]):
    """Rows are their lengths; padding changes the scores of those that are at least so long."""

    def __init__(self, length: int) -> None:
        self._length = length

    def collate(self, rows: Sequence[int], objective: str | None = None, max_length: int | None = None) -> Batch:
        return {"input_ids": torch.zeros(1, 16 if max_length is None else rows[0]), "text": torch.tensor(rows)}

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        is_padded = batch["input_ids"].shape[1] > int(batch["text"])
        return torch.full((1, 2), -1.0 - int(is_padded and int(batch["text"]) >= self._length))


def test_padding_that_counts_at_some_lengths_only_is_found(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    loaded: Any = SimpleNamespace(model=nn.Identity(), device=torch.device("cpu"), compute=nullcontext)
    with pytest.raises(MezoError, match="takes padding for text"):
        check_model(loaded, LeaksFrom(12), [5, 16, 9, 12], recipe)
    check_model(loaded, LeaksFrom(13), [5, 16, 9, 12], recipe)


def test_a_model_that_can_be_loaded_and_not_run_is_one_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A part of 3 elements can't be turned by halves, which nobody says before the first forward pass."""
    config = AutoConfig.for_model(
        "gptj", vocab_size=material.VOCABULARY + 1, n_embd=32, n_layer=2, n_head=4, rotary_dim=3, n_positions=80
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gptj")
    material.tokenizer().save_pretrained(tmp_path / "gptj")
    recipe = make_recipe(f"model.name={tmp_path / 'gptj'}")
    for start in (train, lambda recipe: evaluate_recipe(recipe, "test", None)):
        with pytest.raises(MezoError, match=r"gptj can't run a row of task.name=.*though it was loaded: RuntimeError"):
            start(recipe)
    assert not Path(recipe.output.dir).exists()
