"""FSDP2 and torch.distributed.checkpoint, as torchtitan's loop has them; stopped, and taken up by a fresh model:

torchrun --nproc-per-node 2 examples/titan_like.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

import mezo_scale as ms

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made() -> tuple[torch.nn.Module, ms.MeZO]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SIZES)).eval().to(DEVICE)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, ms.MeZO(model, lr=1e-4, eps=1e-3, seed=1)


def train(model: torch.nn.Module, opt: ms.MeZO, until: int) -> None:
    while opt.step_count < until:
        rows = torch.Generator().manual_seed(opt.step_count * 1000 + dist.get_rank())  # of this step and rank
        ids = torch.randint(3, 60, (4, 12), generator=rows).to(DEVICE)
        opt.step(batch={"input_ids": ids, "labels": ids}, objective=ms.objectives.labels)


if DEVICE == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
dist.broadcast_object_list(place)

model, opt = made()
train(model, opt, until=3)
weights, state = get_state_dict(model, opt)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id=place[0])
train(model, opt, until=6)

fresh, other = made()
weights, state = get_state_dict(fresh, other)
dcp.load({"model": weights, "optimizer": state}, checkpoint_id=place[0])
set_state_dict(fresh, other, model_state_dict=weights, optim_state_dict=state)
resumed_at = other.step_count
train(fresh, other, until=6)

pairs = zip(model.parameters(), fresh.parameters(), strict=True)
same = all(torch.equal(one.full_tensor(), two.full_tensor()) for one, two in pairs)
if dist.get_rank() == 0:
    print(f"resumed at step {resumed_at}, went on to {other.step_count}; weights are equal: {same}", flush=True)
dist.destroy_process_group()
