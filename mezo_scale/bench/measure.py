"""One rank of one cell: builds the model, counts a step's collectives, weighs it, times it.

Run by `running` as: python -m mezo_scale.bench.measure CELL ROUNDS, both in JSON; it prints what it found.
"""

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezo_scale import models, noise, recipe
from mezo_scale.bench.counting import Traffic, summed
from mezo_scale.bench.rivals import RIVALS
from mezo_scale.bench.sweep import Cell
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.memory import PeakMemory, keep_freed_memory
from mezo_scale.distributed.world import World, process_group
from mezo_scale.errors import MezoError
from mezo_scale.models import heads
from mezo_scale.models.checkpoints import silence_transformers
from mezo_scale.models.shapes import config_of
from mezo_scale.models.units import units
from mezo_scale.optim.mezo import MeZO
from mezo_scale.planner.dry_run import random_batch
from mezo_scale.sharding import discover, shards
from mezo_scale.tasks.kinds.candidates import candidates_loss

SAID = "mezo-bench: "  # before what a rank says of its cell

Step = Callable[[], float]


def measure(cell: Cell, rounds: int, world: World) -> dict[str, Any]:
    """The cell's figures, the same on every rank. Every rank of the world calls it.

    Returns:
        step_s, forwards_s: seconds of each round's step, and of the two bare forwards on the same rows after it; of the
            slowest rank.
        memory_bytes: most during a step, beyond what the process had before there was a model; of the largest rank.
        stored_bytes: of the shards, likewise. parameters, layers: of the whole model.
        step_collectives, forward_collectives: see `counting.summed`; of this rank in one step, and in one bare forward.
        waited: part of that time for which the unluckiest rank had work but no core: other programs had it.
        layer_bytes, gather_s: of a decoder layer as it is gathered; seconds of gathering that much. None on one rank.
        matmul_tflops: of a rank that only multiplies square matrices, while the others do the same; of the slowest.
    """
    memory = PeakMemory(world.device)
    if cell.memory_cap_gib is not None and world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cell.memory_cap_gib * 2**30 / total), world.device)
    _compile_kernels(cell, world.device)
    _import_model(cell)
    base = memory.now()
    loaded = models.load(_recipe(cell), world)
    step, forward = _contenders(cell, loaded, world)
    # The first step checks the pairing; ZeRO-3 learns the order of modules from the first three.
    for _ in range(3 if cell.spread.is_deepspeed else 1):
        loss = step()
    memory.reset()
    step()
    peak = memory.peak()
    forward()
    with Traffic() as bare:
        forward()
    with Traffic() as whole:
        step()
    keep_freed_memory()
    began, waited = time.perf_counter(), _waited_s()
    seconds = _interleave({"step_s": step, "forwards_s": lambda: (forward(), forward())}, rounds, world)
    waited = (_waited_s() - waited) / (time.perf_counter() - began)
    count, layers, layer_bytes = _size(loaded.model, cell)
    stored = sum(shard.local.nbytes for shard in shards(loaded.model))
    mine = [*seconds["step_s"], *seconds["forwards_s"], peak - base, stored, waited]
    *times, memory_bytes, stored_bytes, waited = _largest(mine)
    return {
        "step_s": times[:rounds],
        "forwards_s": times[rounds:],
        "loss": loss,
        "memory_bytes": int(memory_bytes),
        "stored_bytes": int(stored_bytes),
        "waited": waited,
        "parameters": count,
        "layers": layers,
        "layer_bytes": layer_bytes,
        "gather_s": _gather_seconds(layer_bytes, rounds, world),
        "matmul_tflops": _matmul_tflops(cell, rounds, world),
        "step_collectives": summed(whole.collectives),
        "forward_collectives": summed(bare.collectives),
        "device_type": world.device.type,
        "device": device_name(world.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def _largest(values: list[float]) -> list[float]:
    """Each value's largest over the ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def _recipe(cell: Cell) -> recipe.Recipe:
    return recipe.parse(
        {
            "model": {"name": cell.model, "dtype": cell.dtype, "compute_dtype": cell.compute_dtype},
            "task": {"data": "random tokens"},
            "sharding": cell.sharding.model_dump(),
        }
    )


def _contenders(cell: Cell, loaded: models.Loaded, world: World) -> tuple[Step, Callable[[], Any]]:
    """A step of the cell's method, and one bare forward on the same rows."""
    model: Any = loaded.model
    made = random_batch(model, cell.rows // cell.world_size, cell.tokens, seed=1 + world.rank)
    batch = {name: tensor.to(loaded.device) for name, tensor in made.items()}

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with loaded.compute():
            return candidates_loss(model, batch)

    def forward() -> float:
        with torch.no_grad():
            return float(objective(model, batch).sum())

    if cell.method == "mezo":
        optimizer = MeZO(model, num_directions=cell.num_directions, dtype=loaded.scratch_dtype)
        return partial(optimizer.step, batch=batch, objective=objective), forward
    rival = RIVALS[cell.method](model)
    return partial(rival.step, batch, objective), forward


def _interleave(contenders: dict[str, Callable[[], Any]], rounds: int, world: World) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round to warm up. All ranks begin each together."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            if dist.is_initialized():
                dist.barrier()
            wait(world.device)
            start = time.perf_counter()
            run()
            wait(world.device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _gather_seconds(nbytes: int, rounds: int, world: World) -> float | None:
    """Median seconds of gathering that many bytes over all ranks."""
    if world.size == 1:
        return None
    mine = torch.zeros(-(-nbytes // world.size), dtype=torch.uint8, device=world.device)
    whole = torch.empty(len(mine) * world.size, dtype=torch.uint8, device=world.device)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    timed = _interleave({"gather": lambda: gather(whole, mine)}, rounds, world)
    return float(np.median(timed["gather"]))


def _matmul_tflops(cell: Cell, rounds: int, world: World) -> float:
    """What multiplying square matrices reaches in the dtype that layers compute in."""
    size, dtype = (1024 if world.device.type == "cpu" else 4096), getattr(torch, cell.compute_dtype or cell.dtype)
    one, other = torch.randn(2, size, size, dtype=dtype, device=world.device)  # beside a model that may fill the device
    out = torch.empty_like(one)
    timed = _interleave({"matmul": lambda: torch.mm(one, other, out=out)}, rounds, world)
    (seconds,) = _largest([float(np.median(timed["matmul"]))])
    return 2 * size**3 / seconds / 1e12


def _size(model: nn.Module, cell: Cell) -> tuple[int, int, int]:
    """Parameters of the model, its decoder layers, and the bytes of one as it is gathered."""
    layers = [unit.module for unit in units(model) if unit.kind == "layer"]
    dtype = cell.dtype if cell.spread.autocasts else cell.compute_dtype or cell.dtype
    layout = discover(model)
    numel = {shard.name: shard.numel for shard in layout.shards}
    first = set(layers[0].modules()) if layers else set()
    each = sum(numel[name] for name in {site.name for site in layout.sites if site.module in first})
    return sum(numel.values()), len(layers), each * getattr(torch, dtype).itemsize


def _compile_kernels(cell: Cell, device: torch.device) -> None:
    """So that what their compiler takes is not counted as the model's."""
    weight = torch.zeros(64, dtype=getattr(torch, cell.dtype), device=device)
    dtypes = {cell.dtype, cell.compute_dtype or cell.dtype}
    for dtype in dtypes:
        out = torch.empty(2, 64, dtype=getattr(torch, dtype), device=device)
        noise.view(weight.to(out.dtype), 1, [(1, 1e-3), (1, -1e-3)], out)
    runs, seeds = np.array([[0, 0, 64]]), np.zeros((1, 1), np.uint64)
    noise.write_(weight, runs, 1, seeds, np.zeros((1, 1), np.float32), np.ones(1, np.float32))


def _import_model(cell: Cell) -> None:
    """The code of the model's architecture, which is no memory of the model's either."""
    config = config_of(cell.model.removeprefix("random:"))
    _ = heads.auto_class(config)._model_mapping[type(config)]
    if cell.spread.is_deepspeed:
        import deepspeed  # noqa: F401


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _waited_s() -> float:
    """Seconds so far that this thread was runnable and did not run; 0 where Linux does not say."""
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def wait(device: torch.device) -> None:
    """For what was launched there."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _reason(error: BaseException) -> str:
    """One line for the row."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MezoError):
        return text
    on_cpu = "DefaultCPUAllocator" in text  # an ordinary RuntimeError there
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or on_cpu:
        return f"out of memory: {text.rpartition('DefaultCPUAllocator: ')[2][:200]}"
    return f"{type(error).__name__}: {text[:200]}"


def main(cell: Cell, rounds: int) -> None:
    """Prints figures, from rank 0, or the reason of a rank that has none; one that is killed prints nothing."""
    silence_transformers()
    rank, failed = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))), False
    try:
        with process_group(always_group=Strategy(cell.strategy).needs_group) as world:
            with world.raise_on_all():
                models.check(_recipe(cell), world)
            answer: dict[str, Any] = {"figures": measure(cell, rounds, world)}
    except Exception as error:
        traceback.print_exc()
        answer, failed = {"reason": _reason(error)}, True
    if failed or rank == 0:
        sys.stderr.flush()
        os.write(1, f"\n{SAID}{json.dumps({'rank': rank} | answer)}\n".encode())  # at once, for ranks share the file
    sys.exit(failed)


if __name__ == "__main__":
    main(Cell(**json.loads(sys.argv[1])), json.loads(sys.argv[2]))
