"""What the benchmarks leave behind: a JSON file, and a table between the marks of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["insert", "save"]


def save(report: dict[str, Any], out: Path, *, depth: int | None = None) -> None:
    """Write a report as JSON; directories are made.

    Parameters
    ----------
    report : dict
    out : Path
    depth : int or None
        Levels that are spread over lines; what lies deeper takes one line. None spreads everything.
    """
    text = json.dumps(report, indent=1) if depth is None else _spread(report, depth, "")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")


def _spread(value: Any, depth: int, margin: str) -> str:
    if depth == 0 or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, separators=(",", ":"))
    inner = margin + " "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_spread(item, depth - 1, inner)}" for key, item in value.items()]
    else:
        lines = [_spread(item, depth - 1, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + ",".join(f"\n{inner}{line}" for line in lines) + f"\n{margin}{closing}"


def insert(page: str, name: str, text: str) -> str:
    """The page with ``text`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
