"""A run: consecutive stretches of one layer's entries, one per KV head, that share codec and tier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from winnow.store.arena import Arena, open_arena
from winnow.store.codecs import ENTRIES, Codec, EncodedSegment, codec_named
from winnow.types import Segment, Tier

__all__ = ["Run", "Shape", "SharedRun"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all runs of a sequence have in common.

    Attributes
    ----------
    heads, head_dim, capacity : int
        ``H``, ``D`` and the most entries a head may ever hold.
    dtype : torch.dtype
        Type of decoded K and V.
    device : torch.device
        Where attention runs.
    directory : Path or None
        Where the disk tier puts its unlinked files.
    """

    heads: int
    head_dim: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    directory: Path | None = None

    @property
    def tier(self) -> Tier:
        """Tier of entries that nobody moved."""
        return "host" if self.device.type == "cpu" else "device"


class Run:
    """Entries that the store owns, in one codec on one tier.

    Head ``h`` holds ``lengths[h]`` entries from slot ``first`` on. Positions are consecutive from
    ``start`` until something made them otherwise; only then does a table of positions exist.
    Except in the last run of a layer, every head holds whole pages of :data:`ENTRIES` entries.
    """

    def __init__(self, shape: Shape, codec: str, tier: Tier, *, start: int = 0):
        self.shape = shape
        self.codec: Codec = codec_named(codec)
        self.tier: Tier = tier
        self.planes = self.codec.planes(shape.head_dim, shape.dtype)
        self.arenas = [self._arena(p.width, p.dtype, -(-shape.capacity // p.entries)) for p in self.planes]
        self.first = 0
        self.start = start
        self.version = 0
        self.lengths = [0] * shape.heads
        self.uniform = True
        self._positions: Arena | None = None
        self._ready = 0  # slots that are prepared for an append to all heads, while they are uniform
        self._room = 0  # tokens that every head is prepared for, while they are ragged

    def _arena(self, width: int, dtype: torch.dtype, rows: int) -> Arena:
        shape = self.shape
        return open_arena(
            shape.heads,
            rows,
            width,
            dtype,
            tier=self.tier,
            device=shape.device,
            directory=shape.directory,
        )

    # ------------------------------------------------------------------ reading

    def read(self, head: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Decoded K and V ``[n, D]`` of entries ``first .. last - 1`` of a head; a view where raw."""
        low = first // ENTRIES * ENTRIES
        high = -(-last // ENTRIES) * ENTRIES
        if all(p.entries == 1 for p in self.planes):
            low, high = first, last
        rows = tuple(
            a.data[head, (self.first + low) // p.entries : (self.first + high) // p.entries]
            for a, p in zip(self.arenas, self.planes, strict=True)
        )
        k, v = self.codec.decode(rows, self.shape.dtype)
        return k[first - low : last - low], v[first - low : last - low]

    def positions_of(self, head: int, first: int, last: int) -> Tensor:
        """``[n]`` int32 positions of entries ``first .. last - 1`` of a head."""
        if self._positions is None:
            return torch.arange(self.start + first, self.start + last, dtype=torch.int32)
        return self._positions.data[head, self.first + first : self.first + last, 0]

    def segment(self) -> Segment | EncodedSegment:
        """The entries as kernels read them: no copy, and a later append does not change it."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        positions = None if self._positions is None else self._positions.data[:, self.first :, 0]
        if self.codec.name == "raw":
            k, v = (arena.data for arena in self.arenas)
            if self.first:
                k, v = k[:, self.first :], v[:, self.first :]
            return Segment(
                k=k,
                v=v,
                lengths=lengths,
                start=self.start,
                positions=positions,
                tier=self.tier,
                version=self.version,
            )
        return EncodedSegment(
            rows=tuple(
                a.data[:, self.first // p.entries :] for a, p in zip(self.arenas, self.planes, strict=True)
            ),
            form=self.codec,
            head_dim=self.shape.head_dim,
            dtype=self.shape.dtype,
            lengths=lengths,
            start=self.start,
            positions=positions,
            tier=self.tier,
            version=self.version,
        )

    def nbytes(self) -> int:
        """Bytes held now."""
        held = sum(arena.nbytes() for arena in self.arenas)
        return held + (self._positions.nbytes() if self._positions is not None else 0)

    # ------------------------------------------------------------------ writing

    def append(self, k_THD: Tensor, v_THD: Tensor, positions_T: Tensor) -> None:
        """Add one entry per token to every head; raw runs only."""
        tokens = k_THD.shape[0]
        if not self.uniform:
            self._append_ragged(k_THD, v_THD, positions_T)
            return
        count = self.lengths[0]
        if count == 0:
            self._restart(int(positions_T[0]))
        if self._positions is None and not _consecutive(positions_T, self.start + count):
            self.need_positions()
        at = self.first + count
        if at + tokens > self._ready:
            self._prepare(at, at + tokens)
        k, v = self.arenas[0].data, self.arenas[1].data
        if tokens == 1:
            k.select(1, at).copy_(k_THD[0])
            v.select(1, at).copy_(v_THD[0])
        else:
            k.narrow(1, at, tokens).copy_(k_THD.transpose(0, 1))
            v.narrow(1, at, tokens).copy_(v_THD.transpose(0, 1))
        if self._positions is not None:
            self._positions.data.select(2, 0).narrow(1, at, tokens).copy_(positions_T)
        self.lengths = [count + tokens] * self.shape.heads

    def _append_ragged(self, k_THD: Tensor, v_THD: Tensor, positions_T: Tensor) -> None:
        """One scatter per plane: head ``h`` writes behind its own last entry."""
        tokens, heads = k_THD.shape[0], self.shape.heads
        self.need_positions()
        assert self._positions is not None
        ends = [self.first + n for n in self.lengths]
        if tokens > self._room:
            room = [
                arena.prepare(head, end, end + tokens) - end
                for arena, _ in self._tables()
                for head, end in enumerate(ends)
            ]
            self._room = min(room)
        slots = torch.tensor(ends, device=k_THD.device)
        if tokens > 1:
            slots = slots.unsqueeze(1) + torch.arange(tokens, device=k_THD.device)
        where = positions_T.to(device=k_THD.device, dtype=torch.int32).repeat(heads)
        for arena, rows in (
            (self.arenas[0], k_THD.transpose(0, 1).flatten(0, 1)),
            (self.arenas[1], v_THD.transpose(0, 1).flatten(0, 1)),
            (self._positions, where.unsqueeze(1)),
        ):
            base = arena.bases if tokens == 1 else arena.bases.unsqueeze(1)
            arena.rows.index_copy_(0, (base + slots).flatten(), rows)
        self._room -= tokens
        self.lengths = [n + tokens for n in self.lengths]

    def write(self, head: int, at: int, k_nD: Tensor, v_nD: Tensor, positions_n: Tensor) -> None:
        """Encode entries into a head from entry ``at`` on; lengths are published separately."""
        slot, last = self.first + at, self.first + at + k_nD.shape[0]
        for arena, plane, rows in zip(self.arenas, self.planes, self.codec.encode(k_nD, v_nD), strict=True):
            assert slot % plane.entries == last % plane.entries == 0, "whole pages"
            arena.prepare(head, slot // plane.entries, last // plane.entries)
            arena.data[head, slot // plane.entries : last // plane.entries] = rows
        if self._positions is not None:
            self._positions.prepare(head, slot, last)
            self._positions.data[head, slot:last, 0] = positions_n

    def copy_pages(self, head: int, at: int, source: Run, first: int, last: int) -> None:
        """Copy encoded entries of a run of the same codec as they are, without another rounding."""
        for mine, theirs, plane in zip(self.arenas, source.arenas, self.planes, strict=True):
            e = plane.entries
            to, frm, n = (self.first + at) // e, (source.first + first) // e, (last - first) // e
            mine.prepare(head, to, to + n)
            mine.data[head, to : to + n] = theirs.data[head, frm : frm + n]
        if self._positions is not None:
            slot = self.first + at
            self._positions.prepare(head, slot, slot + last - first)
            self._positions.data[head, slot : slot + last - first, 0] = source.positions_of(head, first, last)

    def publish(self, lengths: list[int]) -> None:
        """Set how many entries each head holds and give back what lies outside."""
        self.lengths = lengths
        self.uniform = min(lengths) == max(lengths)
        self._ready = self._room = 0
        if max(lengths) == 0:
            self.first = 0
        for arena, entries in self._tables():
            for head, n in enumerate(lengths):
                arena.retain(head, self.first // entries, -(-(self.first + n) // entries))

    def restore(
        self, rows: list[list[Tensor]], lengths: list[int], start: int, positions: list[Tensor] | None
    ) -> None:
        """Add encoded rows from a file, ``rows[plane][head]``, behind what the run holds."""
        if not any(self.lengths):
            self._restart(start)
        follows = positions is None and all(start == self.start + n for n in self.lengths)
        if not follows:
            self.need_positions()
        for head, n in enumerate(lengths):
            at = self.first + self.lengths[head]
            for arena, plane, parts in zip(self.arenas, self.planes, rows, strict=True):
                e = plane.entries
                arena.prepare(head, at // e, (at + n) // e)
                arena.data[head, at // e : (at + n) // e] = parts[head]
            if self._positions is not None:
                self._positions.prepare(head, at, at + n)
                own = torch.arange(start, start + n) if positions is None else positions[head]
                self._positions.data[head, at : at + n, 0] = own
        self.publish([have + n for have, n in zip(self.lengths, lengths, strict=True)])

    def drop_front(self, counts: list[int]) -> None:
        """Drop the oldest ``counts[h]`` entries of each head and give their memory back."""
        left = [n - c for n, c in zip(self.lengths, counts, strict=True)]
        if min(counts) == max(counts):
            self.first += counts[0]
            self.start += counts[0]
        else:
            self.need_positions()
            for arena, e in self._tables():
                for head, (count, n) in enumerate(zip(counts, left, strict=True)):
                    begin, size = self.first // e, -(-n // e)
                    rows = arena.data[head, begin + count // e : begin + count // e + size]
                    arena.data[head, begin : begin + size] = rows.clone()
        self.publish(left)

    def rewind(self) -> None:
        """Forget where entries lay; the caller writes every head anew from slot 0."""
        for arena, _ in self._tables():
            for head in range(self.shape.heads):
                arena.retain(head, 0, 0)
        self.first = 0

    def need_positions(self) -> None:
        """Write positions out, because they stop being consecutive."""
        if self._positions is not None:
            return
        table = self._arena(1, torch.int32, self.shape.capacity)
        for head, n in enumerate(self.lengths):
            table.prepare(head, self.first, self.first + n)
            table.data[head, self.first : self.first + n, 0] = self.positions_of(head, 0, n)
        self._positions = table
        self._ready = self._room = 0  # the table's slots are not prepared for the next append

    def close(self) -> None:
        """Give everything back."""
        for arena, _ in self._tables():
            arena.close()

    def _tables(self) -> list[tuple[Arena, int]]:
        tables = [(arena, plane.entries) for arena, plane in zip(self.arenas, self.planes, strict=True)]
        return tables if self._positions is None else [*tables, (self._positions, 1)]

    def _prepare(self, first: int, last: int) -> None:
        ready = [
            arena.prepare(head, first, last)
            for arena, _ in self._tables()
            for head in range(self.shape.heads)
        ]
        self._ready = min(ready)

    def _restart(self, start: int) -> None:
        """An empty run takes the position of what comes next."""
        self.start = start
        if self._positions is not None:
            self._positions.close()
            self._positions = None


class SharedRun:
    """Read-only entries of a pool or of another sequence, in front of what this one owns."""

    def __init__(self, segment: Segment | EncodedSegment):
        self._segment = segment
        self.tier: Tier = segment.tier
        self.codec: Codec = codec_named(segment.codec)
        self.version = segment.version
        self.lengths: list[int] = segment.lengths.tolist()

    def read(self, head: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Decoded K and V ``[n, D]`` of entries of a head; a view where raw."""
        part = self._segment.decode(first, last)
        if part is self._segment:
            return part.k[head, first:last], part.v[head, first:last]
        return part.k[head, : last - first], part.v[head, : last - first]

    def positions_of(self, head: int, first: int, last: int) -> Tensor:
        """``[n]`` int32 positions."""
        return self._segment.positions_of(head)[first:last]

    def segment(self) -> Segment | EncodedSegment:
        """The pool's segment, or the part of it that is still in use."""
        if self.version != self._segment.version:
            self._segment = replace(self._segment, version=self.version)
        return self._segment

    def nbytes(self) -> int:
        """Bytes of the entries in use; they belong to the pool."""
        return sum(self.lengths) * self._segment.bytes_per_entry

    def narrow(self, first: int, last: int) -> None:
        """Use only entries ``first .. last - 1`` of every head from now on."""
        self._segment = self._segment.narrow(first, last)
        self.lengths = self._segment.lengths.tolist()

    def close(self) -> None:
        """Nothing: the pool frees its own."""


def _consecutive(positions_T: Tensor, expected: int) -> bool:
    if int(positions_T[0]) != expected:
        return False
    tokens = positions_T.shape[0]
    return tokens == 1 or bool((positions_T.diff() == 1).all())
