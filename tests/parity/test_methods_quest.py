"""Quest against the bound written out, page by page."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.kernels.decode import decode
from winnow.loading.page_bounds import PageBounds
from winnow.loading.protocol import DecodeLayer
from winnow.types import AttentionSpec, Segment

HEADS, GROUP, SIZE = 2, 3, 16
SPEC = AttentionSpec(scale=SIZE**-0.5)


def layer(length: int, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS * GROUP, SIZE, generator=make)
    k, v = (torch.randn(HEADS, length, SIZE, generator=make) for _ in range(2))
    return q, k, v


def context(q, k, v, length: int, number: int = 5) -> DecodeLayer:
    segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), length, dtype=torch.int32))
    return DecodeLayer(layer=number, layers=6, q=q, position=length - 1, segments=(segment,), spec=SPEC)


def bounds(q, k, page: int, length: int) -> list[list[float]]:
    """Per KV head the bound of every page: the largest over the query heads of its group."""
    out = []
    for h in range(HEADS):
        row = []
        for begin in range(0, length, page):
            keys = k[h, begin : min(begin + page, length)]
            low, high = keys.min(0).values, keys.max(0).values
            row.append(
                max(
                    float(torch.maximum(q[n] * low, q[n] * high).sum())
                    for n in range(h * GROUP, (h + 1) * GROUP)
                )
            )
        out.append(row)
    return out


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("length", [60, 64, 97])
def test_reads_the_pages_with_the_largest_bounds(page, length):
    q, k, v = layer(length)
    part = PageBounds(keep=6 * page, page=page, dense_layers=0)
    if part.pages * page >= length:
        pytest.skip("the budget holds everything")
    view = part.select(context(q, k, v, length), part.state())
    (selection,) = view.selections
    assert selection.page == page
    for h, row in enumerate(bounds(q, k, page, length)):
        last = len(row) - 1
        best = sorted(range(last), key=row.__getitem__, reverse=True)[: part.pages - 1]
        assert selection.indices[h, : int(selection.counts[h])].tolist() == [*sorted(best), last]
    pages = -(-length // page)
    assert view.scanned == pages * HEADS * 2 * SIZE * 4


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_the_bound_is_one(length, page, seed):
    q, k, _ = layer(length, seed)
    for h, row in enumerate(bounds(q, k, page, length)):
        for number, bound in enumerate(row):
            keys = k[h, number * page : (number + 1) * page]
            assert bound >= float((q[h * GROUP : (h + 1) * GROUP] @ keys.T).max()) - 1e-4


def test_the_growing_page_is_followed():
    q, k, v = layer(200)
    part = PageBounds(keep=24, page=8, dense_layers=0)
    state = part.state()
    for length in range(100, 200):
        stepwise = part.select(context(q, k, v, length), state).selections[0]
        fresh = part.select(context(q, k, v, length), part.state()).selections[0]
        assert torch.equal(stepwise.indices, fresh.indices), length


def test_a_changed_segment_is_bounded_anew():
    q, k, v = layer(120)
    part = PageBounds(keep=24, page=8, dense_layers=0)
    state = part.state()
    part.select(context(q, k, v, 120), state)
    other = Segment(k=k.flip(1), v=v.flip(1), lengths=torch.full((HEADS,), 120, dtype=torch.int32), version=1)
    ctx = DecodeLayer(layer=5, layers=6, q=q, position=119, segments=(other,), spec=SPEC)
    again = part.select(ctx, state).selections[0]
    assert torch.equal(again.indices, part.select(ctx, part.state()).selections[0].indices)


def test_pages_of_one_entry_are_the_exact_top():
    q, k, v = layer(90)
    part = PageBounds(keep=10, page=1, dense_layers=0)
    ctx = context(q, k, v, 90)
    view = part.select(ctx, part.state())
    logits = (q.view(HEADS, GROUP, SIZE) @ k.transpose(1, 2)).amax(1)
    for h in range(HEADS):
        exact = {*logits[h, :89].topk(9).indices.tolist(), 89}
        assert set(view.selections[0].indices[h].tolist()) == exact
    out = decode(q, ctx.segments[0], spec=SPEC, position=89, selection=view.selections[0])
    assert out.pairs == 10 * HEADS * GROUP


def test_first_layers_and_small_caches_are_read_whole():
    q, k, v = layer(90)
    part = PageBounds(keep=24, page=8)
    assert part.select(context(q, k, v, 90, number=1), part.state()).selections is None
    assert part.select(context(q, k, v, 24), part.state()).selections is None
    assert part.select(context(q, k, v, 25), part.state()).selections is not None
