"""Every family of language models and every PEFT method: the perturbed view against copies that were really moved.

    python -m tools.model_sweep                        the whole table; about 15 minutes in one process, hours sharded
    python -m tools.model_sweep --layout plain         one of plain, fsdp2, zero3 (two ranks over gloo)
    python -m tools.model_sweep --only causal/llama adapter/LORA
    python -m tools.model_sweep --report               docs/models.md from the rows there are

A row is right if the losses under the view equal those of deep copies whose weights were moved by the same noise, to
1e-5, one branch at a time and all branches in one batch; or if the view refuses, with a reason. Rows are appended to
tools/results/model_sweep.jsonl as they are made, and a sweep that was stopped goes on. Workers take a chunk of cells
each. One that dies or hangs costs the cell that it was at, which is tried once more by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tools" / "results" / "model_sweep.jsonl"
CHUNK, CELL_LIMIT_S, START_LIMIT_S = 24, 120, 120
COLLECTIVE_LIMIT_S = 60
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
RANKS = {"plain": 1, "fsdp2": 2, "zero3": 2}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=list(RANKS), action="append", help="default: all")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="as causal/llama, masked, adapter/LORA")
    parser.add_argument("--again", action="store_true", help="make these cells anew, whatever rows there are")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--report", action="store_true", help="write docs/models.md and leave")
    parser.add_argument("--work", metavar="LAYOUT", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        from tools.model_report import write

        write(latest(options.rows), ROOT / "docs" / "models.md")
    elif options.work:
        work(options.work, options.only, options.rows, options.rank, options.store)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending the workers
        for layout in options.layout or RANKS:
            sweep(layout, _chosen(options.only), options.rows, again=options.again)


def latest(path: Path) -> dict[tuple[str, str], Row]:
    """(layout, cell) -> its newest row."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["layout"], row["cell"]): row for row in rows}


def _chosen(only: list[str] | None) -> list[str]:
    from tools import tiny_adapters, tiny_models

    names = [*tiny_models.families(), *(f"adapter/{name}" for name in tiny_adapters.adapters())]
    return [name for name in names if only is None or name in only or name.split("/")[0] in only]


# -- the sweep: workers are given chunks ------------------------------------------------------------------------------


def sweep(layout: str, names: list[str], path: Path, *, again: bool = False) -> None:
    """Makes the rows that are missing."""
    _mend(path)
    had = {} if again else latest(path)
    missing = [name for name in names if (layout, name) not in had]
    chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    while chunks:
        chunk = chunks.pop(0)
        start = path.stat().st_size
        end = _run(layout, chunk, path)
        left = [name for name in chunk if name not in _made(path, start)]
        if left and len(chunk) == 1:
            append(path, layout, chunk[0], {"failed": end})
        elif left:
            chunks[:0] = [part for part in ([left[0]], left[1:]) if part]
        print(f"{layout}: {sum(map(len, chunks))} cells left", flush=True)


def _mend(path: Path) -> None:
    """A file that ends with a whole row, or is empty: a sweep that was killed may have left half a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else b""
    path.write_bytes(whole[: whole.rfind(b"\n") + 1])


def _made(path: Path, start: int) -> set[str]:
    with path.open("rb") as file:
        file.seek(start)
        return {json.loads(line)["cell"] for line in file}


def _run(layout: str, chunk: list[str], path: Path) -> str:
    """One worker, or one of each rank, for a chunk; how it ended."""
    with tempfile.TemporaryDirectory(prefix="mezo-sweep-") as folder:
        command = [sys.executable, "-m", "tools.model_sweep", "--work", layout, "--rows", str(path)]
        command += ["--store", f"{folder}/store", "--only", *chunk]
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], cwd=ROOT, env=os.environ | ENVIRONMENT, start_new_session=True
            )
            for rank in range(RANKS[layout])
        ]
        try:
            return _wait(ranks, path)
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()


def _wait(ranks: list[subprocess.Popen[bytes]], path: Path) -> str:
    """Until all have ended, or no row has come for too long."""
    size, since, limit = -1, time.monotonic(), START_LIMIT_S + CELL_LIMIT_S
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            return f"the process ended with code {max(codes, key=lambda code: abs(code or 0))}"
        now = path.stat().st_size
        if now != size:
            limit = START_LIMIT_S + CELL_LIMIT_S if size < 0 else CELL_LIMIT_S
            size, since = now, time.monotonic()
        if time.monotonic() - since > limit:
            return f"no answer in {CELL_LIMIT_S} s"
        time.sleep(0.2)


def append(path: Path, layout: str, name: str, result: dict[str, Any]) -> None:
    row = {"layout": layout, "cell": name, **result, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# -- a worker ---------------------------------------------------------------------------------------------------------


def work(layout: str, names: list[str], path: Path, rank: int, store: str) -> None:
    """Makes the rows of a chunk, in order. Where several ranks work, a failure ends them: they may be out of step."""
    import torch
    import transformers

    from tools import tiny_adapters, tiny_models, view_against_copy

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    builders = tiny_models.families() | {f"adapter/{name}": build for name, build in tiny_adapters.adapters().items()}
    with _group(layout, rank, store):
        for name in names:
            start = time.monotonic()
            try:
                result = view_against_copy.cell(layout, builders[name])
            except view_against_copy.UnusableError as error:  # on every rank alike
                result = {"unusable": str(error)}
            except Exception as error:
                traceback.print_exc(limit=-4)
                result = {"failed": view_against_copy.in_words(error)}
            if rank == 0:
                scale = max(abs(scale) for _, scale in view_against_copy.BRANCHES)
                append(path, layout, name, {**result, "scale": scale, "seconds": round(time.monotonic() - start, 1)})
            if "failed" in result and RANKS[layout] > 1:
                os._exit(0)


@contextlib.contextmanager
def _group(layout: str, rank: int, store: str) -> Iterator[None]:
    world_size = RANKS[layout]
    if world_size == 1:
        yield
        return
    import deepspeed
    import torch.distributed as dist

    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_LIMIT_S),
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its first use would compile for a minute
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
