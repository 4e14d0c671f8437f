"""What the benchmarks leave behind: a JSON file, and a table between the marks of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["insert", "save"]


def save(report: dict[str, Any], out: Path) -> None:
    """Write a report as JSON; directories are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def insert(page: str, name: str, text: str) -> str:
    """The page with ``text`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
