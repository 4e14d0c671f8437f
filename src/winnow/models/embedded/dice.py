"""Random choices that are the same on every machine and Python."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Choices built on the seeding by a string and ``Random.random``, which Python keeps stable.

    Parameters
    ----------
    seed : str
        Equal strings give equal choices, in the order in which they are asked for.
    """

    def __init__(self, seed: str) -> None:
        self._random = Random(seed).random

    def below(self, n: int) -> int:
        """An integer of ``range(n)``, for ``n`` well below 2**53."""
        return int(self._random() * n)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return self._random() < probability

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """The first ``n`` of a Fisher-Yates shuffle."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]
