"""The tables of docs/reliability.md, from the campaign's rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mezo_scale.runs.report import as_markdown
from tools.crash_campaign import Row, is_right

BEGIN, END = "<!-- made by tools/crash_campaign.py --report -->\n", "<!-- end of what is made -->\n"
WHERE = {"single": "one process", "fsdp2": "two ranks, fsdp2", "ddp": "two ranks, ddp"}
WHAT = {"kill": "kill -9", "hang": "hangs, then the launcher is killed"}


def write(rows: list[Row], page: Path) -> None:
    """Puts the tables between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    cases = pd.DataFrame(rows).assign(right=[is_right(row) for row in rows], what=[_what(row) for row in rows])
    page.write_text(before + BEGIN + "\n".join([*_summary(cases), "", *_by_point(cases), ""]) + END + after)


def _summary(cases: pd.DataFrame) -> list[str]:
    """One line per layout and disturbance."""
    when = cases["point"].str.startswith("moment").map({True: "at a random moment", False: "at a failpoint"})
    groups = cases.groupby([cases["layout"].map(WHERE), when, "what"])["right"].agg(["size", "sum"])
    lines = [["where", "when", "what", "cases", "as if nothing had happened"]]
    lines += [[*key, *map(str, counts)] for key, counts in zip(groups.index, groups.to_numpy(), strict=True)]
    right, sessions = cases["right"].sum(), cases["sessions"].sum()
    said = f"{len(cases)} cases, {sessions} sessions, {right} right, {len(cases) - right} wrong."
    return [*as_markdown(lines), "", said]


def _what(row: Row) -> str:
    if row["action"] not in WHAT:
        return f"{row['action']} raised"
    who = f"rank {row['who']}" if row["who"].isdecimal() else f"the launcher{' and all ranks' * (row['who'] == 'all')}"
    return WHAT[row["action"]] if row["layout"] == "single" else f"{WHAT[row['action']]}: {who}"


def _by_point(cases: pd.DataFrame) -> list[str]:
    """One line per failpoint: what was done there, and how often it came out right."""
    cases = cases[~cases["point"].str.startswith("moment")]
    lines = [["failpoint", "done there", "cases", "right", "not reached"]]
    for point, found in cases.groupby(cases["point"].str.replace(r":\d+", "", regex=True), sort=False):
        done = ", ".join(sorted(set(found["action"]), key=str.swapcase))
        lines.append([f"`{point}`", done, *map(str, (len(found), found["right"].sum(), (~found["hit"]).sum()))])
    return as_markdown(lines)
