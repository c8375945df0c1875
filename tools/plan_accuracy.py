"""How far the planner's memory is from the dry run's, and from what real processes take.

    python tools/plan_accuracy.py                     both tables, as CSV, and a note, in tools/results/; 15 minutes
    python tools/plan_accuracy.py --only dry-run      OPT-1.3B, 13B, 66B on 1 to 64 ranks: the real step on fake tensors
    python tools/plan_accuracy.py --only measured     OPT-125M to 1.3B on 1 and 2 CPU ranks: resident memory
    python tools/plan_accuracy.py --cell opt-125m,2,master,1,400     one cell: model, ranks, storage, rows, tokens

A measured cell starts its ranks anew (gloo, one thread each). Each first takes a step of a toy model of the family, so
that libraries are loaded and kernels compiled: what is resident then is the baseline. Then it makes the model, random,
shard by shard, and takes two steps. The figure is the largest VmHWM of any rank, less its baseline. glibc is told to
map every larger block by itself (MALLOC_MMAP_THRESHOLD_), so that what is freed leaves the process: the planner counts
tensors, not what an allocator keeps of them. The check whether branches can be paired is left out (paired=True): it
evaluates branch by branch, where torch copies the head's weight once per row on CPUs.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pandas as pd

RESULTS = pathlib.Path(__file__).parent / "results"
BASE_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
DRY_MODELS, DRY_RANKS = ("opt-1.3b", "opt-13b", "opt-66b"), (1, 2, 4, 8, 64)
MEASURED_MODELS, MEASURED_RANKS = ("opt-125m", "opt-350m", "opt-1.3b"), (1, 2)
ROWS, TOKENS = 1, 400
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["dry-run", "measured"])
    parser.add_argument("--cell", help="measure one cell and print it as JSON")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    if options.cell:
        model, ranks, storage, rows, tokens = options.cell.split(",")
        print(json.dumps(measured(model, int(ranks), storage == "master", int(rows), int(tokens))))
        return
    tables = {"dry-run": dry_runs, "measured": measurements}
    for name in [options.only] if options.only else tables:
        options.out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(tables[name]()).to_csv(options.out / f"plan_{name.replace('-', '_')}.csv", index=False)
    note(options.out)


def dry_runs() -> Iterator[Row]:
    from mezo_scale.models.shapes import config_of
    from mezo_scale.planner import Strategy, Workload, architecture_of, memory, traffic
    from mezo_scale.planner.dry_run import dry_run

    for model in DRY_MODELS:
        for ranks in DRY_RANKS:
            for master in (False, True):
                strategy = Strategy("single" if ranks == 1 else "fsdp2", shard=ranks, master=master)
                config, arch, workload = config_of(model), architecture_of(model), Workload(ROWS, TOKENS)
                start = time.perf_counter()
                dry, gathered = dry_run(config, strategy, workload)
                assert gathered == traffic(arch, strategy, workload).gathered
                yield row(model, strategy, memory(arch, strategy, workload).peak, dry.peak, start)


def measurements() -> Iterator[Row]:
    for model in MEASURED_MODELS:
        for ranks in MEASURED_RANKS:
            for storage in ("16-bit", "master"):
                cell = f"{model},{ranks},{storage},{ROWS},{TOKENS}"
                ran = subprocess.run(
                    [sys.executable, __file__, "--cell", cell], capture_output=True, text=True, check=True
                )
                yield json.loads(ran.stdout.splitlines()[-1])
                print(f"{cell}: {ran.stdout.splitlines()[-1]}", flush=True)


def measured(model: str, ranks: int, master: bool, rows: int, tokens: int) -> Row:
    """A measured cell: its ranks in processes of their own."""
    from mezo_scale.planner import Strategy, Workload, architecture_of, memory

    strategy = Strategy("single" if ranks == 1 else "fsdp2", shard=ranks, master=master)
    plan = memory(architecture_of(model), strategy, Workload(rows, tokens))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); import plan_accuracy as p; "
        call = f"p.rank({{}}, {ranks}, {model!r}, {master}, {rows}, {tokens}, {folder!r})"
        commands = [[sys.executable, "-c", code + call.format(rank)] for rank in range(ranks)]
        processes = [subprocess.Popen(command, env=os.environ | BASE_ENVIRONMENT) for command in commands]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"a rank of {model} on {ranks} failed")
        found = [json.loads((pathlib.Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    largest = max(found, key=lambda one: one["peak"] - one["baseline"])
    return row(model, strategy, plan.peak, largest["peak"] - largest["baseline"], start) | {
        "baseline_gib": round(largest["baseline"] / 2**30, 3)
    }


def rank(rank: int, ranks: int, name: str, master: bool, rows: int, tokens: int, folder: str) -> None:
    """One process of a measured cell."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import mezo_scale as ms
    from mezo_scale.models import shard_fsdp2
    from mezo_scale.models.shapes import config_of, skeleton
    from mezo_scale.tasks.kinds.candidates import candidates_loss

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(f"{folder}/store", ranks))

    def make(config: Any) -> torch.nn.Module:
        model = skeleton(config, torch.float32 if master else torch.bfloat16)
        if ranks > 1:
            shard_fsdp2(model, init_device_mesh("cpu", (ranks,)), torch.bfloat16 if master else None)
        model.to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                getattr(parameter, "_local_tensor", parameter).normal_(0, 0.02)
        return model

    def train(config: Any, rows: int, tokens: int) -> None:
        dtype = torch.bfloat16 if master and ranks == 1 else None
        compute: Callable[[], Any] = nullcontext
        if dtype is not None:
            compute = partial(torch.autocast, "cpu", dtype, cache_enabled=False)

        def objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with compute():
                return candidates_loss(model, batch)

        optimizer = ms.MeZO(make(config), dtype=dtype, paired=True)
        batch = {
            "input_ids": torch.randint(5, 1000, (rows, tokens)),
            "attention_mask": torch.ones(rows, tokens, dtype=torch.int64),
            "candidate_ids": torch.tensor([[5, 6]] * rows),
            "label": torch.zeros(rows, dtype=torch.int64),
        }
        for _ in range(2):
            optimizer.step(batch=batch, objective=objective)

    toy = config_of(name)
    toy.num_hidden_layers, toy.hidden_size, toy.num_attention_heads, toy.vocab_size = 1, 128, 4, 1024
    toy.ffn_dim, toy.word_embed_proj_dim = 256, 128
    train(toy, 1, 16)
    baseline = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    train(config_of(name), rows, tokens)
    found = {"baseline": baseline, "peak": resident("VmHWM")}
    (pathlib.Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most)."""
    found = re.search(rf"{key}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def row(model: str, strategy: Any, plan: float, found: float, start: float) -> Row:
    return {
        "model": model,
        "strategy": strategy.layout,
        "ranks": strategy.world_size,
        "stored": "float32" if strategy.master else "bfloat16",
        "plan_gib": round(plan / 2**30, 3),
        "found_gib": round(found / 2**30, 3),
        "error_percent": round(100 * (plan / found - 1), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def note(folder: pathlib.Path) -> None:
    """A page over the tables that are there."""
    import torch
    import transformers

    about = {
        "plan_dry_run": "Plan against dry run: the real step on fake tensors and a fake process group",
        "plan_measured": "Plan against resident memory of real processes on the CPU, less a baseline",
    }
    lines = [
        "# How far the plan is off",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, `python tools/plan_accuracy.py`, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {os.cpu_count()} {platform.machine()} cores. {ROWS} row of {TOKENS} "
        "tokens per rank, two branches. GiB per device or process.",
    ]
    for name, title in about.items():
        path = folder / f"{name}.csv"
        if path.is_file():
            rows = pd.read_csv(path)
            worst = rows["error_percent"].abs().max()
            lines += ["", f"## {title}", "", f"Largest error: **{worst:g}%**.", ""]
            table = (rows.columns, ["---"] * len(rows.columns), *rows.astype(str).to_numpy())
            lines += [f"| {' | '.join(row)} |" for row in table]
    (folder / "plan_accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
