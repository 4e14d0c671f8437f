"""What is kept of every page of a stored segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from winnow.loading.lists import Stored
from winnow.loading.side_data import SideData
from winnow.loading.side_data import updated as brought_up

__all__ = ["PageTable", "updated"]

_GROW = 64  # pages by which a table's reserve grows, so that a step copies nothing

Summary = Callable[[Tensor], Tensor]
"""``[..., n, D]`` keys of one page each to ``[..., E]``, what is kept of the page."""

PageTable = SideData[Tensor]
"""Rows ``[H, P, E]``."""


def updated(old: PageTable | None, segment: Stored, page: int, summary: Summary) -> PageTable:
    """The table of a segment's pages; only pages that changed are computed.

    Parameters
    ----------
    old : PageTable or None
        The same segment's table of an earlier step; it is written to.
    segment : Segment or EncodedSegment
    page : int
        Entries of a page; the last one of a head may hold fewer.
    summary : callable
    """
    return brought_up(old, segment, _Pages(page, summary))


@dataclass(frozen=True)
class _Pages:
    page: int
    summary: Summary

    def empty(self, segment: Stored) -> Tensor:
        return self._rows(segment, 0)

    def roomy(self, rows: Tensor, segment: Stored, entries: int) -> Tensor:
        pages = -(-entries // self.page)
        if pages <= rows.shape[1]:
            return rows
        wider = self._rows(segment, -(-pages // _GROW) * _GROW)
        wider[:, : rows.shape[1]] = rows
        return wider

    def write(self, rows: Tensor, segment: Stored, done: Sequence[int], lengths: Sequence[int]) -> None:
        together = min(lengths) == max(lengths) and min(done) == max(done)
        for heads in [slice(None)] if together else [slice(h, h + 1) for h in range(len(lengths))]:
            self._write(rows[heads], segment, heads, done[heads][0], lengths[heads][0])

    def _write(self, into: Tensor, segment: Stored, heads: slice, done: int, length: int) -> None:
        first = done // self.page * self.page
        if first >= length:
            return
        k_HnD = segment.decode(first, length).k[heads, : length - first]
        whole = (length - first) // self.page
        at = first // self.page
        if whole:
            shape = (-1, whole, self.page, k_HnD.shape[2])
            into[:, at : at + whole] = self.summary(k_HnD[:, : whole * self.page].reshape(shape))
        if length - first > whole * self.page:
            into[:, at + whole] = self.summary(k_HnD[:, whole * self.page :])

    def _rows(self, segment: Stored, pages: int) -> Tensor:
        sample = segment.decode(0, 0).k
        width = self.summary(sample.new_zeros(1, sample.shape[2])).shape[-1]
        return sample.new_zeros(segment.heads, pages, width)
