"""What 16-bit storage does to MeZO's updates, to the loss, and to the perturbation of normalisation weights.

    python tools/precision.py --model DIR --data CSV [--only survival norms curve] [--out tools/results]

survival: `--steps` updates of slope +-10 on a real weight matrix and on a real normalisation weight, by storage; the
    share of the update that arrives is the projection of what was written on what float64 would have written.
norms: the slope along normalisation weights alone, measured in bfloat16, against the same slope in float32.
curve: the loss of a real model before and after tuning, by storage; every forward computes in bfloat16.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import mezo_scale as ms
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
Row = dict[str, Any]


def survival(model: nn.Module, steps: int) -> Iterator[Row]:
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
                got = _write(base, name, dtype, rounding, seeds, alphas)
                yield {
                    "what": "survival",
                    "storage": storage,
                    "where": f"{'matrix' if name == matrix else 'norm'}, lr {lr:g}",
                    "signal": float(got @ wanted / (wanted @ wanted)),
                    "error": float((got - wanted).norm() / wanted.norm()),
                    "moved": float((got != 0).float().mean()),
                }


def _write(base: Tensor, name: str, dtype: torch.dtype, rounding: str, seeds: np.ndarray, alphas: np.ndarray) -> Tensor:
    """float64 difference that the updates made."""
    local = base.to(dtype)
    before = local.double()
    remainder = torch.zeros_like(local, dtype=torch.int16) if rounding == "master" else None
    runs = np.array([[0, 0, local.numel()]], dtype=np.int64)
    noise.write_(
        local,
        runs,
        noise.param_id(name),
        seeds,
        alphas,
        np.ones(len(seeds), dtype=np.float32),
        remainder=remainder,
        rounding="stochastic" if rounding == "stochastic" else "nearest",
    )
    if remainder is None:
        return local.double() - before
    master = ((local.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)
    return master.double() - before


def norms(folder: str, batches: list[dict[str, Tensor]], directions: int) -> Iterator[Row]:
    """Slopes along normalisation weights, in float32 and with 16-bit weights."""
    slopes: dict[str, dict[float, Tensor]] = {}
    for storage, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = _load(folder, dtype)
        for name, param in model.named_parameters():
            param.requires_grad_("norm" in name)
        for eps in (1e-3, 4e-3):
            opt = ms.MeZO(model, lr=1e-30, eps=eps, num_directions=1)
            found = []
            for batch in batches[:directions]:
                opt.step(batch=batch, objective=candidate_loss)
                found.append(opt.last_record.projected_grads[0])
            slopes.setdefault(storage, {})[eps] = torch.tensor(found, dtype=torch.float64)
    for eps, right in slopes["float32"].items():
        found = slopes["bfloat16"][eps]
        yield {
            "what": "norms",
            "storage": "bfloat16",
            "where": f"eps {eps:g}, {len(right)} directions",
            "signal": float(torch.corrcoef(torch.stack([found, right]))[0, 1]),
            "error": float((found - right).norm() / right.norm()),
            "moved": float(right.abs().mean()),
        }


def curve(folder: str, batches: list[dict[str, Tensor]], held: dict[str, Tensor], lr: float) -> Iterator[Row]:
    """Loss on held-out rows before and after the same steps in every storage."""
    for storage, (dtype, rounding) in STORAGES.items():
        if storage == "float16 stochastic":
            continue
        model = _load(folder, dtype)
        opt = ms.MeZO(model, lr=lr, eps=4e-3, rounding=rounding, dtype=torch.bfloat16)

        def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return candidate_loss(model, batch)

        losses = []
        with torch.no_grad():
            losses.append(float(objective(model, held).mean()))
            for batch in batches:
                opt.step(batch=batch, objective=objective)
            losses.append(float(objective(model, held).mean()))
        yield {
            "what": "curve",
            "storage": storage,
            "where": f"{len(batches)} steps, lr {lr:g}: loss from {losses[0]:.4f}",
            "signal": losses[1],
            "error": losses[0] - losses[1],
            "moved": float("nan"),
        }


def candidate_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy over two answers at the last position of left-padded prompts."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1
    ).logits[:, -1]
    answers = batch["answers"][0]
    return F.cross_entropy(logits.float()[:, answers], batch["labels"], reduction="none")


def read(folder: str, path: str, count: int, rows: int) -> list[dict[str, Tensor]]:
    """Batches of the sentiment task."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = torch.tensor([tokenizer.encode(word, add_special_tokens=False)[0] for word in (" terrible", " great")])
    with open(path, newline="", encoding="utf-8") as file:
        examples = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(examples))[: count * rows]
    batches = []
    for start in range(0, count * rows, rows):
        chosen = [examples[i] for i in order[start : start + rows]]
        tokens = tokenizer([f"{e['text']} It was" for e in chosen], padding=True, return_tensors="pt")
        labels = torch.tensor([int(e["label"]) for e in chosen])
        batches.append({**tokens, "labels": labels, "answers": answers.expand(len(chosen), -1)})
    return batches


def _load(folder: str, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/model", help="folder of a causal language model")
    parser.add_argument("--data", default=".demo/rotten_tomatoes.csv", help="CSV with text and label (0, 1)")
    parser.add_argument(
        "--only", nargs="+", choices=["survival", "norms", "curve"], default=["survival", "norms", "curve"]
    )
    parser.add_argument("--steps", type=int, default=2000, help="updates of the survival part")
    parser.add_argument("--curve-steps", type=int, default=60, help="steps of the loss curve, 16 rows each")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate of the loss curve")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tools/results"))
    options = parser.parse_args()
    if not pathlib.Path(options.model).is_dir() or not pathlib.Path(options.data).is_file():
        parser.error(
            f"{options.model} or {options.data} is not there: run `make demo` once, or give --model and --data"
        )
    rows: list[Row] = []
    parts = []
    if "survival" in options.only:
        parts.append(survival(_load(options.model, torch.float32), options.steps))
    if {"norms", "curve"} & set(options.only):
        batches = read(options.model, options.data, options.curve_steps, 16)
        if "norms" in options.only:
            parts.append(norms(options.model, batches, 12))
        if "curve" in options.only:
            held = read(options.model, options.data, options.curve_steps // 8 + 2, 128)[-1]
            parts.append(curve(options.model, batches, held, options.lr))
    for part in parts:
        for row in part:
            rows.append(row)
            print(
                "{what:9} {storage:20} {where:45} {signal:10.4f} {error:10.4f} {moved:8.4f}".format(**row), flush=True
            )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"precision-{platform.machine()}-{datetime.date.today()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
