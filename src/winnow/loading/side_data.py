"""Side data that a selector keeps of a stored segment, brought up to date step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from winnow.loading.lists import Stored, identity

__all__ = ["Form", "SideData", "updated"]

Rows = TypeVar("Rows")


class Form(Protocol[Rows]):
    """What is kept of the entries of a segment, and how it is made."""

    def empty(self, segment: Stored) -> Rows:
        """Nothing is kept yet."""
        ...

    def roomy(self, rows: Rows, segment: Stored, entries: int) -> Rows:
        """The same rows with room for so many entries of each head, and a reserve; or themselves."""
        ...

    def write(self, rows: Rows, segment: Stored, done: Sequence[int], lengths: Sequence[int]) -> None:
        """Take entries ``done[h] .. lengths[h] - 1`` of every head, in place."""
        ...


@dataclass
class SideData(Generic[Rows]):
    """What is kept of one segment.

    Attributes
    ----------
    of : tuple
        What the segment was; another one makes the rows stale.
    rows
        With a reserve.
    done : list of int
        Entries of each head that the rows cover.
    """

    of: tuple[object, ...]
    rows: Rows
    done: list[int]


def updated(old: SideData[Rows] | None, segment: Stored, form: Form[Rows]) -> SideData[Rows]:
    """What is kept of a segment now; only new entries are looked at.

    Parameters
    ----------
    old : SideData or None
        Of the same segment in an earlier step; it is written to.
    segment : Segment or EncodedSegment
    form : Form
    """
    of, lengths = identity(segment), segment.lengths.tolist()
    if old is None or old.of != of or any(a > b for a, b in zip(old.done, lengths, strict=True)):
        old = SideData(of=of, rows=form.empty(segment), done=[0] * len(lengths))
    if old.done != lengths:
        old.rows = form.roomy(old.rows, segment, max(lengths))
        form.write(old.rows, segment, old.done, lengths)
        old.done = lengths
    return old
