"""Side data that a selector keeps for every page of a stored segment, brought up to date step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from winnow.loading.lists import Stored, identity

__all__ = ["PageTable", "updated"]

_GROW = 64  # pages by which a table's reserve grows, so that a step copies nothing

Summary = Callable[[Tensor], Tensor]
"""``[..., n, D]`` keys of one page each to ``[..., E]``, what is kept of the page."""


@dataclass
class PageTable:
    """What is kept of every page of one segment.

    Attributes
    ----------
    of : tuple
        What the segment was; another one makes the table stale.
    rows : Tensor
        ``[H, P, E]``, with a reserve.
    done : list of int
        Entries of each head that the table covers.
    """

    of: tuple[object, ...]
    rows: Tensor
    done: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes held, reserve included."""
        return self.rows.numel() * self.rows.element_size()


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
    of, lengths = identity(segment), segment.lengths.tolist()
    if old is None or old.of != of or any(a > b for a, b in zip(old.done, lengths, strict=True)):
        old = PageTable(of=of, rows=_empty(segment, 0, summary), done=[0] * len(lengths))
    if old.done == lengths:
        return old
    pages = -(-max(lengths) // page)
    if pages > old.rows.shape[1]:
        wider = _empty(segment, -(-pages // _GROW) * _GROW, summary)
        wider[:, : old.rows.shape[1]] = old.rows
        old.rows = wider
    together = min(lengths) == max(lengths) and min(old.done) == max(old.done)
    for heads in [slice(None)] if together else [slice(h, h + 1) for h in range(len(lengths))]:
        _update(old, segment, heads, old.done[heads][0], lengths[heads][0], page, summary)
    old.done = lengths
    return old


def _update(
    table: PageTable, segment: Stored, heads: slice, done: int, length: int, page: int, summary: Summary
) -> None:
    first = done // page * page
    if first >= length:
        return
    k_HnD = segment.decode(first, length).k[heads, : length - first]
    whole = (length - first) // page
    at = first // page
    into = table.rows[heads]
    if whole:
        shape = (-1, whole, page, k_HnD.shape[2])
        into[:, at : at + whole] = summary(k_HnD[:, : whole * page].reshape(shape))
    if length - first > whole * page:
        into[:, at + whole] = summary(k_HnD[:, whole * page :])


def _empty(segment: Stored, pages: int, summary: Summary) -> Tensor:
    sample = segment.decode(0, 0).k
    width = summary(sample.new_zeros(1, sample.shape[2])).shape[-1]
    return sample.new_zeros(segment.heads, pages, width)
