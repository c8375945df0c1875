"""docs/models.md, from the rows of tools/model_sweep.py."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from mezo_scale.runs.report import as_markdown
from tools.view_against_copy import TOLERANCE

LAYOUTS = ("plain", "fsdp2", "zero3")
PARTS = {"causal": "Causal language models", "masked": "Masked language models", "adapter": "PEFT methods"}
PACKAGES = ("torch", "transformers", "peft", "deepspeed")
LONGEST = 160
Row = dict[str, Any]

HEAD = """# Models

Every family of causal and masked language models that transformers has, and every PEFT method, as tiny random models:
the losses under the [perturbed view](decisions/0002-perturbed-view.md), three branches of two seeds, against those of
deep copies whose weights were moved by the same noise. Made by `make sweep` (`python -m tools.model_sweep`), {dates},
on CPUs: {versions}.
Scales of z up to {scales}.

- **equal**: to {tolerance:.0e} of the loss, one branch at a time and, where it pairs, all branches in one batch.
- **refused**: the view, or the sharding, says that it can't, before anything wrong is computed.
- **no model**: a tiny one can't be built, run or compared there; nothing is known, and nothing is claimed.
- **wrong**, **failed**: neither equal nor refused in so many words.
- *paired*: all branches share one batch, so that every weight is gathered once a step; *one by one*: they do not, and
  MeZO falls back by itself. Parameters that nothing reads get no slope of their own; MeZO names them in a warning.

fsdp2 and zero3 run on two ranks over gloo, each parameter sharded (a unit per layer; a persistence threshold of 0).
"""


def write(rows: dict[tuple[str, str], Row], path: Path) -> None:
    """The page: what was asked, how many rows came out how, and a table for each part."""
    cells = list(dict.fromkeys(cell for _, cell in sorted(rows, key=lambda key: key[1].lower())))
    dates = sorted({row["date"] for row in rows.values()})
    head = HEAD.format(
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        versions=_versions(),
        scales=_scales(rows),
        tolerance=TOLERANCE,
    )
    parts = [head, _counts(rows)]
    for part, title in PARTS.items():
        parts.append(_table(title, [cell for cell in cells if cell.startswith(f"{part}/")], rows))
    path.write_text("\n".join(parts), encoding="utf-8")


def verdict(row: Row | None) -> str:
    """What came out of a cell, in a word."""
    if row is None:
        return "not run"
    if "unusable" in row:
        return "no model"
    if "failed" in row:
        return "failed"
    if row["one"] is None:
        return "refused"
    worst = max(row["one"], row["paired"] or 0.0)
    return "equal" if worst <= TOLERANCE else f"wrong ({worst:.0e})"


def _counts(rows: dict[tuple[str, str], Row]) -> str:
    lines = [["", "layout", "equal", "of these paired", "refused", "no model", "wrong or failed"]]
    for part, title in PARTS.items():
        for layout in LAYOUTS:
            mine = [row for (made, cell), row in rows.items() if made == layout and cell.startswith(f"{part}/")]
            words = [verdict(row).split(" (")[0] for row in mine]
            paired = sum(verdict(row) == "equal" and row["paired"] is not None for row in mine)
            counts = [words.count("equal"), paired, words.count("refused"), words.count("no model")]
            counts.append(words.count("wrong") + words.count("failed"))
            lines.append([title, layout, *map(str, counts)])
    return "\n".join([*as_markdown(lines), ""])


def _table(title: str, cells: list[str], rows: dict[tuple[str, str], Row]) -> str:
    lines = [["", *LAYOUTS, "branches", "why not, or what nothing reads"]]
    for cell in cells:
        found = [rows.get((layout, cell)) for layout in LAYOUTS]
        lines.append([cell.partition("/")[2], *map(verdict, found), _branches(found), _notes(found)])
    return "\n".join([f"## {title}", "", *as_markdown(lines), ""])


def _branches(found: list[Row | None]) -> str:
    ways = {
        layout: "one by one" if row["paired"] is None else "paired"
        for layout, row in zip(LAYOUTS, found, strict=True)
        if row is not None and row.get("one") is not None
    }
    if len(set(ways.values())) < 2:
        return next(iter(ways.values()), "")
    return ", ".join(f"{layout}: {way}" for layout, way in ways.items())


def _notes(found: list[Row | None]) -> str:
    """Each reason once, with the layouts that gave it unless all did."""
    said: dict[str, list[str]] = {}
    ran = [(layout, row) for layout, row in zip(LAYOUTS, found, strict=True) if row is not None]
    for layout, row in ran:
        unread = f"{row['unread']} parameters, as {row['for_example'][0]}" if row.get("unread") else ""
        words = row.get("unusable") or row.get("failed") or row.get("why_not") or unread
        if words:
            said.setdefault(_in_a_cell(words), []).append(layout)
    return "; ".join(
        words if len(layouts) == len(ran) else f"{', '.join(layouts)}: {words}" for words, layouts in said.items()
    )


def _in_a_cell(words: str) -> str:
    text = " ".join(words.split()).replace("|", "\\|")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _scales(rows: dict[tuple[str, str], Row]) -> str:
    """The largest scale of z, and how many rows had which if they differ."""
    found = [row["scale"] for row in rows.values() if "scale" in row]
    counts = {scale: found.count(scale) for scale in sorted(set(found), reverse=True)}
    if len(counts) < 2:
        return "".join(map(str, counts))
    return ", ".join(f"{scale:g} ({count} rows)" for scale, count in counts.items())


def _versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([*found, f"Python {platform.python_version()}"])
