"""Attention: what a model fixes, stored entries, lists of them, and results that merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["AttentionSpec", "Partial", "Segment", "Selection", "Tier"]


Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What a model fixes about one layer's attention, whatever the recipe.

    Attributes
    ----------
    scale : float
        Factor on the query-key products.
    window : int or None
        Sliding window of the model: entry at position ``j`` is visible to a query at ``i``
        only if ``i - j < window``.
    softcap : float or None
        Logits become ``softcap * tanh(logits / softcap)``.
    sinks : Tensor or None
        ``[H * G]`` learned sink logits: each head's softmax has one more term
        ``exp(sinks[h])`` whose value is zero (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Stored entries of one layer that share codec, tier and rotary table.

    Storage is ragged: head ``h`` holds ``lengths[h]`` entries, in ascending position, at the
    front of its own reserved region. Memory behind ``lengths[h]`` is reserved, not valid.

    Attributes
    ----------
    k, v : Tensor
        ``[H, C, D]``. Only the last dimension must be contiguous.
    lengths : Tensor
        ``[H]`` int32 on the CPU.
    start : int
        Position of entry 0 where ``positions`` is None: entry ``e`` is at ``start + e``.
    positions : Tensor or None
        ``[H, C]`` int32, ascending within each head; None where positions are consecutive.
    bias : Tensor or None
        ``[H, C]`` float32 added to the scaled logit of an entry (merged and compensating
        entries stand for several tokens).
    tier : {"device", "host", "disk"}
        Where the bytes lie.
    version : int
        Changes whenever anything but an append happened to the entries (a gather, a rollback,
        a move), so that side data kept beside a segment knows when it is stale.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    start: int = 0
    positions: Tensor | None = None
    bias: Tensor | None = None
    tier: Tier = "host"
    version: int = 0

    @property
    def heads(self) -> int:
        """KV heads ``H``."""
        return self.k.shape[0]

    @property
    def codec(self) -> str:
        """Form that the entries are stored in; ``"raw"`` is what the model computed."""
        return "raw"

    @property
    def bytes_per_entry(self) -> int:
        """Bytes that reading one entry (K and V of one head) moves."""
        return 2 * self.k.shape[2] * self.k.element_size()

    @property
    def reads(self) -> dict[Tier, int]:
        """:attr:`bytes_per_entry` by the tier that they come from."""
        return {self.tier: self.bytes_per_entry}

    @property
    def nbytes(self) -> int:
        """Bytes of the valid entries."""
        return int(self.lengths.sum()) * self.bytes_per_entry

    def positions_of(self, head: int) -> Tensor:
        """``[S]`` int32 positions of the valid entries of one head."""
        n = int(self.lengths[head])
        if self.positions is not None:
            return self.positions[head, :n]
        return torch.arange(self.start, self.start + n, dtype=torch.int32, device=self.k.device)

    def decode(self, first: int = 0, last: int | None = None) -> Segment:
        """Entries ``first .. last - 1`` of every head (all by default), decoded; here without a copy."""
        longest = int(self.lengths.max())
        if first == 0 and (last is None or last >= longest):
            return self
        last = longest if last is None else min(last, longest)
        return Segment(
            k=self.k[:, first:last],
            v=self.v[:, first:last],
            lengths=(self.lengths.clamp(max=last) - first).clamp_(min=0),
            start=self.start + first,
            positions=None if self.positions is None else self.positions[:, first:last],
            bias=None if self.bias is None else self.bias[:, first:last],
            tier=self.tier,
            version=self.version,
        )

    def narrow(self, first: int, last: int) -> Segment:
        """Entries ``first .. last - 1`` of every head, in the form they are stored in; no copy."""
        return self.decode(first, last)

    def tiles(self, entries: int) -> Iterator[Segment]:
        """Decoded segments that together hold all of it; a raw one, which takes no memory, is one.

        ``entries`` bounds what an encoded segment decodes at a time.
        """
        yield self

    def gather(self, selection: Selection) -> Segment:
        """The selected entries, copied into a decoded segment of one head per row of the selection.

        Row ``r`` of the result belongs to KV head ``r // (R // H)``; entries ascend.
        """
        entries, counts = selection.entries(self.lengths)
        heads = torch.arange(entries.shape[0]) // (entries.shape[0] // self.heads)
        rows, at = heads.to(self.k.device).unsqueeze(1), entries.to(self.k.device)
        positions = self.start + entries if self.positions is None else self.positions[rows, at]
        return Segment(
            k=self.k[rows, at],
            v=self.v[rows, at],
            lengths=counts,
            positions=positions.to(torch.int32),
            bias=None if self.bias is None else self.bias[rows, at],
            tier=self.tier,
            version=self.version,
        )


@dataclass(frozen=True, kw_only=True)
class Partial:
    """Attention over some of the entries, in a form that merges exactly with the rest.

    Attributes
    ----------
    out : Tensor
        ``[T, H * G, D]``; the softmax over *these* entries applied to their values. Zero
        where a query saw none of them.
    lse : Tensor
        ``[T, H * G]`` float32, natural logarithm of the sum of exponentials; ``-inf`` where a
        query saw none.
    pairs : int
        Query-key scores inside the mask, summed over query heads: the work done.
    row_max : Tensor or None
        ``[T, H * G]`` float32 largest scaled logit, only where it was asked for.
    logits : Tensor or None
        ``[H * G, S]`` float32 scaled logits of a decode step (``-inf`` where not read), only
        where they were asked for.
    """

    out: Tensor
    lse: Tensor
    pairs: int
    row_max: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Entries that a decode step reads from one segment, by list.

    Attributes
    ----------
    indices : Tensor
        ``[R, N]`` int32, ``R`` is ``H`` (one list per KV head) or ``H * G`` (one per query
        head). Entry numbers where ``page`` is 1, page numbers otherwise; page ``p`` holds
        entries ``p * page .. min((p + 1) * page, length) - 1``. Unique within a row.
    counts : Tensor
        ``[R]`` int32 valid indices per row.
    page : int
    """

    indices: Tensor
    counts: Tensor
    page: int = 1

    def entries(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Spell the lists out, for a segment whose heads hold ``lengths`` (``[H]``) entries.

        Returns
        -------
        entries : Tensor
            ``[R, N * page]`` int64 entry numbers, ascending; 0 behind the end of a row.
        counts : Tensor
            ``[R]`` int32 valid entries per row.
        """
        rows, width = self.indices.shape
        if rows % len(lengths):
            raise ValueError(f"a selection of {rows} rows fits no segment of {len(lengths)} KV heads")
        valid = torch.arange(width) < self.counts.cpu().unsqueeze(1)
        entries = self.indices.cpu().long().unsqueeze(2) * self.page + torch.arange(self.page)
        limit = lengths.long().repeat_interleave(rows // len(lengths)).view(-1, 1, 1)
        valid = (valid.unsqueeze(2) & (entries < limit)).flatten(1)
        far = torch.iinfo(torch.int64).max
        entries = torch.where(valid, entries.flatten(1), far).sort(dim=1).values
        return entries.masked_fill(entries == far, 0), valid.sum(1).to(torch.int32)
