"""One layer of a sequence: its runs, and how a plan is carried out on them.

Entries ascend within a run; the positions of two runs may interleave. Plans number the entries of a
head in ascending position, over all runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from winnow.store.check import check_plan
from winnow.store.codecs import ENTRIES, EncodedSegment, bytes_per_entry, codec_named
from winnow.store.form import stored_rows
from winnow.store.picks import Picks, Piece, between, is_all, lead, others, stretch
from winnow.store.run import Run, Shape, SharedRun
from winnow.types import Demotion, Factors, Plan, Rewrite, Segment, Tier

__all__ = ["Layer"]

_LOWER: tuple[Tier, ...] = ("disk", "host", "device")
_SPLIT = 4  # a suffix this many times longer than what stays before it becomes a run of its own
Kind = tuple[str, Tier]


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
        """The runs that hold something, by their oldest entry; the tail is the last."""
        if self._segments is None:
            self._segments = tuple(run.segment() for run in self._runs() if max(run.lengths))
        return self._segments

    def lengths(self) -> list[int]:
        """Entries of every head."""
        return [sum(of_head) for of_head in zip(*(run.lengths for run in self._runs()), strict=True)]

    def decoded(self) -> Segment:
        """Everything in one decoded segment, in ascending position; no copy where it is one raw segment."""
        segments = self.segments()
        if len(segments) <= 1:
            segment = segments[0] if segments else self.tail.segment()
            return segment.decode(0, self.shape.capacity)
        totals = self.lengths()
        shape, runs = self.shape, self._runs()
        k = torch.zeros(shape.heads, max(totals), shape.head_dim, dtype=shape.dtype, device=shape.device)
        v = torch.zeros_like(k)
        positions = torch.zeros(shape.heads, max(totals), dtype=torch.int32, device=shape.device)
        biased = any(run.biased for run in runs)
        bias = torch.zeros(shape.heads, max(totals), device=shape.device) if biased else None
        for head, total in enumerate(totals):
            order, at = self._order(head), 0
            for run in runs:
                n = run.lengths[head]
                to = slice(at, at + n)
                if n:
                    k[head, to], v[head, to] = run.read(head, 0, n)
                    positions[head, to] = run.positions_of(head, 0, n)
                if n and bias is not None and (own := run.bias_of(head, 0, n)) is not None:
                    bias[head, to] = own
                at += n
            if order is not None:
                for table in (k, v, positions, bias):
                    if table is not None:
                        table[head, :total] = table[head, order.to(table.device)]
        # Ascending, so equal first and last positions mean no gap between them.
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
            bias=bias,
            tier=shape.tier,
            version=self._version,
        )

    # ------------------------------------------------------------------ plans

    def apply(self, plan: Plan) -> None:
        """Carry out a plan: first rewrite, then drop, then demote; each happens whole or not at all."""
        check_plan(plan, self.lengths(), self.shape.head_dim, self.shape.dtype)
        if plan.rewrite is not None:
            self.rewrite(plan.rewrite)
        if plan.keep is not None:
            self.keep(plan.keep)
        for demotion in plan.demote:
            lists = demotion.entries
            if lists is not None and plan.keep is not None:
                lists = tuple(torch.searchsorted(a, b) for a, b in zip(plan.keep, lists, strict=True))
            if lists is None:
                have = [min(demotion.oldest, n) for n in self.lengths()]
                lists = tuple(torch.arange(n) for n in have)
            self.demote(lists, demotion)

    def rewrite(self, changes: Sequence[Rewrite | None]) -> None:
        """Give listed entries new contents; a shared run that holds some of them is copied first."""
        none = torch.empty(0, dtype=torch.int64)
        lists = [none if change is None else change.entries for change in changes]
        touched = [any(map(len, picks)) for picks in self._spread(lists)]
        if not any(touched):
            return
        for run, hit in zip(self._runs(), touched, strict=True):
            if hit and run.codec.key_rank is not None:
                raise ValueError(
                    f"a plan rewrites entries in {run.codec.name!r}, whose keys are rows of one product; "
                    "rewrite entries before they are demoted"
                )
        runs = []
        for run, hit in zip(self._runs(), touched, strict=True):
            runs.append(self._own(run) if hit and isinstance(run, SharedRun) else run)
        biased = any(change is not None and change.bias is not None for change in changes)
        for run, hit in zip(runs, touched, strict=True):
            if hit and biased and isinstance(run, Run):
                run.need_bias()
        self._segments = None
        self._version += 1
        for head, change in enumerate(changes):
            if change is None or not len(change.entries):
                continue
            order = self._order(head)
            physical = change.entries if order is None else order[change.entries]
            base = 0
            for run in runs:
                inside = ((physical >= base) & (physical < base + run.lengths[head])).nonzero().flatten()
                if len(inside):
                    assert isinstance(run, Run), "a shared run is copied before it is written"
                    at = inside.to(change.k.device)
                    bias = None if change.bias is None else change.bias[at]
                    run.rewrite(head, physical[inside] - base, change.k[at], change.v[at], bias)
                    run.version = self._version
                base += run.lengths[head]

    def keep(self, keep: Sequence[Tensor]) -> None:
        """Drop every entry that is not listed."""
        if any(len(kept) != n for kept, n in zip(keep, self.lengths(), strict=True)):
            self._retain(self._spread(keep))

    def truncate(self, length: int) -> None:
        """Drop entries at positions ``length`` and above."""
        if self.end <= length:
            return
        self.end = length
        picks = []
        for run in self._runs():
            where = [run.positions_of(head, 0, n) for head, n in enumerate(run.lengths)]
            picks.append([torch.arange(int((positions < length).sum())) for positions in where])
        self._retain(picks)

    def demote(self, lists: Sequence[Tensor], how: Demotion) -> None:
        """See to it that the listed entries are in a codec on a tier, or lower.

        Entries already in a smaller codec or on a lower tier keep it: a plan never promotes. What is
        left must fill whole pages where entries were listed; of the oldest, whole pages are taken.
        """
        runs = self._runs()
        kinds = [self._target(run, how.codec, how.tier) for run in runs]
        picks = [
            picked if kind != _kind(run) else [pick[:0] for pick in picked]
            for run, kind, picked in zip(runs, kinds, self._spread(lists), strict=True)
        ]
        moves: dict[Kind, list[int]] = {}  # what goes to each kind, by run
        for i, kind in enumerate(kinds):
            if any(map(len, picks[i])):
                moves.setdefault(kind, []).append(i)
        for kind, sources in moves.items():
            _whole_pages(kind, [picks[i] for i in sources], listed=how.entries is not None)
        moving = [any(map(len, picked)) for picked in picks]
        if not any(moving):
            return
        for i, run in enumerate(runs):
            # What stays of a shared run under a codec is not decoded for it: it becomes our own.
            if isinstance(run, SharedRun) and run.codec.name != "raw" and moving[i]:
                runs[i] = run if is_all(picks[i], run.lengths) else self._own(run)
        before = {run: run.lengths for run in self.owned()}
        made: list[Run] = []
        grown: list[Run] = []
        try:
            for kind, sources in moves.items():
                for group in _groups(kind, [(runs[i], picks[i]) for i in sources if moving[i]]):
                    home = self._home(kind, group)
                    (grown if home in before else made).append(home)
                    self._fill(home, group, how)
        except BaseException:
            for home in grown:
                home.publish(before[home])
            for home in made:
                home.close()
            raise
        self._segments = None
        self._version += 1
        for home in (*made, *grown):
            home.version = self._version
        stay: dict[Run | SharedRun, Picks] = {
            run: [others(pick, n) for pick, n in zip(picked, run.lengths, strict=True)]
            for run, picked, moves_some in zip(runs, picks, moving, strict=True)
            if moves_some
        }
        self.front.extend(made)
        self._retain([stay.get(run) for run in self._runs()])

    # ------------------------------------------------------------------ how they are carried out

    def _spread(self, lists: Sequence[Tensor]) -> list[Picks]:
        """Entry numbers of the layer as entry numbers of each of its runs."""
        runs = self._runs()
        picks: list[Picks] = [[] for _ in runs]
        ragged = any(min(run.lengths) != max(run.lengths) for run in runs)
        orders = [self._order(head) for head in range(len(lists))]
        plain = not ragged and all(order is None for order in orders)
        for head, (numbers, order) in enumerate(zip(lists, orders, strict=True)):
            if plain and head and numbers is lists[head - 1]:
                # One list for all heads, as windows have it, is looked at once.
                for picked in picks:
                    picked.append(picked[-1])
                continue
            at = numbers if order is None else order[numbers].sort().values
            base = 0
            for run, picked in zip(runs, picks, strict=True):
                picked.append(between(at, base, base + run.lengths[head]))
                base += run.lengths[head]
        return picks

    def _order(self, head: int) -> Tensor | None:
        """Entry numbers, run after run, in ascending position; None where runs follow one another."""
        runs = [run for run in self._runs() if run.lengths[head]]
        spans = [run.span(head) for run in runs]
        if all(a[1] < b[0] for a, b in pairwise(spans)):
            return None
        return torch.cat([run.positions_of(head, 0, run.lengths[head]).cpu() for run in runs]).argsort()

    def _retain(self, picks: Sequence[Picks | None]) -> None:
        """Keep the picked entries of every run (None: all of them).

        A run under a codec keeps whole pages, those before the first loss as they are; what does not
        fill a page any more goes to the tail, decoded. Of a raw run that is shared, what stays is copied
        to the tail, unless it is one stretch.
        """
        runs = self._runs()
        todo = {
            run: picked
            for run, picked in zip(runs, picks, strict=True)
            if picked is not None and not is_all(picked, run.lengths)
        }
        if todo:
            self._segments = None
            self._version += 1
        carry: list[list[Piece]] = [[] for _ in self.tail.lengths]
        for run in runs:
            if run in todo and run is not self.tail:
                self._keep_in(run, todo[run], carry)
        if any(carry):
            self._carry(todo.get(self.tail), carry)
        elif self.tail in todo and not self._split(todo[self.tail]):
            _compact(self.tail, todo[self.tail], 1)
            self.tail.version = self._version
        for run in self.front:
            if not any(run.lengths):
                run.close()
        self.front = [run for run in self.front if any(run.lengths)]
        if len(self.front) > 1:
            self.front.sort(key=_oldest)

    def _keep_in(self, run: Run | SharedRun, picked: Picks, carry: list[list[Piece]]) -> None:
        page = 1 if run.codec.name == "raw" else ENTRIES
        if isinstance(run, SharedRun):
            first, count = stretch(picked) or (-1, 0)
            if first >= 0 and first % page == count % page == 0:
                run.narrow(first, first + count)
            elif page == 1:
                for head, pick in enumerate(picked):
                    if len(pick):
                        carry[head].append(_taken(run, head, pick))
                run.lengths = [0] * len(picked)
            else:
                self._keep_in(self._own(run), picked, carry)
                return
        else:
            for head, pick in enumerate(picked):
                if rest := len(pick) % page:
                    carry[head].append(_taken(run, head, pick[len(pick) - rest :], copy=True))
            _compact(run, [pick[: len(pick) // page * page] for pick in picked], page)
        run.version = self._version

    def _carry(self, picked: Picks | None, carry: list[list[Piece]]) -> None:
        """Merge decoded entries into what stays of the tail."""
        tail = self.tail
        if picked is None:
            picked = [torch.arange(n) for n in tail.lengths]
        if any(piece.bias is not None for pieces in carry for piece in pieces):
            tail.need_bias()
        tail.need_positions()
        for head, pick in enumerate(picked):
            if len(pick):
                carry[head].append(_taken(tail, head, pick, copy=True))
        tail.rewind()
        lengths = [0] * len(carry)
        for head, pieces in enumerate(carry):
            if pieces:
                whole = Piece.merged(pieces)
                tail.write(head, 0, whole)
                lengths[head] = len(whole.positions)
        tail.publish(lengths)
        tail.version = self._version

    def _split(self, picked: Picks) -> bool:
        """Where every head keeps the same few oldest entries and the same long suffix, let none move.

        The oldest get a run of their own, so that the next such plan (attention sinks and a window that
        slides) only drops the front of the tail.
        """
        tail = self.tail
        n, kept = tail.lengths[0], len(picked[0])
        sinks = lead(picked[0])
        suffix = kept - sinks
        if not (tail.uniform and sinks > 0 and _SPLIT * sinks <= suffix):
            return False
        for head, pick in enumerate(picked):
            if head and pick is picked[head - 1]:
                continue
            inside = len(pick) == kept and int(pick[sinks - 1]) == sinks - 1
            if not (inside and int(pick[sinks]) == n - suffix and int(pick[-1]) == n - 1):
                return False
        taken: list[tuple[Run | SharedRun, Picks]] = [(tail, [pick[:sinks] for pick in picked])]
        home = self._home(_kind(tail), taken)
        self._fill(home, taken, Demotion())
        if home not in self.front:
            self.front.append(home)
        tail.drop_front([n - suffix] * len(picked))
        home.version = tail.version = self._version
        return True

    def _home(self, kind: Kind, taken: Sequence[tuple[Run | SharedRun, Picks]]) -> Run:
        """The run in front that entries of a kind can go behind, or a new one."""
        if codec_named(kind[0]).key_rank is not None:  # every product is a run of its own
            return Run(self.shape, *kind)
        firsts = [
            min(
                (
                    int(run.positions_of(head, 0, run.lengths[head])[p[head][0]])
                    for run, p in taken
                    if len(p[head])
                ),
                default=-1,
            )
            for head in range(self.shape.heads)
        ]
        for run in reversed(self.front):
            if isinstance(run, Run) and _kind(run) == kind:
                behind = all(
                    first < 0 or not n or run.span(head)[1] < first
                    for head, (first, n) in enumerate(zip(firsts, run.lengths, strict=True))
                )
                if behind:
                    return run
        return Run(self.shape, *kind)

    def _fill(self, home: Run, taken: Sequence[tuple[Run | SharedRun, Picks]], how: Demotion) -> None:
        """Add the picked entries of some runs behind those of ``home``."""
        moved, where = [], []
        for head in range(self.shape.heads):
            found = [_at(run, head, picked[head]) for run, picked in taken if len(picked[head])]
            positions = torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.int32)
            follow = len(found) == 1 or bool((positions.diff() > 0).all())
            where.append(positions if follow else positions.sort().values)
            moved.append((len(positions), follow))
        if not any(home.lengths):
            home.start = min(int(positions[0]) for positions in where if len(positions))
        home.make_room(max(n for n, _ in moved))
        for have, positions in zip(home.lengths, where, strict=True):
            begin = home.start + have
            if not torch.equal(positions, torch.arange(begin, begin + len(positions), dtype=torch.int32)):
                home.need_positions()
        if any(run.biased for run, _ in taken):
            home.need_bias()
        if home.codec.key_rank is not None:
            listed = [positions for positions in where if len(positions)]
            first, last = min(int(p[0]) for p in listed), max(int(p[-1]) for p in listed) + 1
            factors = _factors(taken[0][0]) or how.factors
            assert factors is not None, "a plan that needs factors without them is refused"
            home.factor(factors, first, last)
        for head, (_, follow) in enumerate(moved):
            parts = [(run, picked[head]) for run, picked in taken if len(picked[head])]
            at, of_head = home.lengths[head], None if how.channels is None else how.channels[head]
            if follow and all(_same_pages(run, home, pick) for run, pick in parts):
                for run, pick in parts:
                    assert isinstance(run, Run)
                    home.copy_pages(head, at, run, int(pick[0]), int(pick[-1]) + 1)
                    at += len(pick)
            else:
                home.write(head, at, Piece.merged([_taken(run, head, pick) for run, pick in parts]), of_head)
        home.publish([have + n for have, (n, _) in zip(home.lengths, moved, strict=True)])

    def _target(self, run: Run | SharedRun, codec: str | None, tier: Tier | None) -> Kind:
        """Codec and tier that a run's entries get: the smaller and the lower of what is and what is asked."""
        size, dtype = self.shape.head_dim, self.shape.dtype
        names = [run.codec.name] if codec is None else [run.codec.name, codec]
        tiers = [run.tier] if tier is None else [run.tier, tier]
        return (
            min(names, key=lambda name: bytes_per_entry(codec_named(name), size, dtype)),
            min(tiers, key=_LOWER.index),
        )

    def _own(self, shared: SharedRun) -> Run:
        """Replace a shared run by a copy, in the form that it has."""
        segment = shared.segment()
        own = Run(self.shape, *_kind(shared))
        own.restore(stored_rows(segment))
        self._segments = None
        self._version += 1
        own.version = self._version
        self.front = [own if run is shared else run for run in self.front]
        return own

    # ------------------------------------------------------------------ files and memory

    def restored_run(self, codec: str, tier: Tier, follows: int | None) -> Run:
        """The run at the end that entries from a file go to.

        Raw entries at consecutive positions from ``follows`` on may go behind others of their kind.
        """
        last = self.front[-1] if self.front else None
        if codec == "raw" and follows is not None and isinstance(last, Run):  # noqa: SIM102
            if _kind(last) == (codec, tier) and last.ends_before(follows):
                return last
        run = Run(self.shape, codec, tier)
        self.front.append(run)
        return run

    def restored(self, end: int) -> None:
        """All runs have come from a file: what can be appended to becomes the tail."""
        self.end = end
        self._segments = None
        if self.front and isinstance(last := self.front[-1], Run) and _kind(last) == _kind(self.tail):
            self.tail.close()
            self.tail = last
            self.front.pop()

    def owned(self) -> list[Run]:
        """Runs whose memory is this sequence's."""
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

    def _runs(self) -> list[Run | SharedRun]:
        return [*self.front, self.tail]


