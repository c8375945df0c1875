"""A sweep: its cells one after the other, a row to a file for each, and those that have their row already left out.

Every cell is a launch of its own (torchrun, or srun in a SLURM allocation), so that one that runs out of memory, is
killed or hangs ends a cell and not the sweep, and no cell inherits another's memory.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from mezo_scale.bench.measure import SAID
from mezo_scale.bench.sweep import Cell, Places
from mezo_scale.distributed.launcher import detect
from mezo_scale.errors import LaunchError, RecipeError

ROWS = "rows.jsonl"
PROGRAM: tuple[str, ...] = ("-m", "mezo_scale.bench.measure")
_LEAST_S = 20.0  # a cell that has less of the sweep's time left is not started
_GRACE_S = 10.0  # for a launcher to end its ranks

Row = dict[str, Any]
Say = Callable[[str], None]


def run(
    cells: Sequence[Cell],
    out: Path,
    places: Places,
    *,
    rounds: int = 7,
    timeout_s: float = 1800,
    budget_s: float | None = None,
    retry_failed: bool = False,
    say: Say = print,
) -> list[Row]:
    """Measures the cells that have no row in `out` yet, and returns all rows of these cells.

    - A cell that fails, on whatever rank and for whatever reason, is a row with its reason; the next cell goes on.
    - Killed at any point, the same call goes on after the last finished cell.

    Raises:
        LaunchError: more ranks than there are GPUs, or a launcher around this process.
        RecipeError: `out` can't be made, or holds rows that can't be read.
    """
    done = {_cell(row).key for row in read(out) if not (retry_failed and "reason" in row)}
    left = [cell for cell in cells if cell.key not in done]
    _check_launch(left, places)
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out: {out} can't be made ({error.strerror}): give another folder") from None
    if len(left) < len(cells):
        say(f"{len(left)} of {len(cells)} cells are left: the others have their row")
    began = time.monotonic()
    with ending_on_sigterm():
        for number, cell in enumerate(left):
            limit = timeout_s if budget_s is None else min(timeout_s, budget_s - (time.monotonic() - began))
            if limit < min(timeout_s, _LEAST_S):
                say(f"no time left for {len(left) - number} cells; the same command goes on with them")
                break
            say(f"[{number + 1}/{len(left)}] {cell}")
            row = {"cell": asdict(cell), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}
            row |= _measured(cell, command(cell, rounds, places), out / "logs", limit)
            _append(out, row)
            each = (time.monotonic() - began) / (number + 1)
            rest = timedelta(seconds=round(each * (len(left) - number - 1)))
            say(f"    {summary(row)}{f'; about {rest} left' if rest else ''}")
    wanted = {cell.key for cell in cells}
    return [row for row in read(out) if _cell(row).key in wanted]


def command(cell: Cell, rounds: int, places: Places) -> list[str]:
    """The command line that starts a cell's ranks."""
    asked = [*PROGRAM, cell.key, str(rounds)]
    each = places.ranks_per_node(cell.world_size)
    if places.slurm:
        nodes = -(-cell.world_size // each)
        size = [f"--nodes={nodes}", f"--ntasks={cell.world_size}", f"--ntasks-per-node={each}"]
        return ["srun", *size, "--overlap", "--kill-on-bad-exit=1", sys.executable, *asked]
    if cell.world_size == 1:
        return [sys.executable, *asked]
    if PROGRAM[0] != "-m":
        asked = ["--no-python", sys.executable, *asked]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(cell.world_size), *asked]


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
            rows[_cell(row).key] = row
            if not {"reason", "memory_bytes"} & row.keys():
                raise KeyError("memory_bytes")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecipeError(
                f"{path}, line {number} is no row of a sweep: take the line out, or give another --out"
            ) from None
    return list(rows.values())


