"""Random strings and numbers: identifiers, codes and names of variables."""

from __future__ import annotations

from winnow.models.embedded.dice import Dice

__all__ = ["LOWER", "UPPER", "letters", "numbers", "uuid"]

LOWER = "abcdefghijklmnopqrstuvwxyz0123456789"
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def uuid(dice: Dice) -> str:
    """128 random bits in the groups of a UUID (the version bits are random, too)."""
    digits = "".join(f"{dice.below(1 << 32):08x}" for _ in range(4))
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def letters(dice: Dice, n: int, alphabet: str) -> str:
    """``n`` characters of an alphabet."""
    return "".join(dice.pick(alphabet) for _ in range(n))


def numbers(dice: Dice, low: int, high: int, n: int) -> list[int]:
    """``n`` different numbers of ``range(low, high)``, which may be far longer than ``n``."""
    if n > high - low:
        raise ValueError(f"there are no {n} different numbers from {low} to {high - 1}; ask for fewer turns")
    found: dict[int, None] = {}
    while len(found) < n:
        found[low + dice.below(high - low)] = None
    return list(found)
