"""The tables of docs/reliability.md, from the campaign's rows."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from tools.crash_campaign import Row, is_right

BEGIN, END = "<!-- made by tools/crash_campaign.py --report -->\n", "<!-- end of what is made -->\n"
WHERE = {"single": "one process", "fsdp2": "two ranks, fsdp2", "ddp": "two ranks, ddp"}
WHAT = {"kill": "kill -9", "hang": "hangs, then the launcher is killed"}


def write(rows: list[Row], page: Path) -> None:
    """Puts the tables between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + BEGIN + "\n".join([*_summary(rows), "", *_by_point(rows), ""]) + END + after)


def _summary(rows: list[Row]) -> list[str]:
    """One line per layout and disturbance."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        moment = row["point"].startswith("moment")
        groups[WHERE[row["layout"]], "at a random moment" if moment else "at a failpoint", _what(row)].append(row)
    lines = ["| where | when | what | cases | as if nothing had happened |", "|---|---|---|---|---|"]
    for (where, when, what), found in sorted(groups.items()):
        lines.append(f"| {where} | {when} | {what} | {len(found)} | {sum(map(is_right, found))} |")
    right, sessions = sum(map(is_right, rows)), sum(row["sessions"] for row in rows)
    return [*lines, "", f"{len(rows)} cases, {sessions} sessions, {right} right, {len(rows) - right} wrong."]


def _what(row: Row) -> str:
    if row["action"] not in WHAT:
        return f"{row['action']} raised"
    who = f"rank {row['who']}" if row["who"].isdecimal() else f"the launcher{' and all ranks' * (row['who'] == 'all')}"
    return WHAT[row["action"]] if row["layout"] == "single" else f"{WHAT[row['action']]}: {who}"


def _by_point(rows: list[Row]) -> list[str]:
    """One line per failpoint: what was done there, and how often it came out right."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if not row["point"].startswith("moment"):
            groups[re.sub(r":\d+", "", row["point"])].append(row)
    lines = ["| failpoint | done there | cases | right | not reached |", "|---|---|---|---|---|"]
    for point, found in groups.items():
        done = ", ".join(sorted({row["action"] for row in found}, key=str.swapcase))
        missed = sum(not row["hit"] for row in found)
        lines.append(f"| `{point}` | {done} | {len(found)} | {sum(map(is_right, found))} | {missed} |")
    return lines
