"""Random strings: identifiers, codes and names of variables."""

from __future__ import annotations

from winnow.models.embedded.dice import Dice

__all__ = ["LOWER", "UPPER", "letters", "uuid"]

LOWER = "abcdefghijklmnopqrstuvwxyz0123456789"
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def uuid(dice: Dice) -> str:
    """128 random bits in the groups of a UUID (the version bits are random, too)."""
    digits = "".join(f"{dice.below(1 << 32):08x}" for _ in range(4))
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def letters(dice: Dice, n: int, alphabet: str) -> str:
    """``n`` characters of an alphabet."""
    return "".join(dice.pick(alphabet) for _ in range(n))
