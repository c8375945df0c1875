"""A sweep: its cells one after the other, a row to a file for each, and those that have their row already left out."""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from mezo_scale.bench.cell import Cell
from mezo_scale.bench.processes import Outcome, Ranks
from mezo_scale.distributed import preflight
from mezo_scale.distributed.launcher import Launcher
from mezo_scale.errors import LaunchError, RecipeError
from mezo_scale.models.shapes import config_of

ROWS = "rows.jsonl"

Row = dict[str, Any]
Say = Callable[[str], None]


def run(
    cells: Sequence[Cell],
    out: Path,
    launcher: Launcher,
    *,
    rounds: int = 7,
    timeout_s: float = 1800,
    retry_failed: bool = False,
    say: Say = print,
) -> list[Row]:
    """Measures the cells that have no row in `out` yet, and returns all rows of these cells.

    Under a launcher every process calls it: the cells of that world size are measured, the others are left for other
    launches into the same folder. Alone it starts each cell's ranks itself, on this machine.

    - A cell that fails, on whatever rank and for whatever reason, is a row with its reason; the next cell goes on.
    - Killed at any point, the same call goes on after the last finished cell.

    Raises:
        LaunchError: more ranks than this machine has GPUs, or no cell of the launch's size.
        RecipeError: `out` is a file, or holds rows that can't be read.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out: {out} is a file, expected a folder or nothing")
    done = {key_of(row) for row in read(out) if not (retry_failed and "reason" in row)}
    mine = [cell for cell in cells if cell.key not in done]
    store = None
    if launcher.name == "none":
        _check_devices(mine)
    else:
        sizes = sorted({cell.world_size for cell in cells})
        if launcher.world_size not in sizes:
            raise LaunchError(
                f"{launcher.name} started {launcher.world_size} processes, but the sweep's world sizes are "
                f"{', '.join(map(str, sizes))}: start that many, or give --world-size {launcher.world_size}"
            )
        mine = [cell for cell in mine if cell.world_size == launcher.world_size]
        store = preflight.rendezvous(launcher)
        # Rank 0's folder decides: the others may not see it.
        mine = [Cell(**cell) for cell in _agreed(store, launcher, [cell.as_dict() for cell in mine])]
    if len(mine) < len(cells):
        say(f"{len(mine)} of {len(cells)} cells are left: the others have their row, or another world size")
    ranks = Ranks(launcher, store, out / "logs", timeout_s)
    # On the way out the ranks are ended.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    try:
        for number, cell in enumerate(mine):
            say(f"[{number + 1}/{len(mine)}] {cell}")
            row = _row(cell, ranks.run(cell, rounds))
            if launcher.rank == 0:
                _append(out, row)
            each = (time.monotonic() - began) / (number + 1)
            left = timedelta(seconds=round(each * (len(mine) - number - 1)))
            say(f"    {summary(row)}{f'; about {left} left' if left else ''}")
    finally:
        signal.signal(signal.SIGTERM, before)
    if store is not None:
        _leave_together(store, launcher)
    wanted = {cell.key for cell in cells}
    return [row for row in read(out) if key_of(row) in wanted]


def check(cells: Sequence[Cell], project: str) -> None:
    """That there are such models. Raises RecipeError or ModelError, before anything is started."""
    for model in dict.fromkeys([*(cell.model for cell in cells), project]):
        config_of(model.removeprefix("random:"))


def usual_world_sizes(launcher: Launcher) -> list[int]:
    """The launch's; alone, one rank and one per GPU, or two ranks on the CPU."""
    if launcher.name != "none":
        return [launcher.world_size]
    return sorted({1, torch.cuda.device_count() or 2})


def read(out: Path) -> list[Row]:
    """The rows in a folder; of a cell measured again, the last. A line that was cut off is none. Raises RecipeError."""
    path = out / ROWS
    if not path.is_file():
        return []
    rows: dict[str, Row] = {}
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
        except (ValueError, KeyError, TypeError):
            raise RecipeError(
                f"{path}, line {number} is no row of a sweep: take the line out, or give another --out"
            ) from None
    return list(rows.values())


def key_of(row: Row) -> str:
    return Cell(**row["cell"]).key


def summary(row: Row) -> str:
    """A row in one line."""
    if "reason" in row:
        return f"no figures: {row['reason']}"
    step, forwards = sorted(row["step_s"]), sorted(row["forwards_s"])
    median = step[len(step) // 2]
    memory = (row["peak_bytes"] - row["base_bytes"]) / 2**30
    return f"{median:.3f} s/step, two bare forwards {forwards[len(forwards) // 2]:.3f} s, peak {memory:.2f} GiB"


def _row(cell: Cell, outcome: Outcome) -> Row:
    """One cell's row. A step takes as long as on the slowest rank, and as much memory as on the largest."""
    row: Row = {"cell": cell.as_dict(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}
    if outcome.reason:
        return row | {"reason": outcome.reason}
    first, figures = outcome.figures[0], outcome.figures
    return row | {
        **first,
        "step_s": [max(each) for each in zip(*(one["step_s"] for one in figures), strict=True)],
        "forwards_s": [max(each) for each in zip(*(one["forwards_s"] for one in figures), strict=True)],
        **{name: max(one[name] for one in figures) for name in ("peak_bytes", "stored_bytes", "waited")},
        "base_bytes": max(figures, key=lambda one: one["peak_bytes"])["base_bytes"],
    }


def _append(out: Path, row: Row) -> None:
    """Adds a line and makes it last; what an earlier session left of a line is cut off first."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ROWS).open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def _check_devices(cells: Sequence[Cell]) -> None:
    devices, largest = torch.cuda.device_count(), max((cell.world_size for cell in cells), default=1)
    if 0 < devices < largest:
        raise LaunchError(
            f"--world-size {largest}, but this machine has {devices} GPUs: start the sweep on more nodes with "
            "torchrun, deepspeed or srun, one process per GPU"
        )


def _agreed(store: Any, launcher: Launcher, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if launcher.rank == 0:
        store.set("bench/cells", json.dumps(cells))
    return list(json.loads(store.get("bench/cells").decode()))


def _leave_together(store: Any, launcher: Launcher) -> None:
    """Rank 0 may hold the store, and leaves last."""
    store.add("bench/left", 1)
    deadline = time.monotonic() + 60
    while launcher.rank == 0 and store.add("bench/left", 0) < launcher.world_size and time.monotonic() < deadline:
        time.sleep(0.05)
