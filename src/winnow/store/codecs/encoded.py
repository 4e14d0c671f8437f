"""Entries under a codec, with the same small interface as a raw segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.store.codecs.protocol import ENTRIES, Codec, Plane, bytes_per_entry
from winnow.types import AttentionSpec, Factors, Partial, Segment, Selection, Tier

__all__ = ["EncodedSegment"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodedSegment:
    """Stored entries of one layer under a codec; every head holds whole pages.

    Attributes
    ----------
    rows : tuple of Tensor
        The codec's planes, each ``[H, C / entries, width]``; of a plane that pages hold ``once``, the
        rows that ``batches`` names.
    form : Codec
    head_dim : int
    dtype : torch.dtype
        Type of decoded K and V.
    batches : Tensor or None
        ``[H, C / ENTRIES]`` int32: which row of the ``once`` planes each page reads; None for codecs
        without such planes.
    factors : Factors or None
        The keys, for codecs that store them as a product; None for the others.
    lengths, start, positions, bias, tier, version
        As in :class:`winnow.types.Segment`.
    """

    rows: tuple[Tensor, ...]
    form: Codec
    head_dim: int
    dtype: torch.dtype
    lengths: Tensor
    batches: Tensor | None = None
    factors: Factors | None = None
    start: int = 0
    positions: Tensor | None = None
    bias: Tensor | None = None
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

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """The codec's planes for entries of this size."""
        return self.form.planes(self.head_dim, self.dtype)

    @cached_property
    def bytes_per_entry(self) -> int:
        """Bytes that reading one entry (K and V of one head) moves, scales included.

        Of keys that are stored as a product, the row of the left factor; what a selector reads to choose
        is its own account.
        """
        size = bytes_per_entry(self.form, self.head_dim, self.dtype)
        size -= sum(-(-p.width * p.dtype.itemsize // p.entries) for p in self.planes if p.index)
        if self.factors is not None:
            size += self.factors.left.shape[1] * self.factors.left.element_size()
        entries = int(self.lengths.sum())
        if self.batches is None or not entries:
            return size
        pages = [row[: n // ENTRIES] for row, n in zip(self.batches, self.lengths.tolist(), strict=True)]
        rows = sum(row.unique().numel() for row in pages)
        shared = rows * sum(p.width * p.dtype.itemsize for p in self.planes if p.once)
        return int(size + -(-shared // entries))

    @cached_property
    def reads(self) -> dict[Tier, int]:
        """:attr:`bytes_per_entry` by the tier that they come from."""
        if self.factors is None:
            return {self.tier: self.bytes_per_entry}
        left = self.factors.left
        near: Tier = "host" if left.device.type == "cpu" else "device"
        row = left.shape[1] * left.element_size()
        rest = self.bytes_per_entry - row
        return {near: self.bytes_per_entry} if near == self.tier else {near: row, self.tier: rest}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the entries, with what a selector reads, and with factors once for all heads."""
        entries = int(self.lengths.sum())
        if self.factors is None:
            return entries * self.bytes_per_entry
        both = (self.factors.left, self.factors.right)
        shared = sum(table.numel() * table.element_size() for table in both)
        return entries * bytes_per_entry(self.form, self.head_dim, self.dtype) + shared

    @cached_property
    def _derived(self) -> dict[str, Any]:
        return {}

    def derived(self, name: str, make: Callable[[EncodedSegment], T]) -> T:
        """What ``make`` says of this segment, made once: side data that a codec reads at every step."""
        if name not in self._derived:
            self._derived[name] = make(self)
        found: T = self._derived[name]
        return found

    def positions_of(self, head: int) -> Tensor:
        """``[S]`` int32 positions of the valid entries of one head."""
        n = int(self.lengths[head])
        if self.positions is not None:
            return self.positions[head, :n]
        return torch.arange(self.start, self.start + n, dtype=torch.int32, device=self.rows[0].device)

    def read(self, head: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Decoded K and V ``[n, D]`` of entries ``first .. last - 1`` of one head."""
        low, high = first // ENTRIES * ENTRIES, -(-last // ENTRIES) * ENTRIES
        k, v = self._decoded(head, torch.arange(low // ENTRIES, high // ENTRIES))
        return k[first - low : last - low], v[first - low : last - low]

    def decode(self, first: int = 0, last: int | None = None) -> Segment:
        """Entries ``first .. last - 1`` of every head (all by default), decoded into new memory."""
        longest = int(self.lengths.max())
        last = longest if last is None else min(last, longest)
        low, high = first // ENTRIES * ENTRIES, -(-last // ENTRIES) * ENTRIES
        if int(self.lengths.min()) >= last and (self.factors is None or self.positions is None):
            k, v = self._decoded_together(low, high)
        else:  # what lies behind the end of a shorter head is reserved, not valid: never touch it
            k = torch.zeros(
                self.heads, high - low, self.head_dim, dtype=self.dtype, device=self.rows[0].device
            )
            v = torch.zeros_like(k)
            for head, n in enumerate(self.lengths.tolist()):
                if n > low:
                    end = min(n, high)
                    k[head, : end - low], v[head, : end - low] = self.read(head, low, end)
        return Segment(
            k=k[:, first - low : last - low],
            v=v[:, first - low : last - low],
            lengths=(self.lengths.clamp(max=last) - first).clamp_(min=0),
            start=self.start + first,
            positions=None if self.positions is None else self.positions[:, first:last],
            bias=None if self.bias is None else self.bias[:, first:last],
            tier=self.tier,
            version=self.version,
        )

    def seen_as(self, k: Tensor, v: Tensor) -> Segment:
        """These entries with stored rows ``[H, C, W]`` as keys and values, for kernels that read them so."""
        return Segment(
            k=k,
            v=v,
            lengths=self.lengths,
            start=self.start,
            positions=self.positions,
            bias=self.bias,
            tier=self.tier,
            version=self.version,
        )

    def turned(self, k_nD: Tensor, positions_n: Tensor) -> Tensor:
        """Keys that were rebuilt at position 0, at their own."""
        rotary = None if self.factors is None else self.factors.rotary
        return k_nD if rotary is None else rotary.turn(k_nD, positions_n)

    def _decoded_together(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, n, D]`` of entries that every head holds, at the same positions."""
        rows = self._all_heads(low, high)
        if self.factors is None:
            return self.form.decode(rows, self.dtype)
        first = self.start + low - self.factors.start
        left = self.factors.left[first : first + high - low]
        k, v = self.form.decode((*rows, left, self.factors.right), self.dtype)
        return self.turned(k, torch.arange(self.start + low, self.start + high, device=k.device)), v

    def _decoded(self, head: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[n, D]`` of the listed pages of one head."""
        rows = self._pages(head, pages)
        if self.factors is None:
            return self.form.decode(rows, self.dtype)
        at = (pages.unsqueeze(1) * ENTRIES + torch.arange(ENTRIES)).flatten()
        table, device = self.positions, self.factors.left.device
        positions = (self.start + at if table is None else table[head, at.to(table.device)].long()).to(device)
        left = self.factors.left[positions - self.factors.start]
        k, v = self.form.decode((*rows, left, self.factors.right[head]), self.dtype)
        return self.turned(k, positions), v

    def _all_heads(self, low: int, high: int) -> tuple[Tensor, ...]:
        """Rows of pages that every head holds, one per page of the planes that pages hold once."""
        rows = []
        for row, p in zip(self.rows, self.planes, strict=True):
            if p.once:
                assert self.batches is not None
                at = self.batches[:, low // ENTRIES : high // ENTRIES].long()
                rows.append(row[torch.arange(self.heads, device=row.device).unsqueeze(1), at])
            else:
                rows.append(row[:, low // p.entries : high // p.entries])
        return tuple(rows)

    def _pages(self, head: int, pages: Tensor) -> tuple[Tensor, ...]:
        """Rows of the listed pages of one head, one per page of the planes that pages hold once."""
        rows = []
        whole = int(self.lengths[head]) // ENTRIES
        straight = len(pages) and int(pages[-1]) - int(pages[0]) + 1 == len(pages)
        first = int(pages[0]) if straight else 0
        for row, p in zip(self.rows, self.planes, strict=True):
            if p.once:
                assert self.batches is not None
                rows.append(row[head, self.batches[head, pages.to(row.device)].long()])
                continue
            per = ENTRIES // p.entries
            if straight:  # a view, where a list of pages is a copy
                rows.append(row[head, first * per : (first + len(pages)) * per])
            else:
                of_page = row[head, : whole * per].view(-1, per, p.width)
                rows.append(of_page[pages.to(row.device)].flatten(0, 1))
        return tuple(rows)

    def narrow(self, first: int, last: int) -> EncodedSegment:
        """Entries ``first .. last - 1`` of every head, still encoded; whole pages, no copy."""
        assert first % ENTRIES == last % ENTRIES == 0, "whole pages"
        return replace(
            self,
            rows=tuple(
                row if p.once else row[:, first // p.entries : last // p.entries]
                for row, p in zip(self.rows, self.planes, strict=True)
            ),
            batches=None if self.batches is None else self.batches[:, first // ENTRIES : last // ENTRIES],
            lengths=(self.lengths.clamp(max=last) - first).clamp_(min=0),
            start=self.start + first,
            positions=None if self.positions is None else self.positions[:, first:last],
            bias=None if self.bias is None else self.bias[:, first:last],
        )

    def tiles(self, entries: int) -> Iterator[Segment]:
        """Decoded segments of at most ``entries`` entries per head that together hold all of it."""
        entries = max(ENTRIES, entries // ENTRIES * ENTRIES)
        for first in range(0, int(self.lengths.max()), entries):
            yield self.decode(first, first + entries)

    def attend(
        self,
        q_HD: Tensor,
        *,
        spec: AttentionSpec,
        position: int,
        selection: Selection | None = None,
        want_logits: bool = False,
        backend: Backend = "auto",
    ) -> Partial | None:
        """Decode attention over the stored form, as :func:`winnow.kernels.decode.decode`.

        None where the codec offers none for these operands; then :meth:`tiles` or :meth:`gather` is
        what the decode kernel reads.
        """
        return self.form.attend(
            q_HD,
            self,
            spec=spec,
            position=position,
            selection=selection,
            want_logits=want_logits,
            backend=backend,
        )

    def gather(self, selection: Selection) -> Segment:
        """The selected entries, decoded; the pages that hold them are read, no others.

        Row ``r`` of the result belongs to KV head ``r // (R // H)``; entries ascend.
        """
        entries, counts = selection.entries(self.lengths)
        group = entries.shape[0] // self.heads
        k = torch.zeros(*entries.shape, self.head_dim, dtype=self.dtype, device=self.rows[0].device)
        v = torch.zeros_like(k)
        positions = self.start + entries
        bias = None if self.bias is None else torch.zeros(entries.shape, device=self.bias.device)
        for r, n in enumerate(counts.tolist()):
            head, wanted = r // group, entries[r, :n]
            pages, inverse = torch.unique_consecutive(wanted // ENTRIES, return_inverse=True)
            k_nD, v_nD = self._decoded(head, pages)
            at = (inverse * ENTRIES + wanted % ENTRIES).to(k.device)
            k[r, :n], v[r, :n] = k_nD[at], v_nD[at]
            if self.positions is not None:
                positions[r, :n] = self.positions[head, wanted].long()
            if self.bias is not None and bias is not None:
                bias[r, :n] = self.bias[head, wanted.to(bias.device)]
        return Segment(
            k=k,
            v=v,
            lengths=counts,
            positions=positions.to(torch.int32),
            bias=bias,
            tier=self.tier,
            version=self.version,
        )
