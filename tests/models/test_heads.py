"""Masked language models: which they are, and that every strategy reads, computes and saves them as such."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    RobertaConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from mezo_scale import models
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import World
from mezo_scale.errors import ModelError
from mezo_scale.models import checkpoints, heads, save
from mezo_scale.models.shapes import SHAPES, config_of
from mezo_scale.planner import Workload
from mezo_scale.planner.dry_run import dry_run
from mezo_scale.recipe import parse
from mezo_scale.sharding import shards
from mezo_scale.tasks.kinds.candidates import candidate_scores
from tests.support import masked
from tests.support.pool import Ranks
from tests.tasks.test_cloze import kind, rows


@pytest.mark.parametrize(
    ("config", "is_masked"),
    [
        (DistilBertConfig(), True),  # has no causal class
        (RobertaConfig(), True),
        (RobertaConfig(architectures=["RobertaForMaskedLM"]), True),
        (BertConfig(architectures=["BertForPreTraining"]), True),
        (RobertaConfig(architectures=["RobertaForCausalLM"]), False),
        (BertConfig(is_decoder=True), False),
        (BartConfig(architectures=["BartForConditionalGeneration"]), False),
        (LlamaConfig(), False),
    ],
)
def test_a_model_is_masked_unless_it_was_saved_as_a_causal_one(config: Any, is_masked: bool) -> None:
    assert heads.is_masked(config) is is_masked
    heads.check("it", config)


def test_a_model_of_neither_kind_is_refused() -> None:
    with pytest.raises(
        ModelError, match="it is a wav2vec2 model, expected a causal or a masked language model, or an im"
    ):
        heads.check("it", Wav2Vec2Config())
    heads.check("it", ViTConfig())
    with pytest.raises(ModelError, match="it is a vit model, expected a causal or a masked language model"):
        heads.check_language("it", ViTConfig())


def test_a_masked_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = masked.write_model("bert", tmp_path / "model")
    AutoModelForMaskedLM.from_pretrained(folder).bert.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lacks \d weights of a masked language model, cls\.predictions"):
        checkpoints.read(str(folder), torch.float32)


def test_what_was_saved_as_a_causal_model_is_read_as_one(tmp_path: Path) -> None:
    config = RobertaConfig(vocab_size=300, max_position_embeddings=66, **masked.SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert type(checkpoints.read(str(tmp_path), torch.float32)).__name__ == "RobertaForCausalLM"


def there_and_back(name: str, folder: str, strategy: str, out: str) -> tuple[str, float, int]:
    """The model's class, the largest difference of its scores, stored elements on this rank; saves it in `out`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, size, size, torch.device("cpu"))
    recipe = parse({"model": {"name": folder}, "task": {"data": "none"}, "sharding": {"strategy": strategy}})
    models.check(recipe, world)
    loaded = models.load(recipe, world)
    plain, made = AutoModelForMaskedLM.from_pretrained(folder).eval(), kind(name)
    batch = made.collate(rows(made))
    with torch.no_grad():
        difference = candidate_scores(loaded.model, batch) - candidate_scores(plain, batch)
    stored = sum(shard.local.numel() for shard in shards(loaded.model))
    save.write(loaded.model, loaded.processor, Path(out))
    return type(loaded.model).__name__, difference.abs().max().item(), stored


@pytest.mark.parametrize(
    ("strategy", "name", "size"),
    [
        ("single", "bert", 1),
        ("ddp", "roberta", 2),
        ("fsdp2", "roberta", 2),
        ("fsdp2", "bert", 1),
        ("zero3", "roberta", 2),
    ],
)
def test_every_strategy_reads_and_saves_a_masked_model(
    ranks: Ranks, tmp_path: Path, strategy: str, name: str, size: int
) -> None:
    folder, out = masked.write_model(name, tmp_path / "model"), tmp_path / "saved"
    whole = sum(parameter.numel() for parameter in masked.build(name).parameters())
    found = ranks(size, there_and_back, name=name, folder=str(folder), strategy=strategy, out=str(out))
    for called, difference, stored in found:
        assert called.endswith("ForMaskedLM")
        assert difference < 1e-5
        assert stored == pytest.approx(whole / (size if strategy in ("fsdp2", "zero3") else 1), rel=0.1)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, out)]
    assert configs[0] == configs[1]


def random_logits(folder: str, strategy: str) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, size, size, torch.device("cpu"))
    named = f"random:{folder}"
    recipe = parse({"model": {"name": named}, "task": {"data": "none"}, "sharding": {"strategy": strategy}})
    model: Any = models.load(recipe, world).model
    assert type(model).__name__.endswith("RobertaForMaskedLM")
    with torch.no_grad():
        return float(model(input_ids=torch.arange(5, 13)[None]).logits.double().square().sum())


def test_random_weights_of_a_masked_shape_are_the_same_in_every_layout(ranks: Ranks, tmp_path: Path) -> None:
    RobertaConfig(vocab_size=300, max_position_embeddings=66, **masked.SIZES).save_pretrained(tmp_path)
    whole = ranks(1, random_logits, folder=str(tmp_path), strategy="single")
    sharded = ranks(2, random_logits, folder=str(tmp_path), strategy="fsdp2")
    assert sharded == pytest.approx(whole * 2, rel=1e-5)
    assert checkpoints.load_processor("random:roberta-base").mask_token_id is not None
    assert checkpoints.load_processor("random:opt-125m").mask_token_id is None


def test_a_dry_run_counts_the_logits_at_the_masks_alone() -> None:
    shape = SHAPES["roberta-base"]
    config = shape.kind(**{**shape.fields, "num_hidden_layers": 2})
    found, _ = dry_run(config, Strategy("single"), Workload(rows=4, tokens=32, dtype="float32"))
    assert found.logits < 3 * 2 * 4 * config.vocab_size * 4  # two branches of four rows, each once or twice in float32
    assert heads.is_masked(config_of("random:roberta-large"))
