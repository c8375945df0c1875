"""Sharded loading and saving: a rank reads its part, the model computes the same, and what is saved is the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from mezo_scale import models
from mezo_scale.distributed.world import SharedError, World
from mezo_scale.errors import RecipeError
from mezo_scale.models import save
from mezo_scale.recipe import Recipe, parse
from mezo_scale.runs.evaluate import evaluate
from mezo_scale.sharding import shards
from mezo_scale.sharding.fingerprint import local_hash
from mezo_scale.tasks import Score
from mezo_scale.tasks.kinds.candidates import Candidates, Encoded, candidate_scores, collate
from tests.support import material
from tests.support.pool import Ranks

EXAMPLES = [Encoded(tuple(range(5, 9 + n)), ((40 + n,), (50,)), n % 2) for n in range(7)]


def recipe(folder: str, strategy: str, **model: Any) -> Recipe:
    sharding = {"strategy": strategy, **({"replicate": 2} if strategy == "hsdp" else {})}
    return parse({"model": {"name": folder, **model}, "task": {"data": "none"}, "sharding": sharding})


def world() -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, rank, size, size, torch.device("cpu"))


def there_and_back(folder: str, strategy: str, out: str) -> tuple[float, int, int]:
    """Largest difference of the scores, stored elements on this rank; saves the model in `out`."""
    wanted = recipe(folder, strategy)
    models.check(wanted, world())
    loaded = models.load(wanted, world())
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = collate(EXAMPLES, pad_id=0)
    with torch.no_grad():
        difference = candidate_scores(loaded.model, batch) - candidate_scores(plain, batch)
    stored = sum(shard.local.numel() for shard in shards(loaded.model))
    save.write(loaded.model, loaded.processor, Path(out))
    return difference.abs().max().item(), stored, sum(parameter.numel() for parameter in plain.parameters())


CELLS = [
    *(("fsdp2", name, 3) for name in ("llama", "llama-untied", "opt", "gpt2", "mixtral", "mamba")),
    *(("hsdp", name, 4) for name in ("llama", "opt")),
    *(("zero3", name, 2) for name in ("llama", "opt", "mixtral")),
    ("single", "llama", 2),
    ("ddp", "llama", 2),
    ("fsdp2", "llama", 1),
]


@pytest.mark.parametrize(("strategy", "name", "world_size"), CELLS)
def test_a_model_that_is_loaded_sharded_and_saved_is_the_same_checkpoint(
    ranks: Ranks, tmp_path: Path, strategy: str, name: str, world_size: int
) -> None:
    folder, out = material.write_model(name, tmp_path / "model"), tmp_path / "saved"
    results = ranks(world_size, there_and_back, folder=str(folder), strategy=strategy, out=str(out))
    parts = {"single": 1, "ddp": 1, "hsdp": world_size // 2}.get(strategy, world_size)
    for difference, stored, whole in results:
        assert difference < 1e-5
        # Padding of FSDP and ZeRO-3 is no shard; uneven tables leave some ranks with a row less.
        assert stored == pytest.approx(whole / parts, rel=0.1 if parts > 1 else 0)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, out)]
    assert configs[0] == configs[1]
    assert (out / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


def units(folder: str) -> tuple[list[str], list[str], bool]:
    """Names of the FSDP units, those still gathered after two forward passes, and whether the head is the embedding."""
    loaded = models.load(recipe(folder, "fsdp2", compute_dtype="bfloat16"), world())
    batch = collate(EXAMPLES, pad_id=0)
    with torch.no_grad():
        for _ in range(2):
            assert candidate_scores(loaded.model, batch).dtype == torch.float32
    named = {name: module for name, module in loaded.model.named_modules() if isinstance(module, FSDPModule)}
    gathered = [
        f"{name}.{key}"
        for name, module in named.items()
        for key, parameter in module.named_parameters(recurse=False)
        if type(parameter).__name__ != "DTensor"
    ]
    head, table = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    return list(named), gathered, head.weight is table.weight


@pytest.mark.parametrize("name", ["llama", "llama-untied", "opt", "gpt2", "mamba"])
def test_a_unit_is_a_layer_and_frees_its_weights_after_the_forward(ranks: Ranks, tmp_path: Path, name: str) -> None:
    folder = material.write_model(name, tmp_path / "model")
    prefix = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "mamba": "backbone.layers"}.get(
        name, "model.layers"
    )
    expected = {"", f"{prefix}.0", f"{prefix}.1"}
    if name == "llama-untied":
        expected |= {"model.embed_tokens", "lm_head"}
    for found, gathered, tied in ranks(2, units, folder=str(folder)):
        assert set(found) == expected
        assert gathered == []
        assert tied == (name != "llama-untied")


def scores(folder: str, compute_dtype: str | None) -> list[list[float]]:
    loaded = models.load(recipe(folder, "fsdp2", compute_dtype=compute_dtype), world())
    with torch.no_grad():
        return candidate_scores(loaded.model, collate(EXAMPLES, pad_id=0)).tolist()


def test_compute_in_bfloat16_is_near_and_not_the_same(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(material.write_model("llama", tmp_path / "model"))
    full, mixed = (
        torch.tensor(ranks(2, scores, folder=folder, compute_dtype=dtype)[0]) for dtype in (None, "bfloat16")
    )
    assert not torch.equal(full, mixed)
    torch.testing.assert_close(full, mixed, atol=0.1, rtol=0.02)


def evaluation(folder: str, strategy: str, batch_size: int) -> Score:
    wanted = recipe(folder, strategy)
    loaded = models.load(wanted, world())
    return evaluate(loaded, Candidates(loaded.processor, wanted.task), EXAMPLES, batch_size)


def test_an_evaluation_counts_every_example_once_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(material.write_model("llama", tmp_path / "model"))
    (alone,) = ranks(1, evaluation, folder=folder, strategy="single", batch_size=7)
    # 7 examples over 3 ranks in rounds of 6: the last round has a row for one rank only.
    for found in ranks(3, evaluation, folder=folder, strategy="fsdp2", batch_size=2):
        assert (found.count, found.metrics["accuracy"]) == (7, alone.metrics["accuracy"])
        assert found.metrics["loss"].value == pytest.approx(alone.metrics["loss"].value, rel=1e-5)


def refusals(on_rank: int) -> str:
    try:
        with world().raise_on_all():
            if dist.get_rank() == on_rank:
                raise RecipeError("there is no file here")
    except SharedError as error:
        return str(error)
    return ""


def test_what_one_rank_can_not_find_stops_all_with_its_message(ranks: Ranks) -> None:
    assert ranks(3, refusals, on_rank=2) == ["there is no file here"] * 3
    assert ranks(3, refusals, on_rank=5) == [""] * 3


def random_weights(name: str, strategy: str) -> tuple[int, float, int]:
    """This rank's part of the weights' hash, the sum of the scores, and the stored elements."""
    wanted = recipe(name, strategy)
    models.check(wanted, world())
    loaded = models.load(wanted, world())
    with torch.no_grad():
        score = candidate_scores(loaded.model, collate(EXAMPLES, pad_id=0))
    held = shards(loaded.model)
    return local_hash(held), float(score.sum()), sum(shard.local_numel for shard in held)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp2", 2), ("hsdp", 4), ("zero3", 2)])
def test_random_weights_are_the_same_in_every_layout(
    ranks: Ranks, tmp_path: Path, name: str, strategy: str, world_size: int
) -> None:
    shape = f"random:{material.write_model(name, tmp_path / 'model')}"
    ((whole, score, count),) = ranks(1, random_weights, name=shape, strategy="single")
    parts = ranks(world_size, random_weights, name=shape, strategy=strategy)
    assert sum(part[0] for part in parts) % 2**64 == whole % 2**64
    assert [found for _, found, _ in parts] == pytest.approx([score] * world_size, rel=1e-4)
    copies = 2 if strategy == "hsdp" else 1
    assert sum(stored for _, _, stored in parts) == copies * count


def test_random_weights_of_no_known_shape() -> None:
    with pytest.raises(RecipeError, match="no model opt-9b"):
        models.check(recipe("random:opt-9b", "fsdp2"), World(0, 0, 1, 1, torch.device("cpu")))
