"""The factors of a run whose keys are stored as a product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from winnow.store.arena import Arena
from winnow.types import Factors, Rotary

__all__ = ["FactorTable", "OpenTable"]

OpenTable = Callable[[int, int, int], Arena]
"""Makes an arena of so many regions, of so many rows, of such a width."""


class FactorTable:
    """Memory of :class:`winnow.types.Factors`: rows of the left one are addressed by position.

    Parameters
    ----------
    given : Factors
        Copied.
    first, last : int
        Positions ``first .. last - 1`` are stored.
    capacity : int
        Positions that there may be.
    make : callable
        Opens an arena on the tier where attention runs.
    """

    def __init__(self, given: Factors, first: int, last: int, capacity: int, make: OpenTable):
        H, rank, size = given.right.shape
        assert given.start <= first < last <= given.start + len(given.left), "a row for every position"
        self._rotary: Rotary | None = given.rotary
        self._left, self._right = make(1, capacity, rank), make(H, 1, rank * size)
        self._span = (first, last)
        try:
            self._left.prepare(0, first, last)
            self._left.data[0, first:last] = given.left[first - given.start : last - given.start]
            for head in range(H):
                self._right.prepare(head, 0, 1)
                self._right.data[head, 0] = given.right[head].flatten()
        except BaseException:
            self.close()
            raise
        self._shape = (H, rank, size)

    def factors(self) -> Factors:
        """Views of the tables; valid until :meth:`retain` or :meth:`close`."""
        first, last = self._span
        right: torch.Tensor = self._right.data[:, 0].view(self._shape)
        return Factors(left=self._left.data[0, first:last], right=right, start=first, rotary=self._rotary)

    def retain(self, first: int, last: int) -> None:
        """Give back the rows of positions outside ``first .. last - 1``."""
        first, last = max(first, self._span[0]), min(last, self._span[1])
        self._span = (first, last)
        self._left.retain(0, first, last)

    def nbytes(self) -> int:
        """Bytes held now."""
        return self._left.nbytes() + self._right.nbytes()

    def close(self) -> None:
        """Give everything back."""
        self._left.close()
        self._right.close()
