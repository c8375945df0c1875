"""The command line that runs a strategy."""

import shlex
from pathlib import Path

from mezo_scale.distributed.layout import Strategy
from mezo_scale.planner.deepspeed import CONFIGS
from mezo_scale.planner.plan import Cluster
from mezo_scale.planner.workload import Workload


def overrides(model: str, strategy: Strategy, workload: Workload) -> list[str]:
    """What a recipe has to say for this strategy, as `key=value`; `model` as a recipe names it, or its config.json."""
    stored = workload.stored(strategy)
    name = str(Path(model).parent) if model.endswith("config.json") else model
    found = [
        f"model.name={name}",
        f"model.dtype={stored}",
        f"model.compute_dtype={workload.dtype if stored != workload.dtype else 'null'}",
        f"sharding.strategy={strategy.name}",
    ]
    if strategy.is_hybrid:
        found.append(f"sharding.replicate={strategy.replicate}")
    if strategy.is_deepspeed:
        found.append(f"sharding.ds_config={CONFIGS[stored, strategy.offload]}")
    elif strategy.offload == "cpu":
        found.append("sharding.cpu_offload=true")
    if workload.branches > 2:
        found.append(f"optimizer.num_directions={workload.branches // 2}")
    return [*found, f"train.batch_size={workload.rows * strategy.world_size}"]


def command(recipe: str, model: str, strategy: Strategy, workload: Workload, cluster: Cluster) -> str:
    """The line that trains a recipe so; on several nodes the one that submits it to SLURM."""
    said = [recipe, *overrides(model, strategy, workload)]
    if cluster.nodes > 1:
        start = ["--start", "deepspeed"] if strategy.is_deepspeed else []
        size = ["--nodes", str(cluster.nodes), "--gpus-per-node", str(cluster.gpus_per_node)]
        return shlex.join(["mezo-scale", "submit", *said, *size, *start])
    if strategy.is_deepspeed:
        start = ["deepspeed", "--num_gpus", str(cluster.gpus), "--no_local_rank", "--module"]
    else:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(cluster.gpus), "-m"]
    return shlex.join([*start, "mezo_scale.cli", "train", *said])
