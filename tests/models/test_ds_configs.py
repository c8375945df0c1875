"""Every file in ds_configs/ on real DeepSpeed: sharded loading, a step, and the next forward sees what was written."""

import copy
import json
import os
import pathlib
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import mezo_scale as ms
from tests.support import models
from tests.support.pool import Ranks

FOLDER = pathlib.Path(__file__).parents[2] / "ds_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json"))
BF16 = {"zero3_bf16.json", "zero3_bf16_offload_cpu.json"}


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return config


def load(config: dict[str, Any], folder: str, dtype: torch.dtype) -> Any:
    """As the trainer loads: each rank keeps its partition of what it reads."""
    alive = HfDeepSpeedConfig(copy.deepcopy(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    del alive
    engine, *_ = deepspeed.initialize(model=model, optimizer=None, config=config)
    engine.eval()
    return engine


def step_and_look(config: dict[str, Any], folder: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Largest relative differences of the losses to a plain model's, before and after two steps; how far they moved."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    engine = load(config, folder, dtype)
    batch = models.batch("llama", 4)
    sharded_steps, plain_steps = (ms.MeZO(model, lr=0.1, eps=1e-2) for model in (engine, plain))
    differences, first = [], models.causal_loss(plain, batch).detach()
    for _ in range(2):
        with torch.no_grad():
            expected, found = models.causal_loss(plain, batch), models.causal_loss(engine, batch)
        differences.append(((found - expected) / expected).abs().max().item())
        for opt in (sharded_steps, plain_steps):
            opt.step(batch=batch, objective=models.causal_loss)
    with torch.no_grad():
        expected, found = models.causal_loss(plain, batch), models.causal_loss(engine, batch)
    moved = (expected - first).abs().max().item()
    engine.destroy()
    return differences[0], ((found - expected) / expected).abs().max().item(), moved


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    models.build("llama").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_complete_and_for_forward_passes_only(name: str) -> None:
    config = read(name)
    assert "auto" not in json.dumps(config)
    assert "optimizer" not in config
    assert "scheduler" not in config
    assert config["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in config["zero_optimization"]
    assert config.get("bf16", {"enabled": False})["enabled"] == (name in BF16)


@pytest.mark.parametrize("name", sorted({*FILES} - {"zero3_offload_nvme.json", "zero3_hpz.json"}))
def test_a_file_trains_as_it_is(ranks: Ranks, checkpoint: str, name: str) -> None:
    dtype = torch.bfloat16 if name in BF16 else torch.float32
    tolerance = 2e-2 if name in BF16 else 1e-4
    results = ranks(2, step_and_look, config=read(name), folder=checkpoint, dtype=dtype, fresh=True, timeout_s=120)
    for before, after, moved in results:
        assert before < tolerance
        assert after < tolerance
        assert moved > 5 * tolerance


def test_hpz_trains_with_nodes_of_two_ranks(ranks: Ranks, checkpoint: str) -> None:
    """The file says nodes of 8; four processes make two nodes of 2, the smallest in which its copies differ."""
    config = read("zero3_hpz.json")
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    options = {"config": config, "folder": checkpoint, "dtype": torch.float32}
    for before, after, moved in ranks(4, step_and_look, **options, fresh=True, timeout_s=120):
        assert before < 1e-4
        assert after < 1e-4  # a forward over the copies of before the step would be off by as much as the loss moved
        assert moved > 1e-3


def nvme_steps(config: dict[str, Any], folder: str) -> tuple[float, float, float, bool]:
    """As `step_and_look`, and whether a partition lies on disk."""
    engine = load(config, folder, torch.float32)
    swapped = any(shard.paged is not None for shard in ms.shards(engine))
    engine.destroy()
    differences = step_and_look(config, folder, torch.float32)
    return *differences, swapped


def has_async_io() -> bool:
    folder = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR", "/nonexistent"))
    return (folder / "async_io" / "async_io.so").is_file()


@pytest.mark.skipif(
    not has_async_io(),
    reason="DeepSpeed's async_io op is not built: it needs libaio's headers and minutes of compiling; "
    "TORCH_EXTENSIONS_DIR names a folder that has it",
)
def test_parameters_on_nvme_train(ranks: Ranks, tmp_path: pathlib.Path) -> None:
    """A folder of this machine stands in for the disk that the file names; the model is wide enough to be swapped."""
    config = read("zero3_offload_nvme.json")
    config["zero_optimization"]["offload_param"] |= {"nvme_path": str(tmp_path / "disk"), "buffer_size": 2_000_000}
    wide = LlamaConfig(vocab_size=67, hidden_size=512, intermediate_size=1100, num_hidden_layers=1)
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    options = {"config": config, "folder": str(tmp_path / "wide")}
    for before, after, moved, swapped in ranks(2, nvme_steps, **options, fresh=True, timeout_s=300):
        assert swapped
        assert before < 1e-4
        assert after < 1e-4
        assert moved > 1e-3
