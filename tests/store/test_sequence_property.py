"""The store against a list of entries per head, under every order of operations."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from winnow.store import EncodedSegment, SequenceStore, files
from winnow.store.arena import DiskArena, HostArena
from winnow.store.codecs import CODECS, ENTRIES, Decoded, Plane
from winnow.store.run import Shape
from winnow.types import Demotion, Plan, Rewrite, Segment

LAYERS, D, CAPACITY = 2, 16, 1024  # 64 bytes a row: a memory page holds 64 entries


class Mirror(Decoded):
    """A codec that loses nothing: one row per page for K, V negated; the structure without the rounding."""

    name = "mirror"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (
            Plane(name="k", dtype=torch.float32, width=ENTRIES * head_dim, entries=ENTRIES),
            Plane(name="v", dtype=torch.bfloat16, width=head_dim),  # small integers only
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        n, size = k.shape[-2:]
        return k.reshape(*k.shape[:-2], n // ENTRIES, ENTRIES * size), -v.bfloat16()

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = rows
        return k.reshape(*k.shape[:-2], -1, v.shape[-1]).to(dtype), (-v).to(dtype)


class Based(Decoded):
    """A smaller one: what is encoded together shares a base, and V stays where attention runs."""

    name = "based"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (
            Plane(name="base", dtype=torch.float32, width=head_dim, entries=ENTRIES, once=True),
            Plane(name="k", dtype=torch.bfloat16, width=head_dim),
            Plane(name="v", dtype=torch.bfloat16, width=head_dim, stays=True),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        return k[:1], (k - k[:1]).bfloat16(), v.bfloat16()

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        base, k, v = rows
        return base.repeat_interleave(ENTRIES, -2).to(dtype) + k.to(dtype), v.to(dtype)


LOSSLESS = {codec.name: codec for codec in (Mirror(), Based())}


Entry = tuple[int, int, float]  # position, serial number, bias


def new_store(heads: int) -> SequenceStore:
    return SequenceStore(layers=LAYERS, heads=heads, head_dim=D, dtype=torch.float32, capacity=CAPACITY)


def spelt(number: Tensor, layer: int) -> Tensor:
    """Keys that spell serial numbers out; values are their negatives."""
    return torch.stack([number % 251, number // 251, number * 0 + layer, number * 0 + 1] * 4, -1).float()


def lowered(segment: Segment | EncodedSegment, codec: str | None, tier: str | None) -> bool:
    """The segment is in a codec on a tier, or below: ``based`` is smaller than ``mirror``."""
    order = ["raw", "mirror", "based"]
    small = codec is None or order.index(segment.codec) >= order.index(codec)
    return small and (tier is None or segment.tier == tier)


class AgainstLists(RuleBasedStateMachine):
    """Every entry is known by a serial number that K and V spell out."""

    def __init__(self) -> None:
        super().__init__()
        CODECS.update(LOSSLESS)
        self.serial = 0
        self.parent: SequenceStore | None = None

    @initialize(heads=st.integers(1, 3), prefix=st.sampled_from([0, 0, 64, 100, 210]), changed=st.booleans())
    def start(self, heads: int, prefix: int, changed: bool) -> None:
        self.heads = heads
        self.store = new_store(heads)
        self.want: list[list[list[Entry]]] = [[[] for _ in range(heads)] for _ in range(LAYERS)]
        self.position = 0  # of the next token, which is the store's length
        if prefix:
            own = self.store
            self.parent = self.store = new_store(heads)
            self.append(prefix, partial=9)
            if changed:  # a fork of a sequence that lived, not a prefix from a pool
                keep = [torch.arange(h, prefix, 1 + h) for h in range(heads)]
                for layer, wanted in enumerate(self.want):
                    plan = Plan(keep=tuple(keep), demote=(Demotion(oldest=64, codec="mirror"),))
                    self.store.apply(layer, plan)
                    for head, kept in enumerate(keep):
                        wanted[head] = [wanted[head][i] for i in kept.tolist()]
                    self.change(layer, [list(range(1, len(of_head), 9)) for of_head in wanted], bias=True)
            own.adopt(list(map(self.parent.segments, range(LAYERS))), prefix)
            self.before = [self.parent.decoded(i).k.clone() for i in range(LAYERS)]
            self.store = own

    @rule(tokens=st.sampled_from([1, 1, 1, 2, 7, 64, 150]), partial=st.integers(0, 5))
    def append(self, tokens: int, partial: int) -> None:
        if self.position + tokens > CAPACITY:
            k = torch.zeros(tokens, self.heads, D)
            with pytest.raises(ValueError, match="raise the capacity"):
                self.store.append(0, k, k, torch.arange(self.position, self.position + tokens))
            return
        positions = torch.arange(self.position, self.position + tokens, dtype=torch.int32)
        for layer in range(LAYERS):
            number = self.numbers(tokens * self.heads).view(tokens, self.heads)
            k = spelt(number, layer)
            self.store.append(layer, k, -k, positions)
            if partial == 0:  # the step is interrupted after some layers
                self.store.truncate(self.store.length)
                return
            for head in range(self.heads):
                own = zip(positions.tolist(), number[:, head].tolist(), strict=True)
                self.want[layer][head] += [(p, n, 0.0) for p, n in own]
            if layer == 0 and partial == 1 and LAYERS > 1:
                self.store.truncate(self.store.length)
                for head in range(self.heads):
                    del self.want[0][head][len(self.want[0][head]) - tokens :]
                return
        self.store.advance(tokens)
        self.position += tokens

    @rule(
        data=st.data(), layer=st.integers(0, LAYERS - 1), how=st.sampled_from(["some", "few", "front", "all"])
    )
    def keep(self, data: st.DataObject, layer: int, how: str) -> None:
        keep = []
        for head in range(self.heads):
            n = len(self.want[layer][head])
            seed = data.draw(st.integers(0, 2**16))
            chance = torch.rand(n, generator=torch.Generator().manual_seed(seed))
            if how == "front":
                mask = torch.arange(n) < n - seed % 80
            else:
                mask = chance < {"some": 0.7, "few": 0.1, "all": 2.0}[how]
            keep.append(mask.nonzero()[:, 0])
            self.want[layer][head] = [
                e for e, m in zip(self.want[layer][head], mask.tolist(), strict=True) if m
            ]
        self.store.apply(layer, Plan(keep=tuple(keep)))

    @rule(sinks=st.sampled_from([0, 1, 4]), window=st.integers(1, 200), layer=st.integers(0, LAYERS - 1))
    def slide(self, sinks: int, window: int, layer: int) -> None:
        """Attention sinks and a window: what no head may move for."""
        keep = []
        for head, entries in enumerate(self.want[layer]):
            n = len(entries)
            listed = [*range(min(sinks, n)), *range(max(sinks, n - window), n)]
            keep.append(torch.tensor(listed, dtype=torch.int64))
            self.want[layer][head] = [entries[i] for i in listed]
        self.store.apply(layer, Plan(keep=tuple(keep)))

    @rule(
        data=st.data(),
        layer=st.integers(0, LAYERS - 1),
        every=st.sampled_from([1, 7, 90]),
        bias=st.booleans(),
    )
    def rewrite(self, data: st.DataObject, layer: int, every: int, bias: bool) -> None:
        first = [data.draw(st.integers(0, max(0, len(entries) - 1))) for entries in self.want[layer]]
        lists = [
            list(range(a, len(entries), every)) for a, entries in zip(first, self.want[layer], strict=True)
        ]
        self.change(layer, lists, bias=bias)

    def change(self, layer: int, lists: list[list[int]], *, bias: bool) -> None:
        changes: list[Rewrite | None] = []
        for head, listed in enumerate(lists):
            if not listed:
                changes.append(None)
                continue
            number = self.numbers(len(listed))
            k, given = spelt(number, layer), torch.rand(len(listed)) if bias else None
            changes.append(Rewrite(entries=torch.tensor(listed), k=k, v=-k, bias=given))
            for i, (at, serial) in enumerate(zip(listed, number.tolist(), strict=True)):
                position, _, old = self.want[layer][head][at]
                self.want[layer][head][at] = position, serial, old if given is None else float(given[i])
        self.store.apply(layer, Plan(rewrite=tuple(changes)))

    def numbers(self, count: int) -> Tensor:
        self.serial += count
        return torch.arange(self.serial - count, self.serial)

    @rule(
        pages=st.integers(1, 5),
        layer=st.integers(0, LAYERS - 1),
        codec=st.sampled_from([None, "mirror", "based"]),
        tier=st.sampled_from([None, "disk"]),
    )
    def demote(self, pages: int, layer: int, codec: str | None, tier: str | None) -> None:
        how = Demotion(oldest=pages * ENTRIES, codec=codec, tier=tier)
        self.store.apply(layer, Plan(demote=(how,)))
        if codec is None and tier is None:
            return
        oldest = [{p for p, _, _ in entries[: pages * ENTRIES]} for entries in self.want[layer]]
        for segment in self.store.segments(layer):
            if not lowered(segment, codec, tier):
                # Of every form, less than a page could not move.
                for head in range(self.heads):
                    assert len(oldest[head] & set(segment.positions_of(head).tolist())) < ENTRIES

    @rule(
        data=st.data(),
        layer=st.integers(0, LAYERS - 1),
        codec=st.sampled_from(["mirror", "based"]),
        also=st.booleans(),
    )
    def demote_listed(self, data: st.DataObject, layer: int, codec: str, also: bool) -> None:
        """Entries of the tail, a different number in every head; with ``also``, a drop and a rewrite too."""
        tails: list[list[int]] = [[] for _ in range(self.heads)]
        for segment in self.store.segments(layer):
            if segment.codec == "raw" and segment.tier != "disk":
                for head in range(self.heads):
                    tails[head] += segment.positions_of(head).tolist()
        lists, keep = [], []
        for head, entries in enumerate(self.want[layer]):
            number = {entry[0]: i for i, entry in enumerate(entries)}
            free = torch.tensor(sorted(number[p] for p in tails[head]), dtype=torch.int64)
            seed = data.draw(st.integers(0, 2**16))
            order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
            take = seed % 3 * ENTRIES if len(free) >= seed % 3 * ENTRIES else 0
            lists.append(free[order[:take]].sort().values)
            rest = free[order[take:]]
            mask = torch.ones(len(entries), dtype=torch.bool)
            if also:
                mask[rest[::2]] = False
            keep.append(mask.nonzero().flatten())
        plan = Plan(keep=tuple(keep), demote=(Demotion(entries=tuple(lists), codec=codec),))
        self.store.apply(layer, plan)
        for segment in self.store.segments(layer):
            if not lowered(segment, codec, None):
                for head, listed in enumerate(lists):
                    there = {self.want[layer][head][i][0] for i in listed.tolist()}
                    assert not there & set(segment.positions_of(head).tolist())
        for head, kept in enumerate(keep):
            self.want[layer][head] = [self.want[layer][head][i] for i in kept.tolist()]

    @rule(back=st.sampled_from([0, 1, 3, 64, 130, 1000]))
    def truncate(self, back: int) -> None:
        self.position = max(0, self.position - back)
        self.store.truncate(self.position)
        for layer in self.want:
            for head, entries in enumerate(layer):
                layer[head] = [e for e in entries if e[0] < self.position]

    @precondition(lambda self: self.parent is None)
    @rule()
    def through_a_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sequence.kv"
            forms = self.forms()
            files.save(self.store, path, {"tokens": [1, 2]})
            self.store.close()
            self.store, header = files.load(path)
            assert header == {"tokens": [1, 2]}
            assert forms == self.forms()

    def forms(self) -> list[dict[tuple[str, str], list[int]]]:
        """Entries of every head, by form: consecutive raw runs may become one on their way through a file."""
        found = []
        for layer in range(LAYERS):
            counts: dict[tuple[str, str], list[int]] = {}
            for s in self.store.segments(layer):
                have = counts.get((s.codec, s.tier), [0] * self.heads)
                counts[s.codec, s.tier] = [a + n for a, n in zip(have, s.lengths.tolist(), strict=True)]
            found.append(counts)
        return found

    # ------------------------------------------------------------------ what must always hold

    def same(self, segment: Segment, wanted: list[list[Entry]], layer: int) -> None:
        for head, entries in enumerate(wanted):
            n = int(segment.lengths[head])
            assert n == len(entries)
            assert segment.positions_of(head).tolist() == [p for p, _, _ in entries]
            number = segment.k[head, :n, 0] + 251 * segment.k[head, :n, 1]
            assert number.int().tolist() == [s for _, s, _ in entries]
            assert torch.equal(segment.v[head, :n], -segment.k[head, :n])
            assert bool((segment.k[head, :n, 2] == layer).all())
            bias = torch.zeros(n) if segment.bias is None else segment.bias[head, :n]
            assert bias.tolist() == [b for _, _, b in entries]

    @invariant()
    def entries_are_what_they_should_be(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.length == self.position
        for layer, wanted in enumerate(self.want):
            assert self.store.lengths(layer) == [len(entries) for entries in wanted]
            self.same(self.store.decoded(layer), wanted, layer)
            left = [{entry[0]: entry for entry in entries} for entries in wanted]
            for segment in self.store.segments(layer):
                for tile in segment.tiles(70):
                    held = [tile.positions_of(head).tolist() for head in range(self.heads)]
                    self.same(
                        tile, [[of.pop(p) for p in own] for of, own in zip(left, held, strict=True)], layer
                    )
                if segment.codec != "raw":
                    assert all(n % ENTRIES == 0 for n in segment.lengths.tolist())
            assert not any(left)

    @invariant()
    def bytes_are_what_the_kernel_says(self) -> None:
        if not hasattr(self, "store"):
            return
        for state in self.store._layers:
            for run in state.owned():
                for arena in (*run.arenas, *(arena for arena, _ in run._tables())):
                    if isinstance(arena, HostArena):
                        assert arena.nbytes() == arena.resident()
                    elif isinstance(arena, DiskArena):
                        # ext4 takes a block of its own for a list of more than four extents.
                        assert arena.nbytes() <= arena.allocated() <= arena.nbytes() + 4096

    @invariant()
    def a_shared_prefix_is_never_written(self) -> None:
        if self.parent is not None and hasattr(self, "before"):
            for layer, before in enumerate(self.before):
                assert torch.equal(self.parent.decoded(layer).k, before)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.store.close()
            for state in self.store._layers:
                assert all(run.nbytes() == 0 for run in state.owned())
        if self.parent is not None:
            self.parent.close()
        for name in LOSSLESS:
            del CODECS[name]


class OnADevice(AgainstLists):
    """The same on arenas that double, as on a GPU (here their tensors lie in host memory)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Shape, "tier", "device")

    def teardown(self) -> None:
        super().teardown()
        self.patch.undo()


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(
    max_examples=60, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestOnADevice = OnADevice.TestCase
TestOnADevice.settings = settings(TestAgainstLists.settings, max_examples=25)
