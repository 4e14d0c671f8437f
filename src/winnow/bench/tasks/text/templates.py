"""Sentences with slots, written and read by the same template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

__all__ = ["compiled", "read_slots"]


def compiled(template: str, patterns: Mapping[str, str]) -> re.Pattern[str]:
    """The regular expression that reads what a template wrote; see `read_slots`."""
    return _compiled(template, tuple(sorted(patterns.items())))


@lru_cache(maxsize=256)
def _compiled(template: str, patterns: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    known = dict(patterns)
    parts = re.split(r"\{(\w+)\}", template)
    regex = "".join(
        f"(?P<{part}>{known.get(part, '.+?')})" if i % 2 else re.escape(part) for i, part in enumerate(parts)
    )
    return re.compile(regex)


def read_slots(template: str, text: str, patterns: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """Read a text that ``template.format(...)`` has written.

    Parameters
    ----------
    template : str
        With named slots ``{name}``, each once.
    text : str
        All of it must match.
    patterns : mapping, optional
        Regular expression of a slot; others take the shortest text that fits.

    Returns
    -------
    dict or None
        The slots' texts, or None if the template did not write this.
    """
    found = compiled(template, patterns or {}).fullmatch(text)
    return None if found is None else found.groupdict()
