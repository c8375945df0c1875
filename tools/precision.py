"""What storage keeps of MeZO's updates: table 1 of docs/decisions/0005-precision.md.

    python tools/precision.py [--model DIR] [--steps 2000] [--out tools/results]

The same updates of slope +-10 go into a real weight matrix and a real normalisation weight, by storage. Signal is the
projection of what was written on what float64 would have written, error the distance between the two over the length of
the second, moved the part of the elements that changed.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezo_scale import noise

STORAGES = {  # name: dtype, rounding
    "float32": (torch.float32, "nearest"),
    "float16": (torch.float16, "nearest"),
    "float16 stochastic": (torch.float16, "stochastic"),
    "bfloat16 + master": (torch.bfloat16, "master"),
    "bfloat16 stochastic": (torch.bfloat16, "stochastic"),
    "bfloat16": (torch.bfloat16, "nearest"),
}
SLOPE = 10.0


def survival(model: nn.Module, steps: int) -> Iterator[dict[str, Any]]:
    """The same updates into every storage."""
    named = dict(model.named_parameters())
    matrix = next(name for name, param in named.items() if param.dim() == 2 and "proj" in name)
    norm = next(name for name in named if "norm" in name)
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**63, (steps, 1), dtype=np.uint64)
    slopes = SLOPE * rng.choice([-1.0, 1.0], (steps, 1))
    for lr in (1e-6, 1e-7):
        alphas = (-lr * slopes).astype(np.float32)
        for name in (matrix, norm):
            base = named[name].detach().float().reshape(-1)
            wanted = torch.zeros_like(base, dtype=torch.float64)
            for seed, alpha in zip(seeds[:, 0].tolist(), alphas[:, 0].tolist(), strict=True):
                wanted += alpha * noise.normal(seed, noise.param_id(name), 0, base.numel()).double()
            for storage, (dtype, rounding) in STORAGES.items():
                got = written(base, name, dtype, rounding, seeds, alphas)
                yield {
                    "what": "survival",
                    "storage": storage,
                    "where": f"{'matrix' if name == matrix else 'norm'}, lr {lr:g}",
                    "signal": float(got @ wanted / (wanted @ wanted)),
                    "error": float((got - wanted).norm() / wanted.norm()),
                    "moved": float((got != 0).float().mean()),
                }


def written(
    base: Tensor, name: str, dtype: torch.dtype, rounding: str, seeds: np.ndarray, alphas: np.ndarray
) -> Tensor:
    """float64 difference that the updates made."""
    local = base.to(dtype)
    before = local.double()
    remainder = torch.zeros_like(local, dtype=torch.int16) if rounding == "master" else None
    runs, decays = np.array([[0, 0, local.numel()]], dtype=np.int64), np.ones(len(seeds), dtype=np.float32)
    nearest = "nearest" if remainder is not None else rounding
    noise.write_(local, runs, noise.param_id(name), seeds, alphas, decays, remainder=remainder, rounding=nearest)
    if remainder is None:
        return local.double() - before
    master = ((local.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)
    return master.double() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/model", help="folder of a causal language model")
    parser.add_argument("--steps", type=int, default=2000, help="updates")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        parser.error(f"{options.model} is not there: run `make demo` once, or give --model")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    found = pd.DataFrame(survival(model, options.steps))
    path = options.out / f"precision-survival-{platform.machine()}-{datetime.date.today()}.csv"
    found.to_csv(path, index=False)
    print(found.to_string(index=False), path, sep="\n")


if __name__ == "__main__":
    main()
