"""What the check of eps says of rounding and curvature in bfloat16, beside the truth: the same losses in float32.

    python -m tools.eps_accuracy [--model .demo/model] [--data .demo/rotten_tomatoes.csv] [--out tools/results]

A row for each eps: root mean squares over batches, directions and rows of half of what a row's losses on the two sides
differ by (the slope times eps), and of the errors in it. True rounding is what that differs by from float32's. True
curvature is float32's, less what it is at a small eps, scaled up. 504 forwards: about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.noise import direction_seed
from mezo_scale.optim import eps as checked

SCALES = (1e-3, 4e-3, 1.6e-2)
BATCHES, DIRECTIONS, ROWS, TOKENS = 3, 3, 4, 32

Losses = npt.NDArray[np.float64]
"""[batches, directions, places, 2 sides, rows]."""


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The choice between two answers."""
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    last = logits[torch.arange(len(logits)), batch["last"]].float()
    return nn.functional.cross_entropy(last.gather(1, batch["answers"]), batch["label"], reduction="none")


def batch_of(tokenizer: object, table: pd.DataFrame, seed: int) -> dict[str, Tensor]:
    short = table[table["text"].str.split().str.len() < 24]
    rows = short.sample(ROWS, random_state=seed)
    encoded = [tokenizer.encode(f"{text} It was")[-TOKENS:] for text in rows["text"]]  # type: ignore[attr-defined]
    answers = [tokenizer.encode(word)[0] for word in (" terrible", " great")]  # type: ignore[attr-defined]
    lengths = torch.tensor([len(ids) for ids in encoded])
    ids = torch.tensor([row + [0] * (TOKENS - len(row)) for row in encoded])
    return {
        "ids": ids,
        "mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
        "last": lengths - 1,
        "answers": torch.tensor([answers] * ROWS),
        "label": torch.tensor(rows["label"].to_numpy()),
    }


def looked(optimizer: ms.MeZO, batches: list[dict[str, Tensor]], eps: float, *, half: bool) -> Losses:
    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            return loss(model, batch)

    def along(seed: int, batch: dict[str, Tensor]) -> Losses:
        return checked._along(
            seed, eps, lambda branches: optimizer._evaluator.per_row(batch, objective, branches).numpy()
        )

    return np.stack(
        [
            np.stack([along(direction_seed(number, 0, k), batch) for k in range(DIRECTIONS)])
            for number, batch in enumerate(batches)
        ]
    )


def summary(half: dict[float, Losses], single: dict[float, Losses]) -> pd.DataFrame:
    """A row for each eps, from the losses in bfloat16 and in float32."""
    smallest = min(single)
    straight = np.einsum("p,bkpr->bkr", checked._SEEN, _odd(single[smallest])) / smallest
    rows = []
    for eps in half:
        odd, exact = _odd(half[eps]), _odd(single[eps])
        seen, bent = (np.einsum("p,bkpr->bkr", checked._SEEN, part) for part in (odd, exact))
        found = [checked._shares(one, eps, None, ROWS, one_sided=False) for one in half[eps]]
        errors = (odd - exact)[:, :, 1:5]
        rows.append(
            {
                "eps": eps,
                "slope_row": _rms(seen),
                "rounding_row_true": _rms(errors),
                "rounding_row_found": _rms(np.einsum("p,bkpr->bkr", checked._THIRD, odd)),
                "slope": _rms(seen.mean(2)),
                "rounding_true": _rms(errors.mean(3)),
                "rounding_found": _rms(np.array([one.rounding * one.slope * eps for one in found])),
                "curvature_true": _rms((bent - straight * eps).mean(2)),
                "curvature_found": _rms(np.array([one.curvature * one.slope * eps for one in found])),
            }
        )
    return pd.DataFrame(rows)


def _odd(losses: Losses) -> Losses:
    difference: Losses = (losses[:, :, :, 0] - losses[:, :, :, 1]) / 2
    return difference


def _rms(values: Losses) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/model")
    parser.add_argument("--data", default=".demo/rotten_tomatoes.csv")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    tokenizer, table = AutoTokenizer.from_pretrained(options.model), pd.read_csv(options.data)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    batches = [batch_of(tokenizer, table, seed) for seed in range(BATCHES)]
    halves, singles = ms.MeZO(model, dtype=torch.bfloat16, paired=True), ms.MeZO(model, paired=True)
    half = {eps: looked(halves, batches, eps, half=True) for eps in SCALES}
    single = {eps: looked(singles, batches, eps, half=False) for eps in SCALES}
    found = summary(half, single)
    found.round(5).to_csv(options.out / "eps_accuracy.csv", index=False)
    print(found.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
