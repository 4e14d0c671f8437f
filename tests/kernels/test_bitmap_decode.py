"""Decode attention over packed rows: every implementation against the reference, and the form itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.kernels import backend
from winnow.kernels.bitmap_decode import bitmap_decode, expand, pack
from winnow.kernels.decode import decode
from winnow.types import AttentionSpec, Segment, Selection

NATIVE = pytest.mark.skipif(backend.extension() is None, reason="no native kernels")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def layer(lengths, *, group=4, size=64, kept=32, dtype=torch.bfloat16, seed=0):
    """Packed rows with NaN behind every head's end, queries, and the same rows expanded."""
    make = torch.Generator().manual_seed(seed)
    heads, capacity = len(lengths), max(lengths) + 3
    q = torch.randn(heads * group, size, generator=make).to(dtype)
    packed, masks, wide = [], [], []
    for _ in range(2):
        values, mask = pack(torch.randn(heads, capacity, size, generator=make).to(dtype), kept)
        for h, n in enumerate(lengths):
            values[h, n:] = torch.nan
            mask[h, n:] = 255
        packed.append(values)
        masks.append(mask)
        wide.append(expand(values, mask))
    lengths = torch.tensor(lengths, dtype=torch.int32)
    segment = Segment(k=packed[0], v=packed[1], lengths=lengths, start=7)
    dense = Segment(k=wide[0], v=wide[1], lengths=lengths, start=7)
    return q, segment, (masks[0], masks[1]), dense


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("size", "kept"), [(64, 32), (64, 1), (64, 64), (128, 39), (16, 5), (80, 40)])
@pytest.mark.parametrize("lengths", [[1, 1], [63, 5], [1000, 777]])
def test_native_equals_the_reference(isa, dtype, size, kept, lengths):
    q, segment, masks, _ = layer(lengths, size=size, kept=kept, dtype=dtype)
    spec = AttentionSpec(scale=size**-0.5)
    ours, oracle = (
        bitmap_decode(q, segment, masks, spec=spec, position=2000, want_logits=True, backend=of)
        for of in ("native", "reference")
    )
    assert ours.pairs == oracle.pairs == 4 * sum(lengths)
    torch.testing.assert_close(ours.out.float(), oracle.out.float(), atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(ours.lse, oracle.lse, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.logits, oracle.logits, atol=TOLERANCE[dtype], rtol=1e-2)


@NATIVE
@pytest.mark.parametrize("page", [1, 16])
def test_lists_windows_positions_bias_and_softcap(isa, page):
    q, segment, masks, _ = layer([300, 220])
    positions = torch.arange(310, dtype=torch.int32)[None].repeat(2, 1)[:, :303] * 3
    bias = torch.randn(2, 303, generator=torch.Generator().manual_seed(3))
    segment = Segment(
        k=segment.k, v=segment.v, lengths=segment.lengths, positions=positions.contiguous(), bias=bias
    )
    listed = torch.tensor([[0, 3, 7, 11], [1, 2, 8, 12]], dtype=torch.int32)
    selection = Selection(indices=listed, counts=torch.tensor([4, 3], dtype=torch.int32), page=page)
    spec = AttentionSpec(scale=0.125, window=700, softcap=20.0)
    ours, oracle = (
        bitmap_decode(q, segment, masks, spec=spec, position=880, selection=selection, backend=of)
        for of in ("native", "reference")
    )
    assert ours.pairs == oracle.pairs
    torch.testing.assert_close(ours.out.float(), oracle.out.float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("of", ["reference", pytest.param("native", marks=NATIVE)])
def test_equals_dense_attention_over_the_zeroed_rows(of):
    q, segment, masks, dense = layer([500, 400], dtype=torch.float32)
    spec = AttentionSpec(scale=0.125)
    ours = bitmap_decode(q, segment, masks, spec=spec, position=900, backend=of)
    theirs = decode(q, dense, spec=spec, position=900, backend="reference")
    torch.testing.assert_close(ours.out, theirs.out, atol=2e-5, rtol=0)


@given(st.integers(1, 8), st.integers(0, 5), st.data())
@settings(deadline=None, max_examples=60)
def test_packing_keeps_exactly_the_largest(width, rows, data):
    size = 8 * width
    kept = data.draw(st.integers(1, size))
    values = data.draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=size, max_size=size), min_size=rows, max_size=rows)
    )
    x = torch.tensor(values, dtype=torch.float32).view(rows, size)
    packed, mask = pack(x, kept)
    back = expand(packed, mask)
    for row, out, bits in zip(x.tolist(), back.tolist(), mask.tolist(), strict=True):
        order = sorted(range(size), key=lambda d: (-abs(row[d]), d))
        stays = set(order[:kept])
        assert out == [v if d in stays else 0.0 for d, v in enumerate(row)]
        assert {d for d in range(size) if bits[d // 8] >> (d % 8) & 1} == stays


def test_what_the_kernel_cannot_take_is_said():
    q, segment, masks, _ = layer([10, 10])
    wrong = (masks[0][:, :, :4], masks[1])
    with pytest.raises(ValueError, match="64 bits a row"):
        bitmap_decode(q, segment, wrong, spec=AttentionSpec(scale=1.0), position=99, backend="native")
