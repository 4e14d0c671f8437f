"""Stop strings: what of a text may be shown while one of them could still be on its way."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["until_stop"]


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Split a text that was held back so far.

    Parameters
    ----------
    text : str
        What was held back before, and what came since.
    stops : sequence of str

    Returns
    -------
    shown : str
        Text that is safe to show: it ends before the first stop string.
    held : str
        The longest tail that could still grow into a stop string; empty where one was met.
    stopped : bool
        Whether one was met.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], "", True
    keep = max(
        (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - keep], text[len(text) - keep :], False
