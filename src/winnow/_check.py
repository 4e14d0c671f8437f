"""Range checks that the parts share; each message is one line and ends with a remedy."""

from __future__ import annotations

__all__ = ["integer"]


def integer(part: str, name: str, value: object, least: int, unit: str = "entries") -> None:
    """Refuse anything but an integer of at least ``least``.

    Raises
    ------
    ValueError
        Naming the part, the parameter, what was given and what would work.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        hint = " (a count, not a ratio)" if isinstance(value, float) else ""
        raise ValueError(
            f"{part}: {name}={value!r} will not do; give an integer of {unit}, at least {least}{hint}"
        )
