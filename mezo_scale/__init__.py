"""MeZO that shards: fine-tune language models with forward passes only, over FSDP, DeepSpeed ZeRO-3, or one device.

opt = mezo_scale.MeZO(model, lr=1e-6, trajectory="run.mezo")    # model: yours, sharded as you like
loss = opt.step(batch=batch, objective=per_row_losses)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezo_scale import noise
    from mezo_scale.errors import MezoError
    from mezo_scale.optim import estimators, objectives, rules
    from mezo_scale.optim.mezo import MeZO
    from mezo_scale.optim.replay import replay
    from mezo_scale.perturbation import View, perturbed
    from mezo_scale.sharding import Shard, shards
    from mezo_scale.trajectory import StepRecord, Trajectory

__version__ = "0.2.0"

__all__ = [
    "MeZO",
    "MezoError",
    "Shard",
    "StepRecord",
    "Trajectory",
    "View",
    "estimators",
    "noise",
    "objectives",
    "perturbed",
    "replay",
    "rules",
    "shards",
]

_ROOMS = {
    "MeZO": "mezo_scale.optim.mezo",
    "MezoError": "mezo_scale.errors",
    "Shard": "mezo_scale.sharding",
    "StepRecord": "mezo_scale.trajectory",
    "Trajectory": "mezo_scale.trajectory",
    "View": "mezo_scale.perturbation",
    "perturbed": "mezo_scale.perturbation",
    "replay": "mezo_scale.optim.replay",
    "shards": "mezo_scale.sharding",
}

_MODULES = {
    "errors": "mezo_scale.errors",
    "estimators": "mezo_scale.optim.estimators",
    "noise": "mezo_scale.noise",
    "objectives": "mezo_scale.optim.objectives",
    "rules": "mezo_scale.optim.rules",
}


def __getattr__(name: str) -> Any:
    """Public names come when they are first asked for: torch takes seconds to import, and `--help` needs none of it."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
