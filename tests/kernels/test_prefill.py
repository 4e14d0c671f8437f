"""The native prefill kernel against the reference, on every instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.many_queries import (
    BF16,
    F32,
    ISAS,
    halves,
    make,
    on_every_isa,
    one_thread,
    poisoned,
    strided,
)
from tests.kernels.tolerances import LOG_SUM_EXP, OUTPUT
from winnow.kernels import merge
from winnow.kernels.prefill import native, prefill, reference
from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Stripes, Window

DENSE = Dense()
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")
__all__ = ["poisoned"]  # a fixture


def random_lists(heads: int, lists: int, limit: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Offsets and columns of random ascending lists, some of them empty."""
    g = torch.Generator().manual_seed(seed)
    picked = torch.rand(heads, lists, limit, generator=g) < density
    picked[0, 0] = False
    counts = picked.sum(-1)
    # Head n's offsets continue where head n - 1 stopped.
    ends = counts.flatten().cumsum(0).view(heads, lists)
    offsets = torch.cat([ends[:, :1] - counts[:, :1], ends], 1).to(torch.int32)
    return offsets, picked.nonzero()[:, 2].to(torch.int32)


def blocks(T: int, heads: int, S: int, block: int, density: float = 0.5) -> Blocks:
    offsets, columns = random_lists(heads, -(-T // block), -(-S // block), density)
    return Blocks(block=block, offsets=offsets, columns=columns)


def stripes(
    T: int, heads: int, S: int, rows: int, phase: int, density: float = 0.3, seed: int = 0
) -> Stripes:
    offsets, columns = random_lists(heads, -(-(T + phase) // rows), S, density, seed)
    return Stripes(rows=rows, phase=phase, offsets=offsets, columns=columns)


def compare(
    q: Tensor,
    segment: Segment,
    positions: Tensor,
    form: Form = DENSE,
    *,
    row_max: bool = False,
    **spec: Any,
) -> Partial:
    """Native against the float32 reference of the same operands, on every instruction set.

    Returns the result of the best set.
    """
    attention = AttentionSpec(**{"scale": q.shape[-1] ** -0.5, **spec})
    exact = replace(segment, k=segment.k.float(), v=segment.v.float())
    with one_thread():
        want = reference.prefill(q.float(), exact, attention, positions, form, row_max)
    results = on_every_isa(
        lambda: prefill(
            q,
            segment,
            spec=attention,
            query_positions=positions,
            form=form,
            want_row_max=row_max,
            backend="native",
        ),
        q,
        segment.k,
        segment.v,
        positions,
    )
    for name, got in results:
        assert got.pairs == want.pairs, name
        assert got.out.dtype == q.dtype
        assert (got.row_max is not None) == row_max
        say = partial("on {}: {}".format, name)
        rtol, atol = OUTPUT[q.dtype]
        torch.testing.assert_close(got.out.float(), want.out, rtol=rtol, atol=atol, msg=say)
        rtol, atol = LOG_SUM_EXP[q.dtype]
        torch.testing.assert_close(got.lse, want.lse, rtol=rtol, atol=atol, msg=say)
        if got.row_max is not None:
            torch.testing.assert_close(got.row_max, want.row_max, rtol=rtol, atol=atol, msg=say)
    return results[0][1]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128, 256])
def test_head_sizes(dtype: torch.dtype, D: int) -> None:
    compare(*make(71, [300, 131], D=D, dtype=dtype), row_max=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("G", [1, 3, 4, 16])
@pytest.mark.parametrize("T", [1, 2, 7, 63, 130])
def test_groups_and_lengths(dtype: torch.dtype, G: int, T: int) -> None:
    compare(*make(T, [T, max(T - 1, 0), T + 90], G=G, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_long_rows_cross_many_tiles(dtype: torch.dtype) -> None:
    compare(*make(1000, [1000], D=64, dtype=dtype))
    compare(*make(9, [3001, 2999], D=64, dtype=dtype), row_max=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("gaps", [False, True])
def test_positions_window_softcap_bias(dtype: torch.dtype, gaps: bool) -> None:
    case = make(90, [333, 0, 17, 256], dtype=dtype, start=11, gaps=gaps)
    compare(*case)
    compare(*case, window=40)
    compare(*case, softcap=2.0, row_max=True)
    biased = make(90, [333, 0, 17, 256], dtype=dtype, start=11, gaps=gaps, bias=True)
    compare(*biased, row_max=True)
    compare(*biased, Window(init=20, local=50), softcap=3.0, window=100)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "form", [Window(init=4, local=64), Window(init=0, local=1), Window(init=70, local=33)]
)
@pytest.mark.parametrize("gaps", [False, True])
def test_window(dtype: torch.dtype, form: Window, gaps: bool) -> None:
    compare(*make(200, [200, 333, 90], dtype=dtype, gaps=gaps), form)
    compare(*make(600, [600], dtype=dtype, gaps=gaps), form, window=150)
    compare(*make(20, [1200, 40], dtype=dtype, gaps=gaps), form, row_max=True)


@pytest.mark.parametrize("local", [32, 64, 160])
def test_aligned_window(local: int) -> None:
    for T, lengths in ((150, [150, 301]), (40, [700, 9])):
        compare(*make(T, lengths), Window(init=5, local=local, align=32))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("block", [16, 24, 64, 128])
@pytest.mark.parametrize("T", [40, 300])
def test_blocks(dtype: torch.dtype, block: int, T: int) -> None:
    lengths = [300, 289]
    form = blocks(T, 4, min(lengths), block)
    compare(*make(T, lengths, dtype=dtype), form, row_max=True)
    compare(*make(T, lengths, dtype=dtype, gaps=True, bias=True), form, window=200)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "phase"), [(64, 0), (64, 40), (1000, 7), (1, 0)])
def test_stripes(dtype: torch.dtype, rows: int, phase: int) -> None:
    T, lengths = 130, [400, 391]
    form = stripes(T, 4, min(lengths), rows, phase)
    compare(*make(T, lengths, dtype=dtype), form, row_max=True)
    compare(*make(T, lengths, dtype=dtype, gaps=True, bias=True), form, softcap=5.0)


def test_stripes_longer_than_an_item() -> None:
    compare(*make(1300, [1300], dtype=BF16), stripes(1300, 2, 1300, 1024, 100, density=0.1))


def test_everything_listed_equals_dense() -> None:
    case = make(200, [200, 200], dtype=BF16)
    dense = compare(*case)
    listed = compare(*case, blocks(200, 4, 200, 64, density=2.0))  # head 0's first list is left empty
    torch.testing.assert_close(listed.out[64:], dense.out[64:], rtol=0, atol=1e-2)
    assert not listed.out[:64, 0].any()
    wide = compare(*case, Window(init=0, local=200))
    torch.testing.assert_close(wide.out, dense.out, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    q, segment, positions = make(40, [60, 0], dtype=dtype, start=100)
    got = compare(q, segment, positions - 80, row_max=True)  # queries at 40 .. 79: before the segment
    assert got.pairs == 0
    assert not got.out.any()
    assert torch.isneginf(got.lse).all()
    compare(q, segment, positions - 30)  # some rows before, some inside
    far = compare(q, segment, positions + 500, window=100)  # the segment has left the model's window
    assert far.pairs == 0


def test_queries_far_behind_the_segment() -> None:
    compare(*make(33, [500, 100], ahead=1000), Window(init=30, local=700))


def test_no_queries(isa: str) -> None:
    q, segment, positions = make(4, [9])
    got = native.prefill(q[:0], segment, AttentionSpec(scale=1.0), positions[:0], Dense(), False)
    assert got.out.shape == (0, 2, 32)
    assert got.pairs == 0


def test_strided_operands() -> None:
    q, segment, positions = make(50, [140, 77], dtype=BF16)
    got = compare(*strided(q, segment), positions)
    torch.testing.assert_close(got.out, compare(q, segment, positions).out, rtol=0, atol=0)


@pytest.mark.parametrize("row_max", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rising_and_huge_logits(dtype: torch.dtype, row_max: bool) -> None:
    """The reference exponent must follow a maximum that keeps growing, and survive large logits.

    Where nobody asks for maxima, full tiles are weighed before they are looked at.
    """
    q, segment, positions = make(300, [900], D=64, dtype=dtype)
    ramp = torch.linspace(0.1, 3, 905)[None, :, None]
    rising = replace(segment, k=(q[:1, :1].float() * ramp).to(dtype).contiguous())
    rising.k[:, 900:] = torch.nan
    compare(q * 0 + q[:1], rising, positions, scale=1.0 if dtype == BF16 else 0.25, row_max=row_max)
    compare(-(q * 0 + q[:1]), rising, positions, scale=0.25, row_max=row_max)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("tokens", "bad"), [(50, 30), (1500, 30), (1500, 900)])
def test_nan_entries_stay_visible(isa: str, dtype: torch.dtype, tokens: int, bad: int) -> None:
    """Memory behind the lengths is ignored; a NaN inside them is the caller's and must not be hidden."""
    q, segment, positions = make(tokens, [tokens], dtype=dtype)
    segment.k[0, bad, 3] = torch.nan
    got = native.prefill(q, segment, AttentionSpec(scale=0.2), positions, Dense(), False)
    assert got.out[positions >= bad].isnan().all()
    assert not got.out[positions < bad].isnan().any()


@pytest.mark.parametrize("at", [100, 700, 1300])
def test_one_entry_towers_over_a_tile_that_was_weighed_already(at: int) -> None:
    q, segment, positions = make(1500, [1500], D=64, dtype=BF16)
    segment.k[0, at] = 12 * q[1400, 0]
    compare(q, segment, positions)


def test_poisoned_outputs_are_overwritten(isa: str, poisoned: None) -> None:
    q, segment, positions = make(70, [60, 0], dtype=BF16, start=40)
    got = native.prefill(q, segment, AttentionSpec(scale=0.2), positions - 20, Dense(), True)
    assert got.row_max is not None
    for x in (got.out, got.lse, got.row_max):
        assert not x.isnan().any()


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 70),
    S=st.integers(2, 300),
    cut=st.integers(1, 299),
    G=st.integers(1, 5),
    dtype=st.sampled_from([F32, BF16]),
    gaps=st.booleans(),
    window=st.none() | st.integers(1, 200),
)
def test_two_segments_merge_to_one(
    T: int, S: int, cut: int, G: int, dtype: torch.dtype, gaps: bool, window: int | None
) -> None:
    cut = min(cut, S - 1)
    q, whole, positions = make(T, [S], G=G, dtype=dtype, gaps=gaps)
    spec = AttentionSpec(scale=0.2, window=window)
    one = native.prefill(q, whole, spec, positions, Dense(), False)
    parts = [native.prefill(q, part, spec, positions, Dense(), False) for part in halves(whole, cut)]
    merged = merge.merge(parts)
    assert merged.pairs == one.pairs
    rtol, atol = OUTPUT[dtype]
    torch.testing.assert_close(merged.out.float(), one.out.float(), rtol=rtol, atol=atol)
    rtol, atol = LOG_SUM_EXP[dtype]
    torch.testing.assert_close(merged.lse, one.lse, rtol=rtol, atol=atol)


def test_lists_out_of_order_are_refused() -> None:
    q, segment, positions = make(64, [128], G=1)
    for bad in ([1, 1], [1, 0], [-1, 0]):
        form = Blocks(
            block=64,
            offsets=torch.tensor([[0, 2]], dtype=torch.int32),
            columns=torch.tensor(bad, dtype=torch.int32),
        )
        with pytest.raises(ValueError, match="ascending"):
            prefill(
                q,
                segment,
                spec=AttentionSpec(scale=1.0),
                query_positions=positions,
                form=form,
                backend="native",
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"D": 24}, "multiples of 16"),
        ({"scale": -1.0}, "scale"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    q, segment, positions = make(4, [9], D=change.get("D", 32), dtype=change.get("dtype", F32))
    spec = AttentionSpec(scale=change.get("scale", 1.0))
    with pytest.raises(ValueError, match=message):
        prefill(q, segment, spec=spec, query_positions=positions, backend="native")
    assert (
        prefill(q, segment, spec=spec, query_positions=positions).pairs
        == reference.prefill(q, segment, spec, positions, Dense(), False).pairs
    )  # auto falls back to the reference, and says so


def test_contradicting_shapes_are_refused() -> None:
    q, segment, positions = make(4, [9])
    spec = AttentionSpec(scale=1.0)
    with pytest.raises(ValueError, match="query_positions"):
        prefill(q, segment, spec=spec, query_positions=positions.long(), backend="native")
    too_long = replace(segment, lengths=torch.tensor([99], dtype=torch.int32))
    with pytest.raises(ValueError, match="lengths"):
        prefill(q, too_long, spec=spec, query_positions=positions, backend="native")
    with pytest.raises(ValueError, match="go together"):
        prefill(q[..., :16], segment, spec=spec, query_positions=positions, backend="native")
