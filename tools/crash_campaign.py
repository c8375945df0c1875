"""Runs that are killed, everywhere: at every failpoint, at random moments, rank by rank; then the same command again.

    python -m tools.crash_campaign                      what has no row yet; all of it half an hour on 2 cores
    python -m tools.crash_campaign --minutes 10         as much of it as fits
    python -m tools.crash_campaign --layout single --only log header
    python -m tools.crash_campaign --life               one run that is killed over and over; half a minute
    python -m tools.crash_campaign --report             the tables of docs/reliability.md from the rows there are

A case is right if the command that was given at first, given again until it ends with 0 and at most four times, leaves
what an undisturbed run leaves: the bits of the checkpoint, the records of the log (run id and chain values are each
run's own), the results, and no file besides. "single" is one process; "fsdp2" and "ddp" are two ranks under torchrun's
agent. Rows are appended to tools/results/crash_campaign.jsonl, and a campaign that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.pool import ROOT
from tools.crash_sessions import LIMIT_S, Sessions
from tools.failpoints import POINTS

ROWS = ROOT / "tools" / "results" / "crash_campaign.jsonl"
MOST_SESSIONS, HANGS_S = 4, 25
THIRD = (
    "log.writing",
    "log.half_written",
    "log.written",
    "log.syncing",
    "log.synced",
    "step",
    "metrics.writing",
    "metrics.half_written",
)
MORE = (
    "evaluation.begun:2",
    "evaluation.ended:2",
    "results.writing:2",
    "results.written:2",
    "log.half_written:7",
    "snapshot.half_written:3",
)
WRITES = (
    *("header.writing", "header.half_written", "header.written", "header.synced"),
    *("log.writing:3", "log.half_written:3", "log.written:3", "log.syncing:3", "log.half_written:7"),
    *("recipe.writing", "environment.writing", "results.synced", "results.writing:2", "metrics.rewriting"),
    *("snapshot.half_written", "snapshot.sealed", "snapshot.renaming"),
    *("snapshot.half_pruned", "checkpoint.begun", "checkpoint.half_written", "checkpoint.written"),
    *("checkpoint.renaming", "plot.writing", "report.writing"),
)
EVERY_RANK = (
    *("run", "weights", "evaluation", "step.begun", "step.measured", "step.half", "step.applied", "step.ended"),
    *("ranks", "snapshot.begun", "report.begun", "resume.replaying", "resume.half", "resume.replayed"),
)
BEFORE = {  # what happened to a run before the session that the case is about: a failpoint, or how many steps it had
    "resume.torn": "log.half_written:kill:4@0",
    "resume": "step.recorded:kill:4@0",
    "checkpoint.set_aside": "train.steps=4",
}
LIFE = (  # in the order in which a run comes by them
    *("run.begun", "header.half_written", "header.synced", "header.renamed", "recipe.writing", "results.writing"),
    *("log.half_written", "log.written", "log.synced:2", "step.half_applied", "resume.replayed"),
    "metrics.half_written",
    *("snapshot.half_written", "snapshot.sealed", "snapshot.renaming", "snapshot.renamed", "snapshot.half_pruned"),
    *("ranks.compared", "evaluation.ended", "checkpoint.half_written", "checkpoint.written", "checkpoint.renaming"),
    *("log.closing", "plot.writing", "report.writing"),
)
LIFE_STEPS = "train.steps=20"
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One disturbance. `point` is a failpoint with its count or "moment N"; `who`: a rank, "launcher" or "all"."""

    layout: str
    point: str
    action: str
    who: str

    @property
    def failpoint(self) -> str:
        name, _, count = self.point.partition(":")
        return f"{name}:{self.action}:{count or 1}@{self.who}"

    @property
    def key(self) -> tuple[str, ...]:
        return self.layout, self.point, self.action, self.who


