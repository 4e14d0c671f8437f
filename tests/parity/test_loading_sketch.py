"""Sketch: the codes lead to nearly the true top-k, and what is read is attended exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from winnow.kernels.decode import decode
from winnow.loading.protocol import DecodeLayer
from winnow.loading.sketch import Sketch
from winnow.types import AttentionSpec, Segment

HEADS, GROUP, SIZE = 2, 4, 64
SPEC = AttentionSpec(scale=SIZE**-0.5)


def entries(length: int, capacity: int = 4000, seed: int = 0) -> Segment:
    make = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(HEADS, capacity, SIZE, generator=make) for _ in "kv")
    return Segment(k=k, v=v, lengths=torch.full((HEADS,), length, dtype=torch.int32))


def queries(seed: int) -> torch.Tensor:
    return 2 * torch.randn(HEADS * GROUP, SIZE, generator=torch.Generator().manual_seed(seed))


def select(part, state, segment, q, *, layer=0, layers=1):
    n = int(segment.lengths.max())
    ctx = DecodeLayer(layer=layer, layers=layers, q=q, position=n - 1, segments=(segment,), spec=SPEC)
    return part.select(ctx, state)


def listed(view, h: int) -> set[int]:
    chosen = view.selections[0]
    return set(chosen.indices[h, : int(chosen.counts[h])].tolist())


@pytest.mark.parametrize(("bits", "recall"), [(8, 0.97), (4, 0.85)])
def test_recall_of_the_true_top_k(bits, recall):
    segment, q = entries(3000), queries(1)
    part = Sketch(keep=200, bits=bits, recent=1, sinks=0)
    view = select(part, part.state(), segment, q)
    for h in range(HEADS):
        exact = (q[h * GROUP : (h + 1) * GROUP] @ segment.k[h, :3000].T).amax(0)
        true = set(exact.topk(200).indices.tolist())
        assert len(true & listed(view, h)) >= recall * 200


def test_sinks_and_recent_entries_are_always_read():
    segment, part = entries(1000), Sketch(keep=100, recent=30, sinks=5)
    view = select(part, part.state(), segment, queries(2))
    for h in range(HEADS):
        assert set(range(5)) | set(range(970, 1000)) <= listed(view, h)
        assert len(listed(view, h)) == 100


def test_codes_grow_with_the_entries_and_follow_their_version():
    part, q = Sketch(keep=50, recent=4), queries(3)
    state, whole = part.state(), entries(2500)
    for n in (900, 901, 1024, 1025, 2500):
        segment = dataclasses.replace(whole, lengths=torch.full((HEADS,), n, dtype=torch.int32))
        grown, fresh = select(part, state, segment, q), select(part, part.state(), segment, q)
        assert [listed(grown, h) for h in range(HEADS)] == [listed(fresh, h) for h in range(HEADS)]
    other = dataclasses.replace(entries(2500, seed=9), version=1)
    grown, fresh = select(part, state, other, q), select(part, part.state(), other, q)
    assert [listed(grown, h) for h in range(HEADS)] == [listed(fresh, h) for h in range(HEADS)]
    # A rollback shortens a segment; the codes behind its end must not survive.
    shorter = dataclasses.replace(entries(800, seed=4), version=1)
    select(part, state, shorter, q)
    longer = dataclasses.replace(entries(1500, seed=4), version=1)
    assert listed(select(part, state, longer, q), 0) == listed(select(part, part.state(), longer, q), 0)


def test_bytes_are_those_of_the_codes():
    part, segment = Sketch(keep=50, bits=4, recent=4), entries(2048)
    state = part.state()
    view = select(part, state, segment, queries(5))
    per_entry = SIZE // 2 + 4
    assert view.scanned == 2048 * HEADS * per_entry
    assert part.state_bytes(state) == view.scanned  # 2048 entries fill their reserve


def test_nothing_is_copied_while_everything_is_read():
    part, state = Sketch(keep=100, recent=4), None
    state = part.state()
    view = select(part, state, entries(100), queries(6))
    assert view.selections is None
    assert view.scanned == part.state_bytes(state) == 0


def test_layers_between_read_the_same_positions_and_scan_nothing():
    part = Sketch(keep=60, recent=4, every=3)
    state, q = part.state(), queries(7)
    views = [select(part, state, entries(700, seed=n), q, layer=n, layers=5) for n in range(5)]
    assert [view.scanned > 0 for view in views] == [True, False, False, True, False]
    assert listed(views[0], 0) == listed(views[1], 0) == listed(views[2], 0) != listed(views[3], 0)
    assert set(state.copies) == {0, 3}


def test_bias_counts_in_the_choice():
    part, segment, q = Sketch(keep=20, recent=2, sinks=0), entries(500), queries(8)
    bias = torch.zeros(HEADS, segment.k.shape[1])
    bias[:, 123] = 50.0
    biased = dataclasses.replace(segment, bias=bias)
    assert 123 in listed(select(part, part.state(), biased, q), 0)
    view = select(part, part.state(), biased, q)
    out = decode(q, biased, spec=SPEC, position=499, selection=view.selections[0]).out[0]
    torch.testing.assert_close(out[0], segment.v[0, 123], atol=1e-3, rtol=0)


@pytest.mark.parametrize("keep", [68, 0, 10])
def test_a_budget_without_room_is_refused(keep):
    with pytest.raises(ValueError):
        Sketch(keep=keep)