def summary(row: Row) -> str:
    """A row in one line."""
    if "reason" in row:
        return f"no figures: {row['reason']}"
    step, forwards = (sorted(row[name])[len(row[name]) // 2] for name in ("step_s", "forwards_s"))
    return f"{step:.3f} s/step, two bare forwards {forwards:.3f} s, peak {row['memory_bytes'] / 2**30:.2f} GiB"


def _measured(cell: Cell, launch: Sequence[str], folder: Path, limit_s: float) -> Row:
    """The figures of a cell, or the reason why there are none; then the log of its ranks is kept."""
    log = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.log"
    code: int | None = None
    with suppress(subprocess.TimeoutExpired):
        code = launched(launch, log, limit_s, OMP_NUM_THREADS="1")
    text = log.read_text(errors="replace")
    answer = _answer(text, cell, code, f"took longer than {limit_s:.3g} s", log)
    if "reason" not in answer:
        log.unlink()
    return answer


def _answer(text: str, cell: Cell, code: int | None, late: str, log: Path) -> Row:
    """From what the ranks and their launcher printed: a rank's own reason, what killed one, or how the launch ended."""
    said = []
    for line in text.splitlines():
        if SAID in line:
            with suppress(ValueError):  # of a rank that was killed while it wrote
                said.append(json.loads(line.partition(SAID)[2]))
    figures = [one["figures"] for one in said if "figures" in one]
    if figures and code == 0:
        return dict(figures[0])
    failed = [(str(one["reason"]), int(one["rank"])) for one in said if "reason" in one]
    own = [(reason, rank) for reason, rank in failed if not _is_consequence(reason)]
    ends = [(int(code), int(rank)) for rank, code in re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", text)]
    killed = [(killed_by(end), rank) for end, rank in ends if end < 0 and -end != signal.SIGTERM]
    unknown = late if code is None else killed_by(code) if code < 0 else ""
    reason, rank = (own or killed or (failed if code is not None else []) or [(unknown, -1)])[0]
    if not reason:
        scheduler = re.search(r"^(?:srun|slurmstepd): error: (.+)$", text, re.MULTILINE)
        reason = f"ended with exit code {code}{f' ({scheduler[1]})' if scheduler else ''}, see {log}"
    return {"reason": f"rank {rank}: {reason}" if cell.world_size > 1 and rank >= 0 else reason}


def launched(command: Sequence[str], log: Path, limit_s: float | None = None, **environ: str) -> int:
    """Runs a command, what it says going to the log, ends whatever it has started, and returns its exit code.

    Args:
        environ: variables that it has unless this process has them.

    Raises:
        subprocess.TimeoutExpired: it took longer than `limit_s`.
    """
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env=environ | os.environ, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(limit_s)
        finally:
            _end(process)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends this process on the way of an exception, so that what it launched is ended too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_alone(what: str, instead: str) -> None:
    """Raises LaunchError: a launcher around this process."""
    around = detect(os.environ)
    if around.name != "none":
        raise LaunchError(f"{around.name} started {around.world_size} processes, but {what} itself: {instead}")


def killed_by(code: int) -> str:
    """What the exit code of a process that a signal ended says."""
    why = " (out of memory, if the kernel did it)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{why}"


def _is_consequence(reason: str) -> bool:
    """A collective that broke off because the other end is gone."""
    return any(word in reason for word in ("Connection closed", "Connection reset", "DistBackendError", "gloo"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a launch and whatever it has started on this machine; on others srun does."""
    if process.poll() is not None:
        return
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.kill()
    process.kill()
    process.wait()


def _append(out: Path, row: Row) -> None:
    """Adds a line and makes it last; what an earlier session left of a line is cut off first."""
    with (out / ROWS).open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def _cell(row: Row) -> Cell:
    return Cell(**row["cell"])


def _check_launch(cells: Sequence[Cell], places: Places) -> None:
    instead = "run mezo-scale bench once, for several nodes inside a SLURM allocation"
    check_alone("a sweep starts the ranks of each cell", instead)
    devices, largest = places.gpus * places.nodes, max((cell.world_size for cell in cells), default=1)
    if 0 < devices < largest:
        raise LaunchError(
            f"world_sizes has {largest}, but there are {devices} GPUs: give others, or run the sweep inside a SLURM "
            "allocation of more nodes"
        )
