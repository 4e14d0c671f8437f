"""What a segment holds, head by head, in the form it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from winnow.store.codecs import ENTRIES, EncodedSegment
from winnow.types import Factors, Segment

__all__ = ["StoredRows", "stored_rows"]


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Rows of one run, for a copy or a file.

    Attributes
    ----------
    planes : list of list of Tensor
        ``planes[plane][head]``: ``[rows, width]``.
    lengths : list of int
        Entries of each head.
    start : int
        Position of entry 0 where ``positions`` is None.
    positions, bias, batches : list of Tensor, or None
        Per head; as the segment has them.
    factors : Factors or None
        The keys, where they are stored as a product.
    """

    planes: list[list[Tensor]]
    lengths: list[int]
    start: int
    positions: list[Tensor] | None = None
    bias: list[Tensor] | None = None
    batches: list[Tensor] | None = None
    factors: Factors | None = None


def stored_rows(segment: Segment | EncodedSegment) -> StoredRows:
    """The valid rows of every table of a segment; views."""
    lengths: list[int] = segment.lengths.tolist()

    def of_heads(table: Tensor, entries: int = 1) -> list[Tensor]:
        return [table[head, : n // entries] for head, n in enumerate(lengths)]

    batches = None
    if isinstance(segment, EncodedSegment):
        if segment.batches is not None:
            batches = of_heads(segment.batches, ENTRIES)
        planes = []
        for table, plane in zip(segment.rows, segment.planes, strict=True):
            if plane.once:
                assert batches is not None
                used = [int(own.max()) + 1 if len(own) else 0 for own in batches]
                planes.append([table[head, :count] for head, count in enumerate(used)])
            else:
                planes.append(of_heads(table, plane.entries))
    else:
        planes = [of_heads(segment.k), of_heads(segment.v)]
    return StoredRows(
        planes=planes,
        lengths=lengths,
        start=segment.start,
        positions=None if segment.positions is None else of_heads(segment.positions),
        bias=None if segment.bias is None else of_heads(segment.bias),
        batches=batches,
        factors=segment.factors if isinstance(segment, EncodedSegment) else None,
    )
