"""How fast the noise is, and what it adds to a step: ratios measured interleaved in one run, with their spread.

    python tools/kernel_bench.py [--model DIR] [--out tools/results]

Every contender runs once a round, round after round, so that whatever else the machine does falls on all of them. A
ratio is taken within each round; printed are the median, the 10th to 90th percentile, and the ratio of the fastest
rounds. On CUDA devices time is what events on the device say. On a CPU the kernels are timed on one thread and on all,
with memory allocated as Python and torch do; the step on the model in --model, bfloat16, with freed memory kept. On a
GPU the step is timed on random weights in OPT's shapes, 16 rows of 400 tokens. A row per figure goes to a CSV file in
--out.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import pathlib
import sys
import time
import unittest.mock as mock
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale import noise
from mezo_scale.bench.measure import device_name, wait
from mezo_scale.distributed.memory import keep_freed_memory
from mezo_scale.perturbation import view

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_MODELS = {"125M": (768, 12, 12), "1.3B": (2048, 24, 32), "6.7B": (4096, 32, 32), "13B": (5120, 40, 40)}
GPU_ROWS = [(16, 400)]
CPU_ROWS = [(16, 48), (16, 128)]
PARAM_ID = noise.param_id("bench")

Contender = Callable[[], object]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """One row of the file: `what` compared with `against`, in speed or in time.

    ratio, low, high: median, 10th and 90th percentile of the rounds. best: of the fastest round of each, which is the
    one to trust on a machine that others use too. seconds: median of `what`.
    """

    what: str
    against: str
    measure: str
    dtype: str
    size: str
    directions: int
    threads: int
    ratio: float
    low: float
    high: float
    best: float
    seconds: float
    rounds: int


def interleave(
    contenders: dict[str, Contender],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of every contender in every round, after one round to warm up."""
    seconds: Seconds = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            wait(device)
            took = by_events(run) if device.type == "cuda" else by_clock(run, clock, device)
            if number:
                seconds[name].append(took)
    return seconds


def by_clock(run: Contender, clock: Callable[[], float], device: torch.device) -> float:
    start = clock()
    run()
    wait(device)
    return clock() - start


def by_events(run: Contender) -> float:
    """Seconds on the device. It sleeps first, so that Python's time before a launch is not in them, unless what runs
    waits for the device itself."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def figure(
    seconds: Seconds, what: str, against: str, dtype: str, size: str, directions: int = 1, measure: str = "speed"
) -> Figure:
    ours, theirs = np.array(seconds[what]), np.array(seconds[against])
    if measure == "speed":
        ratios, best = theirs / ours, theirs.min() / ours.min()
    else:
        ratios, best = ours / theirs, ours.min() / theirs.min()
    low, ratio, high = map(float, np.percentile(ratios, [10, 50, 90]))
    numbers = (ratio, low, high, float(best), float(np.median(ours)), len(ours))
    return Figure(what, against, measure, dtype, size, directions, torch.get_num_threads(), *numbers)


def kernels(device: torch.device, count: int, rounds: int) -> Iterator[Figure]:
    """The write and the view against a copy of the same bytes, and against torch.normal and add_."""
    runs = np.array([[0, 0, count]])
    for name, dtype in DTYPES.items():
        weight = torch.randn(count, device=device).to(dtype)
        other, pair = torch.empty_like(weight), torch.empty(2, count, dtype=dtype, device=device)
        for directions in (1, 4):
            seeds = np.arange(directions, dtype=np.uint64)[None]
            alphas, decays = np.full((1, directions), 1e-7, np.float32), np.ones(1, np.float32)
            contenders: dict[str, Contender] = {
                "write": partial(noise.write_, weight, runs, PARAM_ID, seeds, alphas, decays),
                "copy": partial(other.copy_, weight),
                "normal, add_": partial(add_normals, weight, directions),
            }
            seconds = interleave(contenders, rounds, device)
            for against in ("copy", "normal, add_"):
                yield figure(seconds, "write", against, name, f"{count} elements", directions)
        contenders = {
            "view": partial(noise.view, weight, PARAM_ID, [(5, 1e-3), (5, -1e-3)], pair),
            "copy": partial(copy_half_as_much_again, weight, other),  # a view reads one and writes two
            "normal, add": partial(view_by_torch, weight, pair),
        }
        seconds = interleave(contenders, rounds, device)
        for against in ("copy", "normal, add"):
            yield figure(seconds, "view", against, name, f"{count} elements")


def add_normals(weight: Tensor, directions: int) -> None:
    for _ in range(directions):
        weight.add_(torch.normal(0.0, 1.0, weight.shape, dtype=weight.dtype, device=weight.device), alpha=1e-7)


def copy_half_as_much_again(weight: Tensor, other: Tensor) -> None:
    other.copy_(weight)
    half = len(weight) // 2
    other[:half].copy_(weight[:half])


def view_by_torch(weight: Tensor, pair: Tensor) -> None:
    z = torch.normal(0.0, 1.0, weight.shape, dtype=weight.dtype, device=weight.device)
    torch.add(weight, z, alpha=1e-3, out=pair[0])
    torch.add(weight, z, alpha=-1e-3, out=pair[1])


def scaling(count: int, rounds: int, threads: int) -> Iterator[Figure]:
    """The same write on one thread and on all; and a sine by torch, for what this machine's cores give together."""
    runs, seeds = np.array([[0, 0, count]]), np.zeros((1, 1), np.uint64)
    angles, sines = torch.randn(count), torch.empty(count)

    def sine(threads: int) -> None:
        torch.set_num_threads(threads)
        torch.sin(angles, out=sines)

    for name, dtype in DTYPES.items():
        weight = torch.randn(count).to(dtype)

        def write(threads: int, weight: Tensor = weight) -> None:
            torch.set_num_threads(threads)
            noise.write_(weight, runs, PARAM_ID, seeds, np.full((1, 1), 1e-7), np.ones(1))

        seconds = interleave(
            {
                f"{what}, {n} threads": partial(run, n)
                for what, run in (("write", write), ("sine", sine))
                for n in (1, threads)
            },
            rounds,
            torch.device("cpu"),
        )
        for what in ("write", "sine"):
            used = name if what == "write" else "float32"
            yield figure(seconds, f"{what}, {threads} threads", f"{what}, 1 threads", used, f"{count} elements")


