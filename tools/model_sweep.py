"""Every family of language models and every PEFT method: the perturbed view against copies that were really moved.

    python -m tools.model_sweep                        the whole table; about 15 minutes in one process, hours sharded
    python -m tools.model_sweep --layout plain         one of plain, fsdp2, zero3 (two ranks over gloo)
    python -m tools.model_sweep --only causal/llama adapter/LORA
    python -m tools.model_sweep --report               docs/models.md from the rows there are

A row is right if the losses under the view equal those of deep copies whose weights were moved by the same noise, to
1e-5, one branch at a time and all branches in one batch; or if the view refuses, with a reason. Rows are appended to
tools/results/model_sweep.jsonl as they are made, and a sweep that was stopped goes on. The ranks are the tests' warm
workers. A cell that fails, dies or hangs is tried once more, in workers of its own.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import time
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.support.pool import ROOT, RankFailed, Ranks
from tools import model_report, tiny_adapters, tiny_models
from tools.view_against_copy import BRANCHES, UnusableError, cell

ROWS = ROOT / "tools" / "results" / "model_sweep.jsonl"
WORLD_SIZES = {"plain": 1, "fsdp2": 2, "zero3": 2}
CELL_LIMIT_S = 120
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=list(WORLD_SIZES), action="append", help="default: all")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="as causal/llama, masked, adapter/LORA")
    parser.add_argument("--again", action="store_true", help="make these cells anew, whatever rows there are")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--report", action="store_true", help="write docs/models.md and leave")
    options = parser.parse_args()
    if options.report:
        return model_report.write(latest(options.rows), ROOT / "docs" / "models.md")
    only = options.only
    names = [name for name in builders() if only is None or name in only or name.split("/")[0] in only]
    with closing(Ranks(max(WORLD_SIZES.values()))) as ranks:
        for layout in options.layout or WORLD_SIZES:
            sweep(ranks, layout, names, options.rows, again=options.again)
    return None


@functools.cache
def builders() -> dict[str, tiny_models.Builder]:
    """By the name of a cell."""
    return tiny_models.families() | {f"adapter/{name}": build for name, build in tiny_adapters.adapters().items()}


def latest(path: Path) -> dict[tuple[str, str], Row]:
    """(layout, cell) -> its newest row. Half a line at the end is of a sweep that was killed."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["layout"], row["cell"]): row for row in rows}


def sweep(ranks: Ranks, layout: str, names: list[str], path: Path, *, again: bool = False) -> None:
    """Makes the rows that are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else b""
    path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    had = {} if again else latest(path)
    missing = [name for name in names if (layout, name) not in had]
    for left, name in zip(reversed(range(len(missing))), missing, strict=True):
        start = time.monotonic()
        try:
            result = _made(ranks, layout, name, fresh=False)
        except RankFailed:
            try:
                result = _made(ranks, layout, name, fresh=True)
            except RankFailed as error:
                result = {"failed": error.why}
        scale = max(abs(scale) for _, scale in BRANCHES)
        append(path, layout, name, {**result, "scale": scale, "seconds": round(time.monotonic() - start, 1)})
        print(f"{layout}: {left} cells left", flush=True)


def append(path: Path, layout: str, name: str, result: Row) -> None:
    row = {"layout": layout, "cell": name, **result, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _made(ranks: Ranks, layout: str, name: str, *, fresh: bool) -> Row:
    return ranks(WORLD_SIZES[layout], on_rank, layout=layout, name=name, timeout_s=CELL_LIMIT_S, fresh=fresh)[0]


def on_rank(layout: str, name: str) -> Row:
    """A cell, on each of its ranks; of one that can't be compared, why."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return cell(layout, builders()[name])
        except UnusableError as error:
            return {"unusable": str(error)}


if __name__ == "__main__":
    from tools import model_sweep  # under its real name: the workers import what they are given

    model_sweep.main()