def cases() -> list[Case]:
    """The whole campaign."""
    points = [f"{name}:3" if name.startswith(THIRD) else name for name in POINTS] + list(MORE)
    pairs = ("fsdp2", "ddp")
    found = [Case("single", point, "kill", "0") for point in points]
    found += [Case("single", point, action, "0") for point in WRITES for action in ("ENOSPC", "EIO")]
    found += [Case("single", f"moment {number}", "kill", "0") for number in range(100)]
    found += [Case("fsdp2", "step.begun:3", "hang", "1"), Case("ddp", "log.writing:3", "hang", "0")]
    everywhere = [point for point in points if point.startswith(EVERY_RANK)]
    found += [Case(pairs[number % 2], point, "kill", "1") for number, point in enumerate(everywhere)]
    whom = ("launcher", "0", "1", "all")
    found += [Case(pairs[number // 4 % 2], f"moment {number}", "kill", whom[number % 4]) for number in range(220)]
    found += [Case(pairs[number % 2], point, "kill", "0") for number, point in enumerate(points)]
    return found


# -- cases ------------------------------------------------------------------------------------------------------------


class Campaign:
    """Carries out cases; what an undisturbed run leaves is made once per layout."""

    def __init__(self, work: Path) -> None:
        self.work, self.session = work, Sessions(work)
        self.undisturbed: dict[str, tuple[Row, float]] = {}

    def reference(self, layout: str) -> tuple[Row, float]:
        if layout not in self.undisturbed:
            run, began = self.work / f"undisturbed-{layout}", time.monotonic()
            code, said = self.session(layout, run)
            if code:
                raise RuntimeError(f"the undisturbed run ended with {code}: {said}")
            self.undisturbed[layout] = left_by(run), time.monotonic() - began
        return self.undisturbed[layout]

    def row(self, case: Case) -> Row:
        expected, lasts_s = self.reference(case.layout)
        began = time.monotonic()
        run = self.work / "-".join(case.key).replace(" ", "").replace(":", "-")
        before = next((value for start, value in BEFORE.items() if case.point.startswith(start)), "")
        if before:
            how = "steps" if "=" in before else "failpoint"
            self.session(case.layout, run, **{how: before})
            Path(f"{run}.hit").unlink(missing_ok=True)
        if case.point.startswith("moment"):
            ends = [self._killed_at_random(case, run)]
        else:
            limit_s = HANGS_S + lasts_s if case.action == "hang" else LIMIT_S
            ends = [self.session(case.layout, run, failpoint=case.failpoint, limit_s=limit_s)]
        hit = ends[0][0] != 0 if case.point.startswith("moment") else Path(f"{run}.hit").exists()
        code = ends[0][0]
        while code != 0 and len(ends) < MOST_SESSIONS:
            code, _ = ends_now = self.session(case.layout, run)
            ends.append(ends_now)
        found = left_by(run)
        row: Row = {"layout": case.layout, "point": case.point, "action": case.action, "who": case.who, "hit": hit}
        row |= {"code": ends[0][0], "sessions": len(ends) + bool(before), "ended": code == 0}
        row |= {f"{what}_equal": found.get(what) == expected[what] for what in ("weights", "records", "results")}
        row["besides"] = sorted(set(found.get("files", ())) - set(expected["files"]))
        row["tracebacks"] = sum("Traceback" in said for _, said in ends) if case.layout == "single" else None
        row["said"] = next((line[:300] for line in ends[0][1].splitlines() if line.startswith("error: ")), "")
        return row | {"seconds": round(time.monotonic() - began, 1)}

    def _killed_at_random(self, case: Case, run: Path) -> tuple[int | None, str]:
        """A session that is killed on its way; one that was faster says how long they take, and the next is drawn."""
        draw, (expected, lasts_s) = random.Random("/".join(case.key)), self.reference(case.layout)
        for _ in range(5):
            shutil.rmtree(run, ignore_errors=True)
            began = time.monotonic()
            code, said = self.session(case.layout, run, after_s=draw.uniform(0, lasts_s), who=case.who)
            if code != 0:
                break
            lasts_s = time.monotonic() - began
            self.undisturbed[case.layout] = expected, lasts_s
        return code, said

    def life(self) -> Row:
        """One run, killed at each of LIFE and started again, beside one that was left alone."""
        runs = [self.work / name for name in ("killed", "undisturbed")]
        missed = []
        for point in LIFE:
            failpoint = Case("single", point, "kill", "0").failpoint
            code, said = self.session("single", runs[0], failpoint=failpoint, steps=LIFE_STEPS)
            if code != -signal.SIGKILL or "Traceback" in said:
                missed.append(f"{point} (code {code}): {said[-500:]}")
        codes = [self.session("single", run, steps=LIFE_STEPS)[0] for run in runs]
        killed, undisturbed = (left_by(run) for run in runs)
        different = [what for what in undisturbed if killed.get(what) != undisturbed[what] and what != "files"]
        return {"kills": len(LIFE) - len(missed), "missed": missed, "codes": codes, "different": different}


def left_by(run: Path) -> Row:
    """What a finished run left, in a form that equal runs have in common; empty if it did not finish."""
    from mezo_scale.trajectory import Trajectory

    weights = run / "checkpoint" / "model.safetensors"
    if not weights.is_file():
        return {}
    results = json.loads((run / "evaluation.json").read_text())
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "records": repr(Trajectory.open(run / "trajectory.mezo").records),
        "results": {name: results[name] for name in ("zero_shot", "majority", "tuned")},
        "files": sorted(name for name in files if not name.startswith("tensorboard/")),
    }


def is_right(row: Row) -> bool:
    """Whether it was disturbed, nobody had to do anything, and nothing shows that something happened."""
    equal = row["ended"] and row["weights_equal"] and row["records_equal"] and row["results_equal"]
    # What was cut off is kept; and of a snapshot at the last step that was not written an older one is in the place.
    allowed = re.compile(r"trajectory\.mezo\.torn|snapshots/step-\d+/.*")
    besides = [name for name in row["besides"] if not allowed.fullmatch(name)]
    return bool(row["hit"] and equal and not besides and not row["tracebacks"])


def read(path: Path) -> list[Row]:
    """The newest row of every case; half a line at the end is of a campaign that was killed."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return list({tuple(row[name] for name in ("layout", "point", "action", "who")): row for row in rows}.values())


def carry_out(chosen: list[Case], path: Path, until: float) -> Iterator[Row]:
    """Makes the rows that are missing, up to a time of `time.monotonic`, and appends each to the file."""
    had = {tuple(row[name] for name in ("layout", "point", "action", "who")) for row in read(path)}
    whole = path.read_bytes() if path.exists() else b""
    path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with tempfile.TemporaryDirectory() as work:
        campaign = Campaign(Path(work))
        for case in chosen:
            if case.key in had:
                continue
            if time.monotonic() > until:
                return
            row = campaign.row(case)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=["single", "fsdp2", "ddp"], action="append", help="default: all")
    parser.add_argument("--only", nargs="+", metavar="START", default=[""], help="points whose names begin so")
    parser.add_argument("--action", action="append", help="kill, hang, ENOSPC, EIO; default: all")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no case after so many")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--life", action="store_true", help="only one run, which is killed over and over")
    parser.add_argument("--report", action="store_true", help="write the tables of docs/reliability.md and leave")
    options = parser.parse_args()
    if options.life:
        with tempfile.TemporaryDirectory() as work:
            found = Campaign(Path(work)).life()
        gc.unfreeze()
        print(json.dumps(found))
        return int(found["codes"] != [0, 0] or bool(found["missed"] or found["different"]))
    if options.report:
        from tools.crash_report import write

        write(read(options.rows), ROOT / "docs" / "reliability.md")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = [
        case
        for case in cases()
        if (not options.layout or case.layout in options.layout)
        and (not options.action or case.action in options.action)
        and case.point.startswith(tuple(options.only))
    ]
    wrong = 0
    for row in carry_out(chosen, options.rows, time.monotonic() + 60 * options.minutes):
        wrong += not is_right(row)
        print("right" if is_right(row) else "WRONG", json.dumps(row), flush=True)
    gc.unfreeze()  # else nanobind takes for leaked what it can't see
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
