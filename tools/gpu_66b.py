"""The published sizes on one GPU: 1.3B, 13B and 30B inside one A100's memory, 66B on a device of 141 GB.

    python tools/gpu_66b.py                      under 9 minutes; adds a dated note and its rows to tools/results/

NOT YET RUN ON A GPU: its logic is tested on a CPU with a tiny model. Random weights in OPT's shapes, bfloat16, a batch
of 16 rows of 400 tokens. The paper's figures (Malladi et al., 2023, arXiv 2305.17333) are of an A100-80GB, the same
batch, 16-bit weights, real data of varying length: they are there for scale, not for a race.

- Up to 30B a rank may take 80 GB (10^9 bytes): `torch.cuda.set_per_process_memory_fraction`. 66B has the whole device.
- Full fine-tuning with AdamW is tried at every size; where it runs out of memory, the row says so.
- Each cell is a process of its own. None is started that could not end in time, and one that takes longer is ended.
"""

import argparse
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from mezo_scale.bench import report, sweep
from mezo_scale.bench.cell import Cell, short_name
from mezo_scale.bench.figures import Figures, figures
from mezo_scale.distributed.launcher import Launcher

A100_GIB = 80e9 / 2**30
MODELS = ["random:opt-1.3b", "random:opt-13b", "random:opt-30b", "random:opt-66b"]
WHOLE = "random:opt-66b"
PAPER_S = {"opt-1.3b": 0.815, "opt-13b": 2.702, "opt-30b": 5.896}  # MeZO, batch 16, one A100
LEAST_S = 20  # a cell that has less time left is not started


def cells(models: list[str], rows: int, tokens: int) -> list[Cell]:
    """What matters most comes first: MeZO at every size, then full fine-tuning, then MeZO as published."""
    ours = [
        Cell(
            model,
            "single",
            1,
            rows,
            tokens,
            dtype="bfloat16",
            memory_cap_gib=None if model == WHOLE else A100_GIB,
        )
        for model in models
    ]
    full = [replace(cell, method="adamw", strategy="fsdp2") for cell in ours]
    return [*ours, *full, *(replace(cell, method="published") for cell in ours if cell.model != WHOLE)]


def note(rows: list[sweep.Row], device: str) -> str:
    """The table, in Markdown."""
    lines = [
        f"# OPT on one {device}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        "`python tools/gpu_66b.py`; random weights, bfloat16; see there what is compared with what.",
        "",
        "| model | method | batch | may take | s/step | paper, A100 | x two forwards | peak GiB | planned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cell = Cell(**row["cell"])
        name = short_name(cell.model.removeprefix("random:"))
        cap = "all" if cell.memory_cap_gib is None else f"{cell.memory_cap_gib:.1f} GiB"
        paper = f"{PAPER_S[name]:.3f}" if cell.method != "adamw" and name in PAPER_S else "—"
        batch = f"{cell.rows} x {cell.tokens}"
        if "reason" in row:
            shown = [row["reason"].replace("|", "/"), paper, "—", "—", "—"]
        else:
            shown = _shown(figures(row), paper)
        lines.append(f"| {' | '.join([name, cell.method, batch, cap, *shown])} |")
    return "\n".join(lines) + "\n"


def _shown(one: Figures, paper: str) -> list[str]:
    planned = "—" if one.planned_gib is None else f"{one.planned_gib:.1f}"
    step = f"{one.step_s:.3f} ({one.low_s:.3f} to {one.high_s:.3f})"
    return [step, paper, f"{one.ratio:.2f}", f"{one.peak_gib:.1f}", planned]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=510, help="when the last cell is ended")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--any-device", action="store_true", help="go on without a GPU, for trying out")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.any_device:
        parser.exit(2, "error: there is no GPU; expected one, of 141 GB for 66B (--any-device goes on without)\n")
    began = time.monotonic()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name = f"opt_{'cuda' if torch.cuda.is_available() else 'cpu'}_{datetime.now(UTC):%Y%m%d}"
    out, wanted = options.out / name, cells(options.model or MODELS, options.rows, options.tokens)
    rows: list[sweep.Row] = []
    for cell in wanted:
        left = options.budget_s - (time.monotonic() - began)
        if left < LEAST_S:
            print(f"no time left for {cell}; the same command again goes on with it", flush=True)
            continue
        rows += sweep.run([cell], out, Launcher("none"), rounds=options.rounds, timeout_s=left)
        (out / "note.md").write_text(note(rows, device), encoding="utf-8")  # whatever happens next, this much is there
    print(note(rows, device))
    print(f"written: {out / 'note.md'}, {report.write(rows, out)}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
