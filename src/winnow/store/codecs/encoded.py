"""Entries under a codec, with the same small interface as a raw segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.store.codecs.protocol import ENTRIES, Codec, bytes_per_entry
from winnow.types import Segment, Selection, Tier

__all__ = ["EncodedSegment"]


@dataclass(frozen=True, kw_only=True)
class EncodedSegment:
    """Stored entries of one layer under a codec; every head holds whole pages.

    Attributes
    ----------
    rows : tuple of Tensor
        The codec's planes, each ``[H, C / entries, width]``.
    form : Codec
    head_dim : int
    dtype : torch.dtype
        Type of decoded K and V.
    lengths, start, positions, tier, version
        As in :class:`winnow.types.Segment`.
    """

    rows: tuple[Tensor, ...]
    form: Codec
    head_dim: int
    dtype: torch.dtype
    lengths: Tensor
    start: int = 0
    positions: Tensor | None = None
    tier: Tier = "host"
    version: int = 0

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self.form.name

    @property
    def heads(self) -> int:
        """KV heads ``H``."""
        return self.rows[0].shape[0]

    @property
    def bytes_per_entry(self) -> int:
        """Bytes that reading one entry (K and V of one head) moves, scales included."""
        return bytes_per_entry(self.form, self.head_dim, self.dtype)

    def positions_of(self, head: int) -> Tensor:
        """``[S]`` int32 positions of the valid entries of one head."""
        n = int(self.lengths[head])
        if self.positions is not None:
            return self.positions[head, :n]
        return torch.arange(self.start, self.start + n, dtype=torch.int32, device=self.rows[0].device)

    def decode(self, first: int = 0, last: int | None = None) -> Segment:
        """Entries ``first .. last - 1`` of every head (all by default), decoded into new memory."""
        longest = int(self.lengths.max())
        last = longest if last is None else min(last, longest)
        low, high = first // ENTRIES * ENTRIES, -(-last // ENTRIES) * ENTRIES
        if int(self.lengths.min()) >= last:
            k, v = self._decode_pages(slice(None), low, high)
        else:  # what lies behind the end of a shorter head is reserved, not valid: never touch it
            k = torch.zeros(
                self.heads, high - low, self.head_dim, dtype=self.dtype, device=self.rows[0].device
            )
            v = torch.zeros_like(k)
            for head, n in enumerate(self.lengths.tolist()):
                if n > low:
                    end = min(n, high)
                    k[head, : end - low], v[head, : end - low] = self._decode_pages(head, low, end)
        return Segment(
            k=k[:, first - low : last - low],
            v=v[:, first - low : last - low],
            lengths=(self.lengths.clamp(max=last) - first).clamp_(min=0),
            start=self.start + first,
            positions=None if self.positions is None else self.positions[:, first:last],
            tier=self.tier,
            version=self.version,
        )

    def _decode_pages(self, heads: int | slice, low: int, high: int) -> tuple[Tensor, Tensor]:
        planes = self.form.planes(self.head_dim, self.dtype)
        rows = zip(self.rows, planes, strict=True)
        return self.form.decode(
            tuple(row[heads, low // p.entries : high // p.entries] for row, p in rows), self.dtype
        )

    def narrow(self, first: int, last: int) -> EncodedSegment:
        """Entries ``first .. last - 1`` of every head, still encoded; whole pages, no copy."""
        assert first % ENTRIES == last % ENTRIES == 0, "whole pages"
        planes = self.form.planes(self.head_dim, self.dtype)
        return replace(
            self,
            rows=tuple(
                row[:, first // p.entries : last // p.entries]
                for row, p in zip(self.rows, planes, strict=True)
            ),
            lengths=(self.lengths.clamp(max=last) - first).clamp_(min=0),
            start=self.start + first,
            positions=None if self.positions is None else self.positions[:, first:last],
        )

    def tiles(self, entries: int) -> Iterator[Segment]:
        """Decoded segments of at most ``entries`` entries per head that together hold all of it."""
        entries = max(ENTRIES, entries // ENTRIES * ENTRIES)
        for first in range(0, int(self.lengths.max()), entries):
            yield self.decode(first, first + entries)

    def gather(self, selection: Selection) -> Segment:
        """The selected entries, decoded; the pages that hold them are read, no others.

        Row ``r`` of the result belongs to KV head ``r // (R // H)``; entries ascend.
        """
        entries, counts = selection.entries(self.lengths)
        group = entries.shape[0] // self.heads
        planes = self.form.planes(self.head_dim, self.dtype)
        k = torch.zeros(*entries.shape, self.head_dim, dtype=self.dtype, device=self.rows[0].device)
        v = torch.zeros_like(k)
        positions = self.start + entries
        for r, n in enumerate(counts.tolist()):
            head, wanted = r // group, entries[r, :n]
            pages, inverse = torch.unique_consecutive(wanted // ENTRIES, return_inverse=True)
            rows = tuple(
                row[head, : int(self.lengths[head]) // p.entries]
                .view(-1, ENTRIES // p.entries, p.width)[pages.to(row.device)]
                .flatten(0, 1)
                for row, p in zip(self.rows, planes, strict=True)
            )
            k_nD, v_nD = self.form.decode(rows, self.dtype)
            at = (inverse * ENTRIES + wanted % ENTRIES).to(k.device)
            k[r, :n], v[r, :n] = k_nD[at], v_nD[at]
            if self.positions is not None:
                positions[r, :n] = self.positions[head, wanted].long()
        return Segment(
            k=k,
            v=v,
            lengths=counts,
            positions=positions.to(torch.int32),
            tier=self.tier,
            version=self.version,
        )
