"""One layer of a sequence: runs in ascending position, and how a plan is carried out on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.store.codecs import ENTRIES, EncodedSegment, bytes_per_entry, codec_named
from winnow.store.run import Run, Shape, SharedRun
from winnow.types import Plan, Segment, Tier

__all__ = ["Layer"]

_LOWER: tuple[Tier, ...] = ("disk", "host", "device")
Piece = tuple[Tensor, Tensor, Tensor]  # K [n, D], V [n, D], positions [n]


@dataclass(frozen=True)
class _Move:
    """The oldest ``take[h]`` entries of a run go to a codec and tier."""

    run: Run | SharedRun
    take: list[int]
    kind: tuple[str, Tier]


class Layer:
    """Runs of one layer: shared ones, demoted ones, and the raw tail that appends go to.

    Attributes
    ----------
    end : int
        Tokens appended or adopted so far, whatever was dropped since.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self.tail = Run(shape, "raw", shape.tier)
        self.front: list[Run | SharedRun] = []
        self.end = 0
        self._version = 0
        self._segments: tuple[Segment | EncodedSegment, ...] | None = None

    def append(self, k_THD: Tensor, v_THD: Tensor, positions_T: Tensor) -> None:
        """Add new entries to the tail."""
        self._segments = None
        self.tail.append(k_THD, v_THD, positions_T)
        self.end += k_THD.shape[0]

    def adopt(self, segments: Sequence[Segment | EncodedSegment]) -> None:
        """Take read-only segments as the front of an empty layer."""
        assert not any(self.lengths()), "only an empty layer adopts"
        self.front = [SharedRun(segment) for segment in segments]
        self._segments = None

    def segments(self) -> tuple[Segment | EncodedSegment, ...]:
        """The runs that hold something, oldest first."""
        if self._segments is None:
            self._segments = tuple(run.segment() for run in self._runs() if max(run.lengths))
        return self._segments

    def lengths(self) -> list[int]:
        """Entries of every head."""
        return [sum(of_head) for of_head in zip(*(run.lengths for run in self._runs()), strict=True)]

    def decoded(self) -> Segment:
        """Everything in one decoded segment; without a copy where it is one raw segment already."""
        segments = self.segments()
        if len(segments) <= 1:
            segment = segments[0] if segments else self.tail.segment()
            return segment.decode(0, self.shape.capacity)
        totals = self.lengths()
        shape = self.shape
        k = torch.zeros(shape.heads, max(totals), shape.head_dim, dtype=shape.dtype, device=shape.device)
        v = torch.zeros_like(k)
        positions = torch.zeros(shape.heads, max(totals), dtype=torch.int32, device=shape.device)
        at = [0] * shape.heads
        for segment in segments:
            part = segment.decode(0, shape.capacity)
            for head, n in enumerate(part.lengths.tolist()):
                to = slice(at[head], at[head] + n)
                k[head, to], v[head, to] = part.k[head, :n], part.v[head, :n]
                positions[head, to] = part.positions_of(head)
                at[head] += n
        # Runs follow one another, so equal first and last positions mean no gap between them.
        start = int(positions[:, 0].min())
        plain = all(s.positions is None for s in segments) and all(
            int(positions[h, 0]) == start and int(positions[h, n - 1]) == start + n - 1
            for h, n in enumerate(totals)
            if n
        )
        return Segment(
            k=k,
            v=v,
            lengths=torch.tensor(totals, dtype=torch.int32),
            start=start if plain else 0,
            positions=None if plain else positions,
            tier=shape.tier,
            version=self._version,
        )

    # ------------------------------------------------------------------ plans

    def apply(self, plan: Plan) -> None:
        """Carry out a plan: drop first, then demote; each of the two happens whole or not at all."""
        for demotion in plan.demote:
            if demotion.oldest % ENTRIES or demotion.oldest < 0:
                raise ValueError(f"a plan demotes {demotion.oldest} entries; make it a multiple of {ENTRIES}")
            if demotion.codec is not None:
                codec_named(demotion.codec).planes(self.shape.head_dim, self.shape.dtype)
        if plan.keep is not None:
            self._check_keep(plan.keep)
            self.keep(plan.keep)
        for demotion in plan.demote:
            if demotion.oldest and (demotion.codec is not None or demotion.tier is not None):
                self.demote(demotion.oldest, demotion.codec, demotion.tier)

    def keep(self, keep: Sequence[Tensor]) -> None:
        """Drop every entry that is not listed.

        Runs are walked from the oldest. A run that loses nothing stays as it is; entries of a
        shared run are copied, because they are not ours to drop. A demoted run keeps whole pages,
        re-encoded, and hands the rest of a page on to the next run, decoded.
        """
        if all(len(kept) == n for kept, n in zip(keep, self.lengths(), strict=True)):
            return
        self._segments = None
        carry: list[list[Piece]] = [[] for _ in keep]
        front: list[Run | SharedRun] = []
        base = [0] * len(keep)
        for run in self._runs():
            picks = [_between(kept, b, b + n) for kept, b, n in zip(keep, base, run.lengths, strict=True)]
            base = [b + n for b, n in zip(base, run.lengths, strict=True)]
            self._keep_in(run, picks, carry)
            if run is not self.tail and max(run.lengths):
                front.append(run)
            elif run is not self.tail:
                run.close()
        self.front = front

    def _keep_in(self, run: Run | SharedRun, picks: list[Tensor], carry: list[list[Piece]]) -> None:
        counts = [len(pick) for pick in picks]
        carried = any(carry)
        if counts == run.lengths and not carried:
            return
        prefix = not carried and all(
            n == 0 or int(pick[-1]) == n - 1 for pick, n in zip(picks, counts, strict=True)
        )
        self._version += 1
        if isinstance(run, SharedRun):
            paged = run.codec.name != "raw"
            if prefix and min(counts) == max(counts) and not (paged and counts[0] % ENTRIES):
                run.narrow(0, counts[0])
            else:
                for head, pick in enumerate(picks):
                    if len(pick):
                        carry[head].append(_gather(run, head, pick))
                run.lengths = [0] * len(picks)
            run.version = self._version
            return
        run.version = self._version
        whole = run is not self.tail
        if prefix and not (whole and any(n % ENTRIES for n in counts)):
            run.publish(counts)
            return
        run.need_positions()
        held = (
            [[*carry[head], _gather(run, head, pick)] for head, pick in enumerate(picks)]
            if run.first
            else None
        )
        if run.first:
            run.rewind()
        lengths = []
        for head, pick in enumerate(picks):
            pieces = held[head] if held is not None else [*carry[head], _gather(run, head, pick)]
            k, v, positions = _joined(pieces)
            stay = len(positions) // ENTRIES * ENTRIES if whole else len(positions)
            run.write(head, 0, k[:stay], v[:stay], positions[:stay])
            carry[head] = [(k[stay:], v[stay:], positions[stay:])] if stay < len(positions) else []
            lengths.append(stay)
        run.publish(lengths)

    def demote(self, entries: int, codec: str | None, tier: Tier | None) -> None:
        """See to it that the oldest ``entries`` of each head are in ``codec`` on ``tier``, or lower.

        A head that holds fewer gives its whole pages. Entries already in a smaller codec or on a
        lower tier keep it: a plan never promotes.
        """
        left = [min(entries, n // ENTRIES * ENTRIES) for n in self.lengths()]
        todo: list[_Move] = []
        for run in self._runs():
            take = [min(a, b) for a, b in zip(left, run.lengths, strict=True)]
            left = [a - b for a, b in zip(left, take, strict=True)]
            if isinstance(run, SharedRun) and min(take) != max(take):
                # A view cannot begin at another entry in every head.
                self._own(run)
                return self.demote(entries, codec, tier)
            kind = self._target(run, codec, tier) if any(take) else _kind(run)
            todo.append(_Move(run, take, kind))
        before = {run: run.lengths for run in self.owned()}
        front: list[Run | SharedRun] = []
        try:
            for group in _groups(todo):
                kind = group[0].kind
                if kind != _kind(group[0].run):
                    last = front[-1] if front else None
                    home = last if isinstance(last, Run) and _kind(last) == kind else Run(self.shape, *kind)
                    if home is not last:
                        front.append(home)
                    self._fill(home, group)
                front.extend(move.run for move in group)
        except BaseException:
            for run in front:
                if run in before:
                    assert isinstance(run, Run)
                    run.publish(before[run])
                elif isinstance(run, Run):
                    run.close()
            raise
        self._segments = None
        self._version += 1
        for move in todo:
            if move.kind != _kind(move.run):
                if isinstance(move.run, SharedRun):
                    move.run.narrow(move.take[0], max(move.run.lengths))
                else:
                    move.run.drop_front(move.take)
                move.run.version = self._version
        for run in front:
            if run not in before and isinstance(run, Run):
                run.version = self._version
            if run is not self.tail and not max(run.lengths):
                run.close()
        self.front = [run for run in front if run is not self.tail and max(run.lengths)]

    def _fill(self, home: Run, group: list[_Move]) -> None:
        """Add the oldest entries of the runs of a group behind those of ``home``."""
        assert all(move.kind == _kind(home) for move in group)
        moved = [sum(counts) for counts in zip(*(move.take for move in group), strict=True)]
        assert all(n % ENTRIES == 0 for n in moved), "whole pages"
        where = [
            torch.cat([move.run.positions_of(head, 0, move.take[head]) for move in group])
            for head in range(len(moved))
        ]
        if not any(home.lengths):
            home.start = min(int(positions[0]) for positions in where if len(positions))
        for have, positions in zip(home.lengths, where, strict=True):
            begin = home.start + have
            if not torch.equal(
                positions.cpu(), torch.arange(begin, begin + len(positions), dtype=torch.int32)
            ):
                home.need_positions()
        for head, n in enumerate(moved):
            at, source = home.lengths[head], group[0].run
            if n and len(group) == 1 and isinstance(source, Run) and source.codec is home.codec:
                home.copy_pages(head, at, source, 0, n)
            elif n:
                parts = [move.run.read(head, 0, move.take[head]) for move in group]
                k, v = (torch.cat(same) for same in zip(*parts, strict=True))
                home.write(head, at, k, v, where[head])
        home.publish([have + n for have, n in zip(home.lengths, moved, strict=True)])

    def _target(self, run: Run | SharedRun, codec: str | None, tier: Tier | None) -> tuple[str, Tier]:
        """Codec and tier that a run's entries get: the smaller and the lower of what is and what is asked."""
        size, dtype = self.shape.head_dim, self.shape.dtype
        names = [run.codec.name] if codec is None else [run.codec.name, codec]
        tiers = [run.tier] if tier is None else [run.tier, tier]
        return (
            min(names, key=lambda name: bytes_per_entry(codec_named(name), size, dtype)),
            min(tiers, key=_LOWER.index),
        )

    def _own(self, shared: SharedRun) -> None:
        """Replace a shared run by a copy, in the form that it has."""
        segment = shared.segment()
        own = Run(self.shape, *_kind(shared))
        tables = segment.rows if isinstance(segment, EncodedSegment) else (segment.k, segment.v)
        lengths, positions = shared.lengths, segment.positions
        own.restore(
            [
                [table[head, : n // plane.entries] for head, n in enumerate(lengths)]
                for table, plane in zip(tables, own.planes, strict=True)
            ],
            lengths,
            segment.start,
            None if positions is None else [positions[head, :n] for head, n in enumerate(lengths)],
        )
        self._segments = None
        self._version += 1
        own.version = self._version
        self.front = [own if run is shared else run for run in self.front]

    def truncate(self, length: int) -> None:
        """Drop entries at positions ``length`` and above."""
        if self.end <= length:
            return
        self.end = length
        keep = []
        for head in range(self.shape.heads):
            positions = [run.positions_of(head, 0, run.lengths[head]) for run in self._runs()]
            keep.append(torch.arange(int((torch.cat(positions) < length).sum())))
        self.keep(keep)

    def _check_keep(self, keep: Sequence[Tensor]) -> None:
        totals = self.lengths()
        if len(keep) != len(totals):
            raise ValueError(f"a plan keeps entries of {len(keep)} heads, the layer has {len(totals)}")
        for head, (kept, n) in enumerate(zip(keep, totals, strict=True)):
            if len(kept) and (int(kept[0]) < 0 or int(kept[-1]) >= n or bool((kept.diff() <= 0).any())):
                raise ValueError(
                    f"the plan's list for head {head} must be ascending, unique and below {n}; sort it"
                )

    def restored_run(self, codec: str, tier: Tier) -> Run:
        """The run at the end of ``front``, or the tail, for entries of a codec on a tier."""
        if (codec, tier) == ("raw", self.shape.tier):
            return self.tail
        run = Run(self.shape, codec, tier)
        self.front.append(run)
        return run

    # ------------------------------------------------------------------ memory

    def _runs(self) -> list[Run | SharedRun]:
        return [*self.front, self.tail]

    def owned(self) -> list[Run]:
        """Runs whose memory is the sequence's own."""
        return [run for run in self._runs() if isinstance(run, Run)]

    def shared(self) -> list[SharedRun]:
        """Runs whose memory is a pool's."""
        return [run for run in self.front if isinstance(run, SharedRun)]

    def close(self) -> None:
        """Give everything back."""
        for run in self._runs():
            run.close()
        self.front = []
        self._segments = None


def _kind(run: Run | SharedRun) -> tuple[str, Tier]:
    return run.codec.name, run.tier


def _groups(moves: list[_Move]) -> Iterator[list[_Move]]:
    """Split moves into groups that give whole pages, so that pages already encoded stay as they are."""
    group: list[_Move] = []
    for move in moves:
        group.append(move)
        counts = [sum(of_head) for of_head in zip(*(m.take for m in group), strict=True)]
        if all(n % ENTRIES == 0 for n in counts):
            yield group
            group = []
    assert not group, "whole pages are demoted"


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    k, v, positions = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return k, v, positions


def _between(kept: Tensor, first: int, last: int) -> Tensor:
    """The part of an ascending list that lies in ``first .. last - 1``, counted from ``first``."""
    a, b = torch.searchsorted(kept, torch.tensor([first, last])).tolist()
    return kept[a:b] - first if first else kept[a:b]


def _gather(run: Run | SharedRun, head: int, pick: Tensor) -> Piece:
    """Copies of the picked entries of a head."""
    n = run.lengths[head]
    k, v = run.read(head, 0, n)
    at = pick.to(k.device)
    return k.index_select(0, at), v.index_select(0, at), run.positions_of(head, 0, n).index_select(0, at)
