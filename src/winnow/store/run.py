"""A run: stretches of one layer's entries, one per KV head, that share codec and tier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from winnow.store.arena import Arena, open_arena
from winnow.store.codecs import ENTRIES, Codec, EncodedSegment, codec_named
from winnow.store.factors import FactorTable
from winnow.store.form import StoredRows
from winnow.store.picks import Piece
from winnow.types import Factors, Segment, Tier

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

    Head ``h`` holds ``lengths[h]`` entries from slot ``first`` on, in ascending position. Positions are
    consecutive from ``start`` until something made them otherwise; only then does a table of positions
    exist. A table of biases exists once one was set. In a codec's run every head holds whole pages of
    :data:`ENTRIES` entries; a raw run holds any number. Where keys are stored as a product, the run has one
    pair of factors, which are given before the first entry is written and serve it for good.
    """

    def __init__(self, shape: Shape, codec: str, tier: Tier, *, start: int = 0):
        self.shape = shape
        self.codec: Codec = codec_named(codec)
        self.tier: Tier = tier
        self.planes = self.codec.planes(shape.head_dim, shape.dtype)
        self.arenas = [
            self._arena(
                p.width, p.dtype, -(-shape.capacity // p.entries) + p.once, shape.tier if p.stays else tier
            )
            for p in self.planes
        ]
        self.first = 0
        self.start = start
        self.version = 0
        self.lengths = [0] * shape.heads
        self.uniform = True
        self._positions: Arena | None = None
        self._bias: Arena | None = None
        pages = -(-shape.capacity // ENTRIES)
        self._batches = self._arena(1, torch.int32, pages, tier) if any(p.once for p in self.planes) else None
        self._factors: FactorTable | None = None
        self._ready = 0  # slots that are prepared for an append to all heads, while they are uniform
        self._room = 0  # tokens that every head is prepared for, while they are ragged
        self._segment: Segment | EncodedSegment | None = None

    def _arena(
        self, width: int, dtype: torch.dtype, rows: int, tier: Tier, heads: int | None = None
    ) -> Arena:
        shape = self.shape
        return open_arena(
            heads or shape.heads,
            rows,
            width,
            dtype,
            tier=tier,
            device=shape.device,
            directory=shape.directory,
        )

    # ------------------------------------------------------------------ reading

    def read(self, head: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Decoded K and V ``[n, D]`` of entries ``first .. last - 1`` of a head; a view where raw."""
        segment = self.segment()
        if isinstance(segment, EncodedSegment):
            return segment.read(head, first, last)
        return segment.k[head, first:last], segment.v[head, first:last]

    def positions_of(self, head: int, first: int, last: int) -> Tensor:
        """``[n]`` int32 positions of entries ``first .. last - 1`` of a head."""
        if self._positions is None:
            return torch.arange(self.start + first, self.start + last, dtype=torch.int32)
        return self._positions.data[head, self.first + first : self.first + last, 0]

    def span(self, head: int) -> tuple[int, int]:
        """First and last position of a head that holds something."""
        n = self.lengths[head]
        if self._positions is None:
            return self.start, self.start + n - 1
        table = self._positions.data[head, :, 0]
        return int(table[self.first]), int(table[self.first + n - 1])

    def bias_of(self, head: int, first: int, last: int) -> Tensor | None:
        """``[n]`` float32 biases of entries ``first .. last - 1`` of a head, where the run has any."""
        return (
            None if self._bias is None else self._bias.data[head, self.first + first : self.first + last, 0]
        )

    @property
    def biased(self) -> bool:
        """Some entry was given a bias."""
        return self._bias is not None

    def segment(self) -> Segment | EncodedSegment:
        """The entries as kernels read them: no copy, and a later append does not change it."""
        if self._segment is None:
            self._segment = self._made_segment()
        elif self._segment.version != self.version:
            self._segment = replace(self._segment, version=self.version)
        return self._segment

    def _made_segment(self) -> Segment | EncodedSegment:
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        positions = None if self._positions is None else self._positions.data[:, self.first :, 0]
        bias = None if self._bias is None else self._bias.data[:, self.first :, 0]
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
                bias=bias,
                tier=self.tier,
                version=self.version,
            )
        page = self.first // ENTRIES
        return EncodedSegment(
            rows=tuple(
                a.data if p.once else a.data[:, self.first // p.entries :]
                for a, p in zip(self.arenas, self.planes, strict=True)
            ),
            form=self.codec,
            head_dim=self.shape.head_dim,
            dtype=self.shape.dtype,
            batches=None if self._batches is None else self._batches.data[:, page:, 0],
            factors=None if self._factors is None else self._factors.factors(),
            lengths=lengths,
            start=self.start,
            positions=positions,
            bias=bias,
            tier=self.tier,
            version=self.version,
        )

    def bytes(self) -> dict[Tier, int]:
        """Bytes held now, by tier: planes that stay count where they stay."""
        held: dict[Tier, int] = {self.tier: 0}
        for arena, plane in zip(self.arenas, self.planes, strict=True):
            tier = self.shape.tier if plane.stays else self.tier
            held[tier] = held.get(tier, 0) + arena.nbytes()
        for table in (self._positions, self._bias, self._batches):
            held[self.tier] += 0 if table is None else table.nbytes()
        if self._factors is not None:
            held[self.shape.tier] = held.get(self.shape.tier, 0) + self._factors.nbytes()
        return held

    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(self.bytes().values())

    # ------------------------------------------------------------------ writing

    def append(self, k_THD: Tensor, v_THD: Tensor, positions_T: Tensor) -> None:
        """Add one entry per token to every head; raw runs only."""
        tokens = k_THD.shape[0]
        self._segment = None
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
        if self._bias is not None:
            self._bias.data.select(2, 0).narrow(1, at, tokens).zero_()
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
        where = positions_T.to(device=k_THD.device, dtype=torch.int32).repeat(heads).unsqueeze(1)
        written = [
            (self.arenas[0], k_THD.transpose(0, 1).flatten(0, 1)),
            (self.arenas[1], v_THD.transpose(0, 1).flatten(0, 1)),
            (self._positions, where),
        ]
        if self._bias is not None:
            written.append((self._bias, torch.zeros(where.shape, device=where.device)))
        for arena, rows in written:
            base = arena.bases if tokens == 1 else arena.bases.unsqueeze(1)
            arena.rows.index_copy_(0, (base + slots).flatten(), rows)
        self._room -= tokens
        self.lengths = [n + tokens for n in self.lengths]

    def factor(self, given: Factors, first: int, last: int) -> None:
        """Take the factors of the keys at positions ``first .. last - 1``, before any entry is written."""
        assert self._factors is None, "a run has one pair of factors"
        shape = self.shape

        def make(heads: int, rows: int, width: int) -> Arena:
            return self._arena(width, shape.dtype, rows, shape.tier, heads)

        self._factors = FactorTable(given, first, last, shape.capacity, make)
        self._segment = None

    def write(self, head: int, at: int, piece: Piece, channels: Tensor | None = None) -> None:
        """Encode entries into a head from entry ``at`` on; lengths are published separately.

        A bias that is not zero needs a table first: :meth:`need_bias`. Keys that the run stores as a product
        are not written: the factors already have them.
        """
        self._segment = None
        slot, last = self.first + at, self.first + at + len(piece.positions)
        if slot == last:
            return
        once: list[tuple[Arena, Tensor]] = []
        encoded = self.codec.encode(piece.k, piece.v, channels)
        for arena, plane, rows in zip(self.arenas, self.planes, encoded, strict=True):
            if plane.once:
                once.append((arena, rows))
                continue
            assert slot % plane.entries == last % plane.entries == 0, "whole pages"
            arena.prepare(head, slot // plane.entries, last // plane.entries)
            arena.data[head, slot // plane.entries : last // plane.entries] = rows
        if once:
            self._batch(head, slot // ENTRIES, last // ENTRIES, once)
        self._write_side(head, slot, piece.positions, piece.bias)

    def _write_side(self, head: int, slot: int, positions_n: Tensor, bias_n: Tensor | None) -> None:
        last = slot + len(positions_n)
        if self._positions is not None:
            self._positions.prepare(head, slot, last)
            self._positions.data[head, slot:last, 0] = positions_n
        if self._bias is not None:
            self._bias.prepare(head, slot, last)
            self._bias.data[head, slot:last, 0] = 0 if bias_n is None else bias_n
        else:
            assert bias_n is None or not bool(bias_n.any()), "a bias needs its table"

    def _batch(self, head: int, first: int, last: int, rows: list[tuple[Arena, Tensor]]) -> None:
        """Give pages ``first .. last - 1`` of the arenas one row of the planes that pages hold once."""
        assert self._batches is not None
        begin = self.first // ENTRIES
        table = self._batches.data[head, :, 0]
        # Pages before ``first`` are in use too, if this call follows another before lengths are published.
        used = set(table[begin : max(first, begin + self.lengths[head] // ENTRIES)].tolist())
        row = next(number for number in range(len(used) + 1) if number not in used)
        self._batches.prepare(head, first, last)
        self._batches.data[head, first:last, 0] = row
        for arena, made in rows:
            arena.prepare(head, 0, row + 1)
            arena.data[head, row] = made[0]

    def copy_pages(self, head: int, at: int, source: Run, first: int, last: int) -> None:
        """Copy encoded entries of a run of the same codec as they are, without another rounding."""
        self._segment = None
        for mine, theirs, plane in zip(self.arenas, source.arenas, self.planes, strict=True):
            if plane.once:
                continue
            e = plane.entries
            to, frm, n = (self.first + at) // e, (source.first + first) // e, (last - first) // e
            mine.prepare(head, to, to + n)
            mine.data[head, to : to + n] = theirs.data[head, frm : frm + n]
        if source._batches is not None:
            begin = (source.first + first) // ENTRIES
            numbers, counts = torch.unique_consecutive(
                source._batches.data[head, begin : begin + (last - first) // ENTRIES, 0], return_counts=True
            )
            page = (self.first + at) // ENTRIES
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                rows = [
                    (mine, theirs.data[head, number : number + 1])
                    for mine, theirs, p in zip(self.arenas, source.arenas, self.planes, strict=True)
                    if p.once
                ]
                self._batch(head, page, page + count, rows)
                page += count
        self._write_side(
            head,
            self.first + at,
            source.positions_of(head, first, last),
            source.bias_of(head, first, last),
        )

    def rewrite(self, head: int, entries: Tensor, k_mD: Tensor, v_mD: Tensor, bias_m: Tensor | None) -> None:
        """Give listed entries of a head new contents; of a codec's run, the touched pages."""
        self._segment = None
        slots = self.first + entries
        if bias_m is not None:
            assert self._bias is not None, "a bias needs its table"
            self._bias.data[head, slots.to(self._bias.data.device), 0] = bias_m
        if self.codec.name == "raw":
            for arena, rows in zip(self.arenas, (k_mD, v_mD), strict=True):
                arena.data[head, slots.to(arena.data.device)] = rows
            return
        for page in torch.unique(entries // ENTRIES).tolist():
            of_page = entries // ENTRIES == page
            first = page * ENTRIES
            k, v = (x.clone() for x in self.read(head, first, first + ENTRIES))
            k[entries[of_page] - first], v[entries[of_page] - first] = k_mD[of_page], v_mD[of_page]
            where = self.positions_of(head, first, first + ENTRIES)
            bias = self.bias_of(head, first, first + ENTRIES)
            self.write(head, first, Piece(k, v, where.clone(), None if bias is None else bias.clone()))

    def publish(self, lengths: list[int]) -> None:
        """Set how many entries each head holds and give back what lies outside."""
        self._segment = None
        self.lengths = lengths
        self.uniform = min(lengths) == max(lengths)
        self._ready = self._room = 0
        if max(lengths) == 0:
            self.first = 0
        for arena, entries in self._tables():
            for head, n in enumerate(lengths):
                arena.retain(head, self.first // entries, -(-(self.first + n) // entries))
        if self._batches is not None:
            page = self.first // ENTRIES
            for head, n in enumerate(lengths):
                used = self._batches.data[head, page : page + n // ENTRIES, 0]
                rows = int(used.max()) + 1 if len(used) else 0
                for arena, plane in zip(self.arenas, self.planes, strict=True):
                    if plane.once:
                        arena.retain(head, 0, rows)
        if self._factors is not None and max(lengths):
            spans = [self.span(head) for head, n in enumerate(lengths) if n]
            self._factors.retain(min(first for first, _ in spans), max(last for _, last in spans) + 1)

    def ends_before(self, position: int) -> bool:
        """Entries at consecutive positions from ``position`` on continue those of every head."""
        plain = self._positions is None and self._bias is None and self.uniform
        return plain and self.start + self.lengths[0] == position

    def restore(self, stored: StoredRows) -> None:
        """Add rows in this run's form, from a copy or a file, behind what the run holds."""
        lengths, start, positions = stored.lengths, stored.start, stored.positions
        if not any(self.lengths):
            self._restart(start)
        if not (positions is None and all(start == self.start + n for n in self.lengths)):
            self.need_positions()
        if stored.factors is not None:
            given = stored.factors
            self.factor(given, given.start, given.start + len(given.left))
        if stored.bias is not None:
            self.need_bias()
        for head, n in enumerate(lengths):
            if n == 0:
                continue
            at = self.first + self.lengths[head]
            for arena, plane, parts in zip(self.arenas, self.planes, stored.planes, strict=True):
                begin, count = 0 if plane.once else at // plane.entries, len(parts[head])
                arena.prepare(head, begin, begin + count)
                arena.data[head, begin : begin + count] = parts[head]
            if self._batches is not None:
                assert stored.batches is not None
                assert at == 0, "rows that pages share are not numbered anew: such a run is restored whole"
                self._batches.prepare(head, 0, n // ENTRIES)
                self._batches.data[head, : n // ENTRIES, 0] = stored.batches[head]
            own = torch.arange(start, start + n) if positions is None else positions[head]
            self._write_side(head, at, own, None if stored.bias is None else stored.bias[head])
        self.publish([have + n for have, n in zip(self.lengths, lengths, strict=True)])

    def drop_front(self, counts: list[int]) -> None:
        """Drop the oldest ``counts[h]`` entries of each head and give their memory back.

        Where all heads drop as many, nothing moves.
        """
        left = [n - c for n, c in zip(self.lengths, counts, strict=True)]
        if min(counts) == max(counts):
            self.first += counts[0]
            self.start += counts[0]
        else:
            self.need_positions()
            self._shift(counts, left, self.first)
        self.publish(left)

    def make_room(self, entries: int) -> None:
        """See to it that every head has slots for ``entries`` more, moving what it holds where need be."""
        if self.first and self.first + max(self.lengths) + entries > self.shape.capacity:
            counts = [0] * len(self.lengths)
            self._shift(counts, self.lengths, 0)
            self.first = 0
            self.publish(self.lengths)

    def _shift(self, counts: list[int], left: list[int], first: int) -> None:
        """Move what follows the oldest ``counts[h]`` entries of each head to slot ``first``."""
        for arena, e in self._tables():
            for head, (count, n) in enumerate(zip(counts, left, strict=True)):
                begin, size = (self.first + count) // e, -(-n // e)
                rows = arena.data[head, begin : begin + size].clone()
                if n:
                    arena.prepare(head, first // e, begin + size)
                arena.data[head, first // e : first // e + size] = rows

    def rewind(self) -> None:
        """Forget where entries lay; the caller writes every head anew from slot 0."""
        self._segment = None
        for arena, _ in self._tables():
            for head in range(self.shape.heads):
                arena.retain(head, 0, 0)
        self.first = 0

    def need_positions(self) -> None:
        """Write positions out, because they stop being consecutive."""
        if self._positions is None:
            where = [self.positions_of(head, 0, n) for head, n in enumerate(self.lengths)]
            self._positions = self._side_table(torch.int32, where)

    def need_bias(self) -> None:
        """Make a table of biases, all of them zero so far."""
        if self._bias is None:
            self._bias = self._side_table(torch.float32, [torch.zeros(n) for n in self.lengths])

    def _side_table(self, dtype: torch.dtype, values: list[Tensor]) -> Arena:
        table = self._arena(1, dtype, self.shape.capacity, self.tier)
        try:
            for head, value in enumerate(values):
                if len(value):
                    table.prepare(head, self.first, self.first + len(value))
                    table.data[head, self.first : self.first + len(value), 0] = value
        except BaseException:
            table.close()
            raise
        self._segment = None
        self._ready = self._room = 0  # the table's slots are not prepared for the next append
        return table

    def close(self) -> None:
        """Give everything back."""
        for arena in self.arenas:
            arena.close()
        for table in (self._positions, self._bias, self._batches, self._factors):
            if table is not None:
                table.close()

    def _tables(self) -> list[tuple[Arena, int]]:
        """Every table that is addressed by slot, with the entries that share one of its rows."""
        tables = [(a, p.entries) for a, p in zip(self.arenas, self.planes, strict=True) if not p.once]
        sides = ((self._positions, 1), (self._bias, 1), (self._batches, ENTRIES))
        return tables + [(table, entries) for table, entries in sides if table is not None]

    def _prepare(self, first: int, last: int) -> None:
        ready = [
            arena.prepare(head, first, last)
            for arena, _ in self._tables()
            for head in range(self.shape.heads)
        ]
        self._ready = min(ready)

    def _restart(self, start: int) -> None:
        """An empty run takes the position of what comes next, and no bias."""
        self.start = start
        for table in (self._positions, self._bias):
            if table is not None:
                table.close()
        self._positions = self._bias = None


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
        if isinstance(self._segment, EncodedSegment):
            return self._segment.read(head, first, last)
        return self._segment.k[head, first:last], self._segment.v[head, first:last]

    def positions_of(self, head: int, first: int, last: int) -> Tensor:
        """``[n]`` int32 positions."""
        return self._segment.positions_of(head)[first:last]

    def span(self, head: int) -> tuple[int, int]:
        """First and last position of a head that holds something."""
        if self._segment.positions is None:
            return self._segment.start, self._segment.start + self.lengths[head] - 1
        table = self._segment.positions[head]
        return int(table[0]), int(table[self.lengths[head] - 1])

    def bias_of(self, head: int, first: int, last: int) -> Tensor | None:
        """``[n]`` float32 biases, where the segment has any."""
        return None if self._segment.bias is None else self._segment.bias[head, first:last]

    @property
    def biased(self) -> bool:
        """The segment carries biases."""
        return self._segment.bias is not None

    def segment(self) -> Segment | EncodedSegment:
        """The pool's segment, or the part of it that is still in use."""
        if self.version != self._segment.version:
            self._segment = replace(self._segment, version=self.version)
        return self._segment

    def nbytes(self) -> int:
        """Bytes of the entries in use; they belong to the pool."""
        return self._segment.nbytes

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
