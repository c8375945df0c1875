"""Runs on a device: a log written there rebuilds the same bits on the CPU, and a step's losses are those of the CPU.

    python -m tools.gpu_conformance [--device cuda]

Small models of several architectures, each under several ways to learn, plain, and over FSDP2 on one rank. Ends with an
error if a weight differs in a bit, or a loss by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mezo_scale as ms
from tests.support import models

ARCHITECTURES = ("opt", "llama", "gemma3", "bert", "t5")
WAYS: dict[str, dict[str, Any]] = {
    "spsa": {"num_directions": 2, "weight_decay": 0.1},
    "grouped": {"estimator": ms.estimators.Grouped(2, 6)},
    "one_sided, signs": {"estimator": ms.estimators.OneSided(3), "distribution": "rademacher"},
    "grouped, low rank": {"estimator": ms.estimators.Grouped(3, 6), "distribution": "low_rank"},
    "master": {"rounding": "master", "dtype": torch.bfloat16},
    "stochastic": {"rounding": "stochastic", "dtype": torch.bfloat16},
}


def run(name: str, way: str, device: torch.device, folder: Path, *, shard: bool) -> str:
    """What is wrong; empty if nothing is."""
    options = dict(WAYS[way])
    dtype = options.pop("dtype", torch.float32)
    model = models.build(name, dtype=dtype).to(device)
    if shard:
        for block in models.blocks(model):
            fully_shard(block)
        fully_shard(model)
    batch = {key: value.to(device) for key, value in models.batch(name, 6).items()}
    log = folder / f"{name}-{way}-{shard}.mezo"
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2, seed=3, trajectory=log, **options)
    losses = [opt.step(batch=batch, objective=models.objective(name)) for _ in range(3)]
    assert opt.trajectory is not None
    opt.trajectory.close()
    beside = models.build(name, dtype=dtype)
    other = ms.MeZO(beside, lr=1e-3, eps=1e-2, seed=3, **options)
    first = other.step(batch=models.batch(name, 6), objective=models.objective(name))
    if abs(first - losses[0]) > (1e-4 if dtype == torch.float32 else 3e-2) * abs(first):
        return f"the first loss is {losses[0]}, on the CPU {first}"
    rebuilt = models.build(name, dtype=dtype)
    ms.replay(rebuilt, log)
    for (parameter, expected), found in zip(rebuilt.named_parameters(), model.parameters(), strict=True):
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        if not torch.equal(expected, whole.cpu()):
            return f"{parameter} differs from what the CPU rebuilds"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29517")}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    wrong = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for shard in (False, True):
            for name in ARCHITECTURES:
                for way in WAYS:
                    found = run(name, way, device, Path(folder), shard=shard)
                    total, wrong = total + 1, wrong + bool(found)
                    layout = "fsdp2" if shard else "plain"
                    print(
                        f"{'WRONG' if found else 'ok   '} {name}, {way}, {layout}{': ' + found if found else ''}",
                        flush=True,
                    )
    dist.destroy_process_group()
    print(f"{total - wrong} of {total} runs are the same on the CPU")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