def last_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1).logits[:, -1]
    return nn.functional.cross_entropy(logits.float(), batch["label"], reduction="none")


def steps(model: nn.Module, name: str, shapes: list[tuple[int, int]], rounds: int) -> Iterator[Figure]:
    """A whole step against two bare forwards on the same rows."""
    model.eval()
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    optimizer = ms.MeZO(model, lr=1e-7)
    for rows, tokens in shapes:
        batch = {
            "input_ids": torch.randint(vocabulary, (rows, tokens), device=device),
            "label": torch.randint(vocabulary, (rows,), device=device),
        }

        def forwards(batch: dict[str, Tensor] = batch) -> None:
            with torch.no_grad():
                for _ in range(2):
                    last_token_loss(model, batch).sum().item()

        step = partial(optimizer.step, batch=batch, objective=last_token_loss)

        def unguarded(step: Callable[[], object] = step) -> None:
            """A step in which nobody sees what modules fetch: what looking costs."""
            with mock.patch.object(view, "fetching", return_value=nullcontext()):
                step()

        contenders: dict[str, Contender] = {"step": step, "two forwards": forwards, "unguarded step": unguarded}
        seconds = interleave(contenders, rounds, device)
        size = f"{name}, {rows} x {tokens} tokens"
        for against in ("two forwards", "unguarded step"):
            yield figure(seconds, "step", against, str(dtype).removeprefix("torch."), size, measure="time")


def gpu_models(device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    from transformers import AutoModelForCausalLM, OPTConfig

    free = torch.cuda.mem_get_info(device)[0]
    for name, (hidden, layers, heads) in GPU_MODELS.items():
        if 12 * hidden**2 * layers * 2 * 1.5 > free:
            print(f"{name} left out: this GPU has {free / 2**30:.0f} GiB free")
            continue
        config = OPTConfig(hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads)
        config.word_embed_proj_dim = hidden
        with device:
            yield name, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def report(figures: Iterator[Figure], table: list[Figure]) -> None:
    for row in figures:
        table.append(row)
        print(
            f"{row.what:18} {row.dtype:9} {row.size:26} K={row.directions} threads={row.threads:<2} "
            f"{row.ratio:7.3f} x the {row.measure} of {row.against:15} ({row.low:.3f} to {row.high:.3f}, "
            f"best {row.best:.3f}) {row.seconds * 1e3:9.2f} ms",
            flush=True,
        )


def save(table: list[Figure], folder: pathlib.Path, device: torch.device) -> pathlib.Path:
    now = datetime.datetime.now(datetime.UTC)
    about = {
        "date": now.strftime("%Y-%m-%d %H:%M"),
        "hardware": f"{device_name(device)}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "command": " ".join(["python -m", f"tools.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels_{device.type}_{now:%Y%m%d}.csv"
    rows = pd.DataFrame([about | asdict(row) for row in table])
    rows.to_csv(path, mode="a", header=not path.exists(), index=False)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--model", help="folder of a real causal language model, for the step on a CPU")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument("--only", choices=["kernels", "step"], help="one half of the figures")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device(options.device)
    table: list[Figure] = []
    threads = torch.get_num_threads()
    if options.only != "step":
        if device.type == "cpu":
            torch.set_num_threads(1)
            report(kernels(device, 1 << 24, options.rounds), table)
            if threads > 1:
                report(scaling(1 << 24, options.rounds, threads), table)
                torch.set_num_threads(threads)
        else:
            report(kernels(device, 1 << 28, options.rounds), table)
    if options.only != "kernels" and device.type == "cpu" and options.model:
        from transformers import AutoModelForCausalLM

        keep_freed_memory()
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        report(steps(model, pathlib.Path(options.model).name, CPU_ROWS, options.rounds), table)
    elif options.only != "kernels" and device.type == "cuda":
        for name, model in gpu_models(device):
            report(steps(model, name, GPU_ROWS, options.rounds), table)
            del model
            gc.collect()
            torch.cuda.empty_cache()
    if not table:
        parser.error("nothing to measure: give --model for the step on a CPU")
    print(f"written to {save(table, options.out, device)}")


if __name__ == "__main__":
    main()
