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

from winnow.store import SequenceStore, files
from winnow.store.arena import DiskArena, HostArena
from winnow.store.codecs import CODECS, ENTRIES, Plane
from winnow.store.run import Shape
from winnow.types import Plan, Segment

LAYERS, D, CAPACITY = 2, 16, 1024  # 64 bytes a row: a memory page holds 64 entries


class Mirror:
    """A codec that loses nothing: one row per page for K, V negated; the structure without the rounding."""

    name = "mirror"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (
            Plane(name="k", dtype=torch.float32, width=ENTRIES * head_dim, entries=ENTRIES),
            Plane(name="v", dtype=torch.bfloat16, width=head_dim),  # small integers only
        )

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        n, size = k.shape[-2:]
        return k.reshape(*k.shape[:-2], n // ENTRIES, ENTRIES * size), -v.bfloat16()

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = rows
        return k.reshape(*k.shape[:-2], -1, v.shape[-1]).to(dtype), (-v).to(dtype)


@pytest.fixture(autouse=True)
def _mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "mirror", Mirror())


def new_store(heads: int) -> SequenceStore:
    return SequenceStore(layers=LAYERS, heads=heads, head_dim=D, dtype=torch.float32, capacity=CAPACITY)


class AgainstLists(RuleBasedStateMachine):
    """Every entry is known by a serial number that K and V spell out."""

    def __init__(self) -> None:
        super().__init__()
        CODECS["mirror"] = Mirror()
        self.serial = 0
        self.parent: SequenceStore | None = None

    @initialize(heads=st.integers(1, 3), prefix=st.sampled_from([0, 0, 64, 100, 210]), changed=st.booleans())
    def start(self, heads: int, prefix: int, changed: bool) -> None:
        self.heads = heads
        self.store = new_store(heads)
        self.want: list[list[list[tuple[int, int]]]] = [[[] for _ in range(heads)] for _ in range(LAYERS)]
        self.position = 0  # of the next token, which is the store's length
        if prefix:
            own = self.store
            self.parent = self.store = new_store(heads)
            self.append(prefix, partial=9)
            if changed:  # a fork of a sequence that lived, not a prefix from a pool
                keep = [torch.arange(h, prefix, 1 + h) for h in range(heads)]
                for layer, wanted in enumerate(self.want):
                    self.store.apply(layer, Plan(keep=tuple(keep), codec="mirror", demote=64))
                    for head, kept in enumerate(keep):
                        wanted[head] = [wanted[head][i] for i in kept.tolist()]
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
            number = self.serial + torch.arange(tokens * self.heads).view(tokens, self.heads)
            self.serial += tokens * self.heads
            k = torch.stack([number % 251, number // 251, number * 0 + layer, number * 0 + 1] * 4, -1).float()
            self.store.append(layer, k, -k, positions)
            if partial == 0:  # the step is interrupted after some layers
                self.store.truncate(self.store.length)
                return
            for head in range(self.heads):
                self.want[layer][head] += zip(positions.tolist(), number[:, head].tolist(), strict=True)
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

    @rule(
        pages=st.integers(1, 5),
        layer=st.integers(0, LAYERS - 1),
        codec=st.sampled_from([None, "mirror"]),
        tier=st.sampled_from([None, "disk"]),
    )
    def demote(self, pages: int, layer: int, codec: str | None, tier: str | None) -> None:
        self.store.apply(layer, Plan(demote=pages * ENTRIES, codec=codec, tier=tier))
        if codec is None and tier is None:
            return
        covered = [0] * self.heads
        for segment in self.store.segments(layer):
            below = (codec is None or segment.codec == codec) and (tier is None or segment.tier == tier)
            for head, n in enumerate(segment.lengths.tolist()):
                if not below:
                    whole = min(pages * ENTRIES, len(self.want[layer][head]) // ENTRIES * ENTRIES)
                    assert covered[head] >= whole or n == 0
                covered[head] += n

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
            forms = [[(s.codec, s.tier) for s in self.store.segments(i)] for i in range(LAYERS)]
            files.save(self.store, path, {"tokens": [1, 2]})
            self.store.close()
            self.store, header = files.load(path)
            assert header == {"tokens": [1, 2]}
            assert forms == [[(s.codec, s.tier) for s in self.store.segments(i)] for i in range(LAYERS)]

    # ------------------------------------------------------------------ what must always hold

    def same(self, segment: Segment, wanted: list[list[tuple[int, int]]], layer: int) -> None:
        for head, entries in enumerate(wanted):
            n = int(segment.lengths[head])
            assert n == len(entries)
            assert segment.positions_of(head).tolist() == [p for p, _ in entries]
            number = segment.k[head, :n, 0] + 251 * segment.k[head, :n, 1]
            assert number.int().tolist() == [s for _, s in entries]
            assert torch.equal(segment.v[head, :n], -segment.k[head, :n])
            assert bool((segment.k[head, :n, 2] == layer).all())

    @invariant()
    def entries_are_what_they_should_be(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.length == self.position
        for layer, wanted in enumerate(self.want):
            assert self.store.lengths(layer) == [len(entries) for entries in wanted]
            self.same(self.store.decoded(layer), wanted, layer)
            at = [0] * self.heads
            for segment in self.store.segments(layer):
                for tile in segment.tiles(70):
                    ends = [a + n for a, n in zip(at, tile.lengths.tolist(), strict=True)]
                    self.same(tile, [w[a:b] for w, a, b in zip(wanted, at, ends, strict=True)], layer)
                    at = ends
                if segment.codec != "raw":
                    assert all(n % ENTRIES == 0 for n in segment.lengths.tolist())

    @invariant()
    def bytes_are_what_the_kernel_says(self) -> None:
        if not hasattr(self, "store"):
            return
        for state in self.store._layers:
            for run in state.owned():
                for arena, _ in run._tables():
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
        del CODECS["mirror"]


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
