"""Resident memory of this process and its peak over a stretch of work."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["peak", "restart"]

_PROCESS = Path("/proc/self")


def _field(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.M)
    except OSError:
        return None  # a system without /proc
    return int(found[1]) * 1024 if found else None


def restart() -> int | None:
    """Resident bytes now, from which the peak is counted; None where the system does not tell."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _field("VmRSS")


def peak() -> int | None:
    """Most resident bytes since :func:`restart`; None where the system does not tell."""
    return _field("VmHWM")
