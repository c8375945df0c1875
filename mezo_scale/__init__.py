"""MeZO that shards: fine-tune language models with forward passes only, over FSDP, DeepSpeed ZeRO-3, or one device.

opt = mezo_scale.MeZO(model, lr=1e-6, trajectory="run.mezo")    # model: yours, sharded as you like
loss = opt.step(batch=batch, objective=per_row_losses)
"""

from mezo_scale import noise
from mezo_scale.errors import MezoError
from mezo_scale.optim import objectives
from mezo_scale.optim.mezo import MeZO
from mezo_scale.optim.replay import replay
from mezo_scale.perturbation import View, perturbed
from mezo_scale.sharding import Shard, shards
from mezo_scale.trajectory import StepRecord, Trajectory

__all__ = [
    "MeZO",
    "MezoError",
    "Shard",
    "StepRecord",
    "Trajectory",
    "View",
    "noise",
    "objectives",
    "perturbed",
    "replay",
    "shards",
]
