"""Models that another library has put on the ranks: the optimizer takes them as they come."""

import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mezo_scale as ms
from tests.support import models
from tests.support.pool import Ranks


def whole(param: Tensor) -> Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param.detach()


def prepared(how: str, folder: str) -> nn.Module:
    if how == "accelerate":
        return Accelerator(cpu=True).prepare(AutoModelForCausalLM.from_pretrained(folder))
    if how == "ddp":
        return DistributedDataParallel(AutoModelForCausalLM.from_pretrained(folder))
    sizes: dict[str, Any] = {"fsdp": {"fsdp_size": 2}, "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2}}[how]
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def stepped(how: str, folder: str) -> tuple[str, int, list[str], list[str], tuple[float, ...]]:
    """(type of the model, elements stored here, names, parameters whose bits are wrong after two steps, slopes)."""
    model = prepared(how, folder).eval()
    batch, objective = models.batch("llama", 2, seed=dist.get_rank()), models.objective("llama")
    opt = ms.MeZO(model, lr=1e-2, eps=1e-2)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    slopes: list[float] = []
    for _ in range(2):
        opt.step(batch=batch, objective=objective)
        record = opt.last_record
        slopes += record.projected_grads
        with torch.no_grad():
            for name, param in plain.named_parameters():
                z = ms.noise.normal(record.seeds[0], ms.noise.param_id(name), 0, param.numel()).view_as(param)
                param.add_(torch.tensor(record.alphas[0]) * z)
    shards = ms.shards(model)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    right = dict(plain.named_parameters())
    wrong = [name for name, param in inner.named_parameters() if not torch.equal(whole(param), right[name])]
    return type(model).__name__, sum(s.local_numel for s in shards), [s.name for s in shards], wrong, tuple(slopes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("prepared") / "llama"
    models.build("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(("how", "world_size"), [("accelerate", 2), ("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_a_model_that_came_sharded_or_replicated_is_tuned_as_it_is(
    ranks: Ranks, folder: pathlib.Path, how: str, world_size: int
) -> None:
    outcomes = ranks(world_size, stepped, how=how, folder=str(folder), fresh=how == "accelerate")
    names = [name for name, _ in models.build("llama").named_parameters()]
    whole_model = sum(param.numel() for param in models.build("llama").parameters())
    for _, _, listed, wrong, slopes in outcomes:
        assert listed == names
        assert wrong == []
        assert slopes == outcomes[0][-1]
    stored = [elements for _, elements, *_ in outcomes]
    if how in ("accelerate", "ddp"):
        assert {kind for kind, *_ in outcomes} == {"DistributedDataParallel"}
        assert stored == [whole_model] * world_size
    else:
        assert sum(stored) == whole_model * world_size // 2