def _kind(run: Run | SharedRun) -> Kind:
    return run.codec.name, run.tier


def _oldest(run: Run | SharedRun) -> int:
    """Position of the oldest entry of a run that holds something."""
    return min(run.span(head)[0] for head, n in enumerate(run.lengths) if n)


def _compact(run: Run, picked: Picks, page: int) -> None:
    """Drop what is not picked from a run of our own; what moves is encoded anew.

    Whole pages that all heads drop at the front go without moving anything, pages before a head's
    first loss stay as they are.
    """
    if not any(map(len, picked)):
        run.publish([0] * len(picked))
        return
    if (found := stretch(picked)) is not None and found[0] % page == 0:
        first, count = found
        run.drop_front([first] * len(picked))
        if count < run.lengths[0] or not run.uniform:
            run.publish([count] * len(picked))
        return
    gone = min(int(pick[0]) if len(pick) else n for pick, n in zip(picked, run.lengths, strict=True))
    # Single entries move anyway; from slot 0 they fill no more memory pages than they must.
    if page > 1 and (gone := gone // page * page):
        run.drop_front([gone] * len(picked))
        picked = [pick - gone for pick in picked]
    leads = [lead(pick) // page * page for pick in picked]
    if any(start < len(pick) for start, pick in zip(leads, picked, strict=True)):
        run.need_positions()
    for head, (start, pick) in enumerate(zip(leads, picked, strict=True)):
        if start < len(pick):
            run.write(head, start, _taken(run, head, pick[start:], copy=True))
    run.publish([len(pick) for pick in picked])


def _whole_pages(kind: Kind, sources: Sequence[Picks], *, listed: bool) -> None:
    """Leave the newest out of what a head moves to a kind, so that it fills pages; lists must fill them."""
    for head in range(len(sources[0])):
        excess = sum(len(picked[head]) for picked in sources) % ENTRIES
        if excess and listed:
            raise ValueError(
                f"a plan moves entries of head {head} to {kind[0]!r} that fill no page of {ENTRIES}; "
                "list entries of one form, a multiple of that many per head"
            )
        for picked in reversed(sources):
            spare = min(excess, len(picked[head]))
            picked[head] = picked[head][: len(picked[head]) - spare]
            excess -= spare


def _groups(
    kind: Kind, taken: list[tuple[Run | SharedRun, Picks]]
) -> list[list[tuple[Run | SharedRun, Picks]]]:
    """What goes into one run: all of it, but for keys that are a product already, each on its own."""
    if codec_named(kind[0]).key_rank is None:
        return [taken] if taken else []
    alone = [[one] for one in taken if _factors(one[0]) is not None]
    rest = [one for one in taken if _factors(one[0]) is None]
    return [*alone, rest] if rest else alone


def _factors(run: Run | SharedRun) -> Factors | None:
    """The factors of a run's keys, where they are stored as a product."""
    segment = run.segment()
    return segment.factors if isinstance(segment, EncodedSegment) else None


def _same_pages(run: Run | SharedRun, home: Run, pick: Tensor) -> bool:
    """The picked entries are whole pages, one after the other, in the codec of ``home``."""
    first, count = int(pick[0]), len(pick)
    return (
        isinstance(run, Run)
        and run.codec is home.codec
        and run.codec.name != "raw"
        and first % ENTRIES == count % ENTRIES == 0
        and int(pick[-1]) == first + count - 1
    )


def _at(run: Run | SharedRun, head: int, pick: Tensor) -> Tensor:
    """Positions of the picked entries of a head."""
    positions = run.positions_of(head, 0, run.lengths[head])
    return positions[pick.to(positions.device)]


def _taken(run: Run | SharedRun, head: int, pick: Tensor, *, copy: bool = False) -> Piece:
    """The picked entries of a head; without ``copy`` they may be views of the run's memory."""
    first, last = int(pick[0]), int(pick[-1]) + 1
    k, v = run.read(head, first, last)
    whole = Piece(k, v, run.positions_of(head, first, last), run.bias_of(head, first, last))
    if last - first == len(pick):
        return whole.map(torch.clone) if copy else whole
    return whole.map(lambda x: x.index_select(0, (pick - first).to(x.device)))
