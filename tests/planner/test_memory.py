"""The planner's memory against what real processes take.

Of other models, ranks and dtypes, measured likewise, the rows are in tools/results/plan_measured.csv.
"""

import ctypes
from typing import Any

import torch

import mezo_scale as ms
from mezo_scale.distributed.memory import PeakMemory
from mezo_scale.models import shard_fsdp2
from mezo_scale.models.shapes import config_of, skeleton
from mezo_scale.planner import Strategy, Workload, architecture_of, memory
from mezo_scale.tasks.kinds.candidates import candidates_loss
from tests.support.pool import Ranks


def taken(name: str, strategy: Strategy, rows: int, tokens: int) -> int:
    """Bytes that two steps of a model of that shape take of this rank at most, beyond what a toy of its family left.

    glibc is told to map every larger block by itself, so that what is freed leaves the process: the planner counts
    tensors, not what an allocator keeps of them. The check whether branches can be paired is left out (paired=True): it
    evaluates branch by branch, where torch copies the head's weight once per row on CPUs.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD
    toy = config_of(name)
    toy.num_hidden_layers, toy.hidden_size, toy.num_attention_heads, toy.vocab_size = 1, 128, 4, 1024
    toy.ffn_dim, toy.word_embed_proj_dim = 256, 128
    tune(toy, strategy, 1, 16)
    resident = PeakMemory(torch.device("cpu"))
    baseline = resident.now()
    resident.reset()
    tune(config_of(name), strategy, rows, tokens)
    return resident.peak() - baseline


def tune(config: Any, strategy: Strategy, rows: int, tokens: int) -> None:
    """Two steps of a random model, made shard by shard."""
    model = skeleton(config, torch.bfloat16)
    shard_fsdp2(model, strategy.mesh("cpu"))
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter._local_tensor.normal_(0, 0.02)  # type: ignore[attr-defined]
    optimizer = ms.MeZO(model, paired=True)
    batch = {
        "input_ids": torch.randint(5, 1000, (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.int64),
        "candidate_ids": torch.tensor([[5, 6]] * rows),
        "label": torch.zeros(rows, dtype=torch.int64),
    }
    for _ in range(2):
        optimizer.step(batch=batch, objective=candidates_loss)


def test_two_ranks_take_the_memory_of_the_plan(ranks: Ranks) -> None:
    name, strategy, rows, tokens = "opt-125m", Strategy("fsdp2", shard=2), 1, 64
    planned = memory(architecture_of(name), strategy, Workload(rows, tokens)).peak
    found = ranks(2, taken, name=name, strategy=strategy, rows=rows, tokens=tokens, fresh=True)
    assert 0.3 * 2**30 < planned < 0.6 * 2**30
    assert abs(planned / max(found) - 1) < 0.15
